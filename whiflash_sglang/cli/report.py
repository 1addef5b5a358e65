"""`whiflash report`: computes the gain of drafting from the counters of a running server."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from whiflash_sglang.errors import ConfigError
from whiflash_sglang.files.hosts import replicas_of

CAVEAT = (
    "Plain seconds are the server's prices of rounds without drafts for the same tokens, not a second run. Prefills "
    "and idle time are in neither. Figures of a tenant or an agent are in OpenTelemetry spans and in "
    "`whiflash_sdk` (Session, collect)."
)


SUMS = ("tokens", "timed_tokens", "timed_seconds", "priced_tokens", "priced_seconds", "plain_seconds")
COUNTED = (*SUMS, "by_arm", "plain_price")
"""Keys of a server's state that a report reads."""


class Brought(NamedTuple):
    """Gain of a server. seconds: of all decode rounds, estimated at the pace of the timed ones. gain: speed over plain
    decoding in the rounds for which plain decoding's price was known; None without such rounds. by_arm: tokens. price:
    how far plain decoding's price is known (`PlainPrice`).
    """

    tokens: int
    seconds: float
    gain: float | None
    by_arm: Mapping[str, int]
    price: Mapping[str, Any]

    def as_json(self) -> dict[str, Any]:
        """Return the figures for `--json`."""
        rate, gain = self.tokens / self.seconds, self.gain
        return {
            "tokens": self.tokens,
            "seconds": self.seconds,
            "tokens_per_second": rate,
            "plain_tokens_per_second": None if gain is None else rate / gain,
            "gain": gain,
            "plain_price": self.price,
            "tokens_by_arm": dict(self.by_arm),
        }


def brought(state: Mapping[str, Any]) -> Brought:
    """Compute the gain over plain decoding since a server's start, from its state.

    Raises:
        ConfigError: the server has timed no round, or is of another release.
    """
    if missing := [name for name in COUNTED if name not in state]:
        raise ConfigError(f"its state has no {missing[0]}: use the command of the server's own release")
    tokens, timed, seconds, priced_tokens, priced_seconds, plain = (state[name] for name in SUMS)
    if min(tokens, timed, seconds) <= 0:
        raise ConfigError("the server has timed no round yet: send it requests, then ask again")
    return Brought(
        tokens,
        # Rounds before a prefill or a pause are not timed.
        seconds * tokens / timed / replicas_of(state),
        plain / priced_seconds if min(priced_tokens, priced_seconds, plain) > 0 else None,
        {arm: own["tokens"] for arm, own in state["by_arm"].items() if own["tokens"] > 0},
        state["plain_price"],
    )
