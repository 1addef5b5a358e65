"""smolagents: `ToolCallingAgent(model=wrap_model(OpenAIModel(…)))`."""

from __future__ import annotations

from smolagents import OpenAIModel  # type: ignore[import-untyped]
from typing_extensions import Unpack

from whiflash_sdk.client import Settings, wrap


def wrap_model(model: OpenAIModel, **settings: Unpack[Settings]) -> OpenAIModel:
    """Wrap the model's client, with the settings of `whiflash_sdk.wrap`, and return the model.

    Hints for every call of this model: `OpenAIModel(…, extra_body=Hints(…).extra_body())`.
    """
    wrap(model.client, **settings)
    return model
