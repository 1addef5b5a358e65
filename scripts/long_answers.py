"""Acceptance against the position in a long answer, by drafter: `python scripts/long_answers.py`.

The embedded target writes on to the end of its context: its end of sequence is forbidden, and tokens are sampled with
seeds, since greedy text of so small a model soon loops. Each drafter is pinned in a server of its own, and `auto`
serves the same requests. A round counts for the stretch of the answer that it began in.
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import outcome
from servers_beside import arguments_of

from whiflash_sglang.lab.bench.prompts import load_prompts, sample
from whiflash_sglang.serving.server import Server
from whiflash_sglang.serving.server_host import ServerHost

ARMS = {"ar": "EAGLE-3", "diffusion": "DSpark", "lookup": "copies", "auto": "auto"}
FIRST = 128
"""Tokens of the first stretch; each further one ends at twice its start."""


def round_tokens(base_url: str, messages: Sequence[Any], tokens: int, seed: int) -> list[int]:
    """Tokens of each round of one answer. Raises httpx.HTTPStatusError."""
    request = {
        "model": "embedded",
        "messages": list(messages),
        "max_tokens": tokens,
        "min_tokens": tokens,
        "temperature": 0.8,
        "top_p": 0.95,
        "seed": seed,
        "custom_params": {"whiflash": json.dumps({"trace": "full"})},
    }
    answer = (
        httpx.post(f"{base_url}/v1/chat/completions", json=request, timeout=None).raise_for_status().json()
    )
    return [
        count for stretch in answer["sglext"]["whiflash"]["stretches"] for count in stretch["round_tokens"]
    ]


def by_stretch(answers: Sequence[Sequence[int]]) -> dict[int, dict[str, float]]:
    """Rounds and tokens a round, by the position that a stretch ends at."""
    counts: dict[int, list[int]] = defaultdict(list)
    for rounds in answers:
        position, end = 1, FIRST
        for tokens in rounds:
            while end <= position:
                end *= 2
            counts[end].append(tokens)
            position += tokens
    return {end: {"rounds": len(own), "tokens_a_round": sum(own) / len(own)} for end, own in counts.items()}


def draw(found: dict[str, dict[int, dict[str, float]]], path: Path) -> None:
    """Acceptance length against the stretch, a line for each drafter."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for arm, stretches in found.items():
        axes.plot(
            [*map(str, stretches)],
            [own["tokens_a_round"] for own in stretches.values()],
            "o-",
            label=ARMS[arm],
        )
    axes.set(xlabel="output tokens, up to", ylabel="tokens a round", ylim=(1, None))
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--prompts", type=Path, default=Path("results/benchmark/held-out.jsonl"))
    parser.add_argument("--category", default="chat")
    parser.add_argument("--answers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=7500)
    parser.add_argument(
        "--out", type=Path, default=Path("results/long-answers.json"), help=".md and .svg beside it"
    )
    args = parser.parse_args()
    asked = [p for p in sample(load_prompts(str(args.prompts)), None) if p.category == args.category]
    asked = asked[: args.answers]
    model, both, ours = arguments_of(False, Path())
    both += ["--model-path", model, "--served-model-name", "embedded", "--dtype", "bfloat16"]
    both += ["--max-total-tokens", str(len(asked) * (args.tokens + 600))]
    found = {}
    with ServerHost() as host, ThreadPoolExecutor(len(asked)) as pool:
        for arm in ARMS:
            print(f"{arm}: {len(asked)} answers of {args.tokens} tokens …", file=sys.stderr, flush=True)
            with Server([*both, *ours, "--whiflash-router", arm], host=host) as server:
                ask = partial(round_tokens, server.base_url, tokens=args.tokens)
                runs = [pool.submit(ask, prompt.messages, seed=seed) for seed, prompt in enumerate(asked)]
                found[arm] = by_stretch([run.result() for run in runs])
    args.out.write_text(json.dumps(found, indent=1) + "\n")
    draw(found, args.out.with_suffix(".svg"))
    ends = sorted({end for own in found.values() for end in own})
    rows = [f"| drafter | {' | '.join(f'to {end}' for end in ends)} |", "| --- |" + " ---: |" * len(ends)]
    for arm, own in found.items():
        cells = [
            f"{own[end]['tokens_a_round']:.2f} ({own[end]['rounds']})" if end in own else "" for end in ends
        ]
        rows.append(f"| {ARMS[arm]} | {' | '.join(cells)} |")
    outcome.write(
        args.out.with_suffix(".md"),
        "Acceptance over long answers",
        f"Tokens a round (and rounds) by position in the answer: {len(asked)} answers of {args.tokens} tokens, sampled "
        "at temperature 0.8, top-p 0.95, with the end of sequence forbidden. Pinned drafters draft their full length; "
        "`auto` prices it.",
        "\n".join(rows),
        f"![tokens a round by position]({args.out.stem}.svg)",
    )


if __name__ == "__main__":
    main()
