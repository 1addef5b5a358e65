"""Verified drafts if two arms may extend each other's: the arm that forbids has the last word."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from whiflash_sglang.arms.base import TextDrafter
from whiflash_sglang.drafts.candidates import Candidate
from whiflash_sglang.prices.costs import FULL_LENGTH
from whiflash_sglang.records.request import Request
from whiflash_sglang.round.quarantine import Quarantine
from whiflash_sglang.round.sources import DraftSources
from whiflash_sglang.structure.spending import Spending

ROOM = 12
FORBIDDEN = 66


class Grammar(TextDrafter):
    """Allows anything but `FORBIDDEN`; behind an even draft it knows the next one."""

    arm, max_drafts, forbids = "structure", 9, True

    def extends(self, request: Request) -> bool:
        return True

    def extend_drafts(self, request: Request, drafts: Candidate, room: int, worth: Any) -> Candidate:
        own = list(drafts.tokens)
        allowed = drafts.first(own.index(FORBIDDEN) if FORBIDDEN in own else len(own))
        last = allowed.tokens[-1]
        return allowed.followed_by([last + 1] if last % 2 == 0 else [], [0.9], self.arm)


class Copy(TextDrafter):
    """Goes on behind what it finds in `known`."""

    arm, max_drafts = "lookup", 9

    def __init__(self, known: dict[int, list[int]]) -> None:
        self.known = known

    def extends(self, request: Request) -> bool:
        return True

    def extend_drafts(self, request: Request, drafts: Candidate, room: int, worth: Any) -> Candidate:
        more = self.known.get(drafts.tokens[-1], [])
        return drafts.followed_by(more, [0.8] * len(more), self.arm)


def verified(drafters: Sequence[Any], first: Sequence[int], route: str) -> list[int]:
    """A request's candidate `first` of the arm `route`, as others extend it."""
    by_arm = {drafter.arm: drafter for drafter in drafters}
    sources = DraftSources(by_arm, Quarantine(["ar", *by_arm]), 100, Spending())
    turn: Any = SimpleNamespace(requests=[Request("r")], plan=SimpleNamespace(worth=FULL_LENGTH))
    drafts = Candidate().followed_by(first, [0.9] * len(first), route)
    chain = sources.extended(turn, 0, route, drafts, ROOM)
    assert sum(part.drafts for part in chain.parts) == len(chain.tokens) == len(chain.alive)
    return list(chain.tokens)


@pytest.mark.parametrize("order", [("structure", "lookup"), ("lookup", "structure")])
def test_nothing_that_is_forbidden_is_verified(order: tuple[str, str]) -> None:
    """Copies may come last, and after anything."""
    for known in ({3: [4]}, {3: [4], 5: [FORBIDDEN, 7]}, {5: [FORBIDDEN]}, {2: [FORBIDDEN]}, {3: [FORBIDDEN, 4]}):
        arms: dict[str, Any] = {"structure": Grammar(), "lookup": Copy(known)}
        found = verified([arms[name] for name in order], [1, 2], "ar")
        assert FORBIDDEN not in found, known
        assert found[:3] == [1, 2, 3]
        if known.get(3) == [4]:
            assert found == [1, 2, 3, 4, 5], "each goes on behind the other"


def test_an_arm_is_not_asked_behind_its_own_drafts() -> None:
    """But behind what others put there."""
    assert verified([Copy({2: [4, 2]})], [1, 2], "lookup") == [1, 2]
    assert verified([Grammar(), Copy({3: [4]})], [1, 2], "lookup") == [1, 2, 3, 4, 5]
    assert verified([Grammar(), Copy({3: [4]})], [1, FORBIDDEN, 2], "ar") == [1]


@pytest.mark.parametrize(
    ("first", "route", "expected", "turns"),
    [
        ([1, 2], "ar", [1, 2, 3], ["structure", "lookup"]),  # the grammar's own 3 is the last
        ([2, FORBIDDEN, 1], "ar", [2, 3], ["structure", "lookup"]),  # as many as before, and its own
        ([1, 3], "ar", [1, 3], ["structure", "lookup"]),  # nobody's but the pass's
        ([1, 3], "lookup", [1, 3], ["structure"]),  # the copy's own 3 stays the last
        ([1, 8], "ar", [1, 8, 9, 1], ["structure", "lookup", "structure"]),  # what was copied is judged
    ],
)
def test_the_last_turn_is_of_who_added_last(
    monkeypatch: pytest.MonkeyPatch, first: list[int], route: str, expected: list[int], turns: list[str]
) -> None:
    """Whether or not drafts were dropped before, and not who was asked last; nobody is asked twice about the same."""
    asked: list[str] = []
    drafters: list[Any] = [Grammar(), Copy({9: [1]})]
    for drafter in drafters:

        def noting(*args: Any, own: Any = drafter, extend: Any = drafter.extend_drafts) -> Candidate:
            asked.append(own.arm)
            candidate: Candidate = extend(*args)
            return candidate

        monkeypatch.setattr(drafter, "extend_drafts", noting)
    assert verified(drafters, first, route) == expected
    assert asked == turns
