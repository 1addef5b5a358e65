"""OpenAI Agents SDK: `Agent(model=wrap_model(OpenAIChatCompletionsModel(…)))`."""

from __future__ import annotations

from agents import OpenAIChatCompletionsModel
from typing_extensions import Unpack

from whiflash_sdk.client import Settings, wrap


def wrap_model(model: OpenAIChatCompletionsModel, **settings: Unpack[Settings]) -> OpenAIChatCompletionsModel:
    """Wrap the model's client, with the settings of `whiflash_sdk.wrap`, and return the model.

    Hints for one agent alone go into its `ModelSettings(extra_body=Hints(…).extra_body())`.
    """
    wrap(model._client, **settings)
    return model
