"""Cost of a learner beside a server, and the time from samples to served weights.

    python scripts/learning_cost.py --markdown FILE

One server of the embedded target keeps samples (`--whiflash-learn`) and answers held-out prompts one by one, in turns:
alone, and beside `whiflash learn --watch` with a share of 10 and of 50 % of a core. A turn asks every prompt once. The
learner works through all turns of its own: it never reaches its end, since its pass is longer.

Last, with no learner at work, one pass without bounds learns from the samples, is judged, and is offered to the server.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import outcome

from whiflash_sglang.cli.serve import server_arguments, server_environment
from whiflash_sglang.lab.bench.pages import table
from whiflash_sglang.learn.samples import samples_of
from whiflash_sglang.progress import tracked
from whiflash_sglang.serving import Server

PROMPTS = Path(__file__).parents[1] / "results" / "benchmark" / "held-out.jsonl"
WHIFLASH = str(Path(sys.executable).with_name("whiflash"))
CONFIG = "smollm2-135m-instruct"
SHARES = (None, 0.1, 0.5)
SETTLES = 15.0
"""Seconds after which a learner has its imports behind it, which no share bounds."""


def ask(server: Server, prompts: Sequence[Any], tokens: int) -> float:
    """Output tokens a second, prefills included."""
    written, began = 0, time.monotonic()
    with httpx.Client(base_url=server.base_url, timeout=600) as client:
        for prompt in tracked(list(prompts), "asking"):
            body = {
                "model": "default",
                "messages": prompt["messages"],
                "temperature": 0,
                "max_tokens": tokens,
            }
            answer = client.post("/v1/chat/completions", json=body)
            answer.raise_for_status()
            written += answer.json()["usage"]["completion_tokens"]
    return written / (time.monotonic() - began)


@contextmanager
def learner(directory: Path, share: float | None) -> Iterator[None]:
    """A learner at work, with this share of a core; None: nobody."""
    if share is None:
        yield
        return
    command = [WHIFLASH, "learn", str(directory), "--config", CONFIG, "--share", str(share), "--json"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        time.sleep(SETTLES)
        if process.poll() is not None:
            raise SystemExit("the learner ended before the turn began: run `whiflash learn` to see why")
        try:
            yield
            ended = process.poll() is not None
        finally:
            process.kill()
    if ended:
        raise SystemExit("the learner ended before the turn did: give more --fill")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--fill", type=int, default=80, help="requests to learn from")
    parser.add_argument("--prompts", type=int, default=8, help="prompts of a turn")
    parser.add_argument("--turns", type=int, default=3, help="turns of each kind")
    parser.add_argument("--tokens", type=int, default=96, help="of an answer, at most")
    parser.add_argument("--markdown", type=Path, help="write the report here")
    given = parser.parse_args()
    rows = [json.loads(line) for line in PROMPTS.read_text().splitlines()]
    rows = [row for row in rows if not row.get("tools") and not row.get("response_format")]
    asked, filling = rows[: given.prompts], rows[given.prompts :]
    found: dict[float | None, list[float]] = {share: [] for share in SHARES}
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        flags = ["--context-length", "8192", "--device", "cpu", "--whiflash-learn", name]
        with Server(server_arguments(flags), env=server_environment(flags)) as server:
            fill = [filling[i % len(filling)] for i in range(given.fill)]
            for i, row in enumerate(fill):  # each another text
                fill[i] = {"messages": [*row["messages"][:-1], again(row["messages"][-1], i // len(filling))]}
            ask(server, fill, given.tokens)
            time.sleep(12)  # samples are written within ten seconds
            print(sum(1 for _ in samples_of(directory).iterdir()), "files of samples", file=sys.stderr)
            for _ in range(given.turns):
                for share in SHARES:
                    with learner(directory, share):
                        found[share].append(ask(server, asked, given.tokens))
                    print(share, found[share][-1], file=sys.stderr, flush=True)
            began = time.monotonic()
            command = [WHIFLASH, "learn", name, "--config", CONFIG, "--url", server.base_url, "--json"]
            command += ["--tokens", "50000"]  # another option, so the killed learners' pass is not continued
            said = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            seconds = time.monotonic() - began
    alone = statistics.median(found[None])
    lines = [
        (
            "alone" if share is None else f"beside a learner with {share:.0%} of a core",
            ", ".join(f"{rate:.1f}" for rate in rates),
            f"{statistics.median(rates) / alone:.2f}",
        )
        for share, rates in found.items()
    ]
    costs = table(("server", "output tokens/s", "median over alone"), lines)
    gains = ", ".join(f"{name} {gain['ratio']:.3f}" for name, gain in said["drafters"].items())
    served = "version {version} was published and served".format(**said) if said["version"] else "none served"
    last = (
        f"A pass without bounds over {said['tokens']} tokens of {said['learned']} requests, judged on {said['judged']} "
        f"more, took {said['seconds']:.0f} s of work and {seconds:.0f} s with its start: {gains}; {served}."
    )
    print(costs, last, sep="\n\n")
    if given.markdown is not None:
        about = [part.replace("\n", " ") for part in __doc__.strip().split("\n\n")[2:]]
        outcome.write(given.markdown, "Cost of learning", about[0], costs, about[1], last)


def again(turn: dict[str, str], number: int) -> dict[str, str]:
    """The same request in other words, so that it is another sample."""
    return turn if not number else {**turn, "content": f"{turn['content']}\n\n(Answer {number + 1}.)"}


if __name__ == "__main__":
    main()
