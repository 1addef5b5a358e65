"""OpenAI Agents SDK: `Agent(model=wrap_model(OpenAIChatCompletionsModel(…)))`."""

from __future__ import annotations

from agents import OpenAIChatCompletionsModel

from whiflash_sdk.client import wrap
from whiflash_sdk.hints import Hints


def wrap_model(
    model: OpenAIChatCompletionsModel, *, hints: Hints | None = None, strict: bool = False, trace: bool = True
) -> OpenAIChatCompletionsModel:
    """Wrap the model's client, see `whiflash_sdk.wrap`, and return the model.

    Hints for one agent alone go into its `ModelSettings(extra_body=Hints(…).extra_body())`.
    """
    wrap(model._client, hints=hints, strict=strict, trace=trace)
    return model
