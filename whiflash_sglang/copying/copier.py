"""Finds one request's copies: in its own text, and in the answer that its caller expects.

The longest match wins, the newest of equals. Counting which continuation is the most frequent did no better on
training answers; how much the places agree shows instead how far to trust the copy (see `calibration`).
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from operator import mul, neg
from typing import TYPE_CHECKING

from whiflash_sglang.copying.calibration import Agreement, MatchCalibration, RequestCalibration
from whiflash_sglang.copying.index import MAX_MATCH, Place, SuffixIndex
from whiflash_sglang.copying.predicted import Prediction
from whiflash_sglang.drafts.candidates import NOTHING, Candidate, Part, common_prefix

if TYPE_CHECKING:
    from whiflash_kernels.cpu.copies import CompiledCopies

Match = tuple[Place, Sequence[int]]
"""A place that matches, and the tokens that followed there."""

SOURCES = CONTEXT, PREDICTION = "context", "prediction"
"""The sources of a copy: the prompt and answer, or the answer that the caller expects."""


def teach(
    copy: Candidate, committed: Sequence[int], judge: MatchCalibration, request: RequestCalibration | None
) -> None:
    """Update the table `judge`, and the `request`'s own factor, by how right a `copy` was: `committed` followed."""
    compared = zip(copy.tokens, copy.agreements, committed, strict=False)
    for length, (copied, agreement, token) in enumerate(compared, copy.matched):
        right = copied == token
        if length == copy.matched and request is not None:
            request.observe(judge.chance(length, agreement), right)
        judge.observe(length, agreement, right)
        if not right:
            break


