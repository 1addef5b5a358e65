"""Turns in a session or without one: text is plain decoding's, and so is what the next turn inherits or has cached."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
from engine import Engine, engine
from matrix import chosen
from model_set import Models
from oracle_arm import OracleArm
from overlap import overlapped
from sglang.srt.session.session_controller import SessionReqNode
from trees import assert_tree_is_true, close

from whiflash_sglang.drafts.candidates import common_prefix
from whiflash_sglang.engine.scheduler.releases import clear_turns
from whiflash_sglang.prices.costs import FULL_LENGTH, Costs

OPTIONS: dict[str, Any] = {
    "max_running_requests": 16,  # between its turns a streaming session keeps its place
    "enable_streaming_session": True,
    "skip_tokenizer_init": False,
}
ENDS: dict[str, dict[str, Any]] = {
    "length": {},
    "tokens": {"ignore_eos": False, "stop_token_ids": [70, 73, 76, 79]},
    "strings": {"stop": ["E", "I", "N"]},
}
"""Ends of a turn. Stop tokens and strings are in the middle of most blocks."""

TURNS = 4


@dataclass(frozen=True)
class Session:
    """A session: what each of its turns adds, and what ends them."""

    name: str
    streaming: bool
    params: dict[str, Any]
    turns: list[list[int]]


def sessions() -> list[Session]:
    rng = random.Random(11)
    return [
        Session(
            f"{'streaming' if streaming else 'ordinary'}-{end}-{i}",
            streaming,
            params,
            [rng.choices(range(32, 127), k=rng.randint(3, 24)) for _ in range(TURNS)],
        )
        for i in range(2)
        for streaming in (True, False)
        for end, params in ENDS.items()
    ]


Asked = list[tuple[list[int], list[int]]]
Texts = dict[str, Asked]
"""Per session and turn: the whole prompt as the engine saw it, and the output."""


def converse(e: Engine, talks: Sequence[Session], check: Any = lambda _: None) -> Texts:
    """All sessions at once, turn by turn, each turn when the session's last one has ended."""
    for talk in talks:
        e.open_session(talk.name, streaming=talk.streaming)
    found: Texts = {talk.name: [] for talk in talks}
    for turn in range(TURNS):
        for talk in talks:
            session = {"id": talk.name}
            if turn and not talk.streaming:
                session["rid"] = f"{talk.name}/{turn - 1}"
            params = {"max_new_tokens": 24, **talk.params, "session": session}
            e.submit(f"{talk.name}/{turn}", talk.turns[turn], **params)
        for talk in talks:  # later turns share the arrays of earlier ones and extend them
            req = e.requests[f"{talk.name}/{turn}"]
            found[talk.name].append((list(req.origin_input_ids), []))
        e.run()
        check(e)
        for talk in talks:
            found[talk.name][-1][1].extend(e.output(f"{talk.name}/{turn}"))
    for talk in talks:
        e.close_session(talk.name)
    e.check_leaks()
    return found


@pytest.fixture(scope="module")
def plain_and_beyond(models: Models) -> tuple[Texts, Asked]:
    """Plain decoding's answers, and those that it would give if nothing stopped it: drafts lead past the stops."""
    with engine(models.target, **OPTIONS) as e:
        texts = converse(e, sessions())
        prompts = [prompt for turns in texts.values() for prompt, _ in turns]
        return texts, list(zip(prompts, e.generate(prompts, max_new_tokens=32), strict=True))


@pytest.fixture
def plain(plain_and_beyond: tuple[Texts, Asked]) -> Texts:
    return plain_and_beyond[0]


@pytest.fixture
def oracle(plain_and_beyond: tuple[Texts, Asked]) -> OracleArm:
    arm = OracleArm(0.95, alphabet=range(32, 127))
    for prompt, said in plain_and_beyond[1]:
        arm.learn(prompt, said)
    return arm


