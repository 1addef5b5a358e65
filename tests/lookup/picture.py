"""The picture of lazy catch-up in docs/dev/lookup.md: `python tests/lookup/picture.py docs/pictures/catch-up.svg`.

The embedded target copies three records and comments on each, under the policy `auto`; every round's arm, the
request's length and both drafters' watermarks are recorded from the running scheduler.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from engine import Engine, engine

from whiflash_sglang.checkpoints.manifest import embedded_bundle
from whiflash_sglang.embedded import ensure_target

RECORDS = (
    ("Ada", 36, "London", ["analytical engine", "notes on programs", "Bernoulli numbers"]),
    ("Emmy", 53, "Erlangen", ["abstract algebra", "invariants", "conservation laws"]),
    ("Sofia", 41, "Stockholm", ["partial differential equations", "a spinning top", "Saturn's rings"]),
)
COMMENTS = ("She wrote the first program.", "She tied symmetry to conservation.", None)


def prompt_text() -> str:
    """Two records copied and commented on, and the third to be copied."""
    parts = []
    for (name, age, city, works), comment in zip(RECORDS, COMMENTS, strict=True):
        record = json.dumps(
            {"name": name, "age": age, "city": city, "works": works, "verified": True}, indent=1
        )
        parts.append(f"Record:\n{record}\nCopy:\n")
        if comment is not None:
            parts.append(f"{record}\nComment: {comment}\n\n")
    return "".join(parts)


COLOURS = {"ar": "tab:blue", "diffusion": "tab:orange", "lookup": "tab:green", "none": "lightgrey"}
NEURAL = ("ar", "diffusion")
BACKLOG = 256


@dataclass
class Round:
    """arm: that drafted it. length: committed tokens after it. synced: watermark of each neural drafter after it."""

    arm: str
    length: int
    synced: dict[str, int]


def record(running: Engine, tokens: int) -> list[Round]:
    """One request, round by round."""
    prompt = running.scheduler.tokenizer.encode(prompt_text())
    running.submit("records", prompt, max_new_tokens=tokens, ignore_eos=True)
    rounds: list[Round] = []
    worker = running.worker

    def note() -> None:
        request: Any = running.requests["records"]
        row = request.kv.req_pool_idx if request.kv is not None else None
        state = worker.controller.states.get(row)
        if state is None or state.previous is None:
            return
        length = len(request.origin_input_ids) + len(request.output_ids)
        synced = {arm: worker.sync.watermarks.synced(row, arm) for arm in NEURAL}
        arm = "lookup" if state.previous == "none" and state.decision.promised else state.previous
        rounds.append(Round(arm, length, synced))

    running.run(on_step=note)
    return rounds


def draw(rounds: list[Round], path: Path) -> None:
    """Length and watermarks by round, above the arms."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 4.2))
    places = range(1, len(rounds) + 1)
    for place, entry in zip(places, rounds, strict=True):
        axes.axvspan(place - 0.5, place + 0.5, color=COLOURS[entry.arm], alpha=0.18, linewidth=0)
    axes.plot(places, [entry.length for entry in rounds], color="black", label="committed tokens")
    for arm in NEURAL:
        marks = [entry.synced[arm] for entry in rounds]
        axes.step(places, marks, where="mid", color=COLOURS[arm], label=f"in the KV of {arm}")
    for arm in dict.fromkeys(entry.arm for entry in rounds):
        axes.bar(0, 0, color=COLOURS[arm], alpha=0.4, label=f"round drafted by {arm}")
    axes.set_xlim(0.5, len(rounds) + 0.5)
    axes.set_ylim(bottom=min(min(entry.synced.values()) for entry in rounds) - 10)
    axes.set_xlabel("round")
    axes.set_ylabel("position")
    axes.legend(loc="upper left")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    flags = {"draft": embedded_bundle(), "whiflash_router": "auto", "whiflash_backlog_tokens": BACKLOG}
    with engine(ensure_target(), whiflash=flags, skip_tokenizer_init=False, dtype="bfloat16") as running:
        rounds = record(running, 150)
        print(running.scheduler.tokenizer.decode(running.output("records")))
    print(" ".join(f"{entry.arm}:{entry.length}" for entry in rounds))
    draw(rounds, Path(sys.argv[1]))


if __name__ == "__main__":
    main()
