"""Each adapter in its real framework: one tool call to its end, hints on every request, traces back."""

import asyncio
from contextvars import copy_context
from typing import Any

import pytest
from fake_server import FakeServer
from openai import AsyncOpenAI, OpenAI

from whiflash_sdk import Capabilities, collect
from whiflash_sdk.client import apart, wrap

FINAL = "It is four."
HELLO: Any = [{"role": "user", "content": "Hello."}]


def check(server: FakeServer, traces: list[Any]) -> None:
    """The tool was called, its result reached the next prompt, and both requests were routed."""
    assert len(server.bodies) == len(traces) == 2
    assert server.said("trace") == [True, True]
    results = [message for message in server.bodies[1]["messages"] if message["role"] == "tool"]
    assert "4" in str(results[0]["content"])


def calculate(expression: str) -> str:
    """Work out an arithmetic expression.

    Args:
        expression: the expression, such as 2+2.
    """
    assert expression == "2+2"
    return "4"


@pytest.fixture(autouse=True)
def prose(server: FakeServer) -> None:
    server.content = FINAL


@pytest.mark.parametrize(("tracing", "streamed"), [(False, True), (True, False)])
def test_openai_agents_name_whoever_runs(server: FakeServer, tracing: bool, streamed: bool) -> None:
    """Behind a hand-off another agent asks; a tool that is an agent asks in its own name."""
    agents = pytest.importorskip("agents")
    from whiflash_sdk.adapters.openai_agents import running_agent, wrap_model

    agents.set_trace_processors([])  # nobody receives the spans
    agents.set_tracing_disabled(not tracing)
    client = AsyncOpenAI(base_url=server.base_url, api_key="key")
    model = wrap_model(agents.OpenAIChatCompletionsModel(model="m", openai_client=client))
    inner = agents.Agent(name="inner", model=model)
    outer = agents.Agent(name="outer", model=model, tools=[inner.as_tool("ask", "Ask it.")])
    first = agents.Agent(name="first", model=model, handoffs=[outer])

    async def run(agent: Any) -> str:
        if not streamed:
            return str((await agents.Runner.run(agent, "What is 2+2?")).final_output)
        result = agents.Runner.run_streamed(agent, "What is 2+2?")
        async for _ in result.stream_events():
            pass
        return str(result.final_output)

    async def both() -> list[str]:
        return [await run(first), await run(outer)]

    with collect() as collected:
        assert [text.strip() for text in asyncio.run(both())] == [FINAL] * 2
    assert len(collected.traces) == 5
    assert server.said("agent") == ["first", "outer", "outer", "inner", "outer"]
    assert running_agent() is None
    agents.set_tracing_disabled(True)


@pytest.mark.parametrize("streaming", [False, True])
def test_langgraph(server: FakeServer, streaming: bool) -> None:
    pytest.importorskip("langgraph")
    from langchain_core.tools import tool
    from langchain_openai import ChatOpenAI
    from langgraph.prebuilt import create_react_agent

    from whiflash_sdk.adapters.langchain import wrap_model

    model = wrap_model(ChatOpenAI(model="m", base_url=server.base_url, api_key="key", streaming=streaming))
    agent = create_react_agent(model, [tool(calculate)])
    with collect() as collected:
        result = agent.invoke({"messages": [("user", "What is 2+2?")]})
    assert result["messages"][-1].content.strip() == FINAL
    check(server, collected.traces)
    assert server.said("agent") == ["agent", "agent"]


