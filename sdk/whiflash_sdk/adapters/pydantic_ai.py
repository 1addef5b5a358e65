"""pydantic-ai: `Agent(wrap_model(OpenAIChatModel(…, provider=…)))`."""

from __future__ import annotations

from pydantic_ai.models.openai import OpenAIChatModel  # type: ignore[import-not-found]
from typing_extensions import Unpack

from whiflash_sdk.client import Settings, wrap

try:
    from pydantic_ai._run_context import get_current_run_context  # type: ignore[import-not-found]
except ImportError:  # versions of before
    get_current_run_context = None


def wrap_model(model: OpenAIChatModel, **settings: Unpack[Settings]) -> OpenAIChatModel:
    """Wrap the model's client, with the settings of `whiflash_sdk.wrap`, and return the model.

    Calls carry the running agent's name, unless something else is said. Hints for one run alone:
    `model_settings={"extra_body": Hints(…).extra_body()}`.
    """
    settings.setdefault("agent", running_agent)
    wrap(model.client, **settings)
    return model


def running_agent() -> str | None:
    """The agent that is running here; None outside, and in versions that do not tell."""
    context = get_current_run_context() if get_current_run_context is not None else None
    name: str | None = getattr(getattr(context, "agent", None), "name", None)
    return name
