"""`whiflash bench --recorded`: plays recorded agents on servers that are forced to write the recorded text.

Prompts, verification, routing and cost are real; only the tokens that the target samples are replaced by the recorded
ones (`round/forcing.py`; without WHIFLASH, `bench/forcing.py`). So a small target can be measured on text that another
model wrote, and all arms see the same prompts. A job is a conversation with its subagents and is one prompt of the run.
Its answers are asked one after the other, with the tools' times between them.
"""

import asyncio
import hashlib
import json
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any
from uuid import uuid4

import httpx

from whiflash_lab.bench.arms import GROUP, MEANS, NONE, PREDICTED, SESSIONS, Arm, Subject, build_arms, check_names
from whiflash_lab.bench.cells import Answer, Turn
from whiflash_lab.bench.fleet import size_of
from whiflash_lab.bench.forcing import ANSWER, PROCESSOR
from whiflash_lab.bench.load import Asker, RequestError
from whiflash_lab.bench.prompts import Prompt
from whiflash_lab.bench.reference import Difference, Reference
from whiflash_lab.bench.runner import METRICS, Runner
from whiflash_lab.conversations import Conversation, RecordedTurn, Renderer, read_recorded, renderer_of
from whiflash_sglang.drafts.candidates import common_prefix
from whiflash_sglang.errors import ConfigError
from whiflash_sglang.files.jsonl import read_json
from whiflash_sglang.formats.checkpoint import integer
from whiflash_sglang.formats.config_json import read_json_config
from whiflash_sglang.formats.draft_format import merged

MARGIN = 128
"""Positions of a context that conversations leave free, for the widest drafts after the text."""


WARM_UP_ANSWERS = 4
"""Answers of a conversation that are played as a warm-up. A whole one may have forty and take minutes."""


@dataclass(frozen=True, slots=True)
class Task:
    """An answer to ask for. conversation: its name. known: tokens of the prompt that the turn before has computed."""

    turn: RecordedTurn
    conversation: str
    known: int


@dataclass(frozen=True, slots=True)
class Talk(Prompt):
    """A conversation with its subagents' conversations. tasks: all their answers, in order. task: its name, or ""."""

    tasks: tuple[Task, ...] = ()
    task: str = ""

    @property
    def context(self) -> int:
        """Tokens of the longest prompt with its answer."""
        return max(task.turn.context for task in self.tasks)

    def request(self) -> dict[str, Any]:
        return {"tasks": [[list(task.turn.prompt), list(task.turn.answer)] for task in self.tasks]}


def talks_of(
    files: Sequence[Sequence[Conversation]], renderer: Renderer, *, max_tokens: int, room: int
) -> tuple[list[Talk], dict[str, str]]:
    """Render conversations in a target's tokens. Return them, and the answers left out for lack of room, with reasons.

    Args:
        files: conversations by file; a subagent's parent is the nearest one of that id before it in its file.
        max_tokens: most tokens of each answer; the rest is cut. room: most tokens of prompt and answer.

    Raises:
        ConfigError: a subagent's parent is not before it, or is shorter than it says.
    """
    recorded = [(number, each) for number, file in enumerate(files) for each in file]
    expected = [None if each.prediction is None else renderer.encode(each.prediction) for _, each in recorded]
    turns, talks, left_out = dict[str, list[RecordedTurn]](), list[Talk](), dict[str, str]()
    names, begins = dict[tuple[int, str], str](), dict[str, int]()
    subagents = defaultdict[tuple[str, int], list[str]](list)

    def played(agent: str) -> Iterator[Task]:
        """Yield every answer once; a subagent's before its parent continues, which needs the subagent's result."""
        computed: Sequence[int] = ()
        for number, turn in enumerate(turns[agent], start=1):
            if number > begins[agent] and turn.context <= room:
                yield Task(turn, agent, common_prefix(turn.prompt, computed))
            if number <= begins[agent] or turn.context <= room:  # else no server computes it
                computed = [*turn.prompt, *turn.answer[:-1]]
            for subagent in subagents[agent, number]:
                yield from played(subagent)

    for index, (file, record) in enumerate(recorded):
        name = record.id
        while name in turns:
            name = f"{name}-{index + 1}"
        own = [
            replace(turn, answer=turn.answer[:max_tokens], free=min(turn.free, max_tokens))
            for turn in renderer.turns(record)
        ]
        serves, after = record.parent or ("", 0)
        parent = names.get((file, serves), "")
        theirs = turns.get(parent, []) if after else []
        if len(theirs) < after:
            raise ConfigError(f"{name}: no {serves!r} with {after} answers is before it")
        same = [(a.prompt, a.answer) == (b.prompt, b.answer) for a, b in zip(own, theirs, strict=False)]
        names[file, record.id], turns[name], begins[name] = name, own, [*same, False].index(False)
        if own and expected[index] is not None:
            others = [tokens for i, tokens in enumerate(expected) if tokens is not None and i != index]
            useless = others[index % len(others)] if others else []
            both = dict(zip(PREDICTED, (expected[index] or [], useless), strict=True))
            own[-1] = replace(own[-1], predictions=both)
        sizes = list(enumerate(turn.context for turn in own))[begins[name] :]
        left_out |= {f"{name}, answer {at}": f"{n} tokens" for at, n in sizes if n > room}
        if after:
            subagents[parent, after].append(name)
        else:
            talks.append(Talk(name, record.category, (), task=record.task))
    talks = [replace(talk, tasks=tuple(played(talk.id))) for talk in talks]
    return [talk for talk in talks if talk.tasks], left_out


