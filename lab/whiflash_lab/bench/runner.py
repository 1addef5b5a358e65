"""Runs a benchmark: starts servers, asks plain decoding for references, warms up, then measures step after step.

If arms are interleaved, every prompt is sent to each arm before the next prompt, so that drift of the machine affects
all arms alike. The first arm rotates, so that no arm is always measured after the same other one. Each repetition has
new servers, because two equal processes may differ by 1 % as long as they run.
"""

import asyncio
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import httpx
from rich.progress import Progress

from whiflash_lab.bench.arms import NONE, Arm, Subject
from whiflash_lab.bench.cells import Cell, Load
from whiflash_lab.bench.fleet import Fleet, environment
from whiflash_lab.bench.load import ROUNDS, TOKEN_IDS, Asker, RefusedError, RequestError, flush
from whiflash_lab.bench.prompts import Prompt, digest_of
from whiflash_lab.bench.reference import BestLogit, Difference, Reference, ask_reference, differences
from whiflash_lab.bench.report import LOOPS, OVERALL, BenchReport, build_report, name_of, whole
from whiflash_sglang.errors import ConfigError, WhiflashError
from whiflash_sglang.files import provenance


class Step(NamedTuple):
    """One cell to measure: `prompts` (ids) asked of `arm` under `load`."""

    load: Load
    arm: str
    repetition: int
    prompts: tuple[str, ...]


