"""What `whiflash bench --recorded` is asked for, carried out and shown."""

import asyncio
import hashlib
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from whiflash_sglang import __version__, provenance
from whiflash_sglang.errors import ConfigError, WhiflashError
from whiflash_sglang.jsonl import write_whole
from whiflash_sglang.lab.bench.arms import Arm
from whiflash_sglang.lab.bench.cells import Journal, PlayedCell
from whiflash_sglang.lab.bench.command import loads_of, open_fleet
from whiflash_sglang.lab.bench.fleet import Fleet
from whiflash_sglang.lab.bench.recorded import (
    DEFAULT,
    Talk,
    figures,
    play,
    recorded_arms,
    recorded_page,
    recorded_tables,
    talks_of,
)
from whiflash_sglang.lab.bench.subject import CPU_KV_TOKENS, build_subject
from whiflash_sglang.lab.recorded.benchmark import renderer_of
from whiflash_sglang.lab.recorded.files import read_recorded
from whiflash_sglang.progress import progress

MARGIN = 128
"""Positions of a context that no conversation takes: the widest drafts go behind the text."""


@dataclass(frozen=True)
class RecordedRun:
    """What to play.

    paths: recorded files. arms: names; `DEFAULT` where there are none. max_tokens: of an answer, None: all of it.
    minutes: begin no repetition that would end later than that after the servers are up.
    """

    paths: tuple[Path, ...]
    arms: tuple[str, ...]
    concurrency: str
    repetitions: int
    max_tokens: int | None
    model_path: str | None
    bundle: str | None
    dtype: str
    minutes: float | None = None
    server_args: tuple[str, ...] = ()
    log_dir: Path | None = None


@dataclass(frozen=True)
class RecordedOutputs:
    """as_json: print JSON instead of tables. out, markdown: files. resume: go on with what `out`'s journal holds."""

    as_json: bool = False
    out: Path | None = None
    markdown: Path | None = None
    resume: bool = False

    def publish(self, result: dict[str, Any]) -> None:
        """Show it and write it, each file whole or not at all."""
        text = json.dumps(result, indent=1)
        if self.as_json:
            print(text)
        else:
            for table in recorded_tables(result):
                Console().print(table)
        if self.out is not None:
            write_whole(self.out, text + "\n")
        if self.markdown is not None:
            command = shlex.join(
                ["whiflash", *(Path(part).name if "/" in part else part for part in sys.argv[1:])]
            )
            write_whole(self.markdown, recorded_page(result, command))


