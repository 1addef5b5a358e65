"""The tool loop as a LangGraph graph: a node that must call a tool, the tools, a node that answers."""

from langchain_core.messages import HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode
from session import Session
from tools import query_shop
from whiflash_sdk import collect
from whiflash_sdk.adapters.langchain import wrap_model

TASK = "How many customers does the shop have? Ask the database."


def build(model: ChatOpenAI):
    """Build the graph of three nodes: call → tools → answer."""
    tools = [tool(query_shop)]
    calling = model.bind_tools(tools, tool_choice="required", strict=True)
    answering = model.bind_tools(tools, tool_choice="none")
    graph = StateGraph(MessagesState)
    graph.add_node("call", lambda state: {"messages": [calling.invoke(state["messages"])]})
    graph.add_node("tools", ToolNode(tools))
    graph.add_node("answer", lambda state: {"messages": [answering.invoke(state["messages"])]})
    for before, after in ((START, "call"), ("call", "tools"), ("tools", "answer"), ("answer", END)):
        graph.add_edge(before, after)
    return graph.compile()


def main() -> None:
    session = Session.from_command_line(__doc__)
    model = ChatOpenAI(
        model=session.model,
        base_url=session.base_url,
        api_key=session.api_key,
        temperature=0,
        max_completion_tokens=128,
    )
    agent = build(wrap_model(model, trace="full"))
    start = [SystemMessage("You answer with the help of tools."), HumanMessage(TASK)]
    with collect() as collected:
        messages = agent.invoke({"messages": start})["messages"]
    call = messages[2].tool_calls[0]
    result = next(message for message in messages if isinstance(message, ToolMessage))
    print(f"{call['name']}({call['args']}) -> {result.content}\n{messages[-1].content}")
    assert result.status == "success", result.content
    session.record(TASK, collected.traces)
    session.report()


if __name__ == "__main__":
    main()
