"""`whiflash bench --recorded`: plays recorded conversations on servers that are forced to write the recorded text.

Prompts, verification, routing and cost are real; only the tokens that the target samples are replaced by the recorded
ones (`round/forcing.py`). So a small target can be measured on text that another model wrote. A conversation with its
subagents is one prompt of the run; its answers are asked one after the other.
"""

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from whiflash_lab.bench.arms import PREDICTION, USELESS, Arm, Subject, build_arms, check_names
from whiflash_lab.bench.cells import Answer, Turn
from whiflash_lab.bench.load import Asker, RequestError
from whiflash_lab.bench.prompts import Prompt
from whiflash_lab.bench.reference import Reference
from whiflash_lab.bench.runner import Runner
from whiflash_lab.bench.subject import CPU_KV_TOKENS
from whiflash_lab.conversations import Conversation, RecordedTurn, Renderer, read_recorded, renderer_of
from whiflash_sglang.errors import ConfigError
from whiflash_sglang.files.jsonl import read_json
from whiflash_sglang.formats.checkpoint import integer
from whiflash_sglang.formats.config_json import read_json_config
from whiflash_sglang.formats.draft_format import merged

BASE = "pinned-none"
"""The arm that others are compared with: the same server without drafts."""

MARGIN = 128
"""Positions of a context that conversations leave free, for the widest drafts after the text."""


WARM_UP_ANSWERS = 4
"""Answers of a conversation that are played as a warm-up. A whole one may have forty and take minutes."""


@dataclass(frozen=True, slots=True)
class Talk(Prompt):
    """A conversation with its subagents' conversations. tasks: all their answers, in order."""

    tasks: tuple[RecordedTurn, ...] = ()

    def request(self) -> dict[str, Any]:
        return {"tasks": [[list(task.prompt), list(task.answer)] for task in self.tasks]}


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
    turns, talks, left_out = dict[str, list[RecordedTurn]](), list[Talk](), dict[str, str]()
    begins, subagents = dict[str, int](), defaultdict[tuple[str, int], list[str]](list)

    def played(agent: str) -> Iterator[RecordedTurn]:
        """Yield every answer once; a subagent's before its parent continues, which needs the subagent's result."""
        for number, turn in enumerate(turns[agent], start=1):
            if number > begins[agent] and len(turn.prompt) + len(turn.answer) <= room:
                yield turn
            for subagent in subagents[agent, number]:
                yield from played(subagent)

    for index, record in enumerate(recorded):
        name = record.id
        while name in turns:
            name = f"{name}-{index + 1}"
        own = [replace(turn, answer=turn.answer[:max_tokens]) for turn in renderer.turns(record)]
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
        sizes = list(enumerate(len(turn.prompt) + len(turn.answer) for turn in own))[begins[name] :]
        left_out |= {f"{name}, answer {at}": f"{n} tokens" for at, n in sizes if n > room}
        if record.parent:
            subagents[record.parent].append(name)
        else:
            talks.append(Talk(name, record.category, ()))
    talks = [replace(talk, tasks=tuple(played(talk.id))) for talk in talks]
    return [talk for talk in talks if talk.tasks], left_out


def recorded_arms(names: Sequence[str], subject: Subject, talks: Iterable[Talk]) -> list[Arm]:
    """Build arms by name, each on a server of its own that takes forced answers; `BASE` is always the first.

    Raises:
        ConfigError: a name is unknown or given twice, or asks for predictions that nobody recorded.
    """
    chosen = [BASE, *(name for name in names if name != BASE)]
    check_names(chosen, recorded=True)
    predicted = any(task.predictions for talk in talks for task in talk.tasks)
    arms = []
    for name in chosen:
        kind, _, brings = name.partition("+")
        if brings and not predicted:
            raise ConfigError(f"--arms {name}: no record has a prediction")
        arm = build_arms([kind], subject)[-1]
        forcing = (*arm.arguments, "--whiflash-force-recorded", "on")
        arms.append(replace(arm, name=name, server=name, arguments=forcing, request={"brings": brings}))
    return arms


