"""Candidates of one request and one arm, made as a round makes them, for tests of what the arm knows."""

from collections.abc import Sequence
from typing import Any

from whiflash_kernels.cpu.texts import NONE, Batch, Candidates

from whiflash_sglang.arms.base import TextDrafter
from whiflash_sglang.drafts.candidates import SOURCES, Candidate, parts_of
from whiflash_sglang.prices.costs import Worth
from whiflash_sglang.records.core import History
from whiflash_sglang.records.request import Request

WIDTH = 160


def candidate_of(candidates: Candidates, index: int, column: int, arms: Sequence[str] = ()) -> Candidate:
    """arms: those that propose, by column."""
    tokens, alive, names, size, at = (each[index, column] for each in candidates)
    parts = parts_of(names[:size].tolist(), arms)
    return Candidate(tokens[:size].tolist(), alive[:size].tolist(), parts, int(at))


class Asked:
    """A batch of one request with one candidate.

    Args:
        places: the request's copies and walk; 0: none. whose: the arm of the candidate, 0: copies, 1: the walk. price:
            of a row. ahead: rows under way.
    """

    def __init__(
        self, library: Any, places: Sequence[int], whose: int, widest: int, price: float, ahead: int = 0
    ) -> None:
        self.candidates, columns = Candidates.of(1, 1, WIDTH), [0 if whose == arm else NONE for arm in (0, 1)]
        handles = [[place] for place in places]
        self._batch = Batch(library, self.candidates, handles, [ahead], columns, [widest] * 2, price)

    def proposed(self, written: Sequence[int] = (), start: int = 0) -> Candidate:
        """Show the text's tokens from `start` on."""
        self._batch.propose(written, [len(written)], [start])
        return candidate_of(self.candidates, 0, 0)

    def continued(self, drafts: Candidate, room: int) -> Candidate:
        self.candidates.enter(0, 0, SOURCES.index("tools"), drafts)
        self._batch.extend([[2]], [room])
        return candidate_of(self.candidates, 0, 0)._replace(under_way=drafts.under_way, at=drafts.at)


def propose(arm: TextDrafter, request: Request, history: History, worth: Worth, under_way: int = 0) -> Candidate | None:
    """Return what the arm proposes behind a request's text; None: nothing."""
    place, whose = arm.handle(request, history), int(arm.arm == "structure")
    if not place:
        return None
    begin = request.known or request.prompt
    written = history(begin)
    request.known = begin + len(written)
    walk, price = getattr(request.kept[arm.arm], "walk", None), worth.least_chance
    if whose and not hasattr(walk, "library"):  # the reference
        walk.read(written)
        said = walk.go_on(Candidate(), arm.max_drafts + under_way, price, under_way)._replace(at=request.known)
    else:
        places = (0, place) if whose else (place, 0)
        said = Asked(arm.library, places, whose, arm.max_drafts, price, under_way).proposed(written, begin)
    for _, error in arm.raised:
        raise error
    return said._replace(under_way=under_way) if said.tokens else None


def continued(arm: Any, request: Request, drafts: Candidate, room: int, worth: Worth) -> Candidate:
    """Drafts of another arm as the structure arm cuts and continues them."""
    walk, price, paid = request.kept[arm.arm].walk, worth.least_chance, drafts.under_way
    if walk is None or not drafts.tokens or (request.kept[arm.arm].source == "tools" and room <= len(drafts.tokens)):
        return drafts
    if not hasattr(walk, "library"):
        longer: Candidate = walk.go_on(drafts, room, price, paid)
        return longer
    return Asked(arm.library, (0, walk.at), 0, arm.max_drafts, price, paid).continued(drafts, room)