def run_recorded(run: RecordedRun, outputs: RecordedOutputs) -> dict[str, Any]:
    """Measure, show and write. What was measured is kept beside `outputs.out` as it comes, so that a run that was
    interrupted can be resumed.

    Raises:
        ConfigError: an option is wrong, a file cannot be read, nothing in it fits the context, or what is to be
            resumed was another run.
        WhiflashError: a server did not start, or did not answer as recorded.
    """
    loads = [int(load.value) for load in loads_of(run.concurrency, "")]
    for file in (outputs.out, outputs.markdown):
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
    if run.log_dir is not None:
        run.log_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="whiflash-bench-") as scratch, ExitStack() as stack:
        kinds = [name.partition("+")[0] for name in run.arms]
        subject = build_subject(run.model_path, run.bundle, run.dtype, run.server_args, Path(scratch), kinds)
        context = json.loads((subject.target / "config.json").read_text("utf-8"))["max_position_embeddings"]
        recorded = [one for path in run.paths for one in read_recorded(path)]
        talks, left_out = talks_of(
            recorded,
            renderer_of(subject.target, subject.bundle),
            max_tokens=run.max_tokens or context,
            room=min(context, CPU_KV_TOKENS // max(loads)) - MARGIN,
        )
        if not talks:
            raise ConfigError(f"no recorded answer fits a context of {context} tokens")
        arms = recorded_arms(run.arms or DEFAULT, subject, talks)
        asked = [[arm.name, subject.hide_paths(arm.arguments)] for arm in arms]
        cells = (outputs.out or Path(scratch) / "result.json").with_suffix(".cells.jsonl")
        journal = Journal(cells, _fingerprint(asked, talks), PlayedCell)
        known = journal.read() if outputs.resume else []
        journal.begin(known)
        bar = stack.enter_context(progress())
        fleet = open_fleet(stack, bar, run.log_dir)
        record = {**provenance.environment(subject.bundle), "busy_before": provenance.busy()}
        start(arms, talks, fleet, bar)
        found = measure(arms, talks, loads, run.repetitions, fleet, bar, journal, run.minutes)
    result = {
        "schema_version": 1,
        "files": [path.name for path in run.paths],
        "talks": len(talks),
        "answers": sum(len(talk.tasks) for talk in talks),
        "left_out": left_out,
        "tokens": sum(len(task.answer) for talk in talks for task in talk.tasks),
        "repetitions": len({cell.repetition for cell in found}),
        "concurrency": figures(talks, found),
        "provenance": {**record, "busy_after": provenance.busy(), "dtype": run.dtype},
    }
    outputs.publish(result)
    return result


def _fingerprint(arms: Sequence[Any], talks: Sequence[Talk]) -> str:
    """What must be equal for the cells of two runs to belong together."""
    texts = [[talk.id, [[list(task.prompt), list(task.answer)] for task in talk.tasks]] for talk in talks]
    return hashlib.sha256(json.dumps([__version__, arms, texts]).encode()).hexdigest()


def start(arms: Sequence[Arm], talks: Sequence[Talk], fleet: Fleet, bar: Progress) -> None:
    """Start a server for each arm; each plays the first conversation once, unmeasured.

    Raises:
        WhiflashError: a server did not start, or of `play`.
    """
    task = bar.add_task("starting servers", total=len(arms))
    failed = fleet.start({arm.server: arm.arguments for arm in arms}, lambda *_: bar.advance(task))
    if failed:
        raise WhiflashError("; ".join(f"{name}: {reason}" for name, reason in failed.items()))
    for arm in arms:
        asyncio.run(play(fleet.url(arm.server), arm, talks[:1], 1))


def measure(
    arms: Sequence[Arm],
    talks: Sequence[Talk],
    concurrency: Sequence[int],
    repetitions: int,
    fleet: Fleet,
    bar: Progress,
    journal: Journal[PlayedCell],
    minutes: float | None = None,
) -> list[PlayedCell]:
    """Play everything `repetitions` times, but for what `journal` already holds.

    Args:
        minutes: begin no repetition that would end later than that from now.

    Returns:
        The cells of whole repetitions.

    Raises:
        WhiflashError: of `play`.
    """
    started = time.monotonic()
    known = {cell.key: cell for cell in journal.read()}
    cells = list[PlayedCell]()
    steps = [list(_steps(arms, talks, concurrency, repetition)) for repetition in range(repetitions)]
    task = bar.add_task("playing", total=sum(map(len, steps)))
    for repetition, own in enumerate(steps):
        began = time.monotonic()
        for at_once, group, arm in own:
            key = at_once, arm.name, repetition, tuple(talk.id for talk in group)
            if key not in known:
                seconds, rounds = asyncio.run(play(fleet.url(arm.server), arm, group, at_once))
                known[key] = PlayedCell(
                    at_once=at_once,
                    arm=arm.name,
                    repetition=repetition,
                    talks=key[-1],
                    seconds=seconds,
                    rounds=rounds,
                )
                journal.append(known[key])
            cells.append(known[key])
            bar.advance(task)
        now = time.monotonic()
        if minutes is not None and now - started + (now - began) > 60 * minutes:
            break
    return cells


def _steps(
    arms: Sequence[Arm], talks: Sequence[Talk], concurrency: Sequence[int], repetition: int
) -> Iterator[tuple[int, list[Talk], Arm]]:
    """Who plays what in a repetition; who comes first rotates. One at a time, each conversation is played by every arm
    before the next one; several at a time, all of them by one arm after the other."""
    for at_once in concurrency:
        groups = [[talk] for talk in talks] if at_once == 1 else [list(talks)]
        for g, group in enumerate(groups):
            first = (repetition * len(groups) + g) % len(arms)
            for arm in (*arms[first:], *arms[:first]):
                yield at_once, group, arm