def read_talks(
    paths: Iterable[Path], subject: Subject, max_tokens: int | None, at_once: int
) -> tuple[list[Talk], dict[str, str]]:
    """Read files and render their conversations (`talks_of`), with the room that `at_once` of them have in a context.

    Args:
        max_tokens: most tokens of an answer; None: no limit.

    Raises:
        ConfigError: a file cannot be read, or nothing in it fits the context.
    """
    text = merged(subject.target, read_json_config(subject.target), "text_config")
    context = integer(text, "max_position_embeddings", subject.target)
    room = (min(context, CPU_KV_TOKENS // at_once) if subject.on_cpu else context) - MARGIN
    talks, left_out = talks_of(
        [conversation for path in paths for conversation in read_recorded(path)],
        renderer_of(subject.target, subject.bundle),
        max_tokens=max_tokens or context,
        room=room,
    )
    if not talks:
        raise ConfigError(f"no recorded answer fits the {room} tokens that each of {at_once} requests has")
    return talks, left_out


class Player(Asker):
    """A client of one server that plays conversations, one answer after the other."""

    async def ask(self, prompt: Prompt) -> Answer:
        """Play a conversation. Return all its answers as one, with each of its turns.

        Raises:
            RequestError: a request failed, or the answer is not the recorded one.
        """
        assert isinstance(prompt, Talk)
        began = time.perf_counter()
        answers = [await self._answer(prompt.id, task) for task in prompt.tasks]
        return Answer(
            prompt=prompt.id,
            seconds=time.perf_counter() - began,
            ttft=None,
            tokens=tuple(token for task in prompt.tasks for token in task.answer),
            forwards=sum(forwards for _, forwards in answers),
            prefills=len(prompt.tasks),
            turns=tuple(turn for turn, _ in answers),
        )

    async def _answer(self, talk: str, task: RecordedTurn) -> tuple[Turn, int]:
        """Ask for one answer of a conversation. Return its turn and the target forwards after its prefill."""
        custom: dict[str, Any] = {"whiflash_forced": list(task.answer)}
        if self.request["brings"] in task.predictions:
            custom["whiflash_prediction"] = list(task.predictions[self.request["brings"]])
        params = {
            "max_new_tokens": len(task.answer),
            "temperature": 0,
            "ignore_eos": True,
            "custom_params": custom,
        }
        body = {"input_ids": list(task.prompt), "sampling_params": params, "stream": True}
        arrived = await self.streamed(talk, "/generate", body)
        # Each event holds the whole answer so far.
        events = [(at, line.removeprefix("data: ")) for at, line in arrived if line.startswith("data: {")]
        reply = read_json(events[-1][1]) if events else {}
        if "error" in reply:
            raise RequestError(f"conversation {talk}: {reply['error']}")
        if reply.get("output_ids") != list(task.answer):
            raise RequestError(
                "the server wrote another text than the recorded one, which makes its figures useless: start it with "
                "--whiflash-force-recorded on"
            )
        meta, prompt, tokens = reply["meta_info"], len(task.prompt), len(task.answer)
        first, last = events[0][0], events[-1][0]
        turn = Turn(prompt=prompt, cached=meta["cached_tokens"], tokens=tokens, ttft=first, seconds=last)
        return turn, int(meta.get("spec_verify_ct") or tokens - 1)


class Replayer(Runner):
    """Runs a benchmark on recorded conversations. Their text is known, so plain decoding gives no references."""

    base = BASE
    asker = Player

    def _ask_references(self) -> None:
        for talk in self._plan.prompts:
            assert isinstance(talk, Talk)
            tokens = tuple(token for task in talk.tasks for token in task.answer)
            self._references[talk.id] = Reference(talk, (), tokens, (), "")

    def _prompt(self, key: str, *, is_warm_up: bool) -> Talk:
        talk = super()._prompt(key, is_warm_up=is_warm_up)
        assert isinstance(talk, Talk)
        return replace(talk, tasks=talk.tasks[:WARM_UP_ANSWERS]) if is_warm_up else talk

    def _groups(self) -> dict[str, str]:
        """Return prompt id → category. No group is `loops`, since the target did not write the texts."""
        return {key: reference.prompt.category for key, reference in self._references.items()}
