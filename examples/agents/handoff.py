"""Two agents of the OpenAI Agents SDK: reception hands over to accounting, which uses a tool and answers."""

import asyncio
from typing import Any

from agents import (
    Agent,
    AgentHooks,
    HandoffOutputItem,
    ModelSettings,
    OpenAIChatCompletionsModel,
    Runner,
    ToolCallOutputItem,
    function_tool,
    set_tracing_disabled,
)
from session import Session
from tools import query_shop
from whiflash_sdk import collect
from whiflash_sdk.adapters.openai_agents import wrap_model

TASK = "What do all orders add up to?"


class AnswerAfterTool(AgentHooks[Any]):
    """Hooks that forbid tools once one has answered: a small model would go on calling them."""

    async def on_tool_end(self, context: Any, agent: Agent[Any], tool: Any, result: str) -> None:
        agent.model_settings = ModelSettings(temperature=0, max_tokens=64, tool_choice="none")


def build(model: OpenAIChatCompletionsModel) -> Agent[Any]:
    """Return the agent reception, whose only tool hands over to accounting."""
    accounting = Agent[Any](
        name="Accounting",
        instructions="You answer questions about the shop's figures with the database.",
        handoff_description="Answers questions about figures.",
        model=model,
        tools=[function_tool(query_shop)],
        model_settings=ModelSettings(temperature=0, max_tokens=64, tool_choice="required"),
        reset_tool_choice=False,
        hooks=AnswerAfterTool(),
    )
    return Agent[Any](
        name="Reception",
        instructions="Hand the question over.",
        model=model,
        handoffs=[accounting],
        model_settings=ModelSettings(temperature=0, max_tokens=64, tool_choice="required"),
    )


async def run(session: Session) -> None:
    set_tracing_disabled(True)
    model = wrap_model(OpenAIChatCompletionsModel(session.model, session.async_client()), trace="full")
    with collect() as collected:
        result = await Runner.run(build(model), TASK, max_turns=4)
    items = result.new_items
    handed = [item for item in items if isinstance(item, HandoffOutputItem)]
    used = [item for item in items if isinstance(item, ToolCallOutputItem)]
    if [item.target_agent.name for item in handed] != ["Accounting"]:
        raise SystemExit("the model did not hand over: its server must hold tools to their schemas (README.md)")
    assert used, "no tool was called"
    print(f"Reception -> Accounting -> query_shop -> {used[0].output}\n{result.final_output}")
    assert any(used[0].output in str(entry) for entry in result.to_input_list())
    session.record(TASK, collected.traces)


def main() -> None:
    session = Session.from_command_line(__doc__)
    asyncio.run(run(session))
    session.report()


if __name__ == "__main__":
    main()
