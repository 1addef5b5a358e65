"""What a round verifies where two arms may prolong each other's drafts: the last word is his who forbids."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from whiflash_kernels import Drafted, lay_drafts

from whiflash_sglang.core import Drafts, Grown
from whiflash_sglang.drafters.base import padded
from whiflash_sglang.round.draft import DraftStage
from whiflash_sglang.round.quarantine import Quarantine

ROOM = 12
FORBIDDEN = 66


class Grammar:
    """Allows anything but `FORBIDDEN`; behind an even draft it knows the next one."""

    prolongs = forbids = True
    late = False

    def prolong(self, grown: Grown) -> Drafts | None:
        own = drafts_of(grown)
        after = own.index(FORBIDDEN) if FORBIDDEN in own else len(own)
        last = own[after - 1]
        more = [last + 1] if last % 2 == 0 else []
        found = padded([more], [[0.9] * len(more)], torch.device("cpu"))
        return Drafts(found.tokens, found.counts, found.alive, passes=0, after=torch.tensor([after]))


class Copy:
    """Goes on behind what it finds in `known`."""

    prolongs, forbids, late = True, False, False

    def __init__(self, known: dict[int, list[int]]) -> None:
        self.known = known

    def prolong(self, grown: Grown) -> Drafts:
        more = self.known.get(drafts_of(grown)[-1], [])
        return padded([more], [[0.8] * len(more)], torch.device("cpu"))


def drafts_of(grown: Grown) -> list[int]:
    return list(grown.drafts.tokens[0, : int(grown.drafts.counts[0])].tolist())


def verified(
    arms: Sequence[tuple[str, Any]], first: Sequence[int], monkeypatch: pytest.MonkeyPatch
) -> list[int]:
    """What is verified of one request whose own arm drafted `first`."""
    one = torch.tensor([0])
    tokens = torch.tensor([list(first)])
    alive = torch.full((1, len(first)), 0.9)
    own = Drafted(one, tokens, torch.tensor([len(first)]), alive, None)
    laid = lay_drafts([own], one, one, width=ROOM, confidences=0, vocabulary=100)
    plan: Any = SimpleNamespace(
        routes=["ar"], joined=[ROOM], on_device=SimpleNamespace(joined=torch.tensor([ROOM]))
    )
    stage = DraftStage.__new__(DraftStage)
    object.__setattr__(stage, "drafters", dict(arms))
    object.__setattr__(stage, "quarantine", Quarantine(["ar", *dict(arms)]))
    monkeypatch.setattr(DraftStage, "_whole_batch", lambda *_: None)
    requests: Any = SimpleNamespace(rows=one, starts=one, reqs=[SimpleNamespace(rid="r")])
    laid, behind, _ = stage._prolonged(requests, plan, laid, None, None)
    found = list(laid.tokens[0, : int(laid.counts[0])].tolist())
    return [*found, *(behind.tokens[0, : int(behind.counts[0])].tolist() if behind is not None else [])]


@pytest.mark.parametrize("order", [("structure", "lookup"), ("lookup", "structure")])
def test_nothing_that_is_forbidden_is_verified(
    order: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever was copied last, and behind what."""
    for known in (
        {3: [4]},
        {3: [4], 5: [FORBIDDEN, 7]},
        {5: [FORBIDDEN]},
        {2: [FORBIDDEN]},
        {3: [FORBIDDEN, 4]},
    ):
        arms = {"structure": Grammar(), "lookup": Copy(known)}
        found = verified([(name, arms[name]) for name in order], [1, 2], monkeypatch)
        assert FORBIDDEN not in found, known
        assert found[:3] == [1, 2, 3]
        if known.get(3) == [4]:
            assert found == [1, 2, 3, 4, 5], "each goes on behind the other"