def sweep(
    arms: Sequence[str], loads: Sequence[Load], repetition: int, alone: Sequence[str], together: Sequence[str]
) -> Iterator[Step]:
    """Yield the steps of one repetition. Every arm answers a prompt, or all of a load, before the next one is asked.

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


WARM_UP_PROMPTS = 3
CLOSED_ALONE = Load(value=1)


@dataclass(frozen=True, slots=True)
class Plan:
    """The plan of a benchmark.

    subject: None if the servers run already. interleave: run all servers at once and send each prompt to each arm in
    turn; otherwise one server at a time. recorded: files of conversations, if these are the prompts. longest_wait: the
    most seconds that a tool takes. left_out: by name, why a prompt is not asked. base: name of the arm that the others
    are compared with.

    Raises:
        ConfigError: prompts have a category of the name of a report's own row.
    """

    subject: Subject | None
    arms: tuple[Arm, ...]
    prompts: tuple[Prompt, ...]
    loads: tuple[Load, ...] = (CLOSED_ALONE,)
    repetitions: int = 3
    max_tokens: int = 160
    interleave: bool = True
    recorded: tuple[str, ...] = ()
    longest_wait: float = 0.0
    left_out: Mapping[str, str] = field(default_factory=dict)
    base: str = NONE

    def __post_init__(self) -> None:
        if taken := {OVERALL, LOOPS} & {prompt.category for prompt in self.prompts}:
            raise ConfigError(f"category {min(taken)!r} of prompts: every report has a row of this name; give another")

    @property
    def over(self) -> str | None:
        """Arm that others are compared with: `auto`, if the plan has it and a variant (`auto-no-hints`); else None."""
        names = [arm.name for arm in self.arms]
        varied = any(name.startswith(("auto-", "auto+")) for name in names)
        return "auto" if varied and "auto" in names else None


class Runner:
    """Carries out a plan on servers that it starts, and builds the report.

    Args:
        fleet: starts the servers; the caller closes it.
        progress: shows what is going on and how long it will take.
    """

    _at_once = 1
    """Reference answers asked for at a time."""

    def __init__(self, plan: Plan, fleet: Fleet, progress: Progress) -> None:
        self._plan, self._fleet, self._progress = plan, fleet, progress
        self._arms, self._base = {arm.name: arm for arm in plan.arms}, name_of(plan.base)
        self._references: dict[str, Reference] = {}
        self._routers: dict[str, str] = {}
        self._servers: dict[str, dict[str, Any]] = {}
        self.unavailable: dict[str, str] = {}
        self._done = self._ended = ""
        self.left_out = dict(plan.left_out)
        self.cells: list[Cell] = []
        self._began = time.monotonic()

    def run(self) -> BenchReport:
        """Measure all steps, compare the answers, and build the report.

        Raises:
            WhiflashError: the arm that others are compared with could not be measured.
        """
        plan = self._plan
        record = {**self._origin(), "busy_before": provenance.busy()}
        try:
            if plan.interleave:
                self._interleaved()
            else:
                self._in_turn()
        except (WhiflashError, httpx.HTTPError, KeyboardInterrupt, SystemExit) as error:  # SIGTERM exits
            if not self.cells:
                raise
            self.unavailable.pop(plan.base, None)
            reason = (str(error) or type(error).__name__) if isinstance(error, Exception) else "interrupted"
            self._ended = f"ended after {self._done}: {reason}"
            self._progress.console.print(self._ended, markup=False, highlight=False, soft_wrap=True)
        self.cells = whole(self.cells)
        judging = self._progress.add_task(f"comparing answers with {self._base}'s", total=None)
        sampled = [reference.prompt.sampling for reference in self._references.values()]
        compared, lost = (None, "") if all(sampled) else self._compare()
        self._progress.remove_task(judging)
        record |= {**self._provenance(), "compared": not any(sampled), "unjudged": lost}
        return build_report(self.cells, self._groups(), compared, record, self.unavailable, plan.over, plan.base)

    @property
    def _subject(self) -> Subject:
        assert self._plan.subject is not None  # it starts the servers
        return self._plan.subject

    def _origin(self) -> dict[str, Any]:
        """Return what the report says of this process and of the models."""
        return {**provenance.environment(self._subject.bundle), "dtype": self._subject.dtype}

    def _compare(self) -> tuple[Sequence[Difference], str]:
        """Return how answers differ from plain decoding's, and the reason if no tie could be judged."""
        best = BestLogit(self._subject.target, self._subject.dtype)
        return differences(self.cells, self._references, best, self._subject.dtype), best.lost

    # ---------------------------------------------------------------- the two orders

    def _interleaved(self) -> None:
        self._start(self._plan.arms)
        self._ask_references()
        self._warm_up(self._available())
        task = self._progress.add_task("measuring", total=None)
        for done in range(self._plan.repetitions):
            self._done = f"{done} of {self._plan.repetitions} repetitions"
            if done:
                self._renew()
            steps = list(sweep(self._available(), self._plan.loads, done, *self._prompt_ids()))
            self._progress.update(task, total=self._plan.repetitions * len(steps), completed=done * len(steps))
            asyncio.run(self._measure(steps, task))

    def _renew(self) -> None:
        """Start new servers of all arms. An arm whose server does not start is lost."""
        names = self._available()
        self._fleet.close()
        self._start([self._arms[name] for name in names])
        self._warm_up(self._available())

    def _in_turn(self) -> None:
        plain = [arm for arm in self._plan.arms if arm.name == self._plan.base]
        servers = dict.fromkeys(arm.server for arm in (*plain, *self._plan.arms))
        for done, server in enumerate(servers):
            self._done = f"{done} of {len(servers)} servers"
            group = [arm for arm in self._plan.arms if arm.server == server]
            self._start(group)
            if server == plain[0].server:
                self._ask_references()
            names = [arm.name for arm in group if arm.name not in self.unavailable]
            self._warm_up(names)
            ids, loads = self._prompt_ids(), self._plan.loads
            steps = [s for name in names for r in range(self._plan.repetitions) for s in sweep([name], loads, r, *ids)]
            task = self._progress.add_task(f"measuring {', '.join(names)}", total=len(steps))
            asyncio.run(self._measure(steps, task))
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

        def on_start(server: str, reason: str | None) -> None:
            if reason is not None:
                for arm in arms:
                    if arm.server == server:
                        self._lose(arm.name, f"the server did not start: {reason}")
            self._progress.advance(task)

        self._fleet.start(servers, on_start)
        self._progress.remove_task(task)
        for arm in arms:
            if arm.name not in self.unavailable:
                info = self._fleet.clients[arm.server].get("/server_info").json()
                self._servers[arm.name] = {
                    "arguments": self._subject.hide_paths(_alone(arm)),
                    "environment": environment(_alone(arm)),
                    **{key: info.get(key) for key in TOLD},
                }
        if self._plan.base in self.unavailable:
            raise WhiflashError(f"{self._base}: {self.unavailable[self._plan.base]}")

    def _lose(self, name: str, reason: str) -> None:
        """Ask an arm no more, and print the reason at once, since the run may last for hours."""
        self.unavailable[name] = reason
        self._progress.console.print(f"{name}: {reason}", markup=False, highlight=False, soft_wrap=True)

    def _ask_references(self) -> None:
        """Ask for reference answers. A row of several turns becomes one prompt per turn, with these answers between the
        turns."""
        pending = list(self._plan.prompts)
        task = self._progress.add_task(f"asking {self._base}", total=len(pending))
        with ThreadPoolExecutor(self._at_once) as pool:
            while pending:
                asked, pending = pending[: self._at_once], pending[self._at_once :]
                for prompt, answer in [(prompt, pool.submit(self._ask_reference, prompt)) for prompt in asked]:
                    try:
                        reference = answer.result()
                    except RefusedError as refused:
                        self.left_out[prompt.id] = str(refused)
                        self._progress.console.print(f"left out: {refused}", markup=False, highlight=False)
                        continue
                    self._references[prompt.id] = replace(reference, prompt=replace(prompt, follow_ups=()))
                    if follow_up := prompt.next_turn(reference.text, reference.calls):
                        pending.append(follow_up)
                done = len(self._references) + len(self.left_out)
                self._progress.update(task, completed=done, total=done + len(pending))
        self._progress.remove_task(task)
        if not self._references:
            first = next(iter(self.left_out.values()), "there are none")
            raise WhiflashError(f"{self._base} took no prompt: {first}")

    def _ask_reference(self, prompt: Prompt) -> Reference:
        client = self._fleet.clients[NONE]
        flush(client)  # Every measured answer begins without a cached prefix, which rounds differently.
        return ask_reference(client, prompt, self._plan.max_tokens)

    def _groups(self) -> dict[str, str]:
        return {key: LOOPS if r.loops else r.prompt.category for key, r in self._references.items()}

    def _prompt_ids(self) -> tuple[list[str], list[str]]:
        """Return the ids of prompts asked one at a time, which are all, and of those asked together.

        Prompts whose plain answer ends in a repetition loop are not asked together, unless every prompt's does.
        """
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
                clients[key] = await stack.enter_async_context(httpx.AsyncClient(**self._fleet.reach(key)))
            for step in steps:
                if step.arm in self.unavailable:
                    continue
                arm = self._arms[step.arm]
                try:
                    cell = await self._cell(step, self._asker(clients[arm.server], arm))
                except (RequestError, httpx.HTTPError) as error:
                    if step.arm == self._plan.base:
                        raise WhiflashError(f"{self._base}: a request failed: {error}") from error
                    self._lose(step.arm, f"a request failed: {error}")
                    continue
                if task is not None:
                    self.cells.append(cell)
                    self._progress.advance(task)

    def _asker(self, client: httpx.AsyncClient, arm: Arm) -> Asker:
        return Asker(client, self._plan.max_tokens, {**TOKEN_IDS, **ROUNDS, **arm.request})

    def _prompt(self, key: str, *, is_warm_up: bool) -> Prompt:
        return self._references[key].prompt

    async def _cell(self, step: Step, asker: Asker) -> Cell:
        arm = self._arms[step.arm]
        client = self._fleet.clients[arm.server]
        self._prepare(arm, client)
        before = _state(arm, client)
        prompts = [self._prompt(key, is_warm_up=step.repetition < 0) for key in step.prompts]
        began = time.perf_counter()
        answers = tuple(await asker.run(step.load, prompts))
        seconds = time.perf_counter() - began
        after = _state(arm, client)
        gained = {key: after[key] - before[key] for key in after} if after else None
        return Cell(
            load=step.load, arm=step.arm, repetition=step.repetition, seconds=seconds, answers=answers, counters=gained
        )

    def _prepare(self, arm: Arm, client: httpx.Client) -> None:
        """Set the arm's router and empty the prefix cache."""
        if arm.router is not None and self._routers[arm.server] != arm.router:
            response = client.post("/whiflash/policy", json={"router": arm.router})
            if response.status_code != 200:
                raise RequestError(f"router {arm.router}: {response.json()['error']['message']}")
            self._routers[arm.server] = arm.router
        flush(client)

    def _provenance(self) -> dict[str, Any]:
        plan = self._plan
        return {
            "date": time.strftime("%Y-%m-%d", time.gmtime()),  # noqa: TID251 (a date)
            "busy_after": provenance.busy(),
            "seconds": round(time.monotonic() - self._began, 1),
            "interleaved": plan.interleave,
            "repetitions": len({cell.repetition for cell in self.cells}),
            "max_tokens": plan.max_tokens,
            "prompts_sha256": digest_of(plan.prompts),
            "left_out": self.left_out,
            "ended": self._ended,
            "recorded": list(plan.recorded),
            "longest_wait": plan.longest_wait,
            "sampling": [dict(one) for one in sorted({tuple(p.sampling.items()) for p in plan.prompts} - {()})],
            "servers": self._servers,
        }


def _alone(arm: Arm) -> list[str]:
    """Return the arguments of a server that runs only this arm."""
    return [*arm.arguments, *(() if arm.router is None else ("--whiflash-router", arm.router))]


TOLD = ("dtype", "attention_backend", "sampling_backend", "max_total_num_tokens")
"""Fields of `/server_info` that a report keeps."""
METRICS = "--enable-metrics"
COUNTED = {"sglang:evicted_tokens_total": "evicted", "sglang:num_retracted_requests_total": "retracted"}
"""SGLang's counters → their names in a cell."""


def _state(arm: Arm, client: httpx.Client) -> dict[str, float]:
    """Return the counters of a server that runs an arm."""
    counted: dict[str, float] = {}
    if METRICS in arm.arguments:
        counted = dict.fromkeys(COUNTED.values(), 0.0)
        for line in client.get("/metrics").raise_for_status().text.splitlines():
            if name := COUNTED.get(line.partition("{")[0]):
                counted[name] += float(line.rpartition(" ")[2])
    if arm.router is None:
        return counted
    state = client.get("/whiflash/state").raise_for_status().json()
    return counted | {key: n for key, n in state.items() if isinstance(n, int | float) and key != "requests"}
