"""`whiflash bench --recorded`: recorded conversations played against servers that are forced along their text.

Prompts, verification, routing and cost are real; only the tokens that the target samples are replaced by the recorded
ones (`round/hooks.py`). So a small target can be measured on the text that another one wrote.
"""

import asyncio
import hashlib
import json
import shlex
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
from rich.progress import Progress

from whiflash_sglang import __version__, provenance
from whiflash_sglang.errors import ConfigError, WhiflashError
from whiflash_sglang.lab.bench.arms import PREDICTION, USELESS, Arm, Subject, build_arms, check_names
from whiflash_sglang.lab.bench.cells import Answer, Cell, Journal, Load
from whiflash_sglang.lab.bench.command import Outputs, loads_of, open_fleet
from whiflash_sglang.lab.bench.fleet import Fleet
from whiflash_sglang.lab.bench.load import ANSWER_SECONDS, LIMITS, flush
from whiflash_sglang.lab.bench.pages import table
from whiflash_sglang.lab.bench.report import paired, samples
from whiflash_sglang.lab.bench.runner import remaining, sweep
from whiflash_sglang.lab.bench.subject import CPU_KV_TOKENS, build_subject
from whiflash_sglang.lab.recorded.conversation import Conversation, Renderer, Turn, renderer_of
from whiflash_sglang.lab.recorded.files import read_recorded
from whiflash_sglang.lab.statistics import rate
from whiflash_sglang.models.config_json import read_json_config
from whiflash_sglang.progress import progress

BASE = "pinned-none"
"""The arm that others are measured against: the same server, which drafts nothing."""

DEFAULT = (BASE, "auto")


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
    talks, left_out, taken = [], 0, set[str]()
    for index, one in enumerate(recorded):
        name = one.id
        while name in taken:
            name = f"{name}-{index + 1}"
        taken.add(name)
        tasks = [replace(turn, answer=turn.answer[:max_tokens]) for turn in renderer.turns(one)]
        if tasks and expected[index] is not None:
            others = [tokens for i, tokens in enumerate(expected) if tokens is not None and i != index]
            useless = others[index % len(others)] if others else []
            both = {PREDICTION: expected[index] or [], USELESS: useless}
            tasks[-1] = replace(tasks[-1], predictions=both)
        kept = tuple(task for task in tasks if len(task.prompt) + len(task.answer) <= room)
        left_out += len(tasks) - len(kept)
        if kept:
            talks.append(Talk(name, one.category, kept))
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


async def play(url: str, arm: Arm, talks: Sequence[Talk], at_once: int) -> tuple[float, list[Answer]]:
    """Play conversations, `at_once` of them at any time, each answer after the one before.

    Returns:
        Seconds from the first request to the last answer, and an `Answer` for each conversation: all its tokens. What
        is not streamed has no first token: `ttft` is 0.

    Raises:
        WhiflashError: a request failed, or the answer is not the recorded one.
    """
    waiting, answers = list(enumerate(talks)), dict[int, Answer]()
    async with httpx.AsyncClient(base_url=url, timeout=ANSWER_SECONDS, limits=LIMITS) as client:

        async def plays() -> None:
            while waiting:
                index, talk = waiting.pop(0)
                began = time.perf_counter()
                rounds = [await _ask(client, arm, task) for task in talk.tasks]
                answers[index] = Answer(
                    prompt=talk.id,
                    seconds=time.perf_counter() - began,
                    ttft=0.0,
                    tokens=tuple(token for task in talk.tasks for token in task.answer),
                    forwards=sum(rounds),
                )

        began = time.perf_counter()
        await asyncio.gather(*(plays() for _ in range(at_once)))
        return time.perf_counter() - began, [answers[index] for index in range(len(talks))]


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


