"""One request's copies: from its own text, and from texts that it may share.

The longest match wins, the newest of equals. Counting which continuation is the most frequent did no better on
training answers; how much the places agree shows instead how far to trust the copy (see `calibration`).
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from whiflash_sglang.lookup.calibration import SURE, Agreement, MatchCalibration, RequestCalibration
from whiflash_sglang.lookup.index import Place, SuffixIndex
from whiflash_sglang.lookup.prediction import Prediction

Shared = Callable[[], Iterable[SuffixIndex]]
"""Texts that a request may copy from besides its own, as they are now."""

OWN_TEXT_ONLY: Shared = tuple

Found = tuple[Place, Sequence[int]]
"""A place that matches, and what followed there."""

RULE_MATCH = 2
"""Tokens that must have occurred before for the plain rule, which better ones are measured against, to copy."""

CONTEXT, PREDICTION, FORM, MEMORY = "context", "prediction", "form", "memory"
"""The sources of a copy: prompt and answer, what the caller expects back, the prompt as it would be written
here, other texts that the request may share."""

FORM_MATCH = 6
"""Tokens that a form must match to be copied from: its text was never written so, and short matches abound."""


class Copied(NamedTuple):
    """One proposed token, and what its chance was judged by."""

    token: int
    length: int
    agreement: Agreement


class Proposal(NamedTuple):
    """tokens: what to copy. alive: for each, the chance that it and all before it are accepted; never increasing.
    origin: what they are taken from.
    """

    tokens: Sequence[Copied] = ()
    alive: Sequence[float] = ()
    origin: str = CONTEXT

    def width(self, limit: int, worth: float) -> int:
        """Tokens to verify: at most `limit`, each accepted with a chance of at least `worth`, the first in any case."""
        width = min(len(self.alive), limit, 1)
        while width < min(len(self.alive), limit) and self.alive[width] >= worth:
            width += 1
        return width

    def expected(self, width: int) -> float:
        """Expected accepted tokens of the first `width`, bonus token not counted."""
        return sum(self.alive[:width])


class Copier:
    """One request. `look` proposes, and whatever is committed next shows how right it was, whoever drafted.

    Args:
        calibration: shared by the tenant's requests. min_match: shortest match worth copying from, in tokens.
        shared: further texts to copy from. forms: texts in the form in which they would be written now
            (`lookup.forms`), preferred where others match as long. prediction: what the caller expects back,
            preferred to all of these where they match as long.
    """

    def __init__(
        self,
        calibration: MatchCalibration,
        min_match: int = 1,
        shared: Shared = OWN_TEXT_ONLY,
        forms: Shared = OWN_TEXT_ONLY,
        prediction: Prediction | None = None,
    ) -> None:
        self.text = SuffixIndex()
        self._calibration, self._request = calibration, RequestCalibration()
        self._min_match, self._shared, self._forms = min_match, shared, forms
        self._prediction = prediction
        self._proposal = Proposal()
        self._source: Place | None = None

    @property
    def calibration(self) -> MatchCalibration:
        """Shared by the tenant's requests, or by those of a scope in it."""
        return self._calibration

    @calibration.setter
    def calibration(self, table: MatchCalibration) -> None:
        """The text goes on in another scope."""
        self._calibration = table

    @property
    def factor(self) -> float:
        """How much likelier than the calibration says a copy's first token is right."""
        return self._request.factor

    def extend(self, tokens: Sequence[int]) -> None:
        """Append what was committed since: the prompt first, then round by round."""
        judge = self._calibration if self._source is None else self._judge(self._source)
        for depth, (copied, token) in enumerate(zip(self._proposal.tokens, tokens, strict=False)):
            right = copied.token == token
            if depth == 0 and judge is self._calibration:
                self._request.observe(judge.chance(copied.length, copied.agreement), right)
            judge.observe(copied.length, copied.agreement, right)
            if not right:
                break
        self._proposal = Proposal()
        if self._prediction is not None:
            self._prediction.follow(tokens)
        if self._source is not None:
            self._source = self._source._replace(source=self._source.source + len(tokens))
        self.text.extend(tokens)

    def look(self, limit: int, worth: float) -> Proposal:
        """The copy after the text's end: up to `limit` tokens, as far as one more may be worth it."""
        self._proposal = Proposal()
        found = self._find((), limit)
        if found:
            best = _best(found)
            self._source = found[best][0]
            self._proposal = self._propose(found, best, worth)
        return self._proposal

    def look_beyond(self, drafts: Sequence[int], alive: float, limit: int, worth: float) -> Proposal:
        """Up to `limit` tokens to copy after `drafts`, which are accepted with a chance of `alive`.

        Every one is worth verifying. Nothing is learned from them: what they say is looked for again once committed.
        """
        found = self._find(drafts, limit) if alive >= worth else []
        if not found:
            return Proposal()
        best = _best(found)
        proposal = self._propose(found, best, worth, alive)
        width = sum(chance >= worth for chance in proposal.alive)
        return Proposal(proposal.tokens[:width], proposal.alive[:width], proposal.origin)

    def _find(self, drafts: Sequence[int], limit: int) -> list[Found]:
        """Places that match the text's end, `drafts` behind it included, and what followed there: forms first, then
        the text's own places, newest first.
        """
        end = [*self.text.end, *drafts] if drafts else self.text.end
        forms, shared = list(self._forms()), list(self._shared())
        places = [p for form in forms for p in form.places_of(end) if p.length >= FORM_MATCH]
        places += self.text.places_of(end) if drafts else self.text.places()
        for other in shared:
            places += other.places_of(end)
        copied_on = self._copied_on(end, (*forms, *shared), len(drafts))
        if copied_on is not None:
            places = [copied_on, *(place for place in places if place != copied_on)]
        if self._prediction is not None:
            at = 0 if self._prediction.is_followed else len(places)
            places.insert(at, self._prediction.place_behind(drafts))
        ahead = (
            (place, place.continuation(limit, drafts)) for place in places if place.length >= self._min_match
        )
        return [(place, tokens) for place, tokens in ahead if tokens]

    def _copied_on(self, end: Sequence[int], shared: Iterable[SuffixIndex], drafts: int) -> Place | None:
        """The place of the last copy, moved on: a chain's newest places may have left it behind."""
        last = self._source
        # A text that was forgotten since must not be proposed.
        if last is None or not any(last.text is text for text in (self.text, *shared)):
            return None
        return last.text.place_at(last.source + drafts, end)

    def _propose(self, found: Sequence[Found], best: int, worth: float, chance: float = 1.0) -> Proposal:
        """The copy from place `best`; `chance`: that everything before it is accepted."""
        places, ahead = zip(*found, strict=True)
        length, judge = places[best].length, self._judge(places[best])
        following: Sequence[int] = range(len(places))
        agreed = all(own == ahead[best] for own in ahead)
        tokens: list[Copied] = []
        alive: list[float] = []
        for depth, token in enumerate(ahead[best]):
            same = following
            if not agreed and len(following) > 1:
                same = [i for i in following if depth < len(ahead[i]) and ahead[i][depth] == token]
            agreement = _agreement(places, following, same)
            known = judge.chance(length + depth, agreement)
            chance *= (
                min(known, SURE) if depth or judge is not self._calibration else self._request.adjust(known)
            )
            if tokens and chance < worth:
                break
            tokens.append(Copied(token, length + depth, agreement))
            alive.append(chance)
            following = same
        return Proposal(tokens, alive, self._origin(places[best]))

    def _origin(self, place: Place) -> str:
        """The source of a copy from `place`."""
        if place.text is self.text:
            return CONTEXT
        if self._prediction is not None and place.text is self._prediction.text:
            return PREDICTION
        return FORM if any(place.text is form for form in self._forms()) else MEMORY

    def _judge(self, place: Place) -> MatchCalibration:
        """The features by which a copy from `place` is judged."""
        predicted = self._prediction
        return (
            self._calibration
            if predicted is None or place.text is not predicted.text
            else predicted.calibration
        )


def _best(found: Sequence[Found]) -> int:
    """The longest match, the first of equals."""
    return max(range(len(found)), key=lambda i: found[i][0].length)


def _agreement(places: Sequence[Place], following: Sequence[int], same: Sequence[int]) -> Agreement:
    """How the places that agreed so far, `following`, judge a token that `same` of them say."""
    if len(following) == 1:
        return Agreement.ALONE
    if len(same) == len(following):
        return Agreement.UNANIMOUS
    otherwise = max(places[i].length for i in following if i not in same)
    return Agreement.LEADING if max(places[i].length for i in same) > otherwise else Agreement.CONTESTED
