"""Counts of rounds and requests by arm, from numbers that the host has without asking the device."""

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from whiflash_sglang.drafts import arms
from whiflash_sglang.spans.hints import HINT_SOURCES, HintSource

REASONS = ("score", "policy", "span", "pin", "off")
"""Reasons for which a round was routed to its arm."""

CACHED = ("device", "host", "storage")
"""Places from which a prompt's cached KV may come."""

MOST_PENDING = 4096
"""Most observations that wait to be published; the oldest are dropped, for instance where nobody publishes."""


@dataclass(slots=True)
class ArmCounts:
    """Counts of the rounds of one arm (`none`: rounds without a pass).

    rounds: of single requests. tokens: that they committed, bonus tokens included. proposed, accepted: drafts.
    joined, joined_accepted: the part of those drafts that another arm appended to the arm's own chain.
    """

    rounds: int = 0
    tokens: int = 0
    proposed: int = 0
    accepted: int = 0
    joined: int = 0
    joined_accepted: int = 0

    def add(self, tokens: int, proposed: int, first: int) -> None:
        """Count a round that committed `tokens` (bonus included) of `proposed` drafts, `first` by the arm itself."""
        self.rounds += 1
        self.tokens += tokens
        self.proposed += proposed
        self.accepted += tokens - 1
        self.joined += proposed - first
        self.joined_accepted += max(tokens - 1 - first, 0)

    def merge(self, other: "ArmCounts") -> None:
        """Add the figures of `other`."""
        for name, count in asdict(other).items():
            setattr(self, name, getattr(self, name) + count)


@dataclass(slots=True)
class Tally:
    """Totals since the start, and observations since they were last published.

    by_arm: counts of every arm and of `none`. loaded: counts by arm of ended requests whose prompt's KV came in part
    from the host or from storage. cached: prompt tokens of ended requests whose KV was cached, by place.
    reasons: rounds of requests by reason of their route. requests: that began, by source of their hints. previews: by
    what became of them; preview_tokens: prompt tokens that they prefilled.
    timed_seconds: of consecutive rounds and the time between them; timed_tokens: of these rounds. priced_seconds,
    priced_tokens: of timed rounds for which plain decoding's price was known; plain_seconds: that plain decoding would
    take for these tokens. round_seconds: observations of a round's time. acceptance: observations of tokens a round,
    one for each ended request and arm that drafted for it.
    """

    by_arm: dict[str, ArmCounts]
    loaded: dict[str, ArmCounts]
    cached: dict[str, int] = field(default_factory=lambda: dict.fromkeys(CACHED, 0))
    reasons: dict[str, int] = field(default_factory=lambda: dict.fromkeys(REASONS, 0))
    requests: dict[HintSource, int] = field(default_factory=lambda: dict.fromkeys(HINT_SOURCES, 0))
    previews: dict[str, int] = field(default_factory=lambda: {"prefilled": 0, "dropped": 0})
    preview_tokens: int = 0
    timed_seconds: float = 0.0
    timed_tokens: int = 0
    priced_seconds: float = 0.0
    priced_tokens: int = 0
    plain_seconds: float = 0.0
    round_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=MOST_PENDING))
    acceptance: deque[tuple[str, float]] = field(default_factory=lambda: deque(maxlen=MOST_PENDING))

    @classmethod
    def of(cls, drafters: Iterable[str]) -> "Tally":
        """Return an empty tally for a worker with these arms."""
        known = tuple(drafters)
        by_arm, loaded = ({arm: ArmCounts() for arm in (*known, arms.NONE)} for _ in range(2))
        return cls(by_arm, loaded)

    def committed(
        self, request: dict[str, ArmCounts], arm: str, reason: str, *, tokens: int, proposed: int, first: int
    ) -> None:
        """Count a round of `arm` in the totals and in `request`, the counts of its request (`ArmCounts.add`)."""
        if arm not in request:
            request[arm] = ArmCounts()
        for counts in (self.by_arm[arm], request[arm]):
            counts.add(tokens, proposed, first)
        self.reasons[reason] += 1

    def timed(self, tokens: int, seconds: float) -> None:
        """Count a round that committed `tokens`. seconds: those of the round and of its gap (`RoundTime`)."""
        self.timed_tokens += tokens
        self.timed_seconds += seconds

    def priced(self, tokens: int, seconds: float, *, plain_seconds: float) -> None:
        """Count a timed round. plain_seconds: what plain decoding would take for its tokens."""
        self.priced_tokens += tokens
        self.priced_seconds += seconds
        self.plain_seconds += plain_seconds

    def snapshot(self) -> dict[str, Any]:
        """Return the totals for `GET /whiflash/state`."""
        sums = ("timed_seconds", "timed_tokens", "priced_seconds", "priced_tokens", "plain_seconds")
        return {
            "by_arm": {arm: asdict(counts) for arm, counts in self.by_arm.items()},
            "loaded": {arm: asdict(counts) for arm, counts in self.loaded.items()},
            "cached": dict(self.cached),
            "reasons": dict(self.reasons),
            "hints": dict(self.requests),
            "previews": {**self.previews, "tokens": self.preview_tokens},
            **{name: getattr(self, name) for name in sums},
        }

    def ended(self, request: dict[str, ArmCounts], cached: Mapping[str, int]) -> None:
        """Count a request that ended or was retracted. request: its counts. cached: tokens by place, if it ended."""
        for place, tokens in cached.items():
            self.cached[place] += tokens
        for arm, counts in request.items():
            if "host" in cached or "storage" in cached:
                self.loaded[arm].merge(counts)
            self.acceptance.append((arm, counts.tokens / counts.rounds))
