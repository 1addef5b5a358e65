"""A tool-calling loop on the plain OpenAI client. The only change for WhiFlash is in `Session.client`:

client = whiflash_sdk.wrap(client)
"""

from typing import Any

from openai import OpenAI
from session import Session
from tools import SCHEMAS, run_tool
from whiflash_sdk import routing

TASKS = {
    "calculate": "What is 12*(3+4)? Use the calculator.",
    "query_shop": "What do all orders add up to? Ask the database.",
    "search_files": "Which example files mention sqlite? Search the files.",
}


def solve(client: OpenAI, session: Session, task: str, tool: str) -> str:
    """Solve one task: a forced call of `tool`, its result, then the answer, which is returned."""
    messages: list[Any] = [{"role": "system", "content": "You answer with the help of tools."}]
    messages.append({"role": "user", "content": task})
    asked: dict[str, Any] = {"model": session.model, "temperature": 0, "max_tokens": 48, "tools": [SCHEMAS[tool]]}

    turn = client.chat.completions.create(**asked, messages=messages, tool_choice="required")
    session.record(f"{task} (tool call)", [routing(turn)])
    message = turn.choices[0].message
    call = message.tool_calls[0].function
    result = run_tool(call.name, call.arguments)
    print(f"{call.name}({call.arguments}) -> {result}")

    messages.append(message.model_dump(exclude_none=True))
    messages.append({"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": result})
    answer = client.chat.completions.create(**asked, messages=messages, tool_choice="none")
    text = answer.choices[0].message.content or ""
    session.record(f"{task} (answer)", [routing(answer)], text)
    messages[-1] = {**messages[-1], "content": ""}
    without = client.chat.completions.create(**{**asked, "max_tokens": 1}, messages=messages, tool_choice="none")
    assert answer.usage.prompt_tokens > without.usage.prompt_tokens, "the result did not reach the prompt"
    return text


def main() -> None:
    session = Session.from_command_line(__doc__)
    client = session.client()
    for tool, task in TASKS.items():
        print(f"\n{task}\n{solve(client, session, task, tool)}")
    session.report()


if __name__ == "__main__":
    main()
