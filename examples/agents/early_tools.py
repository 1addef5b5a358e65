"""A slow tool that starts while the answer is still being written. The only change for WhiFlash is the block:

with early_tools({"query_shop": shop}) as tools
"""

import json
import time
from typing import Any

from session import Session
from tools import SCHEMAS, query_shop
from whiflash_sdk import early_tools, routing

TASK = "How many orders are there? Ask the database."


class SlowShop:
    """The shop's database, behind a slow network. started: when each question reached it."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self.started: list[float] = []

    def __call__(self, **asked: Any) -> str:
        self.started.append(time.monotonic())
        time.sleep(self._seconds)
        return query_shop(**asked)


def main() -> None:
    session = Session.from_command_line(__doc__)
    client, shop = session.client(), SlowShop(0.2)
    messages: list[Any] = [
        {"role": "system", "content": "You answer with the help of tools."},
        {"role": "user", "content": TASK},
    ]
    asked: dict[str, Any] = {
        "model": session.model,
        "temperature": 0,
        "max_tokens": 64,
        "tools": [SCHEMAS["query_shop"]],
    }
    one = {"tool_choice": "required", "parallel_tool_calls": False}
    with early_tools({"query_shop": shop}) as tools:
        with client.chat.completions.create(**asked, **one, messages=messages, stream=True) as stream:
            pieces = [
                piece
                for chunk in stream
                for choice in chunk.choices
                for piece in choice.delta.tool_calls or ()
                if piece.index == 0
            ]
        ended = time.monotonic()
        arguments = "".join(piece.function.arguments or "" for piece in pieces)
        result = tools["query_shop"](**json.loads(arguments))
    [started] = shop.started
    assert started < ended, "the tool did not start early"
    print(f"{arguments} -> {result}, started {1000 * (ended - started):.0f} ms before the end")
    session.record(f"{TASK} (tool call)", [routing(stream)])

    function = {"name": "query_shop", "arguments": arguments}
    called = {"id": pieces[0].id, "type": "function", "function": function}
    messages.append({"role": "assistant", "content": None, "tool_calls": [called]})
    messages.append({"role": "tool", "tool_call_id": pieces[0].id, "content": result})
    answer = client.chat.completions.create(**asked, messages=messages, tool_choice="none")
    text = answer.choices[0].message.content or ""
    session.record(f"{TASK} (answer)", [routing(answer)], text)
    print(text)
    session.report()


if __name__ == "__main__":
    main()
