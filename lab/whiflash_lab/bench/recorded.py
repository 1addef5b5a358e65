"""`whiflash bench --recorded`: plays recorded agents on servers that are forced to write the recorded text.

Prompts, verification, routing and cost are real; only the tokens that the target samples are replaced by the recorded
ones (`round/forcing.py`; without WHIFLASH, `bench/forcing.py`). So a small target can be measured on text that another
model wrote, and all arms see the same prompts. A job is a conversation with its subagents and is one prompt of the run.
Its answers are asked one after the other, with the tools' times between them. Subagents of one answer run at once,
unless their times show that one followed another.
"""

import asyncio
import math
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any, TypeAlias
from uuid import uuid4

import httpx

from whiflash_lab.bench.arms import (
    MEANS,
    NONE,
    PREDICTION,
    SESSIONS,
    USELESS,
    Arm,
    Subject,
    build_arms,
    check_names,
)
from whiflash_lab.bench.cells import Answer, Cell, Turn
from whiflash_lab.bench.forcing import ANSWER, PROCESSOR
from whiflash_lab.bench.load import Asker, RequestError
from whiflash_lab.bench.prompts import Prompt
from whiflash_lab.bench.reference import BestLogit, Difference, Reference
from whiflash_lab.bench.runner import METRICS, Runner
from whiflash_lab.conversations import Conversation, RecordedTurn, Renderer, read_recorded, renderer_of
from whiflash_sglang.errors import ConfigError
from whiflash_sglang.files.jsonl import read_json
from whiflash_sglang.formats.checkpoint import integer
from whiflash_sglang.formats.config_json import read_json_config
from whiflash_sglang.formats.draft_format import merged
from whiflash_train.rounds import agreed

MARGIN = 128
"""Positions of a context that conversations leave free, for the widest drafts after the text."""


WARM_UP_ANSWERS = 4
"""Answers of a conversation that are played as a warm-up. A whole one may have forty and take minutes."""


@dataclass(frozen=True, slots=True)
class Task:
    """An answer to ask for. known: tokens of its prompt that the conversation's turn before has computed."""

    turn: RecordedTurn
    known: int


Step: TypeAlias = "Task | tuple[tuple[Step, ...], ...]"
"""An answer, or the subagents that begin at once after it."""


@dataclass(frozen=True, slots=True)
class Talk(Prompt):
    """A conversation with its subagents' conversations. steps: what is asked, in order."""

    steps: tuple[Step, ...] = ()

    @property
    def turns(self) -> list[RecordedTurn]:
        """All answers, subagents' before those of their parent that come later."""
        return [task.turn for task in tasks_of(self.steps)]

    @property
    def context(self) -> int:
        """Tokens of the longest prompt with its answer."""
        return max(turn.context for turn in self.turns)

    def request(self) -> dict[str, Any]:
        return {"tasks": [[list(turn.prompt), list(turn.answer)] for turn in self.turns]}


def tasks_of(steps: Iterable[Step]) -> Iterator[Task]:
    """Yield the answers of steps and of the subagents between them."""
    for step in steps:
        if isinstance(step, Task):
            yield step
        else:
            for chain in step:
                yield from tasks_of(chain)


