"""Answers of a group as sources of copies: whose are found, how long they stay, and when they are searched."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from unittest.mock import Mock

import pytest
from drafting import propose
from hypothesis import given, settings
from hypothesis import strategies as st

from whiflash_sglang.arms.lookup import LookupArm
from whiflash_sglang.checkpoints.manifest import Lookup
from whiflash_sglang.copying import groups
from whiflash_sglang.copying.groups import PROBES, SIBLINGS
from whiflash_sglang.drafts.candidates import NOTHING, Candidate
from whiflash_sglang.prices.costs import FULL_LENGTH
from whiflash_sglang.records.request import Request
from whiflash_sglang.spans.hints import RequestHints

ANSWER = list(range(100, 140))
PROMPT = [1, 2, 3]


def arm(late: bool = False, **said: Any) -> LookupArm:
    return LookupArm(Lookup(max_width=8, **said), late)


@dataclass
class Asked:
    """A request with its text so far."""

    arm: LookupArm
    request: Request
    text: list[int]

    def say(self, *tokens: int) -> Candidate:
        """A round that commits tokens; then a proposal."""
        self.text += tokens
        return propose(self.arm, self.request, lambda start: self.text[start:], FULL_LENGTH) or NOTHING

    def end(self, *, finished: bool = True) -> None:
        if finished:
            self.arm.answered(self.request, self.text[self.request.prompt :])
        self.arm.end(self.request)


def ask(
    arm: LookupArm, rid: str = "r", tenant: bytes | None = None, prompt: Sequence[int] = PROMPT, **hints: Any
) -> Asked:
    request = Request(rid, RequestHints(**{"task": "t", **hints}), tenant=tenant, prompt=len(prompt))
    arm.begin(request)
    return Asked(arm, request, list(prompt))


def answered(arm: LookupArm, answer: Sequence[int] = ANSWER, **of: Any) -> None:
    asked = ask(arm, **of)
    asked.say(*answer)
    asked.end()


def copied(candidate: Candidate) -> tuple[list[int], set[str]]:
    return list(candidate.tokens), {part.source for part in candidate.parts}


@pytest.mark.parametrize("live", [False, True])
def test_a_groups_answers_are_copied(live: bool) -> None:
    server = arm()
    first, second = ask(server, "a"), ask(server, "b")
    first.say(*ANSWER)
    if not live:
        first.end()
    assert copied(second.say(*ANSWER[:2])) == (ANSWER[2:5], {"group"})
    assert copied(second.say(*ANSWER[2:5])) == (ANSWER[5:8], {"group"})


def test_an_answer_that_was_aborted_leaves_nothing() -> None:
    server = arm()
    first, second = ask(server, "a"), ask(server, "b")
    first.say(*ANSWER)
    assert second.say(*ANSWER[:2]).tokens
    first.end(finished=False)
    assert copied(second.say(7, *ANSWER[:2]))[1] == {"context"}
    assert not ask(server, "c").say(*ANSWER[1:3]).tokens


@pytest.mark.parametrize(
    ("theirs", "mine"),
    [
        ({"tenant": b"a"}, {"tenant": b"b"}),
        ({"tenant": b"a"}, {}),
        ({}, {"tenant": b"a"}),
        ({}, {"task": "u"}),
        ({}, {"task": None}),
        ({"task": None}, {"task": None}),
        ({"lookup": "context"}, {}),
        ({}, {"lookup": "context"}),
        ({"prompt": ANSWER}, {}),
    ],
)
def test_others_are_not(theirs: dict[str, Any], mine: dict[str, Any]) -> None:
    """Another tenant's, another task's, without one, if the request says that only its own text is copied, prompts."""
    server, empty = arm(), arm()
    answered(server, [] if "prompt" in theirs else ANSWER, rid="a", **theirs)
    live = ask(server, "b", **theirs)
    live.say(*[] if "prompt" in theirs else ANSWER)
    beside, alone = ask(server, "c", **mine), ask(empty, "c", **mine)
    for token in [*ANSWER, *ANSWER[:5], 9, *ANSWER]:
        assert beside.say(token) == alone.say(token)


tokens = st.lists(st.integers(1, 5), min_size=1, max_size=40)


@settings(deadline=None, max_examples=60)
@given(st.lists(tokens, max_size=4), tokens)
def test_a_hostile_tenant_finds_what_an_empty_memory_has(theirs: list[list[int]], mine: list[int]) -> None:
    """In tokens: chances are shared by all, and hold no text."""
    server, empty = arm(), arm()
    for number, text in enumerate(theirs):
        answered(server, text, rid=f"{number}", tenant=b"victim")
    running = ask(server, "live", b"victim")
    hostile, alone = ask(server, "h", b"hostile"), ask(empty, "h", b"hostile")
    for token in mine:
        running.say(token)
        found, own = hostile.say(token), alone.say(token)
        shared = min(len(found.tokens), len(own.tokens))
        assert found.tokens[:shared] == own.tokens[:shared]
        assert {part.source for part in found.parts} <= {"context"}
        assert bool(found.tokens) == bool(own.tokens)


def test_a_tenants_answers_are_one_group_if_the_operator_says_so() -> None:
    for said, there in (("tenant", True), ("group", False), ("off", False)):
        server = arm(answers=said)
        answered(server, rid="a", tenant=b"a", task=None)
        assert bool(ask(server, "b", b"a", task=None).say(*ANSWER[:2]).tokens) == there
        assert not ask(server, "c", b"b", task=None).say(*ANSWER[:2]).tokens
    answered(server, rid="d")
    assert not ask(server, "e").say(*ANSWER[:2]).tokens, "off"


def test_what_is_forgotten_is_found_by_nobody() -> None:
    server = arm()
    answered(server, rid="a")
    running, sibling = ask(server, "b"), ask(server, "c")
    assert running.say(*ANSWER[:2]).tokens
    sibling.say(7, 8, 9)
    server.forget()
    assert server.host_bytes([])["groups"] == 0
    assert not running.say(7, 8).tokens
    assert not ask(server, "d").say(*ANSWER[:2]).tokens
    for each in (running, sibling):
        each.end()
    assert not ask(server, "e").say(7, 8).tokens


def test_an_answer_is_kept_once_if_its_index_is_made_twice() -> None:
    server = arm(late=True)
    asked = ask(server, "a")
    asked.say(*ANSWER[:9])
    assert asked.request.kept["lookup"].copier is not None
    assert server.promised(asked.request) is not None, "the device copies alone"
    asked.say(*ANSWER[9:])
    (live,) = server._groups._groups[None, "t"].live.values()  # type: ignore[union-attr]
    assert live.text.tokens.tolist() == ANSWER


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "TOKENS", 200)
    monkeypatch.setattr(groups, "GROUPS", 3)
    monkeypatch.setattr(groups, "MOST", 250)
    server = arm()
    for number in range(30):
        answered(server, range(1000 * number, 1000 * number + 70), rid=f"a{number}")
    (group,) = server._groups._groups.values()  # type: ignore[union-attr]
    assert len(group.ended.text) <= 200
    assert not ask(server, "old").say(20_000, 20_001).tokens
    assert ask(server, "new").say(29_000, 29_001).tokens
    answered(server, range(5000), rid="long")
    assert len(group.ended.text) <= 200
    for name in "uvtw":  # `t` is used again, so `u` is the one that goes
        answered(server, range(9), rid=name, task=name)
    assert [name for _, name in server._groups._groups] == ["v", "t", "w"]  # type: ignore[union-attr]
    answered(server, range(189), rid="x", task="v")
    assert [name for _, name in server._groups._groups] == ["w", "v"], "tokens"  # type: ignore[union-attr]


def test_siblings_end_with_the_last_of_them() -> None:
    server, name = arm(), f"{SIBLINGS}1"
    first, second = ask(server, "a", task=name), ask(server, "b", task=name)
    first.say(*ANSWER)
    first.end()
    assert second.say(*ANSWER[:2]).tokens
    second.end()
    assert server.host_bytes([])["groups"] == 0


def test_an_answer_longer_than_the_newest_places_is_followed_where_it_was() -> None:
    """Its run hides the place in which the answer goes on, unless that is remembered."""
    server, answer = arm(), [1, 2, *[7] * 60, 3, 4, 5, 9]
    answered(server, answer, rid="a", prompt=[50])
    asked, at = ask(server, "b", prompt=[60]), 2
    said = asked.say(1, 2)
    while at < len(answer) - 3:
        assert list(said.tokens[:1]) == answer[at : at + 1], at
        said, at = asked.say(*answer[at : at + 8]), at + 8


def test_a_group_whose_copies_are_not_taken_is_tried_at_the_beginning_of_each_request() -> None:
    server = arm(late=True)
    answered(server, [token for i in range(50) for token in (5, 200 + i)], rid="a")
    useless, useful = ask(server, "b"), ask(server, "c")
    for number in range(PROBES + 1):
        assert server.promised(useless.request) is None
        useless.say(5, 300 + number)
    assert server.promised(useless.request) is not None
    for number in range(PROBES + 9):
        useful.say(5, 200 + number)
        assert server.promised(useful.request) is None
    assert server.promised(useless.request) is None, "it was right for another one"


def test_the_host_looks_while_a_group_has_others() -> None:
    """If the host knows texts late, the device alone copies for a request that copies from its own text only."""
    server = arm(late=True)
    first = ask(server, "a")
    assert server.promised(first.request) is not None
    second = ask(server, "b")
    assert server.promised(first.request) is None
    first.say(*ANSWER)
    assert copied(second.say(*ANSWER[:2])) == (ANSWER[2:5], {"group"})
    first.end(finished=False)
    assert server.promised(second.request) is not None
    assert second.request.kept["lookup"].copier is None


def test_without_a_compiler_the_device_copies_own_text(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("whiflash_sglang.arms.lookup.compiled_texts", Mock(side_effect=OSError("no compiler")))
    server = arm()
    assert "neither predictions nor other answers of a task" in caplog.text
    request = Request("r", RequestHints(task="t"), prediction=[1, 2, 3], stops=(7,))
    server.begin(request)
    assert server.promised(request) is not None
    assert propose(server, request, lambda start: [5][start:], FULL_LENGTH) is None
    server.copied(request, lambda: Candidate([6, 7, 8], [0.5, 0.25, 0.125]), [6])
    assert server.promised(request) == (1.75, 3), "what comes after the turn's end promises nothing"
    server.end(request)
    server.forget()
