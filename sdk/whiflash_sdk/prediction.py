"""Predicted outputs: `with predict(text): client.chat.completions.create(...)`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_PREDICTED: ContextVar[str | None] = ContextVar("whiflash_predicted", default=None)


def predicted_text() -> str | None:
    """What the innermost enclosing `predict` block expects back; None outside."""
    return _PREDICTED.get()


@contextmanager
def predict(text: str | None) -> Iterator[None]:
    """Calls inside the block expect `text` back, or something like it: the file to edit, the document to correct.

    The server copies from it, so an answer that follows it takes a fraction of the time. Every copied token is
    verified: in fp32 the answer is the same with any prediction, in bf16 another token may win a near tie. It goes out
    with chat and text completions, in this thread or task, to servers that say that they understand it. A call's own
    `prediction=` is left as it is, on every server. None: nothing is expected after all.
    """
    token = _PREDICTED.set(text)
    try:
        yield
    finally:
        _PREDICTED.reset(token)
