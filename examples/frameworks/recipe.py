"""Shared by all recipes: the command line, and one line of JSON about what was seen."""

import argparse
import json
from collections.abc import Iterable
from importlib.metadata import version

from whiflash_sdk import CollectedTrace

given = argparse.ArgumentParser()
given.add_argument("--base-url", default="http://127.0.0.1:30000/v1", help="of the server's OpenAI routes")
given.add_argument("--model", default="smollm2-135m-instruct")
given.add_argument("--api-key", default="none", help="if the server was given one")
URL, MODEL, KEY = vars(given.parse_args()).values()
QUESTION = "Name three colours."
MESSAGES = [{"role": "user", "content": QUESTION}]


def report(package: str, way: str, traces: Iterable[CollectedTrace]) -> None:
    """Print the outcome of a run. way: by which the framework sends hints."""
    found = list(traces)
    agents = list(dict.fromkeys(trace.agent for trace in found if trace.agent))
    tokens = sum(trace.tokens for trace in found)
    print(
        json.dumps({"version": version(package), "way": way, "agents": agents, "traces": len(found), "tokens": tokens})
    )
