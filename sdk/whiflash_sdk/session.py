"""One tenant's conversation with one agent: `with Session(tenant="acme", agent="coder"): agent.run(...)`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from typing_extensions import Self

from whiflash_sdk.blocks import BlockValue
from whiflash_sdk.edits import file_to_edit
from whiflash_sdk.hints import Hints, name_sent


@dataclass(frozen=True)
class Session:
    """Names the tenant and the agent of the calls inside the block, in this thread or task.

    An inner session inherits fields that it leaves out. If a request offers a tool that edits files, the file that the
    conversation read or wrote last is sent as its prediction. A call, an inner block or `predict` wins.

    tenant: owner of the answers' text, as in `wrap(tenant=)`. agent: name of the agent. predicts: whether files are
    predicted; the default is yes. task: name of the task, whose calls copy from each other's answers.

    Raises: ValueError for an empty tenant.
    """

    tenant: str | None = None
    agent: str | None = None
    predicts: bool | None = None
    task: str | None = None

    def __post_init__(self) -> None:
        if self.tenant == "":
            raise ValueError("tenant: is empty, which is no salt. Give a name, or None")

    def __enter__(self) -> Self:
        _SESSION.enter(self)
        return self

    def __exit__(self, *_: object) -> None:
        _SESSION.leave(self)

    def hints(self) -> Hints:
        """Return hints with the names of agent and task, as far as they are given."""
        agent = Hints(agent=name_sent(self.agent)) if self.agent else Hints()
        return Hints(task=name_sent(self.task)).over(agent) if self.task else agent

    def prediction(self, body: Mapping[str, Any], parser: str | None) -> str | None:
        """Return the file that this request may edit; None if unknown. parser: the server's parser of tool calls."""
        return None if self.predicts is False else file_to_edit(body, parser)


_SESSION: BlockValue[Session | None] = BlockValue("whiflash_session", None)


def session() -> Session | None:
    """Merge the enclosing sessions field by field, the innermost first; None outside of sessions."""
    held = [one for one in _SESSION.held() if one]

    def field(name: str) -> Any:
        return next((value for one in held if (value := getattr(one, name)) is not None), None)

    return Session(field("tenant"), field("agent"), field("predicts"), field("task")) if held else None


def naming_sessions() -> list[Session]:
    """Return the enclosing sessions that name an agent or a task, the innermost first."""
    return [one for one in _SESSION.held() if one and (one.agent or one.task)]
