"""One agent in pydantic-ai: its first step may only call a tool, its second only give the typed answer."""

from dataclasses import replace
from typing import Any

from pydantic import BaseModel, Field
from pydantic_ai import Agent, RunContext, Tool, ToolOutput
from pydantic_ai.capabilities import PrepareOutputTools, PrepareTools
from pydantic_ai.messages import ToolReturnPart
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider
from pydantic_ai.tools import ToolDefinition
from session import Session
from tools import query_shop
from whiflash_sdk import collect
from whiflash_sdk.adapters.pydantic_ai import wrap_model

TASK = "How many orders are there?"


class Answer(BaseModel):
    """The figure that was asked for."""

    figure: int = Field(ge=0, le=1000)


async def first_step(context: RunContext[Any], tools: list[ToolDefinition]) -> list[ToolDefinition]:
    """Return the tools that the model may call: all at first, none once one has answered."""
    return [replace(tool, strict=True) for tool in tools] if context.run_step == 1 else []


async def later_steps(context: RunContext[Any], tools: list[ToolDefinition]) -> list[ToolDefinition]:
    """Return the tool for the final answer once another tool has answered; before that none."""
    return [replace(tool, strict=True) for tool in tools] if context.run_step > 1 else []


def main() -> None:
    session = Session.from_command_line(__doc__)
    provider = OpenAIProvider(openai_client=session.async_client())
    agent = Agent(
        wrap_model(OpenAIChatModel(session.model, provider=provider), trace="full"),
        tools=[Tool(query_shop)],
        output_type=ToolOutput(Answer),
        capabilities=[PrepareTools(first_step), PrepareOutputTools(later_steps)],
        model_settings={"temperature": 0, "max_tokens": 128},
    )
    with collect() as collected:
        result = agent.run_sync(TASK)
    returns = [part for message in result.all_messages() for part in message.parts if isinstance(part, ToolReturnPart)]
    assert returns[0].tool_name == "query_shop", result.all_messages()
    print(f"query_shop -> {returns[0].content}\n{result.output!r}")
    session.record(TASK, collected.traces)
    session.report()


if __name__ == "__main__":
    main()
