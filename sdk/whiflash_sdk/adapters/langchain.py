"""LangChain and LangGraph: `wrap_model(ChatOpenAI(…))`, then `.bind_tools(…)` and all the rest."""

from __future__ import annotations

from langchain_openai import ChatOpenAI

from whiflash_sdk.client import wrap
from whiflash_sdk.hints import Hints


def wrap_model(
    model: ChatOpenAI, *, hints: Hints | None = None, strict: bool = False, trace: bool = True
) -> ChatOpenAI:
    """Wrap the model's clients, sync and async, see `whiflash_sdk.wrap`, and return the model.

    Hints for one runnable alone: `model.bind(extra_body=Hints(…).extra_body())`.
    """
    for client in (model.root_client, model.root_async_client):
        if client is not None:  # without a key there is no sync client
            wrap(client, hints=hints, strict=strict, trace=trace)
    return model
