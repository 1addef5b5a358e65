"""Acceptance against the position in a long answer, by drafter: `python scripts/long_answers.py TEXT …`.

Servers are forced along the files' text, to the end of the embedded target's context: text of so small a model loops
after some hundred tokens, whether greedy or sampled, and loops flatter every drafter. Each drafter is pinned in a
server of its own, and `auto` serves the same requests. A round counts for the stretch of the answer that it began in.
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import httpx
import outcome
from servers_beside import arguments_of
from transformers import AutoTokenizer

from whiflash_sglang.lab.bench.pages import table
from whiflash_sglang.serving import Server, ServerHost
from whiflash_sglang.spans.hints import CARRIED_FORCED

ARMS = {"ar": "EAGLE-3", "diffusion": "DSpark", "lookup": "copies", "auto": "auto"}
FORCED = ("--whiflash-force-recorded", "on")
FIRST = 128
"""Tokens of the first stretch; each further one ends at twice its start."""


def round_tokens(base_url: str, answer: Sequence[int]) -> list[int]:
    """Tokens of each round of one answer, which is forced. Raises httpx.HTTPStatusError."""
    request = {
        "model": "embedded",
        "messages": [{"role": "user", "content": "Write a long text."}],
        "max_tokens": len(answer),
        "temperature": 0,
        "custom_params": {"whiflash": json.dumps({"trace": "full"}), CARRIED_FORCED: list(answer)},
    }
    reply = (
        httpx.post(f"{base_url}/v1/chat/completions", json=request, timeout=None).raise_for_status().json()
    )
    return [
        count for stretch in reply["sglext"]["whiflash"]["stretches"] for count in stretch["round_tokens"]
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
    parser.add_argument("texts", type=Path, nargs="+", metavar="TEXT")
    parser.add_argument("--tokens", type=int, default=7500, help="of each text, from its beginning")
    parser.add_argument(
        "--out", type=Path, default=Path("results/long-answers.json"), help=".md and .svg beside it"
    )
    args = parser.parse_args()
    model, both, ours = arguments_of(False, Path())
    tokenizer = AutoTokenizer.from_pretrained(model)
    answers = [
        tokenizer.encode(file.read_text(), add_special_tokens=False)[: args.tokens] for file in args.texts
    ]
    both += ["--model-path", model, "--served-model-name", "embedded", "--dtype", "bfloat16"]
    both += ["--max-total-tokens", str(sum(map(len, answers)) + 600 * len(answers)), *FORCED]
    found = {}
    with ServerHost() as host, ThreadPoolExecutor(len(answers)) as pool:
        for arm in ARMS:
            print(f"{arm}: {sum(map(len, answers))} tokens …", file=sys.stderr, flush=True)
            with Server([*both, *ours, "--whiflash-router", arm], host=host) as server:
                found[arm] = by_stretch(list(pool.map(partial(round_tokens, server.base_url), answers)))
    args.out.write_text(json.dumps(found, indent=1) + "\n")
    draw(found, args.out.with_suffix(".svg"))
    ends = sorted({end for own in found.values() for end in own})
    sizes = ", ".join(
        f"{file.name}: {len(own)} tokens" for file, own in zip(args.texts, answers, strict=True)
    )
    rows = []
    for arm, own in found.items():
        cells = (
            f"{own[end]['tokens_a_round']:.2f} ({own[end]['rounds']})" if end in own else "" for end in ends
        )
        rows.append((ARMS[arm], *cells))
    outcome.write(
        args.out.with_suffix(".md"),
        "Acceptance over long answers",
        f"Tokens a round (and rounds) by position in the answer, along the text of {sizes}. Pinned "
        "drafters draft their full length; `auto` prices it. Neural drafters expect their target's own text, so their "
        "level is lower than on answers; the slope is what counts.",
        table(("drafter", *(f"to {end}" for end in ends)), rows),
        f"![tokens a round by position]({args.out.stem}.svg)",
    )


if __name__ == "__main__":
    main()
