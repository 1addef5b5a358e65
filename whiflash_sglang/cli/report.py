"""`whiflash report`: computes the gain of drafting from the counters of a running server."""

from collections.abc import Mapping
from typing import Any

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


def brought(state: Mapping[str, Any]) -> dict[str, Any]:
    """Compute the gain over plain decoding since a server's start, from its state: the figures of `--json`.

    `seconds` are those of all decode rounds, estimated at the pace of the timed ones. `gain` is the speed over plain
    decoding in the rounds for which plain decoding's price was known, None without such rounds. `plain_price` is how
    far that price is known (`PlainPrice`).

    Raises:
        ConfigError: the server has timed no round, or is of another release.
    """
    if missing := [name for name in COUNTED if name not in state]:
        raise ConfigError(f"its state has no {missing[0]}: use the command of the server's own release")
    tokens, timed, seconds, priced_tokens, priced_seconds, plain = (state[name] for name in SUMS)
    if min(tokens, timed, seconds) <= 0:
        raise ConfigError("the server has timed no round yet: send it requests, then ask again")
    # Rounds before a prefill or a pause are not timed.
    seconds = seconds * tokens / timed / replicas_of(state)
    gain = plain / priced_seconds if min(priced_tokens, priced_seconds, plain) > 0 else None
    return {
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "plain_tokens_per_second": None if gain is None else tokens / seconds / gain,
        "gain": gain,
        "plain_price": state["plain_price"],
        "tokens_by_arm": {arm: own["tokens"] for arm, own in state["by_arm"].items() if own["tokens"] > 0},
    }
