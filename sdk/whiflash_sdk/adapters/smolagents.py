"""smolagents: `ToolCallingAgent(model=wrap_model(OpenAIModel(…)))`."""

from __future__ import annotations

from smolagents import OpenAIModel  # type: ignore[import-untyped]

from whiflash_sdk.client import wrap
from whiflash_sdk.hints import Hints


def wrap_model(
    model: OpenAIModel, *, hints: Hints | None = None, strict: bool = False, trace: bool = True
) -> OpenAIModel:
    """Wrap the model's client, see `whiflash_sdk.wrap`, and return the model.

    Hints for every call of this model: `OpenAIModel(…, extra_body=Hints(…).extra_body())`.
    """
    wrap(model.client, hints=hints, strict=strict, trace=trace)
    return model
