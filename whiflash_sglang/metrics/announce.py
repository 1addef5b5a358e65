"""What an operator's log says of WHIFLASH: one line at the start, one for each call that steers. Imports no SGLang."""

import json
import logging
from collections.abc import Mapping
from typing import Any

from whiflash_sglang.config import PolicyChange
from whiflash_sglang.drafters.base import Drafter
from whiflash_sglang.routing.assign import Costs

logger = logging.getLogger("whiflash_sglang")


def started(
    policy: str, drafters: Mapping[str, Drafter], costs: Costs, *, draft_bytes: int, token_bytes: int
) -> None:
    """Say who may draft, how wide, at what price.

    Args:
        draft_bytes: of a token's KV, the drafters' part. token_bytes: all of it.
    """
    arms = []
    for arm, drafter in drafters.items():
        seconds = costs.draft(arm, 1)
        price = f", {1000 * seconds:.2f} ms a draft" if seconds else ""
        arms.append(f"{arm} (up to {drafter.max_drafts} drafts{price})")
    share = draft_bytes / token_bytes if token_bytes else 0.0
    logger.info(
        "WHIFLASH: policy %s; arms %s; drafters' KV %d of %d bytes a token (%.1f%%)",
        policy,
        ", ".join(arms),
        draft_bytes,
        token_bytes,
        100 * share,
    )


def steered(client: str | None, call: str, what: Mapping[str, Any], status: int) -> None:
    """Say who changed what, or tried to, on a route that steers.

    Args:
        client: address of the connection, a gateway's if there is one before us; None where there is none. call: name
            of the route. what: as fields that are fit for a log: none of a tenant's keys. status: of the answer.
    """
    done = "done" if status == 200 else f"refused with {status}"
    logger.info("control: %s %s, from %s: %s", call, json.dumps(what), client or "nowhere", done)


def loggable(change: Mapping[str, Any]) -> dict[str, Any]:
    """A change of policy as the log may have it: the fields that exist, with what they were given if that is short."""
    found = {}
    for name in PolicyChange.model_fields:
        if name in change:
            value = change[name]
            short = isinstance(value, bool | int | float | str | None) and len(repr(value)) <= 32
            found[name] = value if short else "..."
    return found