def figures(talks: Sequence[Talk], cells: Sequence[Cell]) -> dict[str, dict[str, Any]]:
    """By conversations at a time and by arm: tokens a second, acceptance length, ratios over every other arm with
    95 % intervals.

    Args:
        talks: all that were played. cells: of whole repetitions, every arm's of each.
    """
    groups = {talk.id: talk.category for talk in talks}
    prefills = {talk.id: len(talk.tasks) for talk in talks}
    by_load: dict[str, dict[str, list[Cell]]] = defaultdict(lambda: defaultdict(list))
    for cell in cells:
        by_load[f"{cell.load.value}"][cell.arm].append(cell)
    found: dict[str, dict[str, Any]] = {}
    for at_once, by_arm in by_load.items():
        found[at_once] = {}
        for name, own in by_arm.items():
            answers = [answer for cell in own for answer in cell.answers]
            drafted = sum(len(answer.tokens) - prefills[answer.prompt] for answer in answers)
            forwards = sum(answer.forwards for answer in answers)
            others = {other: cells for other, cells in by_arm.items() if other != name}
            found[at_once][name] = {
                "output_tokens_per_s": rate(*samples(own)),
                "acceptance_length": drafted / forwards if forwards else 1.0,
                "over": {other: paired(own, cells, groups).model_dump() for other, cells in others.items()},
            }
    return found


def recorded_page(result: Mapping[str, Any]) -> str:
    """The result as a Markdown page."""
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
        rows = []
        for name, own in arms.items():
            ratios = (own["over"].get(other) for other in arms)
            shown = (f"{r['ratio']:.2f} [{r['low']:.2f}, {r['high']:.2f}]" if r else "" for r in ratios)
            rows.append(
                (name, f"{own['output_tokens_per_s']:.1f}", f"{own['acceptance_length']:.2f}", *shown)
            )
        header = ("arm", "tokens/s", "acceptance length", *(f"over {name}" for name in arms))
        parts += [f"## {at_once} at a time", table(header, rows)]
    command = (Path(part).name if "/" in part else part for part in made["command"])
    parts.append(f"`{shlex.join(command)}`")
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


def run_recorded(run: RecordedRun, outputs: Outputs, *, resume: bool) -> None:
    """Measure, show and write. What was measured is kept beside `outputs.out` as it comes, so that a run that was
    interrupted can be resumed.

    Raises:
        ConfigError: an option is wrong, a file cannot be read, nothing in it fits the context, or what is to be
            resumed was another run.
        WhiflashError: a server did not start, or did not answer as recorded.
    """
    loads = loads_of(run.concurrency)
    outputs.prepare()
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
            room=min(context, CPU_KV_TOKENS // max(load.value for load in loads)) - MARGIN,
        )
        if not talks:
            raise ConfigError(f"no recorded answer fits a context of {context} tokens")
        arms = recorded_arms(run.arms or DEFAULT, subject, talks)
        asked = [[arm.name, subject.hide_paths(arm.arguments)] for arm in arms]
        cells = (outputs.out or Path(scratch) / "result.json").with_suffix(".cells.jsonl")
        journal = Journal(cells, _fingerprint(asked, talks))
        known = journal.read() if resume else []
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
    outputs.show(recorded_page(result), json.dumps(result, indent=1))


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
    loads: Sequence[Load],
    repetitions: int,
    fleet: Fleet,
    bar: Progress,
    journal: Journal,
    minutes: float | None = None,
) -> list[Cell]:
    """Play everything `repetitions` times, but for what `journal` already holds.

    Args:
        minutes: begin no repetition that would end later than that from now.

    Returns:
        The cells of whole repetitions.

    Raises:
        WhiflashError: of `play`.
    """
    started, cells, done, whole = time.monotonic(), journal.read(), 0, set[Any]()
    by_name, by_id = {arm.name: arm for arm in arms}, {talk.id: talk for talk in talks}
    task = bar.add_task("playing", total=None)
    while done < repetitions:
        began = time.monotonic()
        steps = list(sweep(list(by_name), loads, done, list(by_id), list(by_id)))
        bar.update(task, total=repetitions * len(steps))
        for step in remaining(steps, cells):
            arm, chosen = by_name[step.arm], [by_id[name] for name in step.prompts]
            flush(fleet.clients[arm.server])
            seconds, answers = asyncio.run(play(fleet.url(arm.server), arm, chosen, step.load.value))
            cell = Cell(
                load=step.load,
                arm=step.arm,
                repetition=step.repetition,
                seconds=seconds,
                answers=tuple(answers),
            )
            cells.append(cell)
            journal.append(cell)
            bar.advance(task)
        done += 1
        whole |= {step.key for step in steps}
        bar.update(task, completed=done * len(steps))
        now = time.monotonic()
        if minutes is not None and now - started + (now - began) > 60 * minutes:
            break
    return [cell for cell in cells if cell.key in whole]
