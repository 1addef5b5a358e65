"""Seconds saved by a tool that starts early: `python scripts/early_tools.py --markdown FILE`.

A turn is one streamed answer that must call a tool, until the tool's result is there. The tool waits 50, 200 or
1,000 ms. Turns alternate: the tool starts after the answer, or as soon as its call is complete
(`whiflash_sdk.early_tools`). Calls and results are checked to be equal. The embedded model writes text after its call;
the other answers are stopped there, where larger models end. At most the shorter of the tool's time and the time from
the call's end to the answer's is saved.

The second table shows how much an event of the server could add: the time from the moment at which the call's text was
fixed, because only one call that the schema allows was left, until its JSON object closed.
"""

import argparse
import functools
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import outcome
from openai import OpenAI
from servers_beside import address
from whiflash_sdk import early_tools, wrap

from whiflash_sglang.lab.bench.pages import table

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "agents"))

from tools import SCHEMAS, TOOLS

NAME = "query_shop"
SCHEMA = SCHEMAS[NAME]["function"]["parameters"]
TURNS = ("after the call", "a tool, ms", "tool after the answer, ms", "early, ms", "saved, ms")
MOMENTS = ("fixed, ms", "closed, ms", "ended, ms", "fixed to closed, ms", "closed to ended, ms")
SYSTEM = {"role": "system", "content": "You answer with the help of tools."}
ORDERS = {
    "role": "user",
    "content": "How many orders are there, what do they add up to, and which is the largest?",
}
ASKED: dict[str, Any] = {"temperature": 0, "tools": [SCHEMAS[NAME]], "tool_choice": "required"}
ANSWERS: dict[str, dict[str, Any]] = {
    "then the end": {"messages": [SYSTEM, ORDERS], "max_tokens": 64, "stop": ["</tool_call>"]},
    "then text": {"messages": [SYSTEM, ORDERS], "max_tokens": 64},
}


def slow(function: Callable[..., str], seconds: float) -> Callable[..., str]:
    """The same function, whose answer takes a while."""

    @functools.wraps(function)
    def waits(**arguments: Any) -> str:
        time.sleep(seconds)
        return function(**arguments)

    return waits


def turn(
    client: OpenAI, body: Mapping[str, Any], functions: Mapping[str, Callable[..., str]], *, early: bool
) -> tuple[float, list[tuple[str, str]]]:
    """Seconds until all results were there, and the results with their calls."""
    began = time.monotonic()
    with early_tools(functions) if early else nullcontext(functions) as given:
        calls = written(client.chat.completions.create(**body, stream=True))
        found = [(text, given[NAME](**json.loads(text))) for text in calls]
    return time.monotonic() - began, found


def written(stream: Any) -> list[str]:
    """The arguments of every whole call; one that the answer's last token cuts is left out."""
    texts: dict[int, str] = {}
    for chunk in stream:
        for call in chunk.choices[0].delta.tool_calls or ():
            texts[call.index] = texts.get(call.index, "") + (call.function.arguments or "")
    return [text for text in texts.values() if text.endswith("}")]


def turns(
    client: OpenAI, body: Mapping[str, Any], milliseconds: int, repetitions: int
) -> tuple[float, float]:
    """Median seconds of a turn with the tool after the answer, and early.

    Raises: AssertionError where the two differ in calls or results.
    """
    functions = {NAME: slow(TOOLS[NAME], milliseconds / 1000)}
    seconds: dict[bool, list[float]] = {False: [], True: []}
    expected = None
    for _, early in itertools.product(range(repetitions), seconds):
        took, found = turn(client, body, functions, early=early)
        expected = expected or found
        assert found == expected, f"early={early}: {found}, not {expected}"
        seconds[early].append(took)
    return statistics.median(seconds[False]), statistics.median(seconds[True])


def moments(client: OpenAI, body: Mapping[str, Any]) -> tuple[float, float, float]:
    """Seconds from the request to the moment when the first call was fixed, closed, and its answer ended."""
    values = itertools.product(*(spec["enum"] for spec in SCHEMA["properties"].values()))
    allowed = [json.dumps(dict(zip(SCHEMA["properties"], value, strict=True))) for value in values]
    began, text = time.monotonic(), ""
    fixed = closed = None
    for chunk in client.chat.completions.create(**body, stream=True):
        now = time.monotonic() - began
        for call in chunk.choices[0].delta.tool_calls or ():
            text += "" if call.index else (call.function.arguments or "")
        if fixed is None and sum(one.startswith(text) for one in allowed) == 1:
            fixed = now
        if closed is None and text in allowed:
            closed = now
    assert fixed is not None, f"no call: {text}"
    assert closed is not None, f"no whole call: {text}"
    return fixed, closed, time.monotonic() - began


def measured(client: OpenAI, model: str, repetitions: int) -> list[str]:
    """Both tables."""
    rows, seen = [], []
    for name, more in ANSWERS.items():
        body = {**ASKED, **more, "model": model}
        turn(client, body, TOOLS, early=True)
        for milliseconds in (50, 200, 1000):
            after, early = turns(client, body, milliseconds, repetitions)
            cells = (after, early, after - early)
            rows.append((name, f"{milliseconds:,}", *(f"{one * 1000:,.0f}" for one in cells)))
            print(*rows[-1], file=sys.stderr, flush=True)
        times = [moments(client, body) for _ in range(3 * repetitions)]
        points = [statistics.median(one) for one in zip(*times, strict=True)]
        gaps = [statistics.median(one[at + 1] - one[at] for one in times) for at in (0, 1)]
        seen.append((name, *(f"{one * 1000:,.0f}" for one in points + gaps)))
        print(*seen[-1], file=sys.stderr, flush=True)
    return [table(TURNS, rows), table(("after the call", *MOMENTS), seen)]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--markdown", type=Path, help="write the report here")
    parser.add_argument("--url", help="ask this server; default: start one")
    given = parser.parse_args()
    with address(given.url) as url:
        client = wrap(OpenAI(base_url=f"{url}/v1", api_key="none"))
        model = client.models.list().data[0].id
        tables = measured(client, model, given.repetitions)
    print("\n\n".join(tables))
    if given.markdown is not None:
        about = [part.replace("\n", " ") for part in __doc__.strip().split("\n\n")[1:]]
        outcome.write(given.markdown, "Tools that start early", about[0], tables[0], about[1], tables[1])


if __name__ == "__main__":
    main()