def recorded_arms(names: Sequence[str], subject: Subject, talks: Iterable[Talk]) -> list[Arm]:
    """Build arms by name, each on a server of its own that takes forced answers; plain decoding is always the first.

    Raises:
        ConfigError: a name is unknown or given twice, or asks for predictions that nobody recorded.
    """
    chosen = [NONE, *(name for name in names if name != NONE)]
    check_names(chosen, recorded=True)
    predicted = any(task.turn.predictions for talk in talks for task in talk.tasks)
    arms = []
    for name in chosen:
        kind, *means = name.split("+")
        if set(PREDICTED).intersection(means) and not predicted:
            raise ConfigError(f"--arms {name}: no record has a prediction")
        arm = build_arms([kind], subject)[-1]
        forcing = FORCING[arm.router is not None]
        flags = (*arm.arguments, *forcing, METRICS, *(flag for one in means for flag in MEANS[one]))
        arms.append(replace(arm, name=name, server=name, arguments=flags, means=tuple(means)))
    return arms


FORCING = {True: ("--whiflash-force-recorded", "on"), False: ("--enable-custom-logit-processor",)}
"""Whether a server runs WHIFLASH → flags with which it takes forced answers."""


def read_talks(paths: Iterable[Path], subject: Subject, max_tokens: int | None) -> tuple[list[Talk], dict[str, str]]:
    """Read files and render their conversations (`talks_of`), with the room of a context and of the KV pool.

    Args:
        max_tokens: most tokens of an answer; None: no limit.

    Raises:
        ConfigError: a file cannot be read, or nothing in it fits the context.
    """
    text = merged(subject.target, read_json_config(subject.target), "text_config")
    context = integer(text, "max_position_embeddings", subject.target)
    room = min(context, size_of(subject.common, POOL) or context) - MARGIN
    talks, left_out = talks_of(
        [read_recorded(path) for path in paths],
        renderer_of(subject.target, subject.bundle),
        max_tokens=max_tokens or context,
        room=room,
    )
    if not talks:
        raise ConfigError(f"no recorded answer fits the {room} tokens that each request has")
    return talks, left_out


POOL = "--max-total-tokens"


def with_pool(subject: Subject, talks: Sequence[Talk], agents: int, share: float) -> Subject:
    """Return a subject whose servers' KV pool has a share of the tokens that `agents` need: for each the mean of the
    jobs' longest contexts. The longest job always fits."""
    contexts = [talk.context for talk in talks]
    pool = max(round(share * agents * fmean(contexts)), max(contexts) + MARGIN)
    return replace(subject, common=(*subject.common, POOL, str(pool)))


