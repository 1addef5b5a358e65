"""The processes that serve one model together: the first decides, the others follow. Imports no SGLang.

A round's work follows from what was committed, which all know, and from clocks and mail, which only the first looks at.
So the first decides, once a round, and sends it to the others. Everything else they work out from the same numbers with
the same code. Every message checks that they did, by a checksum of all that was noted.
"""

import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from whiflash_sglang.errors import WhiflashError

T = TypeVar("T")


class DivergedError(WhiflashError):
    """Two processes of one model did different things: their collective calls would wait for each other for ever."""


@dataclass(frozen=True, slots=True)
class Message:
    """The first rank's message. number: of those before it. checksum: of what it had noted by then. now: on
    its clock.
    """

    number: int
    checksum: int
    now: float
    value: Any


class Ranks:
    """One process of those that serve a model, alone unless it is given others.

    Args:
        rank: of this process, 0 decides. size: processes. send: from the first process to all, in each of which it
            returns what the first handed in; None where there is one.
    """

    def __init__(
        self, rank: int = 0, size: int = 1, send: Callable[[Message | None], Any] | None = None
    ) -> None:
        if (send is None) != (size == 1):
            raise ValueError(f"{size} ranks and {'no ' * (send is None)}way to talk to them")
        self.rank, self.size, self._send = rank, size, send
        self._number = self._checksum = 0
        self._now = 0.0

    @property
    def leads(self) -> bool:
        """Whether this process decides."""
        return self.rank == 0

    def broadcast(self, decide: Callable[[], T]) -> T:
        """Decision of the first rank, in all of them; `decide` is called there only.

        Raises:
            DivergedError: in another rank, when it has not noted what the first has, or the first sends something else.
        """
        if self._send is None:
            return decide()
        message = None
        if self.leads:
            message = Message(self._number, self._checksum, time.monotonic(), decide())
        received = self._send(message)
        if not isinstance(received, Message):
            raise DivergedError(
                f"rank {self.rank} of {self.size} waits for a round's plan, rank 0 sent something else "
                f"({received!r:.80}): "
                "they do not serve the same requests any more"
            )
        if (received.number, received.checksum) != (self._number, self._checksum):
            raise DivergedError(
                f"rank {self.rank} of {self.size} did not commit what rank 0 did: before message {received.number} of "
                f"rank 0, {self._number} of this one, they noted {received.checksum:08x} and {self._checksum:08x}"
            )
        self._number, self._now = received.number + 1, received.now
        value: T = received.value
        return value

    def note(self, *facts: object) -> None:
        """Note facts that every rank must share, by their `repr`; they are compared with the next message."""
        if self._send is not None:
            self._checksum = zlib.crc32(repr(facts).encode(), self._checksum)

    def now(self) -> float:
        """Seconds that never run backwards, the same in every rank: of the first, when it spoke last, 0 before."""
        return time.monotonic() if self._send is None else self._now
