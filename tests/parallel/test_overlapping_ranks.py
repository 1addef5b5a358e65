"""Two ranks under overlap scheduling: plain decoding's texts, no pass without overlap, and the same rounds in both."""

from functools import partial

import pytest
from matrix import sampled
from overlapping_ranks import OPTIONS, Overlapped, asked, play_overlapping
from ranks_at_work import on_ranks
from reference import Comparison, ReferenceTarget
from tensor_parallel import RANKS, Checkpoints, Outputs, go_wild, play_plain

SESSIONS = {"enable_session_radix_cache": True}
MASKS = "whiflash_sglang/engine/forward/masks.py"


@pytest.fixture(scope="module")
def texts(checkpoints: Checkpoints) -> Outputs:
    """Plain decoding's with two ranks, without overlap."""
    first, second = on_ranks(RANKS, partial(play_plain, checkpoints, asked(), **SESSIONS, **OPTIONS))
    assert first == second
    return dict(first)


@pytest.mark.parametrize("router", sampled(["random", "auto"], "random"))
def test_text_is_plain_decodings(checkpoints: Checkpoints, texts: Outputs, router: str) -> None:
    """Greedy, sampled and under grammars, with aborts, retractions, a preview and tasks; the second rank's clocks say
    nothing.

    SGLang samples retracted requests again, in plain decoding, too.
    """
    found: list[Overlapped] = on_ranks(
        RANKS, partial(play_overlapping, checkpoints, router, texts, go_wild, **SESSIONS)
    )
    first, second = (each.played for each in found)
    for number, (one, other) in enumerate(zip(first.rounds, second.rounds, strict=True)):
        assert one == other, f"round {number} of {len(first.rounds)}"
    assert first.outputs == second.outputs
    comparison, compared = Comparison(ReferenceTarget(checkpoints.target)), set[str]()
    for a in asked():
        text = first.outputs[a.rid]
        expected = texts[a.rid] if a.abort_after is None else texts[a.rid][: len(text)]
        if "temperature" not in a.params:
            comparison.check(a.prompt, expected, text, a.rid)
        elif a.rid not in found[0].retracted:
            compared.add(a.rid)
            assert text == expected, a.rid
    (cached,), (tried, other, again, _, alone) = first.outputs["cached"], first.outputs["rounds"]
    assert all(first.outputs[rid] == texts[rid] for rid in texts.keys() - {a.rid for a in asked()})
    assert (cached, again < tried / 2, other) == (96, True, alone), "another tenant finds nothing"
    print(comparison.summary(), {each.passes: each.apart for each in found})
    assert compared
    assert first.retracted
    assert first.accepted
    assert router == "auto" or first.arms >= {"ar", "diffusion", "lookup", "oracle", "none"}
    for each in found:
        assert each.passes > 30
        assert each.apart == 0
        assert not each.races
        assert all(site.startswith(f"waits_of_host: {MASKS}") for site in each.waits), each.waits
