"""`whiflash bench --recorded`: recorded conversations played against servers that are forced along their text.

Prompts, verification, routing and cost are real; only the tokens that the target samples are replaced by the recorded
ones (`round/forcing.py`). So a small target can be measured on the text that another one wrote.
"""

import asyncio
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import httpx

from whiflash_sglang.errors import ConfigError, WhiflashError
from whiflash_sglang.lab.bench.arms import PREDICTION, USELESS, Arm, Subject, build_arms, check_names
from whiflash_sglang.lab.bench.load import ANSWER_SECONDS
from whiflash_sglang.lab.recorded.conversation import Conversation
from whiflash_sglang.lab.recorded.turns import Renderer

BASE = "pinned-none"
"""The arm that others are measured against: the same server, which drafts nothing."""

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
    async with httpx.AsyncClient(base_url=url, timeout=ANSWER_SECONDS) as client:

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
