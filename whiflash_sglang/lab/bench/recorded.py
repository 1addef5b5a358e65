"""`whiflash bench --recorded`: recorded conversations played against servers that are forced along their text.

Prompts, verification, routing and cost are real; only the tokens that the target samples are replaced by the recorded
ones (`round/hooks.py`). So a small target can be measured on the text that another one wrote.
"""

import asyncio
import hashlib
import json
import shlex
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from whiflash_sglang import __version__, provenance
from whiflash_sglang.errors import ConfigError, WhiflashError
from whiflash_sglang.jsonl import write_whole
from whiflash_sglang.lab.bench.arms import PREDICTION, USELESS, Arm, Subject, build_arms, check_names
from whiflash_sglang.lab.bench.cells import Journal, PlayedCell
from whiflash_sglang.lab.bench.command import loads_of, open_fleet
from whiflash_sglang.lab.bench.fleet import Fleet
from whiflash_sglang.lab.bench.load import ANSWER_SECONDS, LIMITS
from whiflash_sglang.lab.bench.subject import CPU_KV_TOKENS, build_subject
from whiflash_sglang.lab.recorded.conversation import Conversation, Renderer, Turn, renderer_of
from whiflash_sglang.lab.recorded.files import read_recorded
from whiflash_sglang.lab.statistics import Interval, paired_ratio, rate
from whiflash_sglang.models.config_json import read_json_config
from whiflash_sglang.progress import progress

BASE = "pinned-none"
"""The arm that others are measured against: the same server, which drafts nothing."""

DEFAULT = (BASE, "auto")
FLUSHES = 500


@dataclass(frozen=True)
class Talk:
    """A conversation's answers, in order."""

    id: str
    category: str
    tasks: tuple[Turn, ...]


def talks_of(
    recorded: Sequence[Conversation], renderer: Renderer, *, max_tokens: int, room: int
) -> tuple[list[Talk], int]:
    """Conversations in a target's tokens, and the number of answers left out because their prompts have no room.

    Args:
        max_tokens: of each answer, the rest is cut. room: tokens of prompt and answer.
    """
    expected = [None if one.prediction is None else renderer.encode(one.prediction) for one in recorded]
    talks, left_out = [], 0
    for index, one in enumerate(recorded):
        tasks = [replace(turn, answer=turn.answer[:max_tokens]) for turn in renderer.turns(one)]
        if tasks and expected[index] is not None:
            others = [tokens for i, tokens in enumerate(expected) if tokens is not None and i != index]
            useless = others[index % len(others)] if others else []
            both = {PREDICTION: expected[index] or [], USELESS: useless}
            tasks[-1] = replace(tasks[-1], predictions=both)
        kept = tuple(task for task in tasks if len(task.prompt) + len(task.answer) <= room)
        left_out += len(tasks) - len(kept)
        if kept:
            talks.append(Talk(one.id, one.category, kept))
    return talks, left_out


def recorded_arms(names: Sequence[str], subject: Subject, talks: Iterable[Talk]) -> list[Arm]:
    """Arms by name, each on a server of its own that takes forced answers; `BASE` is always the first.

    Raises:
        ConfigError: a name is unknown or given twice, or asks for predictions that nobody recorded.
    """
    wanted = [BASE, *(name for name in names if name != BASE)]
    check_names(wanted, recorded=True)
    predicted = any(task.predictions for talk in talks for task in talk.tasks)
    arms = []
    for name in wanted:
        kind, _, brings = name.partition("+")
        if brings and not predicted:
            raise ConfigError(f"--arms {name}: no record has a prediction")
        arm = build_arms([kind], subject)[-1]
        forcing = (*arm.arguments, "--whiflash-router", str(arm.router), "--whiflash-force-recorded", "on")
        arms.append(replace(arm, name=name, server=name, arguments=forcing, request={"brings": brings}))
    return arms


async def play(url: str, arm: Arm, talks: Sequence[Talk], at_once: int) -> tuple[float, int]:
    """Play conversations, `at_once` of them at any time, each answer after the one before.

    Returns:
        Seconds from the first request to the last answer, and verifications after the prefills.

    Raises:
        WhiflashError: a request failed, or the answer is not the recorded one.
    """
    waiting, rounds = list(reversed(talks)), 0
    async with httpx.AsyncClient(base_url=url, timeout=ANSWER_SECONDS, limits=LIMITS) as client:

        async def plays() -> None:
            nonlocal rounds
            while waiting:
                for task in waiting.pop().tasks:
                    own = await _ask(client, arm, task)  # Not `rounds += await`: it would forget the others'.
                    rounds += own

        await _flush(client)
        began = time.perf_counter()
        await asyncio.gather(*(plays() for _ in range(at_once)))
        return time.perf_counter() - began, rounds


async def _ask(client: httpx.AsyncClient, arm: Arm, task: Turn) -> int:
    custom: dict[str, Any] = {"whiflash_forced": list(task.answer)}
    if arm.request["brings"] in task.predictions:
        custom["whiflash_prediction"] = list(task.predictions[arm.request["brings"]])
    params = {
        "max_new_tokens": len(task.answer),
        "temperature": 0,
        "ignore_eos": True,
        "custom_params": custom,
    }
    answer = await client.post("/generate", json={"input_ids": list(task.prompt), "sampling_params": params})
    if answer.status_code != 200:
        raise WhiflashError(f"{arm.name}: {answer.text}")
    body = answer.json()
    if body["output_ids"] != list(task.answer):
        raise WhiflashError(
            f"{arm.name}: the server wrote another text than the recorded one, which makes its figures useless: start "
            "it with --whiflash-force-recorded on"
        )
    return int(body["meta_info"].get("spec_verify_ct") or len(task.answer) - 1)


