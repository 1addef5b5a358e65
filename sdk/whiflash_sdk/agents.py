"""Names of agents, by blocks and by frameworks: `with agent("planner"): client.chat.completions.create(...)`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

from whiflash_sdk.hints import Hints, name_sent
from whiflash_sdk.spans import hinted

Agent = str | Callable[[], "str | None"]
"""A name, or a function that returns it at every call; None: no name."""


def agent(name: str) -> AbstractContextManager[Hints]:
    """Name the agent of the calls inside the block, in this thread or task; wins over a framework's and the client's.

    Traces and reports name the agent; drafts do not depend on it.

    name: of 1 to 64 characters.

    Raises: HintError for what the server would refuse.
    """
    return hinted(Hints(agent=name))


def name_of(agent: Agent | None) -> str | None:
    """Return the agent's name at this call, as it is sent; None if it has none."""
    name = agent() if callable(agent) else agent
    return name_sent(name) if name else None
