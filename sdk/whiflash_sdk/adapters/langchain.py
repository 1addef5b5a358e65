"""Adapter for LangChain and LangGraph: `wrap_model(ChatOpenAI(…))`, then `.bind_tools(…)` and so on."""

from __future__ import annotations

from typing import Final, TypeVar

from typing_extensions import Unpack

from whiflash_sdk.adapters import extra
from whiflash_sdk.client import apart, wrap
from whiflash_sdk.outgoing import ClientSettings

with extra("langchain"):
    from langchain_core.runnables.config import var_child_runnable_config
    from langchain_openai.chat_models.base import BaseChatOpenAI

ModelT = TypeVar("ModelT", bound=BaseChatOpenAI)


def wrap_model(model: ModelT, **settings: Unpack[ClientSettings]) -> ModelT:
    """Give the model wrapped clients of its own, with the settings of `whiflash_sdk.wrap`, and return the model.

    Calls carry the name of their agent, or of their node in a graph, as `agent`, unless the settings name another.

    Hints for a single runnable: `model.bind(extra_body=Hints(…).extra_body())`.
    """
    settings.setdefault("agent", node)
    if model.root_client is not None:  # None if the key is an async function
        model.root_client = wrap(apart(model.root_client, model), **settings)
        model.client = model.root_client.chat.completions
    if model.root_async_client is not None:
        model.root_async_client = wrap(apart(model.root_async_client, model), **settings)
        model.async_client = model.root_async_client.chat.completions
    return model


_OF_AGENTS: Final = ("", "model", "tools")
"""Names of the nodes inside a LangChain agent; those of its middleware have a dot in their names."""


def node() -> str | None:
    """Return the name of the running LangChain agent (`create_agent`) or LangGraph node; None outside.

    A node of an inner graph follows the outer node, `team/planner`, or the agent whose tool runs the graph.
    """
    config = var_child_runnable_config.get() or {}
    metadata = config.get("metadata") or {}
    path = str(metadata.get("langgraph_checkpoint_ns") or metadata.get("langgraph_node") or "")
    # A namespace holds `node:task id` for every graph, and the numbers of tasks that a node started, which are dropped.
    nodes = [step.split(":")[0] for step in path.split("|") if not step.isdigit()]
    agent = metadata.get("lc_agent_name")
    if not agent:
        return "/".join(nodes) or None
    return str(agent) if nodes[-1] in _OF_AGENTS or "." in nodes[-1] else f"{agent}/{nodes[-1]}"
