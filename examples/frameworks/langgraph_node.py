"""LangChain and LangGraph: an adapter wraps the model object and knows which node runs."""

from langchain_openai import ChatOpenAI
from langgraph.graph import END, START, MessagesState, StateGraph
from recipe import KEY, MODEL, QUESTION, URL, report
from whiflash_sdk import collect
from whiflash_sdk.adapters.langchain import wrap_model

model = wrap_model(ChatOpenAI(model=MODEL, base_url=URL, api_key=KEY, max_tokens=32))


def plan(state: MessagesState) -> MessagesState:
    return {"messages": [model.invoke(state["messages"])]}


graph = StateGraph(MessagesState)
graph.add_node("planner", plan)
graph.add_edge(START, "planner")
graph.add_edge("planner", END)
with collect() as collected:
    graph.compile().invoke({"messages": [("user", QUESTION)]})
report("langgraph", "adapter", collected.traces)
