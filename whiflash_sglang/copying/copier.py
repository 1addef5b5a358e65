"""Finds one request's copies: in its own text, in answers of its group, and in the answer that its caller expects.

The longest match wins, the newest of equals. Counting which continuation is the most frequent did no better on
training answers; how much the places agree shows instead how far to trust the copy (see `calibration`).
"""

from array import array
from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING

from whiflash_sglang.copying.calibration import MatchCalibration, RequestCalibration
from whiflash_sglang.copying.groups import GROUP, Member
from whiflash_sglang.copying.texts import Prediction, Source, Text
from whiflash_sglang.drafts.candidates import NOTHING, Candidate, Part

if TYPE_CHECKING:
    from whiflash_kernels.cpu.copies import CompiledCopies

CONTEXT = "context"
"""The source of copies from the request's own text: the prompt and the answer so far."""

_AT = 5
"""Index, in a source's fields, of the place where the last copy from it goes on."""


def teach(
    copy: Candidate, committed: Sequence[int], judge: MatchCalibration, request: RequestCalibration | None
) -> int:
    """Teach `judge`, and the `request`'s own factor, which tokens of a `copy` were right: `committed` are those of the
    text. Return the number of right ones.
    """
    compared = zip(copy.tokens, copy.agreements, committed, strict=False)
    length = copy.matched
    for length, (copied, agreement, token) in enumerate(compared, copy.matched):
        right = copied == token
        if length == copy.matched and request is not None:
            request.observe(judge.chance(length, agreement), right)
        judge.observe(length, agreement, right)
        if not right:
            return length - copy.matched
    return min(len(copy.tokens), len(committed))


class Copier:
    """Proposes a request's copies by `look`, and learns from the tokens committed next, whichever arm drafted them.

    Args:
        compiled: the search. calibration: shared by all requests. min_match: shortest match worth copying from, in
            tokens. prediction: the expected answer, preferred to the text if both match as long. request: how well it
            has copied so far; None: unknown. stops: tokens that end the request, after which no copy goes on. member:
            the request in its group; None: it has none.
    """

    def __init__(
        self,
        compiled: "CompiledCopies",
        calibration: MatchCalibration,
        min_match: int = 1,
        prediction: Prediction | None = None,
        request: RequestCalibration | None = None,
        stops: Sequence[int] = (),
        member: Member | None = None,
    ) -> None:
        self.text = Text(compiled)
        self._own = Source(CONTEXT, self.text, calibration, request or RequestCalibration())
        self._own.fields[-1] = True
        self._compiled, self._min_match, self._stops = compiled, min_match, array("i", stops)
        self._prediction, self._member = prediction, member
        self._sources, self._fields = list[Source](), array("q")
        self._copy, self._source, self._at = NOTHING, self._own, -1

    def extend(self, tokens: Sequence[int]) -> None:
        """Append the newly committed tokens, and learn from them: the prompt first, then round by round."""
        right = teach(self._copy, tokens, self._source.judge, self._source.habit)
        if self._member is not None:
            if any(source.name == GROUP for source in self._sources):
                self._member.looked(right if self._source.name == GROUP else 0)
            self._member.extend(len(self.text), tokens)
        self._copy = NOTHING
        if self._prediction is not None:
            self._prediction.follow(tokens)
        if self._at >= 0:
            self._at += len(tokens)
        self.text.extend(tokens)

    def look(self, limit: int, worth: float, paid: int = 0) -> Candidate:
        """Return the copy after the text's end, up to `limit` tokens: the first and the first `paid` in any case, the
        others while each is accepted with a chance of at least `worth`, given that the paid ones are.
        """
        self._copy, source, at = self._searched((), limit, (worth, 1.0, paid))
        if self._copy.tokens:
            self._source, self._at = source, at
        return self._copy

    def look_beyond(self, drafts: Sequence[int], alive: float, limit: int, worth: float, paid: int = 0) -> Candidate:
        """Return up to `limit` tokens to copy after `drafts`, which are accepted with a chance of `alive`.

        Each is worth its row or among the first `paid`. It learns nothing: `look` searches again after the commit.
        """
        if paid <= 0 and alive < worth:
            return NOTHING
        copy, *_ = self._searched(drafts, limit, (worth, alive, paid))
        return copy if copy.tokens and (paid > 0 or copy.alive[0] >= worth) else NOTHING

    def _searched(
        self, drafts: Sequence[int], limit: int, chances: tuple[float, float, int]
    ) -> tuple[Candidate, Source, int]:
        """Return the copy after `drafts`, its source, and its place there. chances: as in `CompiledCopies.copy`."""
        if limit <= 0 or not len(self.text):
            return NOTHING, self._own, -1
        self._list_sources()
        tokens, alive, agreements, matched, at, number = self._compiled.copy(
            self._fields, drafts, self._stops, self._min_match, limit, chances
        )
        if not tokens:
            return NOTHING, self._own, -1
        source = self._sources[number]
        return Candidate(tokens, alive, [Part(source.name, len(tokens))], 0, matched, agreements), source, at

    def _list_sources(self) -> None:
        """Write the sources as compiled code reads them, those preferred among equal matches first."""
        sources = [self._own] if self._member is None else [self._own, *self._member.others()]
        if self._prediction is not None:
            sources.insert(0 if self._prediction.is_followed else len(sources), self._prediction)
        if sources != self._sources:
            self._sources = sources
            self._fields = array("q", chain.from_iterable(each.fields for each in sources))
        for number, source in enumerate(sources):
            self._fields[number * len(source.fields) + _AT] = self._at if source is self._source else -1
