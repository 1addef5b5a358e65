"""pydantic-ai: `Agent(wrap_model(OpenAIChatModel(…, provider=…)))`."""

from __future__ import annotations

from pydantic_ai.models.openai import OpenAIChatModel  # type: ignore[import-not-found]
from typing_extensions import Unpack

from whiflash_sdk.client import Settings, wrap


def wrap_model(model: OpenAIChatModel, **settings: Unpack[Settings]) -> OpenAIChatModel:
    """Wrap the model's client, with the settings of `whiflash_sdk.wrap`, and return the model.

    Hints for one run alone: `model_settings={"extra_body": Hints(…).extra_body()}`.
    """
    wrap(model.client, **settings)
    return model
