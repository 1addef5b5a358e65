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
    """Calls inside the block are of this tenant and agent, in this thread or task.

    An inner session that leaves a field out has the outer one's. If a request offers a tool that edits files, the file
    that the conversation read or wrote last is sent as its prediction. A call, an inner block or `predict` wins.

    tenant: whose text the answers are, as `wrap(tenant=)` has it. agent: name of the agent. predicts: whether files are
    predicted, which they are by default.

    Raises: ValueError for an empty tenant.
    """

    tenant: str | None = None
    agent: str | None = None
    predicts: bool | None = None

    def __post_init__(self) -> None:
        if self.tenant == "":
            raise ValueError("tenant: is empty, which is no salt. Give a name, or None")

    def __enter__(self) -> Self:
        _SESSION.enter(self)
        return self

    def __exit__(self, *_: object) -> None:
        _SESSION.leave(self)

    def hints(self) -> Hints:
        """Hints with the agent's name."""
        return Hints(agent=name_sent(self.agent)) if self.agent else Hints()

    def prediction(self, body: Mapping[str, Any], parser: str | None) -> str | None:
        """The file that this request may edit. parser: the server's, of tool calls."""
        return None if self.predicts is False else file_to_edit(body, parser)


_SESSION: BlockValue[Session | None] = BlockValue("whiflash_session", None)


def session() -> Session | None:
    """The enclosing sessions as one: the innermost wins, field by field."""
    held = [one for one in _SESSION.held() if one]

    def field(name: str) -> Any:
        return next((value for one in held if (value := getattr(one, name)) is not None), None)

    return Session(field("tenant"), field("agent"), field("predicts")) if held else None


def naming_sessions() -> list[Session]:
    """The enclosing sessions that have an agent, the innermost first."""
    return [one for one in _SESSION.held() if one and one.agent]
