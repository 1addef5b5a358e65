"""Adapter for smolagents: `ToolCallingAgent(model=wrap_model(OpenAIModel(…)))`."""

from __future__ import annotations

import sys
from types import FrameType
from typing import TypeVar

from typing_extensions import Unpack

from whiflash_sdk.adapters import extra
from whiflash_sdk.client import apart, wrap
from whiflash_sdk.outgoing import ClientSettings

with extra("smolagents"):
    from smolagents import MultiStepAgent, OpenAIModel  # type: ignore[import-untyped]

ModelT = TypeVar("ModelT", bound=OpenAIModel)


def wrap_model(model: ModelT, **settings: Unpack[ClientSettings]) -> ModelT:
    """Give the model a wrapped client of its own, with the settings of `whiflash_sdk.wrap`, and return the model.

    Calls carry the running agent's name, or its class's name without one, unless the settings name another. Hints for
    every call of this model: `OpenAIModel(…, extra_body=Hints(…).extra_body())`.
    """
    settings.setdefault("agent", running_agent)
    model.client = wrap(apart(model.client, model), **settings)
    return model


def running_agent() -> str | None:
    """Return the name of the agent whose step calls the model; None outside.

    smolagents passes only messages to a model, so the agent is searched for in the calling frames.
    """
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, MultiStepAgent):
            return str(caller.name or type(caller).__name__)
        frame = frame.f_back
    return None
