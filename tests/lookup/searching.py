"""The compiled search, for tests of what uses it."""

import ctypes
from array import array
from collections.abc import Sequence
from typing import Any

import pytest
from drafting import Asked
from whiflash_kernels.cpu.texts import compiled_texts

from whiflash_sglang.copying.calibration import MatchCalibration, RequestCalibration
from whiflash_sglang.copying.copier import Copier
from whiflash_sglang.drafts.candidates import NOTHING, Candidate, Part
from whiflash_sglang.embedded import cache_root


def _search() -> ctypes.CDLL:
    try:
        return compiled_texts(cache_root() / "compiled")
    except OSError as error:
        pytest.skip(str(error), allow_module_level=True)


SEARCH = _search()


class Looking(Copier):
    """A request's copies, looked for alone."""

    def __init__(
        self,
        judge: Any = None,
        min_match: int = 1,
        prediction: Any = None,
        habit: Any = None,
        stops: Any = (),
        member: Any = None,
    ) -> None:
        habit = habit or RequestCalibration()
        super().__init__(SEARCH, judge or MatchCalibration(), min_match, prediction, habit, stops, member)

    def look(self, limit: int, worth: float, paid: int = 0) -> Candidate:
        """The copy after the text's end, up to `limit` tokens, the first `paid` in any case."""
        self.join_group()
        asked = Asked(SEARCH, (self.at, 0), 0, limit - paid, worth, paid)
        said = asked.proposed(start=len(self))
        return said and self.last_copy(said)

    def last_copy(self, said: Candidate) -> Candidate:
        """A copy with what it is judged by."""
        agreements, place = array("i", [0]) * 200, array("q", [0, 0])
        count = self.last(agreements.buffer_info()[0], place.buffer_info()[0])
        assert count == len(said.tokens)
        if not count:
            return NOTHING
        return said._replace(at=0, matched=place[0], agreements=agreements[:count].tolist())

    def look_beyond(self, drafts: Sequence[int], alive: float, limit: int, worth: float, paid: int = 0) -> Candidate:
        """Up to `limit` tokens to copy after `drafts`, which are accepted with a chance of `alive`."""
        ahead = len(drafts) + paid if paid else 0
        asked = Asked(SEARCH, (self.at, 0), 1, limit, worth, ahead)
        longer = asked.continued(Candidate(drafts, [alive] * len(drafts), [Part("tools", len(drafts))]), 150)
        more = longer.tokens[len(drafts) :]
        return Candidate(more, longer.alive[len(drafts) :], longer.parts[-1:]) if more else NOTHING
