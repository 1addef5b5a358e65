"""Values that `with` blocks set for their thread or task and the tasks that these start; `predict` is one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar, Token
from dataclasses import dataclass
from typing import Generic, TypeVar

ValueT = TypeVar("ValueT")


@dataclass(eq=False)
class _Block(Generic[ValueT]):
    value: ValueT
    outer: _Block[ValueT] | None
    ended: bool = False


class BlockValue(Generic[ValueT]):
    """A context variable whose value blocks set.

    A block may end in another context than it began in: frameworks run the two halves of a generator in two threads
    or tasks (FastAPI's `yield` dependencies, fixtures of pytest-asyncio). Such a block ends for every context, since
    nothing can reset the context that it began in. So does a block that ends before a block inside it.
    """

    def __init__(self, name: str, default: ValueT) -> None:
        self._blocks: ContextVar[_Block[ValueT] | None] = ContextVar(name, default=None)
        self._default = default

    def get(self) -> ValueT:
        """Return the value of the innermost open block; the default outside of blocks."""
        return next(self.held(), self._default)

    def held(self) -> Iterator[ValueT]:
        """Yield the values of all open enclosing blocks, the innermost first."""
        return (block.value for block in self._open())

    def _open(self) -> Iterator[_Block[ValueT]]:
        """Yield the enclosing blocks that have not ended, the innermost first."""
        block = self._blocks.get()
        while block is not None:
            if not block.ended:
                yield block
            block = block.outer

    def enter(self, value: ValueT) -> None:
        """Set the value until `leave`; for objects that may be entered in several tasks at once."""
        self._blocks.set(_Block(value, next(self._open(), None)))

    def leave(self, value: ValueT) -> None:
        """End the innermost open block that has this value."""
        block = next((block for block in self._open() if block.value is value), None)
        if block is not None:
            block.ended = True

    @contextmanager
    def holding(self, value: ValueT) -> Iterator[ValueT]:
        """Set the value until the block ends."""
        block = _Block(value, next(self._open(), None))
        token = self._blocks.set(block)
        try:
            yield value
        finally:
            block.ended = not self._is_reset(block, token)

    def _is_reset(self, block: _Block[ValueT], token: Token[_Block[ValueT] | None]) -> bool:
        """Reset the variable to before the block; False in another context, or if a block inside is still open."""
        if self._blocks.get() is not block:
            return False
        try:
            self._blocks.reset(token)
        except ValueError:
            return False
        return True


_PREDICTED: BlockValue[str | bool | None] = BlockValue("whiflash_predicted", False)


def predicted_text(outside: Callable[[], str | None] = lambda: None) -> str | None:
    """Return the text that the innermost enclosing `predict` block expects; without one, the result of `outside`."""
    text = _PREDICTED.get()
    return outside() if isinstance(text, bool) else text


def predict(text: str | None) -> AbstractContextManager[str | bool | None]:
    """Predict the answers of the calls inside the block: `text` is the file to edit or the document to correct.

    The server copies from the text, so an answer that follows it takes a fraction of the time. Every copied token is
    verified: in fp32 the answer is the same with any prediction, in bf16 another token may win a near tie. The text is
    sent with every request that takes hints, in this thread or task, to servers that understand predictions. A call's
    own `prediction=` is left as it is, on every server. None: predict nothing in this block.
    """
    return _PREDICTED.holding(text)
