"""One agent in smolagents: its one step must call a tool, then it sums up."""

from session import Session
from smolagents import ActionStep, OpenAIModel, ToolCallingAgent, tool
from tools import query_shop
from whiflash_sdk import collect
from whiflash_sdk.adapters.smolagents import wrap_model

TASK = "What is the largest order?"


def main() -> None:
    session = Session.from_command_line(__doc__)
    model = wrap_model(
        OpenAIModel(
            session.model,
            api_base=session.base_url,
            api_key=session.api_key,
            flatten_messages_as_text=True,
            temperature=0,
            max_tokens=64,
            tool_choice={"type": "function", "function": {"name": "query_shop"}},
        ),
        trace="full",
    )
    agent = ToolCallingAgent(tools=[tool(query_shop)], model=model, max_steps=1, verbosity_level=0)
    with collect() as collected:
        answer = agent.run(TASK)
    step = next(step for step in agent.memory.steps if isinstance(step, ActionStep) and step.tool_calls)
    print(f"{step.tool_calls[0].name}({step.tool_calls[0].arguments}) -> {step.observations}\n{answer}")
    session.record(TASK, collected.traces)
    session.report()


if __name__ == "__main__":
    main()
