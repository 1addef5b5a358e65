"""Adapter for the OpenAI Agents SDK: `Agent(model=wrap_model(OpenAIChatCompletionsModel(…)))`."""

from __future__ import annotations

from typing import TypeVar

from typing_extensions import Unpack

from whiflash_sdk.adapters import extra
from whiflash_sdk.client import apart, wrap
from whiflash_sdk.outgoing import ClientSettings

with extra("openai-agents"):
    from agents import OpenAIChatCompletionsModel, OpenAIResponsesModel, get_current_span
    from agents.tracing import AgentSpanData

ModelT = TypeVar("ModelT", OpenAIChatCompletionsModel, OpenAIResponsesModel)


def wrap_model(model: ModelT, **settings: Unpack[ClientSettings]) -> ModelT:
    """Give the model a wrapped client of its own, with the settings of `whiflash_sdk.wrap`, and return the model.

    Calls carry the running agent's name, unless the settings name another. Hints for a single agent go into its
    `ModelSettings(extra_body=Hints(…).extra_body())`.
    """
    settings.setdefault("agent", running_agent)
    model._client = wrap(apart(model._client, model), **settings)
    return model


def running_agent() -> str | None:
    """Return the name of the running agent; None outside.

    The agent's span encloses those of its calls, also if tracing is disabled. The enclosing span is found in a private
    field of the current one.
    """
    span = get_current_span()
    while span is not None and not isinstance(span.span_data, AgentSpanData):
        token = getattr(span, "_prev_span_token", None)
        before = getattr(token, "old_value", None)
        span = before if hasattr(before, "span_data") else None
    return span.span_data.name if span is not None else None
