"""Names of agents: `with agent("planner"): client.chat.completions.create(...)`, and those that frameworks give."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

from whiflash_sdk.hints import Hints, name_sent
from whiflash_sdk.spans import hinted

Agent = str | Callable[[], "str | None"]
"""A name, or a function that returns it at every call; None: no name."""


def agent(name: str) -> AbstractContextManager[Hints]:
    """Calls inside the block are this agent's, in this thread or task, over what a framework says and the client.

    Traces and reports name the agent; drafts do not depend on it.

    name: of 1 to 64 characters.

    Raises: HintError for what the server would refuse.
    """
    return hinted(Hints(agent=name))


def name_of(agent: Agent | None) -> str | None:
    """The name now, as it is sent."""
    name = agent() if callable(agent) else agent
    return name_sent(name) if name else None