def test_langgraph_nodes_are_named_by_their_path(server: FakeServer) -> None:
    pytest.importorskip("langgraph")
    from langchain_openai import ChatOpenAI
    from langgraph.graph import END, START, MessagesState, StateGraph

    from whiflash_sdk import Hints, agent
    from whiflash_sdk.adapters.langchain import node, wrap_model

    model = wrap_model(ChatOpenAI(model="m", base_url=server.base_url, api_key="key"))

    async def ask(state: Any) -> Any:
        return {"messages": [await model.ainvoke(state["messages"])]}

    def say(state: Any) -> Any:
        with agent("said"):
            model.invoke(state["messages"])
        model.invoke(state["messages"])
        bound = model.bind(extra_body=Hints(agent="bound").extra_body())
        return {"messages": [bound.invoke(state["messages"])]}

    inner = StateGraph(MessagesState).add_node("plan", ask).add_edge(START, "plan").add_edge("plan", END)
    graph = StateGraph(MessagesState).add_node("team", inner.compile()).add_node("write", ask)
    graph.add_node("say", say)
    graph.add_edge(START, "team").add_edge("team", "write").add_edge("write", "say").add_edge("say", END)
    asyncio.run(graph.compile().ainvoke({"messages": [("user", "Hello.")]}))
    assert server.said("agent") == ["team/plan", "write", "said", "say", "bound"]
    assert node() is None
    model.invoke("Outside.")
    wrap_model(model.model_copy(), agent="mine").invoke("Outside.")
    with pytest.raises(ValueError, match="wrapped already, with other agent"):
        wrap_model(model, agent="mine")
    wrap_model(model).invoke("Outside.")
    told = wrap_model(model.model_copy(), capabilities=Capabilities(version=1), trace=False, agent="told")
    told.invoke("Outside.")
    assert server.said("agent")[5:] == [None, "mine", None, "told"]
    assert "trace" not in server.hints()


OF_LANGCHAIN = {
    ("researcher", "model:1"): "researcher",
    ("researcher", "tools:1|2|model:3"): "researcher",
    ("researcher", "Summarization.before_model:1"): "researcher",
    ("boss", "tools:1"): "boss",
    ("boss", "tools:1|planner:2"): "boss/planner",
    ("boss", ""): "boss",
    (None, "model:1"): "model",
}


@pytest.mark.parametrize(("said", "expected"), OF_LANGCHAIN.items())
def test_agents_that_langchain_makes_have_their_own_names(said: tuple[str, str], expected: str) -> None:
    """LangChain 1 names an agent in its metadata, which every graph of its tools inherits."""
    config = pytest.importorskip("langchain_core.runnables.config").var_child_runnable_config
    pytest.importorskip("langchain_openai")
    from whiflash_sdk.adapters.langchain import node

    context = copy_context()
    context.run(config.set, {"metadata": {"lc_agent_name": said[0], "langgraph_checkpoint_ns": said[1]}})
    assert context.run(node) == expected


def shared(framework: str, server: FakeServer) -> tuple[Any, list[Any]]:
    """Two models of a framework on one client, wrapped in turn; and how to ask one."""
    if framework.startswith("agents"):
        agents = pytest.importorskip("agents")
        from whiflash_sdk.adapters.openai_agents import wrap_model as wrap_agents

        agents.set_tracing_disabled(True)
        client = AsyncOpenAI(base_url=server.base_url, api_key="key")
        model_class = getattr(agents, framework.partition(".")[2])
        made = [wrap_agents(model_class(model="tiny", openai_client=client), agent=name) for name in "ab"]
        return lambda model: agents.Runner.run(agents.Agent(name="x", model=model), "Hello."), made
    if framework == "langchain":
        langchain = pytest.importorskip("langchain_openai")
        from whiflash_sdk.adapters.langchain import wrap_model as wrap_langchain

        one = langchain.ChatOpenAI(model="tiny", base_url=server.base_url, api_key="key")
        made = [wrap_langchain(model, agent=name) for model, name in ((one, "a"), (one.model_copy(), "b"))]
        return lambda model: model.ainvoke("Hello."), made
    if framework == "smolagents":
        smolagents = pytest.importorskip("smolagents")
        from whiflash_sdk.adapters.smolagents import wrap_model as wrap_smolagents

        sync_client = OpenAI(base_url=server.base_url, api_key="key")
        both = [smolagents.OpenAIModel("tiny", api_key="key") for _ in "ab"]
        for model in both:
            model.client = sync_client
        made = [wrap_smolagents(model, agent=name) for model, name in zip(both, "ab", strict=True)]
        message = smolagents.ChatMessage(role="user", content="Hello.")
        return lambda model: asyncio.to_thread(model.generate, [message]), made
    pydantic_ai = pytest.importorskip("pydantic_ai")
    from pydantic_ai.models import openai
    from pydantic_ai.providers.openai import OpenAIProvider

    from whiflash_sdk.adapters.pydantic_ai import wrap_model as wrap_pydantic

    provider = OpenAIProvider(openai_client=AsyncOpenAI(base_url=server.base_url, api_key="key"))
    model_class = getattr(openai, framework.partition(".")[2])
    made = [wrap_pydantic(model_class("tiny", provider=provider), agent=name) for name in "ab"]
    return lambda model: pydantic_ai.Agent(model).run("Hello."), made


