"""The log of routes that steer a server: who changed it, and how."""

import json
import logging
from collections.abc import Mapping
from typing import Any

from whiflash_sglang.settings.config import PolicyChange

logger = logging.getLogger("whiflash_sglang")


def log_steering(client: str | None, call: str, what: Mapping[str, Any], status: int) -> None:
    """Log a change, or a refused one, on a route that steers.

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
