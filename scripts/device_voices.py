"""Acceptance with drafts chosen as on a card, beside a host's: `python scripts/device_voices.py --markdown FILE`.

Two servers of the embedded target on this machine's CPU answer the same prompts one by one. The first reads every
round's outcome before it plans the next. The second plans as beside a card (`WHIFLASH_DEVICE_RESIDENT=1`): texts are on
the device, and the host never reads a round's outcome in it. Prompts are recorded agents' turns, edits with a
prediction, and calls and JSON under a grammar. Answers must be equal, apart from a near tie between two tokens.

Accepted drafts are counted by their source.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import outcome
from whiflash_sdk import Hints

from whiflash_sglang.cli.serve import server_arguments, server_environment
from whiflash_sglang.lab.bench.pages import table
from whiflash_sglang.progress import tracked
from whiflash_sglang.serving import Server

DATA = Path(__file__).parents[1] / "results" / "benchmark"
SETS = {
    "recorded agents": "turns.jsonl",
    "edits with a prediction": "edits.jsonl",
    "calls and JSON": "structure.jsonl",
}
FLAGS = ["--context-length", "8192", "--device", "cpu"]
FIELDS = ("messages", "tools", "tool_choice", "response_format", "prediction")


class Played(NamedTuple):
    """The answers to a set. texts: in order. rounds, tokens: of all of them. accepted: drafts by source."""

    texts: list[str]
    rounds: int
    tokens: int
    accepted: Counter[str]


def play(server: Server, prompts: Sequence[Mapping[str, Any]], tokens: int) -> Played:
    """Ask one prompt after another, greedily."""
    asked: dict[str, Any] = {"model": "default", "temperature": 0, "max_tokens": tokens, "cache_salt": "one"}
    asked |= Hints(trace=True).extra_body()
    texts, rounds, written, accepted = [], 0, 0, Counter[str]()
    with httpx.Client(base_url=server.base_url, timeout=600) as client:
        for prompt in tracked(list(prompts), "asking"):
            body = asked | {name: prompt[name] for name in FIELDS if prompt.get(name)}
            answer = client.post("/v1/chat/completions", json=body)
            answer.raise_for_status()
            found = answer.json()
            trace = found["sglext"]["whiflash"]
            texts.append(json.dumps(found["choices"][0]["message"], sort_keys=True))
            rounds, written = rounds + trace["rounds"], written + trace["tokens"]
            accepted.update({name: one["accepted"] for name, one in trace.get("sources", {}).items()})
    return Played(texts, rounds, written, accepted)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tokens", type=int, default=128, help="of an answer, at most")
    parser.add_argument("--limit", type=int, help="prompts of each set, at most")
    parser.add_argument("--markdown", type=Path, help="write the report here")
    given = parser.parse_args()
    prompts = {
        name: [json.loads(line) for line in (DATA / file).read_text().splitlines()][: given.limit]
        for name, file in SETS.items()
    }
    played: dict[str, list[Played]] = {name: [] for name in SETS}
    for resident in ("0", "1"):
        env = {**server_environment(FLAGS), "WHIFLASH_DEVICE_RESIDENT": resident}
        with Server(server_arguments(FLAGS), env=env) as server:
            for name, asked in prompts.items():
                played[name].append(play(server, asked, given.tokens))
                print(resident, name, played[name][-1][1:], file=sys.stderr, flush=True)
    lengths, sources = [], []
    for name, (host, device) in played.items():
        own, other = (one.tokens / one.rounds for one in (host, device))
        same = sum(ours == theirs for ours, theirs in zip(host.texts, device.texts, strict=True))
        lengths.append(
            (name, f"{own:.2f}", f"{other:.2f}", f"{other / own:.3f}", f"{same} of {len(host.texts)}")
        )
        for source in sorted({**host.accepted, **device.accepted}, key=lambda one: -host.accepted[one]):
            counts = (played[name][at].accepted[source] for at in (0, 1))
            sources.append((f"{name}: {source}", *map(str, counts)))
    tables = [
        table(("prompts", "host", "device", "device over host", "equal answers"), lengths),
        table(("accepted drafts", "host", "device"), sources),
    ]
    print("\n\n".join(tables))
    if given.markdown is not None:
        about = [part.replace("\n", " ") for part in __doc__.strip().split("\n\n")[1:]]
        outcome.write(given.markdown, "Drafts chosen as on a card", about[0], *tables, about[1])


if __name__ == "__main__":
    main()