def talks_of(
    recorded: Sequence[Conversation], renderer: Renderer, *, max_tokens: int, room: int
) -> tuple[list[Talk], dict[str, str]]:
    """Render conversations in a target's tokens. Return them, and the answers left out for lack of room, with reasons.

    Args:
        max_tokens: most tokens of each answer; the rest is cut. room: most tokens of prompt and answer.

    Raises:
        ConfigError: a subagent's parent is not before it, or is shorter than it says.
    """
    expected = [None if each.prediction is None else renderer.encode(each.prediction) for each in recorded]
    turns, talks, left_out = dict[str, list[RecordedTurn]](), list[Prompt](), dict[str, str]()
    begins, subagents = dict[str, int](), defaultdict[tuple[str, int], list[str]](list)
    spans: dict[str, tuple[float, float]] = {}

    def steps(agent: str) -> Iterator[Step]:
        """Yield every answer once; a subagent's before its parent continues, which needs the subagent's result."""
        computed: Sequence[int] = ()
        for number, turn in enumerate(turns[agent], start=1):
            if number > begins[agent] and turn.context <= room:
                yield Task(turn, agreed(turn.prompt, computed))
            computed = [*turn.prompt, *turn.answer[:-1]]
            groups, ended = list[list[tuple[Step, ...]]](), math.nan
            for name in subagents[agent, number]:
                begin, end = spans[name]
                if not groups or begin > ended:
                    groups.append([])
                groups[-1].append(tuple(steps(name)))
                ended = max(end, ended)
            yield from (tuple(filter(None, group)) for group in groups if any(group))

    for index, record in enumerate(recorded):
        name = record.id
        while name in turns:
            name = f"{name}-{index + 1}"
        own = [
            replace(turn, answer=turn.answer[:max_tokens], free=min(turn.free, max_tokens))
            for turn in renderer.turns(record)
        ]
        theirs = turns.get(record.parent[0], []) if record.parent else []
        if record.parent and len(theirs) < record.parent[1]:
            raise ConfigError(f"{name}: no {record.parent[0]!r} with {record.parent[1]} answers is before it")
        same = [(a.prompt, a.answer) == (b.prompt, b.answer) for a, b in zip(own, theirs, strict=False)]
        turns[name], begins[name] = own, [*same, False].index(False)
        if own and expected[index] is not None:
            others = [tokens for i, tokens in enumerate(expected) if tokens is not None and i != index]
            useless = others[index % len(others)] if others else []
            both = {PREDICTION: expected[index] or [], USELESS: useless}
            own[-1] = replace(own[-1], predictions=both)
        sizes = list(enumerate(turn.context for turn in own))[begins[name] :]
        left_out |= {f"{name}, answer {at}": f"{n} tokens" for at, n in sizes if n > room}
        spans[name] = record.span
        if record.parent:
            subagents[record.parent].append(name)
        else:
            talks.append(Prompt(name, record.category, ()))
    whole = [Talk(talk.id, talk.category, (), steps=tuple(steps(talk.id))) for talk in talks]
    return [talk for talk in whole if talk.steps], left_out


def recorded_arms(names: Sequence[str], subject: Subject, talks: Iterable[Talk]) -> list[Arm]:
    """Build arms by name, each on a server of its own that takes forced answers; plain decoding is always the first.

    Raises:
        ConfigError: a name is unknown or given twice, or asks for predictions that nobody recorded.
    """
    chosen = [NONE, *(name for name in names if name != NONE)]
    check_names(chosen, recorded=True)
    predicted = any(turn.predictions for talk in talks for turn in talk.turns)
    arms = []
    for name in chosen:
        kind, *means = name.split("+")
        if {PREDICTION, USELESS}.intersection(means) and not predicted:
            raise ConfigError(f"--arms {name}: no record has a prediction")
        arm = build_arms([kind], subject)[-1]
        forcing = FORCING[arm.router is not None]
        flags = (*arm.arguments, *forcing, METRICS, *(flag for one in means for flag in MEANS[one]))
        arms.append(replace(arm, name=name, server=name, arguments=flags, means=tuple(means)))
    return arms


FORCING = {True: ("--whiflash-force-recorded", "on"), False: ("--enable-custom-logit-processor",)}
"""Whether a server runs WHIFLASH → flags with which it takes forced answers."""


def read_talks(
    paths: Iterable[Path], subject: Subject, max_tokens: int | None
) -> tuple[list[Talk], dict[str, str]]:
    """Read files and render their conversations (`talks_of`), with the room of a context and of the KV pool.

    Args:
        max_tokens: most tokens of an answer; None: no limit.

    Raises:
        ConfigError: a file cannot be read, or nothing in it fits the context.
    """
    text = merged(subject.target, read_json_config(subject.target), "text_config")
    context = integer(text, "max_position_embeddings", subject.target)
    pools = [int(value) for flag, value in pairwise(subject.common) if flag == POOL]
    room = min(context, *pools[-1:]) - MARGIN if pools else context - MARGIN
    talks, left_out = talks_of(
        [conversation for path in paths for conversation in read_recorded(path)],
        renderer_of(subject.target, subject.bundle),
        max_tokens=max_tokens or context,
        room=room,
    )
    if not talks:
        raise ConfigError(f"no recorded answer fits the {room} tokens that each request has")
    return talks, left_out


POOL = "--max-total-tokens"


def with_pool(subject: Subject, talks: Sequence[Talk], agents: int, share: float) -> Subject:
    """Return a subject whose servers' KV pool has a share of what `agents` need: the mean of the jobs' longest contexts
    for each. The longest job always fits."""
    contexts = [talk.context for talk in talks]
    pool = max(round(share * agents * fmean(contexts)), max(contexts) + MARGIN)
    return replace(subject, common=(*subject.common, POOL, str(pool)))


