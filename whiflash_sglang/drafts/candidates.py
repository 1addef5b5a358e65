"""Candidates: drafts that a draft source proposes without a pass of a model, and what they were taken from."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple


class Part(NamedTuple):
    """Successive drafts that were taken from one source."""

    source: str
    drafts: int


def first_of(parts: Iterable[Part], count: int) -> Iterator[Part]:
    """The first `count` drafts of them."""
    for part in parts:
        if count > 0:
            yield Part(part.source, min(part.drafts, count))
        count -= part.drafts


def behind(parts: Iterable[Part], count: int) -> Iterator[Part]:
    """The drafts of them that come after the first `count`."""
    for part in parts:
        if part.drafts > count:
            yield Part(part.source, part.drafts - max(count, 0))
        count -= part.drafts


class Forecast(NamedTuple):
    """Expectation of an arm for its next round; it looks in every round, whichever arm drafts then.

    length: expected acceptance length, bonus token included; 1: it has nothing to propose. rows: that it would verify.
    """

    length: float
    rows: int


PLAIN = Forecast(1.0, 1)
"""A round without drafts."""


class Candidate(NamedTuple):
    """Tokens that may follow a request's text. alive: for each token, the chance that it and all before it are
    accepted; never increasing. parts: their sources. at: the position of the first, if the text was known so far.
    matched, agreements: those of a copy, tokens before it that match, and how the places judge each of its tokens.
    under_way: rows that earlier rounds are expected to verify when it is made: only its tokens after theirs must pay.
    """

    tokens: Sequence[int] = ()
    alive: Sequence[float] = ()
    parts: Sequence[Part] = ()
    at: int = 0
    matched: int = 0
    agreements: Sequence[int] = ()
    under_way: int = 0

    def first(self, count: int) -> "Candidate":
        """Its first `count` tokens."""
        if count == len(self.tokens):
            return self
        parts = list(first_of(self.parts, count))
        return Candidate(self.tokens[:count], self.alive[:count], parts, self.at, under_way=self.under_way)

    def followed_by(self, tokens: Sequence[int], alive: Sequence[float], source: str) -> "Candidate":
        """With these tokens behind it, taken from `source`."""
        if not tokens:
            return self
        parts = [*self.parts, Part(source, len(tokens))]
        tokens, alive = [*self.tokens, *tokens], [*self.alive, *alive]
        return Candidate(tokens, alive, parts, self.at, under_way=self.under_way)

    def least_chance(self, price: float, passed: int) -> float:
        """Value of `alive` below which a row is not worth `price` tokens: it is paid once `passed` are committed."""
        return price * self.alive[passed - 1] if 0 < passed <= len(self.alive) else price

    def valid(self, vocabulary: int) -> "Candidate":
        """Its first tokens, as far as each is one of `vocabulary` ids and has a chance that is a number."""
        tokens = self.tokens
        if not tokens or (min(tokens) >= 0 and max(tokens) < vocabulary and sum(self.alive) >= 0):
            return self
        pairs = zip(tokens, self.alive, strict=True)
        bad = (i for i, (token, alive) in enumerate(pairs) if not 0 <= token < vocabulary or alive != alive)
        return self.first(next(bad, len(tokens)))

    def gain(self, worth: float) -> float:
        """Tokens that verifying it is expected to bring, if a row must bring `worth`."""
        return sum(self.alive) - worth * len(self.alive)

    def outlook(self, most: int | None = None, passed: int = 0, price: float = 0.0) -> Forecast:
        """Forecast of verifying it, or `most` tokens, after `passed` that are expected to be committed by then: of
        those that are worth `price`. It brings nothing if others are committed.
        """
        least = self.least_chance(price, passed)
        alive = [chance for chance in self.alive[passed:][:most] if chance >= least]
        return Forecast(1 + sum(alive), 1 + len(alive))


NOTHING = Candidate()


def common_prefix(first: Sequence[object], second: Sequence[object]) -> int:
    """Tokens, or characters, that both begin with."""
    most = min(len(first), len(second))
    if first[:most] == second[:most]:  # in C
        return most
    return next((number for number in range(most) if first[number] != second[number]), most)
