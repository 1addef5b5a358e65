"""Adapter for pydantic-ai: `Agent(wrap_model(OpenAIChatModel(…, provider=…)))`."""

from __future__ import annotations

import copy
from typing import TypeVar

from typing_extensions import Unpack

from whiflash_sdk.adapters import extra
from whiflash_sdk.client import apart, wrap
from whiflash_sdk.outgoing import ClientSettings

with extra("pydantic-ai"):
    from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel  # type: ignore[import-not-found]

try:
    from pydantic_ai._run_context import get_current_run_context  # type: ignore[import-not-found]
except ImportError:  # older versions
    get_current_run_context = None

ModelT = TypeVar("ModelT", OpenAIChatModel, OpenAIResponsesModel)


def wrap_model(model: ModelT, **settings: Unpack[ClientSettings]) -> ModelT:
    """Give the model a wrapped client of its own, with the settings of `whiflash_sdk.wrap`, and return the model.

    Calls carry the running agent's name, unless the settings name another. Hints for a single run:
    `model_settings={"extra_body": Hints(…).extra_body()}`.
    """
    settings.setdefault("agent", running_agent)
    client = wrap(apart(model.client, model), **settings)
    if "client" in vars(model):
        model.client = client
    else:  # newer versions read it from the provider, which several models may share
        model._provider = _with_client(model._provider, client)
    return model


def _with_client(provider: object, client: object) -> object:
    """Copy the provider for this client. The copy has its own HTTP client if the provider closes its HTTP client."""
    made = copy.copy(provider)
    vars(made)["_client"] = client
    if getattr(made, "_own_http_client", None) is not None:
        http = vars(made)["_own_http_client"] = made._http_client_factory()  # type: ignore[attr-defined]
        made._set_http_client(http)  # type: ignore[attr-defined]
    return made


def running_agent() -> str | None:
    """Return the name of the running agent; None outside, and in versions that do not expose it."""
    context = get_current_run_context() if get_current_run_context is not None else None
    name: str | None = getattr(getattr(context, "agent", None), "name", None)
    return name