@dataclass(frozen=True, slots=True)
class Player(Asker):
    """A client of one server that plays jobs. is_stock: whether the server runs without WHIFLASH. means: of the arm.
    longest_wait: seconds of a tool at most."""

    is_stock: bool = False
    means: tuple[str, ...] = ()
    longest_wait: float = 0.0

    async def ask(self, prompt: Prompt) -> Answer:
        """Play a job. Return all its answers as one, with each of its turns.

        Raises:
            RequestError: a request failed, or the answer is not the recorded one.
        """
        assert isinstance(prompt, Talk)
        began = time.perf_counter()
        answers = await self._play(prompt.id, prompt.steps)
        return Answer(
            prompt=prompt.id,
            seconds=time.perf_counter() - began,
            ttft=None,
            tokens=tuple(token for _, tokens, _ in answers for token in tokens),
            forwards=sum(forwards for *_, forwards in answers),
            prefills=len(answers),
            turns=tuple(turn for turn, *_ in answers),
        )

    async def _play(self, talk: str, steps: Sequence[Step]) -> list[tuple[Turn, list[int], int]]:
        """Play one conversation, and its subagents' at once. Return all answers (`_answer`) in the recorded order."""
        session = {"session_id": uuid4().hex} if SESSIONS in self.means else {}
        answers, ended = [], time.perf_counter()
        for step in steps:
            if isinstance(step, Task):
                # A tool's time goes on while subagents run, which are such a tool.
                await asyncio.sleep(min(step.turn.wait, self.longest_wait) + ended - time.perf_counter())
                answers.append(await self._answer(talk, step, session))
                ended = time.perf_counter()
                continue
            async with asyncio.TaskGroup() as group:
                subagents = [group.create_task(self._play(talk, chain)) for chain in step]
            answers += [answer for subagent in subagents for answer in subagent.result()]
        if session:
            await self.client.post("/close_session", json=session)
        return answers

    async def _answer(self, talk: str, task: Task, session: Mapping[str, str]) -> tuple[Turn, list[int], int]:
        """Ask for one answer. Return its turn, its tokens, and the target forwards after its prefill."""
        recorded = task.turn
        custom: dict[str, Any] = {}
        if recorded.answer:
            custom[ANSWER if self.is_stock else "whiflash_forced"] = list(recorded.answer)
        for name in recorded.predictions.keys() & set(self.means):
            custom["whiflash_prediction"] = list(recorded.predictions[name])
        params = {
            "max_new_tokens": len(recorded.answer) or recorded.free,
            "temperature": 0,
            "ignore_eos": True,
            "custom_params": custom,
        }
        body = {"input_ids": list(recorded.prompt), "sampling_params": params, "stream": True, **session}
        if self.is_stock:
            body["custom_logit_processor"] = PROCESSOR
        arrived = await self.streamed(talk, "/generate", body)
        # Each event holds the whole answer so far.
        events = [(at, line.removeprefix("data: ")) for at, line in arrived if line.startswith("data: {")]
        reply = read_json(events[-1][1]) if events else {}
        if "error" in reply:
            raise RequestError(f"conversation {talk}: {reply['error']}")
        written = reply.get("output_ids", [])
        if recorded.answer and written != list(recorded.answer):
            raise RequestError(
                "the server wrote another text than the recorded one, which makes its figures useless: start it with "
                f"{' '.join(FORCING[not self.is_stock])}"
            )
        meta, first, last = reply["meta_info"], events[0][0], events[-1][0]
        turn = Turn(
            prompt=len(recorded.prompt),
            known=task.known,
            cached=meta["cached_tokens"],
            tokens=len(written),
            ttft=first,
            seconds=last,
        )
        return turn, written, int(meta.get("spec_verify_ct") or len(written) - 1)


class Replayer(Runner):
    """Runs a benchmark on recorded conversations. Their text is known, so plain decoding gives no references."""

    def _ask_references(self) -> None:
        self._references = {talk.id: Reference(talk, (), (), (), "") for talk in self._plan.prompts}

    def _compare(self, cells: Sequence[Cell], best: BestLogit) -> list[Difference]:
        return []  # Each answer was compared with the recorded one when it came.

    def _asker(self, client: httpx.AsyncClient, arm: Arm) -> Player:
        plan = self._plan
        return Player(client, plan.max_tokens, {}, arm.router is None, arm.means, plan.longest_wait)

    def _prompt(self, key: str, *, is_warm_up: bool) -> Talk:
        talk = super()._prompt(key, is_warm_up=is_warm_up)
        assert isinstance(talk, Talk)
        if not is_warm_up:
            return talk
        first = list(tasks_of(talk.steps))[:WARM_UP_ANSWERS]
        return replace(talk, steps=tuple(Task(replace(task.turn, wait=0.0), task.known) for task in first))

    def _groups(self) -> dict[str, str]:
        """Return prompt id → category. No group is `loops`, since the target did not write the texts."""
        return {key: reference.prompt.category for key, reference in self._references.items()}