async def _flush(client: httpx.AsyncClient) -> None:
    for _ in range(FLUSHES):
        if (await client.post("/flush_cache")).status_code == 200:
            return
        await asyncio.sleep(0.02)  # It is refused until the scheduler has put the last answer away.
    raise WhiflashError(
        f"{client.base_url} does not empty its prefix cache, because requests still run there: end its other clients"
    )


def figures(talks: Sequence[Talk], cells: Sequence[PlayedCell]) -> dict[str, dict[str, Any]]:
    """By conversations at a time and by arm: tokens a second, acceptance length, ratios over every other arm with
    95 % intervals.

    Args:
        talks: all that were played. cells: of whole repetitions, every arm's of each.
    """
    by_id = {talk.id: talk for talk in talks}
    found = {}
    for at_once in dict.fromkeys(cell.at_once for cell in cells):
        own = [cell for cell in cells if cell.at_once == at_once]
        found[str(at_once)] = _figures(by_id, own)
    return found


def _figures(talks: Mapping[str, Talk], cells: Sequence[PlayedCell]) -> dict[str, Any]:
    groups = list(dict.fromkeys(cell.talks for cell in cells))
    repetitions = len({cell.repetition for cell in cells})
    answers = [[task.answer for key in group for task in talks[key].tasks] for group in groups]
    lengths = np.array([[float(sum(map(len, own)))] * repetitions for own in answers])
    drafted = sum(len(answer) - 1 for own in answers for answer in own) * repetitions
    strata = [talks[group[0]].category for group in groups]
    times, rounds = dict[str, np.ndarray](), Counter[str]()
    for cell in cells:
        own = times.setdefault(cell.arm, np.zeros((len(groups), repetitions)))
        own[groups.index(cell.talks), cell.repetition] = cell.seconds
        rounds[cell.arm] += cell.rounds
    found: dict[str, Any] = {}
    for name, own in times.items():
        over: dict[str, Interval] = {
            other: paired_ratio(lengths, own, lengths, theirs, strata)
            for other, theirs in times.items()
            if other != name
        }
        found[name] = {
            "output_tokens_per_s": rate(lengths, own),
            "acceptance_length": drafted / rounds[name] if rounds[name] else 1.0,
            "over": {other: ratio.model_dump() for other, ratio in over.items()},
        }
    return found


def recorded_rows(arms: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of one number of conversations at a time."""
    header = ["arm", "tokens/s", "acceptance length", *(f"over {name}" for name in arms)]
    rows = []
    for name, own in arms.items():
        ratios = (own["over"].get(other) for other in arms)
        shown = (f"{r['ratio']:.2f} [{r['low']:.2f}, {r['high']:.2f}]" if r else "" for r in ratios)
        rows.append([name, f"{own['output_tokens_per_s']:.1f}", f"{own['acceptance_length']:.2f}", *shown])
    return header, rows


def recorded_tables(result: Mapping[str, Any]) -> list[Table]:
    """One table for every number of conversations at a time."""
    tables = []
    for at_once, arms in result["concurrency"].items():
        table = Table(
            title=f"{at_once} at a time, {result['talks']} conversations, {result['tokens']} forced tokens"
        )
        header, rows = recorded_rows(arms)
        for column in header:
            table.add_column(column, justify="left" if column == "arm" else "right")
        for row in rows:
            table.add_row(*row)
        tables.append(table)
    return tables


def recorded_page(result: Mapping[str, Any], command: str) -> str:
    """The same as a Markdown page. command: what printed it."""
    made, count = result["provenance"], result["repetitions"]
    repetitions = "1 repetition" if count == 1 else f"{count} repetitions"
    parts = [
        f"# Recorded conversations, forced: {', '.join(result['files'])}",
        f"{made['hardware']['cpu']}, {made['hardware']['cores']} cores, {made['threads']} threads a server, "
        f"{made['dtype']}, SGLang {made['packages']['sglang']}, torch {made['packages']['torch']}. "
        f"{repetitions}, interleaved; {result['talks']} conversations, {result['answers']} "
        f"answers, {result['tokens']} forced tokens. Load of the machine before "
        f"{made['busy_before']['load_1min']:.1f}, after {made['busy_after']['load_1min']:.1f}.",
        "Rates count the whole exchange, prefill included. In brackets: 95 % paired bootstrap intervals over "
        "conversations and repetitions. Acceptance length: tokens per target forward.",
    ]
    for at_once, arms in result["concurrency"].items():
        header, rows = recorded_rows(arms)
        lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
        parts += [f"## {at_once} at a time", "\n".join(f"| {' | '.join(line)} |" for line in lines)]
    parts.append(f"`{command}`")
    return "\n\n".join(parts) + "\n"


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
        context = read_json_config(subject.target)["max_position_embeddings"]
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
