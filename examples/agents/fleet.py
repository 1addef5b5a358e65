"""Several agents at once on one server: each routes for itself, inside shared batches."""

import asyncio
import time
from typing import Any

from openai import AsyncOpenAI
from session import Session
from tools import SCHEMAS, run_tool
from whiflash_sdk import collect

JOBS = [
    ("calculate", "What is 17*23? Use the calculator."),
    ("query_shop", "What is the largest order? Ask the database."),
    ("search_files", "Which example files mention agents? Search the files."),
    ("query_shop", "How many orders are there? Ask the database."),
]


async def work(client: AsyncOpenAI, session: Session, number: int, tool: str, task: str) -> None:
    """Run one agent: a forced tool call, then a streamed answer."""
    messages: list[Any] = [{"role": "user", "content": task}]
    asked: dict[str, Any] = {"model": session.model, "temperature": 0, "max_tokens": 48, "tools": [SCHEMAS[tool]]}
    with collect() as collected:
        turn = await client.chat.completions.create(**asked, messages=messages, tool_choice="required")
        message = turn.choices[0].message
        call = message.tool_calls[0]
        result = run_tool(call.function.name, call.function.arguments)
        messages += [
            message.model_dump(exclude_none=True),
            {"role": "tool", "tool_call_id": call.id, "content": result},
        ]
        answer = ""
        stream = await client.chat.completions.create(**asked, messages=messages, tool_choice="none", stream=True)
        async for chunk in stream:
            answer += (chunk.choices[0].delta.content or "") if chunk.choices else ""
    print(f"agent {number}: {call.function.name}({call.function.arguments}) -> {result}; {answer!r}")
    session.record(f"agent {number}: {task}", collected.traces)


async def run(session: Session) -> None:
    began = time.perf_counter()
    async with session.async_client() as client:
        await asyncio.gather(*(work(client, session, n, *job) for n, job in enumerate(JOBS, 1)))
    print(f"{len(JOBS)} agents in {time.perf_counter() - began:.1f} s")


def main() -> None:
    session = Session.from_command_line(__doc__)
    asyncio.run(run(session))
    session.report()


if __name__ == "__main__":
    main()