@dataclass(frozen=True, slots=True)
class Player(Asker):
    """Replays recorded agents' conversations on one server. is_stock: whether it runs without WHIFLASH. means: as in
    `Arm`. longest_wait: the most seconds that a tool takes."""

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
        answers, closing, ended = [], [], defaultdict[str, float](lambda: began)
        sessions = {task.conversation: uuid4().hex for task in prompt.tasks if SESSIONS in self.means}
        last = {task.conversation: task for task in prompt.tasks}
        for task in prompt.tasks:
            # A tool's time goes on while subagents run, which are such a tool.
            waited = time.perf_counter() - ended[task.conversation]
            await asyncio.sleep(min(task.turn.wait, self.longest_wait) - waited)
            answers.append(await self._answer(prompt, task, sessions.get(task.conversation)))
            ended[task.conversation] = time.perf_counter()
            if sessions and last[task.conversation] is task:
                close = self.client.post("/close_session", json={"session_id": sessions[task.conversation]})
                closing.append(asyncio.create_task(close))  # no agent waits for it
        job = Answer(
            prompt=prompt.id,
            seconds=time.perf_counter() - began,
            ttft=None,
            tokens=tuple(token for _, tokens, _ in answers for token in tokens),
            forwards=sum(forwards for *_, forwards in answers),
            prefills=len(answers),
            turns=tuple(turn for turn, *_ in answers),
        )
        await asyncio.gather(*closing)
        return job

    async def _answer(self, talk: Talk, task: Task, session: str | None) -> tuple[Turn, list[int], int]:
        """Request a recorded turn's answer. Return its turn, its tokens, and the target forwards after its prefill."""
        recorded = task.turn
        custom: dict[str, Any] = {}
        if recorded.answer:
            custom[ANSWER if self.is_stock else "whiflash_forced"] = list(recorded.answer)
        if talk.task and GROUP in self.means:
            named = hashlib.sha256(talk.task.encode()).hexdigest()[:16]
            custom["whiflash"] = json.dumps({"task": named})
        for name in (one for one in self.means if one in recorded.predictions):
            custom["whiflash_prediction"] = list(recorded.predictions[name])
        params = {
            "max_new_tokens": len(recorded.answer) or recorded.free,
            "temperature": 0,
            "ignore_eos": True,
            "custom_params": custom,
        }
        body = {"input_ids": list(recorded.prompt), "sampling_params": params, "stream": True, "session_id": session}
        if self.is_stock:
            body["custom_logit_processor"] = PROCESSOR
        arrived = await self.streamed(talk.id, "/generate", body)
        # Each event holds the whole answer so far.
        events = [(at, line.removeprefix("data: ")) for at, line in arrived if line.startswith("data: {")]
        reply = read_json(events[-1][1]) if events else {}
        if "error" in reply:
            raise RequestError(f"conversation {talk.id}: {reply['error']}")
        if "meta_info" not in reply:
            raise RequestError(f"conversation {talk.id}: the stream ended without an answer")
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

    def _compare(self) -> tuple[Sequence[Difference], str]:
        return [], ""  # each answer was compared with the recorded one when it came

    def _asker(self, client: httpx.AsyncClient, arm: Arm) -> Player:
        plan = self._plan
        return Player(client, plan.max_tokens, {}, arm.router is None, arm.means, plan.longest_wait)

    def _prompt(self, key: str, *, is_warm_up: bool) -> Talk:
        talk = super()._prompt(key, is_warm_up=is_warm_up)
        assert isinstance(talk, Talk)
        if not is_warm_up:
            return talk
        first = tuple(replace(one, turn=replace(one.turn, wait=0.0)) for one in talk.tasks[:WARM_UP_ANSWERS])
        return replace(talk, tasks=first, task="")  # no group may know the answers that are measured

    def _groups(self) -> dict[str, str]:
        """Return prompt id → category. Looping answers have no group of their own: the target did not write them."""
        return {key: reference.prompt.category for key, reference in self._references.items()}
