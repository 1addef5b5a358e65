"""Ranks: the processes that serve one model together. Rank 0 decides, the others follow. Imports no SGLang.

A round's work follows from the committed tokens, which all ranks know, and from a clock, which only rank 0 reads. So
rank 0 decides once a round and sends its decision. The others work out everything else from the same numbers
with the same code. Every message checks that they did, by a checksum of all noted facts.
"""

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
    """A message of rank 0. number: of messages before it. checksum: of the facts that rank 0 had noted. value: its
    decision.
    """

    number: int
    checksum: int
    value: Any


class Ranks:
    """This process among the ranks that serve a model; by default it is the only one.

    Args:
        rank: of this process; 0 decides. size: number of processes. send: broadcasts from rank 0: in every process it
            returns what rank 0 passed in; None for a single process.
    """

    def __init__(self, rank: int = 0, size: int = 1, send: Callable[[Message | None], Any] | None = None) -> None:
        if (send is None) != (size == 1):
            raise ValueError(f"{size} ranks and {'no ' * (send is None)}way to talk to them")
        self.rank, self.size, self._send = rank, size, send
        self._number = self._checksum = 0

    @property
    def leads(self) -> bool:
        """Whether this process is rank 0, which decides each round for all."""
        return self.rank == 0

    def broadcast(self, decide: Callable[[], T]) -> T:
        """Return rank 0's decision in every rank; `decide` is called in rank 0 only.

        Raises:
            DivergedError: in another rank, if its noted facts differ from rank 0's, or rank 0 sends no `Message`.
        """
        if self._send is None:
            return decide()
        message = None
        if self.leads:
            message = Message(self._number, self._checksum, decide())
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
        self._number = received.number + 1
        value: T = received.value
        return value

    def note(self, *facts: object) -> None:
        """Note facts that every rank must share, by their `repr`; they are compared with the next message."""
        if self._send is not None:
            self._checksum = zlib.crc32(repr(facts).encode(), self._checksum)
