"""LangChain and LangGraph: `wrap_model(ChatOpenAI(…))`, then `.bind_tools(…)` and all the rest."""

from __future__ import annotations

from langchain_openai import ChatOpenAI
from typing_extensions import Unpack

from whiflash_sdk.client import Settings, wrap


def wrap_model(model: ChatOpenAI, **settings: Unpack[Settings]) -> ChatOpenAI:
    """Wrap the model's clients, sync and async, with the settings of `whiflash_sdk.wrap`, and return the model.

    Hints for one runnable alone: `model.bind(extra_body=Hints(…).extra_body())`.
    """
    for client in (model.root_client, model.root_async_client):
        if client is not None:  # without a key there is no sync client
            wrap(client, **settings)
    return model
