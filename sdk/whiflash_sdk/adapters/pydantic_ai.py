"""pydantic-ai: `Agent(wrap_model(OpenAIChatModel(…, provider=…)))`."""

from __future__ import annotations

from pydantic_ai.models.openai import OpenAIChatModel  # type: ignore[import-not-found]

from whiflash_sdk.client import wrap
from whiflash_sdk.hints import Hints


def wrap_model(
    model: OpenAIChatModel, *, hints: Hints | None = None, strict: bool = False, trace: bool = True
) -> OpenAIChatModel:
    """Wrap the model's client, see `whiflash_sdk.wrap`, and return the model.

    Hints for one run alone: `model_settings={"extra_body": Hints(…).extra_body()}`.
    """
    wrap(model.client, hints=hints, strict=strict, trace=trace)
    return model
