"""LangChain and LangGraph: `wrap_model(ChatOpenAI(…))`, then `.bind_tools(…)` and all the rest."""

from __future__ import annotations

from langchain_core.runnables.config import var_child_runnable_config
from langchain_openai import ChatOpenAI
from typing_extensions import Unpack

from whiflash_sdk.client import Settings, wrap


def wrap_model(model: ChatOpenAI, **settings: Unpack[Settings]) -> ChatOpenAI:
    """Wrap the model's clients, sync and async, with the settings of `whiflash_sdk.wrap`, and return the model.

    Calls from a graph carry its node's name as `agent`, unless something else is said.

    Hints for one runnable alone: `model.bind(extra_body=Hints(…).extra_body())`.
    """
    settings.setdefault("agent", node)
    for client in (model.root_client, model.root_async_client):
        if client is not None:  # without a key there is no sync client
            wrap(client, **settings)
    return model


def node() -> str | None:
    """The LangGraph node that is running here, inner graphs' behind outer ones': `team/planner`; None outside."""
    config = var_child_runnable_config.get() or {}
    metadata = config.get("metadata") or {}
    path = str(metadata.get("langgraph_checkpoint_ns") or metadata.get("langgraph_node") or "")
    # A namespace holds `node:task id` for every graph, and numbers of tasks that one node started.
    return "/".join(part.split(":")[0] for part in path.split("|") if not part.isdigit()) or None
