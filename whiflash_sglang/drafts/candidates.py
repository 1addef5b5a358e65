"""Candidates: drafts that are proposed without a pass of a model, and the sources that they were taken from."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

SOURCES = CONTEXT, GROUP, PREDICTION, GRAMMAR, TOOLS = "context", "group", "prediction", "grammar", "tools"
"""The sources of compiled code's drafts, in the order of its numbers: the request's text, answers of its group, the
answer that its caller predicts, its grammar, or only its tools."""


class Part(NamedTuple):
    """Successive drafts that were taken from one source."""

    source: str
    drafts: int


def parts_of(names: Iterable[int], arms: Sequence[str]) -> list[Part]:
    """Return the parts of successive drafts, by `Candidates.names` of compiled code. arms: those that propose."""
    return [
        Part(SOURCES[name] if name < len(SOURCES) else arms[name - len(SOURCES)], len(list(run)))
        for name, run in groupby(names)
    ]


def first_of(parts: Iterable[Part], count: int) -> Iterator[Part]:
    """Yield the parts of the first `count` drafts: the last part is cut."""
    for part in parts:
        if count > 0:
            yield Part(part.source, min(part.drafts, count))
        count -= part.drafts


class Forecast(NamedTuple):
    """Expectation of an arm for the next round, made in every round, also when another arm drafts.

    length: expected acceptance length, bonus token included; 1: nothing to propose. rows: number that it would verify.
    """

    length: float
    rows: int


PLAIN = Forecast(1.0, 1)
"""A round without drafts."""


class Candidate(NamedTuple):
    """Tokens that may follow a request's text. alive: for each token, the chance that it and all before it are
    accepted; never increasing. parts: sources of the tokens. at: position of the first token in the request's text.
    matched, agreements: for a copy only, how many tokens before it match, and by token how far the matching places
    agree on it. under_way: rows that earlier rounds are expected to verify; only later tokens must be worth a row."""

    tokens: Sequence[int] = ()
    alive: Sequence[float] = ()
    parts: Sequence[Part] = ()
    at: int = 0
    matched: int = 0
    agreements: Sequence[int] = ()
    under_way: int = 0

    def first(self, count: int) -> "Candidate":
        """Return the candidate cut to its first `count` tokens."""
        if count == len(self.tokens):
            return self
        parts = list(first_of(self.parts, count))
        return Candidate(self.tokens[:count], self.alive[:count], parts, self.at, under_way=self.under_way)

    def until(self, stops: Collection[int]) -> "Candidate":
        """Return the candidate cut after its first token of `stops`: nothing is accepted after the end of a turn."""
        if set(self.tokens).isdisjoint(stops):
            return self
        ends = (number for number, token in enumerate(self.tokens, 1) if token in stops)
        return self.first(next(ends, len(self.tokens)))

    def least_chance(self, price: float, passed: int) -> float:
        """Return the value of `alive` below which a token's row costs more than it brings. price: tokens that a row
        must bring if the first `passed` tokens are committed."""
        return price * self.alive[passed - 1] if 0 < passed <= len(self.alive) else price

    def valid(self, vocabulary: int) -> "Candidate":
        """Cut the candidate before the first token that is no id below `vocabulary` or whose chance is NaN."""
        tokens = self.tokens
        if not tokens or (min(tokens) >= 0 and max(tokens) < vocabulary and sum(self.alive) >= 0):
            return self
        pairs = zip(tokens, self.alive, strict=True)
        bad = (i for i, (token, alive) in enumerate(pairs) if not 0 <= token < vocabulary or alive != alive)
        return self.first(next(bad, len(tokens)))

    def outlook(self, most: int | None = None, passed: int = 0, price: float = 0.0) -> Forecast:
        """Return the forecast of verifying at most `most` tokens after the first `passed`, as far as they are worth
        `price` tokens a row. It assumes that earlier rounds commit those first ones; else the candidate is wrong.
        """
        if most is None and not passed and price <= 0.0:
            return Forecast(1 + sum(self.alive), 1 + len(self.alive))
        least = self.least_chance(price, passed)
        alive = [chance for chance in self.alive[passed:][:most] if chance >= least]
        return Forecast(1 + sum(alive), 1 + len(alive))


NOTHING = Candidate()


def common_prefix(first: Sequence[object], second: Sequence[object]) -> int:
    """Length of the longest common prefix of two sequences."""
    most = min(len(first), len(second))
    if first[:most] == second[:most]:  # a fast path, in C
        return most
    return next((number for number in range(most) if first[number] != second[number]), most)