class Copier:
    """Proposes a request's copies by `look`, and learns from the tokens committed next, whichever arm drafted them.

    Args:
        calibration: shared by all requests. min_match: shortest match worth copying from, in tokens.
        prediction: the expected answer, preferred to the text if both match as long. request: how well it has copied so
            far; None: unknown. compiled: searches in place of `_find` and `_propose`, unless there is a prediction;
            None: there is no compiler.
    """

    def __init__(
        self,
        calibration: MatchCalibration,
        min_match: int = 1,
        prediction: Prediction | None = None,
        request: RequestCalibration | None = None,
        compiled: "CompiledCopies | None" = None,
    ) -> None:
        self.text = SuffixIndex(compiled=compiled)
        self._compiled = compiled if prediction is None else None
        self.calibration, self._request = calibration, request or RequestCalibration()
        self._min_match, self._prediction = min_match, prediction
        self._copy = NOTHING
        self._source: Place | None = None

    def extend(self, tokens: Sequence[int]) -> None:
        """Append the tokens committed since, and learn from them: the prompt first, then round by round."""
        judge = self.calibration if self._source is None else self._judge(self._source)
        teach(self._copy, tokens, judge, self._request if judge is self.calibration else None)
        self._copy = NOTHING
        if self._prediction is not None:
            self._prediction.follow(tokens)
        if self._source is not None:
            length, source, text = self._source
            self._source = Place(length, source + len(tokens), text)
        self.text.extend(tokens)

    def look(self, limit: int, worth: float, paid: int = 0) -> Candidate:
        """Return the copy after the text's end, up to `limit` tokens: the first and the first `paid` in any case, the
        others while each is accepted with a chance of at least `worth`, given that the paid ones are.
        """
        self._copy = NOTHING
        if self._compiled is not None:
            self._copy, source = self._searched(self._compiled, (), limit, (worth, 1.0, paid))
            if self._copy.tokens:
                self._source = Place(self._copy.matched, source, self.text)
            return self._copy
        matches = self._find((), limit)
        if matches:
            best = _best(matches)
            self._source = matches[best][0]
            self._copy = self._propose(matches, best, worth, paid=paid)
        return self._copy

    def look_beyond(
        self, drafts: Sequence[int], alive: float, limit: int, worth: float, paid: int = 0
    ) -> Candidate:
        """Return up to `limit` tokens to copy after `drafts`, which are accepted with a chance of `alive`.

        Every one is worth verifying or paid. Nothing is learned from them: `look` searches again after the commit.
        """
        if paid <= 0 and alive < worth:
            return NOTHING
        if self._compiled is not None:
            copy, _ = self._searched(self._compiled, drafts, limit, (worth, alive, paid))
        else:
            matches = self._find(drafts, limit)
            copy = self._propose(matches, _best(matches), worth, alive, paid) if matches else NOTHING
        return copy if copy.tokens and (paid > 0 or copy.alive[0] >= worth) else NOTHING

    def _searched(
        self, compiled: "CompiledCopies", drafts: Sequence[int], limit: int, chances: tuple[float, float, int]
    ) -> tuple[Candidate, int]:
        """Search by compiled code: return the copy after `drafts` and its place. chances: as in `_propose`."""
        if limit <= 0 or not len(self.text):
            return NOTHING, 0
        copied_from = -1 if self._source is None else self._source.source
        factors = self._request.factor, *chances
        tokens, alive, agreements, matched, source = compiled.copy(
            self.text.fields, drafts, copied_from, self._min_match, limit, self.calibration.addresses, factors
        )
        if not tokens:
            return NOTHING, 0
        return Candidate(tokens, alive, [Part(CONTEXT, len(tokens))], 0, matched, agreements), source

    def _find(self, drafts: Sequence[int], limit: int) -> list[Match]:
        """Return places that match the end of the text and `drafts`, and what followed there, newest first."""
        end = [*self.text.end, *drafts][-MAX_MATCH:] if drafts else self.text.end
        places = list(self.text.places_of(end) if drafts else self.text.places())
        if self._source is not None and self._source.text is self.text:
            # The place copied from has moved on, and may no longer be among a chain's newest ones.
            copied_on = self.text.place_at(self._source.source + len(drafts), end)
            if copied_on in places:
                places.remove(copied_on)
            places.insert(0, copied_on)
        if self._prediction is not None:
            at = 0 if self._prediction.is_followed else len(places)
            places.insert(at, self._prediction.place_behind(drafts))
        least = self._min_match
        return [
            (place, tokens)
            for place in places
            if place.length >= least and (tokens := place.text.continuation(place.source, limit, drafts))
        ]

    def _propose(
        self, matches: Sequence[Match], best: int, worth: float, chance: float = 1.0, paid: int = 0
    ) -> Candidate:
        """Make the copy from place `best`. chance: that everything before it is accepted. worth, paid: as in `look`."""
        place, copy = matches[best]
        judge, length = self._judge(place), place.length
        agreements: list[int] = []
        chances: list[float] = []
        for agreement, count in _votes(matches, copy):
            chances += judge.along(length + len(chances), agreement, count)
            agreements += [agreement] * count
        if judge is self.calibration:
            chances[0] = self._request.adjust(judge.chance(length, agreements[0]))
        alive = list(accumulate(chances, mul, initial=chance))[1:]
        if 0 < paid <= len(alive):
            worth *= alive[paid - 1]
        first = min(max(paid, 1), len(alive))
        count = len(alive) if alive[-1] >= worth else bisect_right(alive, -worth, first, key=neg)
        parts = [Part(CONTEXT if place.text is self.text else PREDICTION, count)]
        return Candidate(list(copy[:count]), alive[:count], parts, 0, length, agreements[:count])

    def _judge(self, place: Place) -> MatchCalibration:
        """Return the chances for copies from `place`: the predicted output's if it is there, else the server's."""
        if (predicted := self._prediction) is not None and place.text is predicted.text:
            return predicted.calibration
        return self.calibration


def _best(matches: Sequence[Match]) -> int:
    """Return the index of the longest match, the first of equals."""
    lengths = [place.length for place, _ in matches]
    return lengths.index(max(lengths))


def _votes(matches: Sequence[Match], copy: Sequence[int]) -> Iterator[tuple[Agreement, int]]:
    """Yield how the places vote on the tokens of a `copy` from one of them, and on how many tokens in a row so.

    At each token those places vote that agreed with the copy so far.
    """
    shared = [len(copy) if ahead == copy else common_prefix(ahead, copy) for _, ahead in matches]
    following: Sequence[int] = range(len(matches))
    begin = 0
    for at in sorted({count for count in shared if count < len(copy)}):
        if at > begin:
            yield Agreement.UNANIMOUS, at - begin
        same = [i for i in following if shared[i] > at]
        longest = max(matches[i][0].length for i in same)
        leads = all(matches[i][0].length < longest for i in following if shared[i] == at)
        yield Agreement.LEADING if leads else Agreement.CONTESTED, 1
        following, begin = same, at + 1
    if begin < len(copy):
        yield Agreement.ALONE if len(following) == 1 else Agreement.UNANIMOUS, len(copy) - begin