OF_AGENTS = ["agents.OpenAIChatCompletionsModel", "agents.OpenAIResponsesModel"]
OF_PYDANTIC = ["pydantic_ai.OpenAIChatModel", "pydantic_ai.OpenAIResponsesModel"]


@pytest.mark.parametrize("framework", ["langchain", "smolagents", *OF_AGENTS, *OF_PYDANTIC])
def test_models_of_one_client_keep_their_settings(framework: str, server: FakeServer) -> None:
    server.capabilities["routes"] = ["chat/completions", "completions", "responses"]
    ask, models = shared(framework, server)

    async def both() -> None:
        for model in models:
            await ask(model)

    asyncio.run(both())
    assert server.said("agent") == ["a", "b"]


@pytest.mark.parametrize("is_wrapped", [True, False])
def test_a_client_whose_class_makes_no_copies_is_shared_too(server: FakeServer, is_wrapped: bool) -> None:
    class Mine(OpenAI):
        def __init__(self, url: str) -> None:
            super().__init__(base_url=url, api_key="key")

    class Model:
        pass

    mine = Mine(server.base_url)
    whole = [wrap(mine, agent="whole")] if is_wrapped else []
    mine.chat.completions.create(model="m", messages=HELLO)
    models = [Model(), Model()]
    views = [wrap(apart(mine, model), agent=name) for model, name in zip(models, "ab", strict=True)]
    server.bodies.clear()
    with collect(*whole, views[1]) as collected:
        for asked in (*views, *whole):
            asked.chat.completions.create(model="m", messages=HELLO)
    assert server.said("agent") == ["a", "b", "whole"][: len(server.bodies)]
    assert [trace.agent for trace in collected.traces] == (["a", "b", "whole"] if is_wrapped else ["b"])
    if not is_wrapped:
        mine.chat.completions.create(model="m", messages=HELLO)
        assert "custom_params" not in server.bodies[-1]
    assert all(isinstance(view, Mine) for view in views)


def test_a_tracer_on_a_shared_client_is_kept(server: FakeServer) -> None:
    client, seen = OpenAI(base_url=server.base_url, api_key="key"), list[str]()
    request = client.request

    def traced(cast_to: Any, options: Any, **more: Any) -> Any:
        seen.append(options.url)
        return request(cast_to, options, **more)

    client.request = traced  # type: ignore[method-assign,assignment]
    copy = wrap(apart(client, server))
    copy.chat.completions.create(model="m", messages=HELLO)
    assert seen[-1] == "/chat/completions"
    assert "whiflash" in server.bodies[-1]["custom_params"]


def test_pydantic_ai(server: FakeServer) -> None:
    pydantic_ai = pytest.importorskip("pydantic_ai")
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    from whiflash_sdk.adapters.pydantic_ai import get_current_run_context, wrap_model

    client = AsyncOpenAI(base_url=server.base_url, api_key="key")
    model = wrap_model(OpenAIChatModel("m", provider=OpenAIProvider(openai_client=client)))
    agent = pydantic_ai.Agent(model, tools=[calculate], name="helper")
    with collect() as collected:
        assert agent.run_sync("What is 2+2?").output == FINAL
    check(server, collected.traces)
    if get_current_run_context is not None:
        assert server.said("agent") == ["helper", "helper"]


def test_smolagents(server: FakeServer) -> None:
    smolagents = pytest.importorskip("smolagents")
    from whiflash_sdk.adapters.smolagents import wrap_model

    model = wrap_model(smolagents.OpenAIModel("m", api_base=server.base_url, api_key="key"))
    agent = smolagents.ToolCallingAgent(tools=[smolagents.tool(calculate)], model=model, max_steps=2, verbosity_level=0)
    with collect() as collected:
        agent.run("What is 2+2?")
    assert set(server.said("agent")) == {"ToolCallingAgent"}
    assert len(collected.traces) == len(server.bodies) >= 2
    assert server.hints(0)["trace"] is True
    assert "Observation:\n4" in str(
        server.bodies[1]["messages"][-1]["content"][0]["text"]
    )  # smolagents sends it as text
