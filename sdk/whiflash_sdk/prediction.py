"""Predicted outputs: `with predict(text): client.chat.completions.create(...)`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

from whiflash_sdk.blocks import BlockValue

_PREDICTED: BlockValue[str | bool | None] = BlockValue("whiflash_predicted", False)


def predicted_text(outside: Callable[[], str | None] = lambda: None) -> str | None:
    """What the innermost enclosing `predict` block expects back; what `outside` gives where there is none."""
    text = _PREDICTED.get()
    return outside() if isinstance(text, bool) else text


def predict(text: str | None) -> AbstractContextManager[str | bool | None]:
    """Calls inside the block expect `text` back, or something like it: the file to edit, the document to correct.

    The server copies from it, so an answer that follows it takes a fraction of the time. Every copied token is
    verified: in fp32 the answer is the same with any prediction, in bf16 another token may win a near tie. It goes out
    with every request that takes hints, in this thread or task, to servers that say that they understand it. A call's
    own `prediction=` is left as it is, on every server. None: nothing is expected after all.
    """
    return _PREDICTED.holding(text)
