"""Agents' sessions that hold their KV (`--enable-session-radix-cache`) in a pool of half of what they need: every turn
finds as many tokens cached as in plain decoding under the same flags, and has its text.
"""

import random
from collections.abc import Callable
from typing import Any

import pytest
from engine import Engine, engine
from model_set import Models
from previewed import words
from trees import assert_tree_is_true, matched_slots

from whiflash_sglang.engine.scheduler import session_tree
from whiflash_sglang.engine.scheduler.session_tree import LINE, MARK

AGENTS, TURNS, SAID = 4, 6, 16
FLAGS: dict[str, Any] = {"enable_session_radix_cache": True, "max_total_tokens": 640}
CASES: dict[str, dict[str, Any]] = {
    "slots": {},
    "pages": {"page_size": 16, "max_total_tokens": 768},
    "chunks": {"chunked_prefill_size": 24},
    "host": {"enable_hierarchical_cache": True, "hicache_ratio": 1.5, "hicache_write_policy": "write_through"},
}
RESERVED = 32
"""Slots that a running request reserves for two rounds; plain decoding reserves none, so its pool has fewer."""
Turns = dict[str, tuple[int, list[int]]]
"""Cached tokens and text, by request."""


def work(e: Engine, beside: Callable[[Engine, int], object] = lambda *_: None) -> Turns:
    """Agents' turns one after the other, with strangers' prompts in between. beside: submits a turn's neighbours."""
    rng, texts, found = random.Random(5), {agent: list[int]() for agent in range(AGENTS)}, Turns()
    for turn in range(TURNS):
        for agent, text in texts.items():
            text += rng.choices(range(32, 127), k=rng.randint(12, 40))
            rid = f"{agent}/{turn}."
            beside(e, turn * AGENTS + agent)
            said = e.ask(rid, text, max_new_tokens=SAID, session_id=f"{LINE}{agent}")
            found[rid] = e.requests[rid].cached_tokens, said
            text += said
        e.ask(f"stranger/{turn}.", rng.choices(range(32, 127), k=90), max_new_tokens=1)
    for agent in texts:
        e.close_session(f"{LINE}{agent}")
    e.scheduler.tree_cache.sanity_check()
    e.check_leaks()
    return found


@pytest.mark.parametrize("case", CASES)
def test_turns_find_what_plain_decoding_finds(models: Models, case: str) -> None:
    flags = FLAGS | CASES[case]
    with engine(models.target, **flags) as e:
        plain = work(e)
    flags["max_total_tokens"] += RESERVED
    with engine(models.target, whiflash=models.whiflash("random"), **flags) as e:
        assert e.scheduler.tree_cache.tree_core.is_eagle
        found = work(e)
        assert_tree_is_true(e, models)
    assert {rid: said for rid, (_, said) in found.items()} == {rid: said for rid, (_, said) in plain.items()}
    pairs = 1 if case == "host" else 0  # keys of two tokens: the last slot of what was evicted is not shared
    lost = {rid: (found[rid][0], cached) for rid, (cached, _) in plain.items() if found[rid][0] < cached - pairs}
    assert not lost
    assert sum(cached for cached, _ in plain.values()) > len(plain) * 40


def aborted(e: Engine, number: int) -> None:
    """A neighbour of the same session that its client leaves in the midst of its answer."""
    if number % 3 == 1:
        name = f"gone/{number}."
        e.submit(name, [*range(40, 70), number], max_new_tokens=40, session_id=f"{LINE}{number % AGENTS}")
        for _ in range(3):
            e.step()
        e.abort(name)


def busy(e: Engine, number: int) -> None:
    e.submit(f"busy/{number}.", [*range(40, 60), number], max_new_tokens=24, session_id=f"{MARK}others")


@pytest.mark.parametrize(("beside", "retract"), [(aborted, 0), (busy, 3)], ids=["aborted", "retracted"])
def test_neighbours_change_no_text(models: Models, beside: Any, retract: int) -> None:
    with engine(models.target, **FLAGS) as e:
        plain = {rid: said for rid, (_, said) in work(e).items()}
    with engine(models.target, whiflash=models.whiflash("random"), retract=retract, **FLAGS) as e:
        found = work(e, beside)
        assert_tree_is_true(e, models)
        assert not retract or any(req.retraction_count for req in e.requests.values())
    assert {rid: said for rid, (_, said) in found.items()} == plain
    assert sum(cached for cached, _ in found.values()) > len(found) * 20


@pytest.mark.parametrize("flags", [{}, {"page_size": 16}, {"radix_eviction_policy": "slru"}], ids=str)
def test_what_a_compacted_turn_left_goes_first(models: Models, flags: dict[str, Any]) -> None:
    """Before a stranger's live prefix, if the session is one conversation; SGLang evicts the stranger's."""
    options = {**FLAGS, "max_total_tokens": 448, **flags}
    with engine(models.target, whiflash=models.whiflash("random"), **options) as e:
        for begins in (MARK, LINE):
            e.scheduler.flush_cache()
            e.requests.clear()
            system, old, summary, live, more = map(words, range(5), (32, 112, 32, 80, 200))
            session = f"{begins}agent"
            for name in ("old", "again"):  # `slru` protects what was used twice
                e.ask(name, [*system, *old], max_new_tokens=16, session_id=session)
            e.ask("live", live, max_new_tokens=16)
            e.ask("new", [*system, *summary], max_new_tokens=16, session_id=session)
            e.ask("more", more, max_new_tokens=1)
            left = [len(matched_slots(e, text)) for text in ([*system, *old], live, [*system, *summary])]
            superseded = begins == LINE
            assert (left[0] < 80) == superseded, left
            assert (left[1] >= 64) == superseded, left
            assert left[2] >= 48
            e.close_session(session)
            e.scheduler.tree_cache.sanity_check()
        e.check_leaks()


def test_sessions_that_nobody_closes_are_bounded(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tenant that has the most loses the one that it used longest ago, if that is answered, too; a request opens it
    again."""
    monkeypatch.setattr(session_tree, "MOST_OPEN", 3)
    with engine(models.target, whiflash=models.whiflash("random"), **FLAGS) as e:
        e.submit("running", range(60, 90), max_new_tokens=40, session_id=f"b{LINE}1")
        e.step()
        for number, name in enumerate(("a1", "b2", "b3", "b2", "b1")):
            e.ask(f"{number}.", range(50 + number, 90), max_new_tokens=4, session_id=f"{name[0]}{LINE}{name[1]}")
        refs, left = e.scheduler.tree_cache.session_refs, [f"a{LINE}1", f"b{LINE}2", f"b{LINE}1"]
        assert [*refs._session_generations] == left
        assert all(component._session_leaves.keys() <= set(left) for component in refs.components)
        assert len(e.output("running")) == 40
        e.scheduler.tree_cache.sanity_check()
        e.check_leaks()
