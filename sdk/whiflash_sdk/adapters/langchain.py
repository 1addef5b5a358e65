"""LangChain and LangGraph: `wrap_model(ChatOpenAI(…))`, then `.bind_tools(…)` and all the rest."""

from __future__ import annotations

from typing import TypeVar

from langchain_core.runnables.config import var_child_runnable_config
from langchain_openai.chat_models.base import BaseChatOpenAI
from typing_extensions import Unpack

from whiflash_sdk.client import apart, wrap
from whiflash_sdk.outgoing import Settings

ModelT = TypeVar("ModelT", bound=BaseChatOpenAI)


def wrap_model(model: ModelT, **settings: Unpack[Settings]) -> ModelT:
    """Give the model wrapped clients of its own, with the settings of `whiflash_sdk.wrap`, and return the model.

    Calls from a graph carry its node's name as `agent`, unless something else is said.

    Hints for one runnable alone: `model.bind(extra_body=Hints(…).extra_body())`.
    """
    settings.setdefault("agent", node)
    if model.root_client is not None:  # where the key is an async function there is none
        model.root_client = wrap(apart(model.root_client, model), **settings)
        model.client = model.root_client.chat.completions
    if model.root_async_client is not None:
        model.root_async_client = wrap(apart(model.root_async_client, model), **settings)
        model.async_client = model.root_async_client.chat.completions
    return model


def node() -> str | None:
    """The LangGraph node that is running here, inner graphs' behind outer ones': `team/planner`; None outside."""
    config = var_child_runnable_config.get() or {}
    metadata = config.get("metadata") or {}
    path = str(metadata.get("langgraph_checkpoint_ns") or metadata.get("langgraph_node") or "")
    # A namespace holds `node:task id` for every graph, and numbers of tasks that one node started.
    return "/".join(part.split(":")[0] for part in path.split("|") if not part.isdigit()) or None
