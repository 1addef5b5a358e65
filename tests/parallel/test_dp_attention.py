"""DP attention on two ranks: each answers its own requests as plain decoding does, beside an idle rank, too."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from dp_attention import (
    EXPERTS,
    HEAD,
    PENALTIES,
    SEEDS,
    alike,
    asked,
    play_overlapped,
    play_plain,
    play_replayed,
    play_shares,
    stays_away,
)
from families import FAMILIES, tiny_family
from matrix import sampled
from ranks_at_work import RankFailedError, on_ranks
from reference import Comparison
from server_host import ServerHost
from tensor_parallel import ENDS_AT_ONCE, RANKS, Checkpoints, Outputs, Played
from test_data_parallel import assert_both_count_and_forget, assert_policies_keep_texts
from tiny_models import save_tokenizer
from traffic import Arrival

Made = tuple[Any, Checkpoints]
"""A target's model, and files of it and its drafters."""


def made(root: Path, family: str) -> Made:
    target = root / "target"
    model = tiny_family(target, FAMILIES[family])
    save_tokenizer(target)
    return model, Checkpoints.of(root, target)


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A target whose experts the ranks share."""
    return made(tmp_path_factory.mktemp("dp-attention"), "Qwen3MoeForCausalLM")


@pytest.fixture(scope="module")
def plain(moe: Made) -> Sequence[Outputs]:
    """Plain decoding's texts, of each rank."""
    return on_ranks(RANKS, partial(play_plain, moe[1], asked()))


def check(model: Any, plain: Sequence[Outputs], played: Sequence[Played]) -> None:
    comparison = Comparison(model)
    for share, expected, found in zip(asked(), plain, played, strict=True):
        for a in share:
            text = found.outputs[a.rid]
            whole = expected[a.rid] if a.abort_after is None else expected[a.rid][: len(text)]
            if a.params.keys() & PENALTIES.keys():
                assert text == whole, a.rid
            else:
                comparison.check(a.prompt, whole, text, a.rid)
    print(comparison.summary(), [len(each.rounds) for each in played])


@pytest.mark.parametrize(
    ("router", "arguments"),
    sampled(
        [(router, more) for router in ("random", "auto") for more in ({"retract": 2}, HEAD, EXPERTS)],
        ("random", {"retract": 2}),  # `HEAD` is in `test_all_ranks_replay_the_same_graph`
    ),
)
def test_text_is_plain_decodings(moe: Made, plain: Sequence[Outputs], router: str, arguments: dict[str, Any]) -> None:
    """Greedy, penalised and under grammars, with log-probabilities, an abort and retractions."""
    model, checkpoints = moe
    work = partial(play_shares, checkpoints, router, asked(), plain, alike, **arguments)
    first, second = played = on_ranks(RANKS, work)
    check(model, plain, played)
    assert first.retracted or "retract" not in arguments
    assert all(each.accepted for each in played)
    # The second rank had nothing for most of the rounds of the first.
    assert 0 < len(second.rounds) < len(first.rounds)
    if router == "random":
        assert first.arms >= {"ar", "diffusion", "lookup", "oracle", "none"}


@pytest.mark.evidence
@pytest.mark.parametrize(
    ("family", "arguments"),
    [("Qwen3NextForCausalLM", {}), ("Glm4MoeForCausalLM", HEAD), ("DeepseekV3ForCausalLM", EXPERTS)],
)
def test_families(tmp_path: Path, family: str, arguments: dict[str, Any]) -> None:
    """A recurrent state, dense layers before experts, and latent attention with experts of their own."""
    model, checkpoints = made(tmp_path, family)
    plain = on_ranks(RANKS, partial(play_plain, checkpoints, asked(), **arguments))
    played = on_ranks(RANKS, partial(play_shares, checkpoints, "random", asked(), plain, alike, **arguments))
    check(model, plain, played)
    assert all(each.accepted for each in played)


@pytest.mark.evidence
def test_seeded_sampling(moe: Made) -> None:
    """Noise is keyed by seed and position. None has a top-p: SGLang keys the noise of all by rank then."""
    drawn = [{"max_new_tokens": 24, "temperature": 1.0, "sampling_seed": seed} for seed in range(8)]
    arrivals = [Arrival(f"s{i}", 3 * i, tuple(range(100 + i, 130)), each) for i, each in enumerate(drawn)]
    shares = [arrivals[:6], arrivals[6:]]
    plain = on_ranks(RANKS, partial(play_plain, moe[1], shares, **SEEDS))
    played = on_ranks(RANKS, partial(play_shares, moe[1], "random", shares, plain, alike, **SEEDS))
    assert [each.outputs for each in played] == plain
    assert all(each.accepted for each in played)


def test_all_ranks_replay_the_same_graph(tmp_path: Path) -> None:
    """Also one without a request."""
    model, dense = made(tmp_path, "Qwen3ForCausalLM")
    plain = on_ranks(RANKS, partial(play_plain, dense, asked(), **HEAD))
    (first, replayed), (second, again) = on_ranks(RANKS, partial(play_replayed, dense, asked(), plain))
    check(model, plain, [first, second])
    assert replayed == again
    assert len(replayed) > max(len(first.rounds), len(second.rounds))
    assert len(set(replayed)) > 3


@pytest.mark.evidence
def test_no_pass_is_without_overlap(moe: Made, plain: Sequence[Outputs]) -> None:
    found = on_ranks(RANKS, partial(play_overlapped, moe[1], asked(), plain))
    check(moe[0], plain, [each.played for each in found])
    for each in found:
        assert each.passes
        assert each.apart == 0
        assert not each.races
        assert all("engine/forward/masks.py" in site for site in each.waits), each.waits


@pytest.mark.evidence
def test_an_idle_rank_that_stays_away_is_found(moe: Made, plain: Sequence[Outputs]) -> None:
    with pytest.raises(RankFailedError):
        on_ranks(RANKS, partial(play_shares, moe[1], "none", asked(), plain, stays_away))


@pytest.mark.evidence
@pytest.mark.server
def test_a_server_of_two_ranks(host: ServerHost, moe: Made) -> None:
    """Both draft, answer controls and count for themselves, and one answers while the other has nothing to do."""
    flags = ("--tp-size", "2", "--dp-size", "2", "--enable-dp-attention", "--enable-session-radix-cache")
    with host.running(*moe[1].served("none"), *flags, env=ENDS_AT_ONCE) as server:
        assert_policies_keep_texts(server)
        before = server.get("/whiflash/state")["replicas"]
        assert [own["replica"] for own in before] == [0, 1]
        server.generate(input_ids=[1, 2, 3], sampling_params={"max_new_tokens": 24}, session_id="two")
        assert not server.get("/whiflash/capabilities")["previews"]
        after = server.get("/whiflash/state")["replicas"]
        assert after[0]["rounds"] == before[0]["rounds"]
        assert after[1]["rounds"] > before[1]["rounds"]
        assert_both_count_and_forget(server)