def test_turns_under_every_policy(
    models: Models, plain: Texts, oracle: OracleArm, request: pytest.FixtureRequest
) -> None:
    """And what a streaming session keeps: at every slot both drafters' KV is that of one pass."""
    checked: list[int] = []

    def check(e: Engine) -> None:
        for name, slot in e.scheduler.tree_cache.session.slots.items():
            [node] = e.scheduler.session_controller.get(name).req_nodes.values()
            tokens = [*node.req.origin_input_ids, *node.req.output_ids]
            kept = slot.kv.kv_committed_len
            assert kept == len(tokens) - 1, "the last token was never computed"
            slots = e.worker.target.slot_table[slot.kv.req_pool_idx, :kept].long()
            for arm, expected in models.reference.keys_values(tokens).items():
                kv = e.worker.drafters[arm].kv
                close(kv.k[:, slots], expected.k[:, :kept], f"k of {arm} in {name}")
                close(kv.v[:, slots], expected.v[:, :kept], f"v of {arm} in {name}")
            checked.append(kept)

    with engine(models.target, whiflash=models.whiflash("none"), arms=[oracle], **OPTIONS) as e:
        every = ("ar", "diffusion", "lookup", "auto", "none", "random")
        for router in chosen(request.config, every, "auto", "random"):
            e.start_over(router)
            e.requests.clear()
            assert converse(e, sessions(), check if router == "random" else lambda _: None) == plain
            assert not e.states
    assert max(oracle.accepted) == oracle.max_drafts
    assert len(checked) == TURNS * sum(talk.streaming for talk in sessions())


def test_turns_under_overlap(models: Models, plain: Texts, oracle: OracleArm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Costs, "worth", lambda _: FULL_LENGTH)
    talks = sessions()[: 2 * len(ENDS)]
    options = {"whiflash": models.whiflash("random"), "arms": [oracle], "host_lengths": False, **OPTIONS}
    with overlapped(models.target, **options) as e:
        assert converse(e, talks) == {talk.name: plain[talk.name] for talk in talks}
        assert not e.streams.races
        assert not e.states
    assert max(oracle.accepted) == oracle.max_drafts


@pytest.mark.parametrize("case", [{"page_size": 16, "chunked_prefill_size": 16}, {"max_total_tokens": 480}], ids=str)
def test_turns_in_pages_chunks_and_a_full_pool(
    models: Models, plain: Texts, oracle: OracleArm, case: dict[str, int]
) -> None:
    flags = models.whiflash("random")
    with engine(models.target, whiflash=flags, arms=[oracle], **{**OPTIONS, **case}) as e:
        talks = sessions() if "max_total_tokens" not in case else sessions()[:3]
        assert converse(e, talks) == {talk.name: plain[talk.name] for talk in talks}


def told(e: Engine) -> dict[str, tuple[list[int], int, list[int]]]:
    """Prompt, cached tokens and output of each turn; then all of a text is a prompt, and all but its end."""
    found, rng = dict[str, tuple[list[int], int, list[int]]](), random.Random(5)
    texts = {end: list[int]() for end in ENDS}
    for turn in [*map(str, range(TURNS)), "again", "fork"]:
        for end, text in texts.items():
            kept = len(text) - 9 * (turn == "fork")
            text[kept:] = rng.choices(range(32, 127), k=rng.randint(3, 40) * (turn != "again"))
            e.submit(f"{end}/{turn}", text, **{"max_new_tokens": 24, **ENDS[end]})
        e.run()
        for end, text in texts.items():
            said = e.output(rid := f"{end}/{turn}")
            found[rid] = list(text), e.requests[rid].cached_tokens, said
            text += said * turn.isdigit()
    e.check_leaks()
    return found


@pytest.mark.parametrize("page", [1, 16])
def test_a_turn_finds_as_many_tokens_cached_as_in_plain_decoding(models: Models, page: int) -> None:
    """All KV that was computed. At a fork EAGLE-3's last entry pairs a feature with the other text's token."""
    with engine(models.target, page_size=page, **OPTIONS) as e:
        plain = told(e)
    oracle = OracleArm(0.95, alphabet=range(32, 127))
    for prompt, _, said in plain.values():
        oracle.learn(prompt, said)
    flags: dict[str, Any] = {"whiflash": models.whiflash("random"), "arms": [oracle], "page_size": page}
    with engine(models.target, **flags, **OPTIONS) as e:
        found = told(e)
        assert_tree_is_true(e, models)
    assert max(oracle.accepted) == oracle.max_drafts
    assert plain["length/1"][1] == (len(plain["length/0"][0]) + 23) // page * page
    for rid, (prompt, cached, said) in plain.items():
        if rid.endswith("fork"):
            shared = common_prefix(prompt, plain[rid.replace("fork", "again")][0])
            cached = min(cached, (shared - 1) // page * page)
        assert found[rid] == (prompt, cached, said), rid


def test_a_turn_with_thousands_after_it_is_replaced() -> None:
    for replaced, left in (("0", {"0"}), (None, set())):
        turns: dict[str, Any] = {}
        for number in range(3000):
            req: Any = SimpleNamespace(rid=str(number), finished_reason=None)
            turns[req.rid] = SessionReqNode(req, turns.get(str(number - 1)))
        clear_turns(turns, replaced)
        assert set(turns) == left
