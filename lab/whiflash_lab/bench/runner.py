"""Runs a benchmark: starts servers, asks plain decoding for references, warms up, then measures step after step.

If arms are interleaved, every prompt is sent to each arm before the next prompt, so that drift of the machine affects
all arms alike. The first arm rotates, so that no arm is always measured after the same other one.
"""

import asyncio
import hashlib
import json
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import httpx
from rich.progress import Progress

from whiflash_lab.bench.arms import NONE, Arm, Subject
from whiflash_lab.bench.cells import Cell, Journal, Load
from whiflash_lab.bench.fleet import Fleet, environment
from whiflash_lab.bench.load import ANSWER_SECONDS, Asker, RefusedError, RequestError, flush
from whiflash_lab.bench.prompts import Prompt, digest_of
from whiflash_lab.bench.reference import BestLogit, Reference, ask_reference, differences, plain_of
from whiflash_lab.bench.report import LOOPS, BenchReport, build_report
from whiflash_sglang import __version__
from whiflash_sglang.errors import WhiflashError
from whiflash_sglang.files.hosts import LIMITS
from whiflash_train import provenance


class Step(NamedTuple):
    """One cell to measure: `prompts` (ids) asked of `arm` under `load`."""

    load: Load
    arm: str
    repetition: int
    prompts: tuple[str, ...]

    @property
    def key(self) -> tuple[str, str, int, tuple[str, ...]]:
        """Key of the cell that this step gives (`Cell.key`)."""
        return self.load.label, self.arm, self.repetition, tuple(sorted(self.prompts))


def sweep(
    arms: Sequence[str], loads: Sequence[Load], repetition: int, alone: Sequence[str], together: Sequence[str]
) -> Iterator[Step]:
    """Yield the steps of one interleaved repetition.

    Args:
        alone: prompts asked one at a time. together: prompts asked under every other load.
    """
    turn = repetition
    for load in loads:
        units = [(prompt,) for prompt in alone] if load.is_alone else [tuple(together)]
        for unit in units:
            first = turn % len(arms)
            for arm in (*arms[first:], *arms[:first]):
                yield Step(load, arm, repetition, unit)
            turn += 1


def in_turn(
    arms: Sequence[str],
    loads: Sequence[Load],
    repetitions: int,
    alone: Sequence[str],
    together: Sequence[str],
) -> Iterator[Step]:
    """Yield all steps of one arm, then all of the next, so that one server runs at a time."""
    for arm in arms:
        for repetition in range(repetitions):
            yield from sweep([arm], loads, repetition, alone, together)


def remaining(steps: Sequence[Step], cells: Collection[Cell]) -> list[Step]:
    """Return the steps that have no cell yet."""
    done = {cell.key for cell in cells}
    return [step for step in steps if step.key not in done]


def whole(cells: Sequence[Cell]) -> list[Cell]:
    """Return the cells of complete repetitions. An interrupted run may leave an incomplete one."""
    measured = Counter(cell.repetition for cell in cells)
    return [cell for cell in cells if measured[cell.repetition] == max(measured.values())]


WARM_UP_PROMPTS = 3
CLOSED_ALONE = Load(value=1)
SEEDED = "--enable-deterministic-inference"
"""SGLang's flag without which it ignores seeds."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The plan of a benchmark.

    repetitions: most repetitions; minutes: no repetition starts that would end later than this after the start.
    over: the arm that all others are compared with, besides plain decoding.
    interleave: run all servers at once and send each prompt to each arm in turn; otherwise one server at a time.
    suites: by name, origin and licence of the suites' prompts. recorded: files of conversations, if these are the
        prompts. left_out: by name, why a prompt is not asked.
    sampling: fields of every request. tools: the tools sent with prompts, for the report.
    restart: restart the servers for every repetition (interleaved runs only). Two equal processes may differ by 1 % as
        long as they run, which would count as a difference between arms.
    """

    subject: Subject
    arms: tuple[Arm, ...]
    prompts: tuple[Prompt, ...]
    loads: tuple[Load, ...] = (CLOSED_ALONE,)
    repetitions: int = 3
    max_tokens: int = 160
    interleave: bool = True
    restart: bool = False
    minutes: float | None = None
    over: str | None = None
    suites: Mapping[str, str] = field(default_factory=dict)
    recorded: tuple[str, ...] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)
    sampling: Mapping[str, float] = field(default_factory=dict)
    tools: Mapping[str, Any] = field(default_factory=dict)

    @property
    def compares(self) -> bool:
        """Whether answers must equal plain decoding's: greedy ones, or seeded ones in float32."""
        return not self.sampling or (self.subject.dtype == "float32" and SEEDED in self.subject.common)

    @property
    def fingerprint(self) -> str:
        """Digest of everything that two runs must share for their cells to belong together."""
        parts = {
            "version": __version__,
            "models": [str(self.subject.target), provenance.weights_of(self.subject.bundle)],
            "arms": [[arm.name, self.subject.hide_paths(arm.arguments), arm.request] for arm in self.arms],
            "prompts": digest_of(self.prompts),
            "loads": [load.label for load in self.loads],
            "max_tokens": self.max_tokens,
            "sampling": dict(self.sampling),
            "order": [self.interleave, self.restart],
        }
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


