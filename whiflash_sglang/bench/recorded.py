"""`whiflash bench --recorded`: recorded conversations played against servers that are forced along their text.

Prompts, verification, routing and cost are real; only the tokens that the target samples are replaced by the recorded
ones (`round/forcing.py`). So a small target can be measured on the text that another one wrote.
"""

import asyncio
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from rich.progress import Progress
from rich.table import Table

from whiflash_sglang.bench.arms import ROUTERS, VARIANTS, Arm, Subject, build_arms
from whiflash_sglang.bench.fleet import Fleet
from whiflash_sglang.bench.load import ANSWER_SECONDS
from whiflash_sglang.bench.statistics import Interval, paired_ratio, rate
from whiflash_sglang.errors import ConfigError, WhiflashError
from whiflash_sglang.recorded.conversation import Conversation
from whiflash_sglang.recorded.turns import Renderer

BASE = "pinned-none"
"""The arm that others are measured against: the same server, which drafts nothing."""

PREDICTION, USELESS = "prediction", "useless"
"""What an arm's requests bring along, behind a plus: the recorded prediction, or another conversation's."""

DEFAULT = (BASE, "auto")
FLUSHES = 500


@dataclass(frozen=True)
class Task:
    """One recorded answer. predictions: token ids by what arms may bring along."""

    prompt: Sequence[int]
    answer: Sequence[int]
    predictions: Mapping[str, Sequence[int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Talk:
    """A conversation's answers, in order."""

    id: str
    category: str
    tasks: tuple[Task, ...]


@dataclass(frozen=True)
class Played:
    """A conversation as one arm played it. rounds: verifications after the prefills."""

    talk: str
    tokens: int
    seconds: float
    rounds: int


def talks_of(
    recorded: Sequence[Conversation], renderer: Renderer, *, max_tokens: int, room: int
) -> tuple[list[Talk], int]:
    """Conversations in a target's tokens, and the number of answers left out because their prompts have no room.

    Args:
        max_tokens: of each answer, the rest is cut. room: tokens of prompt and answer.
    """
    encode = renderer.vocabulary.encode
    expected = [None if one.prediction is None else encode(one.prediction) for one in recorded]
    talks, left_out = [], 0
    for index, one in enumerate(recorded):
        turns = list(renderer.turns(one))
        tasks = [Task(turn.prompt, turn.answer[:max_tokens]) for turn in turns]
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
    if len(set(wanted)) != len(wanted):
        raise ConfigError(f"--arms names an arm twice: {', '.join(wanted)}")
    predicted = any(task.predictions for talk in talks for task in talk.tasks)
    arms = []
    for name in wanted:
        kind, _, brings = name.partition("+")
        if kind not in {*ROUTERS, *VARIANTS} or brings not in ("", PREDICTION, USELESS):
            known = ", ".join((*ROUTERS, *VARIANTS))
            raise ConfigError(
                f"--arms: {name!r} is unknown with --recorded; known: {known}, and each with "
                f"+{PREDICTION} or +{USELESS}"
            )
        if brings and not predicted:
            raise ConfigError(f"--arms {name}: no record has a prediction")
        arm = build_arms([kind], subject)[-1]
        forcing = (*arm.arguments, "--whiflash-router", str(arm.router), "--whiflash-force-recorded", "on")
        arms.append(replace(arm, name=name, server=name, arguments=forcing, request={"brings": brings}))
    return arms


async def play(url: str, arm: Arm, talks: Sequence[Talk], at_once: int) -> tuple[list[Played], float]:
    """Play conversations, `at_once` of them at any time, each answer after the one before. Also: seconds in all.

    Raises:
        WhiflashError: a request failed, or the answer is not the recorded one.
    """
    waiting, played = list(reversed(talks)), list[Played]()
    async with httpx.AsyncClient(base_url=url, timeout=ANSWER_SECONDS) as client:

        async def plays() -> None:
            while waiting:
                talk = waiting.pop()
                began, rounds = time.perf_counter(), 0
                for task in talk.tasks:
                    rounds += await _ask(client, arm, task)
                tokens = sum(len(task.answer) for task in talk.tasks)
                played.append(Played(talk.id, tokens, time.perf_counter() - began, rounds))

        await _flush(client)
        began = time.perf_counter()
        await asyncio.gather(*(plays() for _ in range(at_once)))
        return played, time.perf_counter() - began


async def _ask(client: httpx.AsyncClient, arm: Arm, task: Task) -> int:
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
        raise WhiflashError(f"{arm.name}: the server did not follow the recorded text")
    return int(body["meta_info"].get("spec_verify_ct") or len(task.answer) - 1)


async def _flush(client: httpx.AsyncClient) -> None:
    for _ in range(FLUSHES):
        if (await client.post("/flush_cache")).status_code == 200:
            return
        await asyncio.sleep(0.02)  # It is refused until the scheduler has put the last answer away.
    raise WhiflashError("the prefix cache could not be emptied: the server does not become idle")


def measure(
    arms: Sequence[Arm],
    talks: Sequence[Talk],
    concurrency: Sequence[int],
    repetitions: int,
    fleet: Fleet,
    bar: Progress,
) -> dict[str, Any]:
    """Start a server for each arm and play everything `repetitions` times; who comes first rotates.

    One at a time, each conversation is played by every arm before the next one; several at a time, all of them by one
    arm after the other. The first conversation is played once before, unmeasured.

    Raises:
        WhiflashError: a server did not start, or of `play`.
    """
    task = bar.add_task("starting servers", total=len(arms))
    failed = fleet.start({arm.server: arm.arguments for arm in arms}, lambda *_: bar.advance(task))
    if failed:
        raise WhiflashError("; ".join(f"{name}: {reason}" for name, reason in failed.items()))
    for arm in arms:
        asyncio.run(play(fleet.url(arm.server), arm, talks[:1], 1))
    result = {}
    for at_once in concurrency:
        groups = [[talk] for talk in talks] if at_once == 1 else [list(talks)]
        task = bar.add_task(f"{at_once} at a time", total=repetitions * len(groups) * len(arms))
        seconds: dict[str, list[list[float]]] = {arm.name: [[] for _ in groups] for arm in arms}
        rounds = dict.fromkeys(seconds, 0)
        turn = 0
        for _ in range(repetitions):
            for g, group in enumerate(groups):
                for arm in (*arms[turn % len(arms) :], *arms[: turn % len(arms)]):
                    played, took = asyncio.run(play(fleet.url(arm.server), arm, group, at_once))
                    seconds[arm.name][g].append(took)
                    rounds[arm.name] += sum(one.rounds for one in played)
                    bar.advance(task)
                turn += 1
        result[str(at_once)] = figures(groups, seconds, rounds, repetitions)
    return result


def figures(
    groups: Sequence[Sequence[Talk]],
    seconds: Mapping[str, Sequence[Sequence[float]]],
    rounds: Mapping[str, int],
    repetitions: int,
) -> dict[str, Any]:
    """By arm: tokens a second, acceptance length, and the ratios over every other arm with 95 % intervals.

    Args:
        groups: what was timed together. seconds: by arm, group and repetition. rounds: by arm, of all repetitions.
    """
    answers = [[task.answer for talk in group for task in talk.tasks] for group in groups]
    lengths = np.array([[float(sum(map(len, own)))] * repetitions for own in answers])
    drafted = sum(len(answer) - 1 for own in answers for answer in own) * repetitions
    strata = [group[0].category for group in groups]
    times = {name: np.array(own, dtype=np.float64) for name, own in seconds.items()}
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


def recorded_tables(result: Mapping[str, Any]) -> list[Table]:
    """One table for every number of conversations at a time."""
    tables = []
    for at_once, arms in result["concurrency"].items():
        table = Table(
            title=f"{at_once} at a time, {result['talks']} conversations, {result['tokens']} forced tokens"
        )
        for column in ("arm", "tokens/s", "acceptance length", *(f"over {name}" for name in arms)):
            table.add_column(column, justify="left" if column == "arm" else "right")
        for name, own in arms.items():
            ratios = (own["over"].get(other) for other in arms)
            shown = (f"{r['ratio']:.2f} [{r['low']:.2f}, {r['high']:.2f}]" if r else "" for r in ratios)
            table.add_row(
                name, f"{own['output_tokens_per_s']:.1f}", f"{own['acceptance_length']:.2f}", *shown
            )
        tables.append(table)
    return tables


def write_result(result: Mapping[str, Any], out: Path) -> None:
    """As JSON, whole or not at all."""
    import json

    out.parent.mkdir(parents=True, exist_ok=True)
    staged = out.with_name(out.name + ".part")
    staged.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    staged.replace(out)