class Runner:
    """Carries out a plan and builds the report.

    Args:
        fleet: starts the servers; the caller closes it.
        progress: shows what is going on and how long it will take.
    """

    base = NONE
    """The arm of plain decoding."""
    asker: type[Asker] = Asker

    def __init__(self, plan: Plan, fleet: Fleet, journal: Journal, progress: Progress) -> None:
        self._plan, self._fleet, self._journal, self._progress = plan, fleet, journal, progress
        self._arms = {arm.name: arm for arm in plan.arms}
        self._references: dict[str, Reference] = {}
        self._apart: dict[str, dict[str, Reference]] = {}
        self._routers: dict[str, str] = {}
        self._servers: dict[str, dict[str, Any]] = {}
        self.unavailable: dict[str, str] = {}
        self.left_out = dict(plan.left_out)
        self.cells: list[Cell] = []
        self._began = time.monotonic()

    def run(self, *, resume: bool) -> BenchReport:
        """Measure the steps that have no cell yet, compare the answers, and build the report.

        Raises:
            WhiflashError: plain decoding could not be measured; the journal belongs to another plan.
        """
        plan = self._plan
        record = {**provenance.environment(plan.subject.bundle), "busy_before": provenance.busy()}
        self.cells = self._journal.read() if resume else []
        self._journal.begin(self.cells)
        if plan.interleave:
            self._interleaved()
        else:
            self._in_turn()
        cells = whole([cell for cell in self.cells if cell.arm not in self.unavailable])
        judging = self._progress.add_task("comparing answers with plain decoding", total=None)
        best = BestLogit(plan.subject.target, plan.subject.dtype)
        references = {**self._apart, NONE: self._references}
        compared = differences(cells, references, best, plan.subject.dtype) if plan.compares else None
        self._progress.remove_task(judging)
        record |= {**self._provenance(cells), "unjudged": best.lost}
        return build_report(cells, self._groups(), compared, record, self.unavailable, plan.over, self.base)

    # ---------------------------------------------------------------- the two orders

    def _interleaved(self) -> None:
        self._start(self._plan.arms)
        self._ask_references()
        for name in self._available():
            self._ask_apart(name)
        self._warm_up(self._available())
        task = self._progress.add_task("measuring", total=1)
        # With --restart a repetition's time includes the start of its servers.
        began = self._began if self._plan.restart else time.monotonic()
        done, planned, used = 0, self._plan.repetitions, 0
        while done < planned:
            steps = list(sweep(self._available(), self._plan.loads, done, *self._prompt_ids()))
            self._progress.update(task, total=planned * len(steps))
            left = remaining(steps, self.cells)
            if self._plan.restart and used and left:
                self._renew()
            used += bool(left)
            asyncio.run(self._measure(left, task))
            done += 1
            self._progress.update(task, completed=done * len(steps))
            planned = self._fitting(done, (time.monotonic() - began) / max(used, 1))

    def _renew(self) -> None:
        """Restart all servers. Raises WhiflashError if one does not start, so that its arm's cells are not dropped."""
        names = self._available()
        self._fleet.close()
        self._start([self._arms[name] for name in names])
        lost = [f"{name}: {self.unavailable[name]}" for name in names if name in self.unavailable]
        if lost:
            raise WhiflashError(f"{'; '.join(lost)}; --resume goes on from what was measured")
        self._warm_up(names)

    def _fitting(self, done: int, seconds_each: float) -> int:
        """Return the number of repetitions that fit into the plan's minutes, at least those that are done."""
        if self._plan.minutes is None:
            return self._plan.repetitions
        left = self._plan.minutes * 60 - (time.monotonic() - self._began)
        return min(self._plan.repetitions, done + max(0, int(left / seconds_each)))

    def _in_turn(self) -> None:
        plain = [arm for arm in self._plan.arms if arm.name == self.base]
        for server in dict.fromkeys(arm.server for arm in (*plain, *self._plan.arms)):
            group = [arm for arm in self._plan.arms if arm.server == server]
            self._start(group)
            if server == plain[0].server:
                self._ask_references()
            names = [arm.name for arm in group if arm.name not in self.unavailable]
            for name in names:
                self._ask_apart(name)
                self._warm_up([name])
            steps = list(in_turn(names, self._plan.loads, self._plan.repetitions, *self._prompt_ids()))
            task = self._progress.add_task(f"measuring {', '.join(names)}", total=len(steps))
            asyncio.run(self._measure(remaining(steps, self.cells), task))
            self._progress.remove_task(task)
            if names:
                self._fleet.stop(server)

    # ---------------------------------------------------------------- before measuring

    def _start(self, arms: Sequence[Arm]) -> None:
        servers: dict[str, list[str]] = {}
        for arm in arms:
            if arm.server not in servers:
                self._routers[arm.server] = arm.router or ""
                servers[arm.server] = _alone(arm)
        task = self._progress.add_task("starting servers", total=len(servers))
        checkouts = {arm.server: arm.checkout for arm in arms if arm.checkout is not None}

        def on_start(server: str, reason: str | None) -> None:
            if reason is not None:
                for arm in arms:
                    if arm.server == server:
                        self._lose(arm.name, f"the server did not start: {reason}")
            self._progress.advance(task)

        self._fleet.start(servers, on_start, checkouts)
        self._progress.remove_task(task)
        for arm in arms:
            if arm.name not in self.unavailable:
                info = self._fleet.clients[arm.server].get("/server_info").json()
                self._servers[arm.name] = {
                    "arguments": self._plan.subject.hide_paths(_alone(arm)),
                    "environment": environment(_alone(arm)),
                    # This checkout's provenance is in the report's own.
                    **({} if arm.checkout is None else provenance.checkout(arm.checkout)),
                    **{key: info.get(key) for key in ("dtype", "attention_backend", "sampling_backend")},
                }
        if self.base in self.unavailable:
            raise WhiflashError(f"plain decoding: {self.unavailable[self.base]}")

    def _lose(self, name: str, reason: str) -> None:
        """Drop an arm and print the reason at once, since the run may last for hours."""
        self.unavailable[name] = reason
        self._progress.console.print(f"{name}: {reason}", markup=False, highlight=False, soft_wrap=True)

    def _ask_references(self) -> None:
        """Ask plain decoding for reference answers. A row of several turns becomes one prompt per turn, with plain
        decoding's answers between the turns."""
        pending = list(self._plan.prompts)
        task = self._progress.add_task("asking plain decoding", total=len(pending))
        client = self._fleet.clients[NONE]
        while pending:
            prompt = pending.pop(0)
            flush(client)  # Every measured answer begins without a cached prefix, which rounds differently.
            self._progress.advance(task)
            try:
                reference = ask_reference(client, prompt, self._plan.max_tokens, self._plan.sampling)
            except RefusedError as refused:
                self.left_out[prompt.id] = str(refused)
                self._progress.console.print(f"left out: {refused}", markup=False, highlight=False)
                continue
            self._references[prompt.id] = replace(reference, prompt=replace(prompt, follow_ups=()))
            follow_up = prompt.next_turn(reference.text, reference.calls)
            if follow_up is not None:
                pending.append(follow_up)
                self._progress.update(task, total=len(self._references) + len(self.left_out) + len(pending))
        self._progress.remove_task(task)
        if not self._references:
            raise WhiflashError(
                f"plain decoding took no prompt: {next(iter(self.left_out.values()), 'there are none')}"
            )

    def _ask_apart(self, name: str) -> None:
        """Ask `name`, if it is plain decoding on ranks, for its answers to the prompts that `none` has answered."""
        if name == NONE or name != plain_of(name):
            return
        client, own = self._fleet.clients[self._arms[name].server], dict[str, Reference]()
        for key, reference in self._progress.track(self._references.items(), description=f"asking {name}"):
            flush(client)
            own[key] = ask_reference(client, reference.prompt, self._plan.max_tokens, self._plan.sampling)
        self._apart[name] = own

    def _groups(self) -> dict[str, str]:
        return {key: LOOPS if r.loops else r.prompt.category for key, r in self._references.items()}

    def _prompt_ids(self) -> tuple[list[str], list[str]]:
        """Return ids of prompts asked one at a time, and of those asked together: without loops unless all loop."""
        groups = self._groups()
        together = [key for key, group in groups.items() if group != LOOPS]
        return list(groups), together or list(groups)

    def _warm_up(self, names: Sequence[str]) -> None:
        prompts = tuple(list(self._references)[:WARM_UP_PROMPTS])
        for name in names:
            task = self._progress.add_task(f"warming up {name}", total=None)
            asyncio.run(self._measure([Step(CLOSED_ALONE, name, -1, prompts)], None))
            self._progress.remove_task(task)

    def _available(self) -> list[str]:
        return [name for name in self._arms if name not in self.unavailable]

    # ---------------------------------------------------------------- measuring

    async def _measure(self, steps: Sequence[Step], task: Any) -> None:
        """Measure `steps` in order and store their cells; without a `task` it is a warm-up, and nothing is stored."""
        async with AsyncExitStack() as stack:
            clients = {}
            for key in self._fleet.clients:
                url = self._fleet.url(key)
                client = httpx.AsyncClient(base_url=url, timeout=ANSWER_SECONDS, limits=LIMITS)
                clients[key] = await stack.enter_async_context(client)
            for step in steps:
                if step.arm in self.unavailable:
                    continue
                arm = self._arms[step.arm]
                try:
                    fields = {**self._plan.sampling, **arm.request}
                    asker = self.asker(clients[arm.server], self._plan.max_tokens, fields)
                    cell = await self._cell(step, asker)
                except (RequestError, httpx.HTTPError) as error:
                    if step.arm == self.base:
                        raise WhiflashError(f"plain decoding: a request failed: {error}") from error
                    self._lose(step.arm, f"a request failed: {error}")
                    continue
                if task is not None:
                    self.cells.append(cell)
                    self._journal.append(cell)
                    self._progress.advance(task)

    def _prompt(self, key: str, *, is_warm_up: bool) -> Prompt:
        return self._references[key].prompt

    async def _cell(self, step: Step, asker: Asker) -> Cell:
        arm = self._arms[step.arm]
        client = self._fleet.clients[arm.server]
        self._route(arm, client)
        flush(client)
        before = _state(arm, client)
        prompts = [self._prompt(key, is_warm_up=step.repetition < 0) for key in step.prompts]
        began = time.perf_counter()
        answers = await asker.run(step.load, prompts)
        seconds = time.perf_counter() - began
        after = _state(arm, client)
        rounds = {key: after[key] - before[key] for key in after} if after else None
        return Cell(
            load=step.load,
            arm=step.arm,
            repetition=step.repetition,
            seconds=seconds,
            answers=tuple(answers),
            rounds=rounds,
        )

    def _route(self, arm: Arm, client: httpx.Client) -> None:
        if arm.router is None or self._routers[arm.server] == arm.router:
            return
        response = client.post("/whiflash/policy", json={"router": arm.router})
        if response.status_code != 200:
            raise RequestError(f"router {arm.router}: {response.json()['error']['message']}")
        self._routers[arm.server] = arm.router

    def _provenance(self, cells: Sequence[Cell]) -> dict[str, Any]:
        plan = self._plan
        return {
            "dtype": plan.subject.dtype,
            "busy_after": provenance.busy(),
            "seconds": round(time.monotonic() - self._began, 1),
            "interleaved": plan.interleave,
            "restarted": plan.restart,
            "repetitions": len({cell.repetition for cell in cells}),
            "max_tokens": plan.max_tokens,
            "prompts_sha256": digest_of(plan.prompts),
            "left_out": self.left_out,
            "recorded": list(plan.recorded),
            "suites": plan.suites,
            "sampling": dict(plan.sampling),
            "tools": dict(plan.tools),
            "compared": plan.compares,
            "servers": self._servers,
        }


def _alone(arm: Arm) -> list[str]:
    """Return the arguments of a server that runs only this arm."""
    return [*arm.arguments, *(() if arm.router is None else ("--whiflash-router", arm.router))]


def _state(arm: Arm, client: httpx.Client) -> dict[str, float]:
    if arm.router is None:
        return {}
    state = client.get("/whiflash/state").raise_for_status().json()
    return {key: n for key, n in state.items() if isinstance(n, int | float) and key != "requests"}
