"""What `scripts/soak.py` does to a server: users who ask, leave, branch and change the policy, each answer judged."""

import asyncio
import random
import signal
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil

from whiflash_sglang.serving import Server, runs

LONGEST, TIE = 48, 1e-4
"""Tokens of an answer at most; difference of log-probabilities below which two tokens are as good."""
ROOMY = ("--max-total-tokens", "40000", "--max-running-requests", "8")

Prompt = tuple[int, ...]


@dataclass
class Found:
    """Counts of a scenario.

    failed: requests without an answer that should have one. leaks: records of requests that are gone, processes, and
    memory that keeps growing. crashes: tracebacks in the log, servers that are gone, and scenarios that broke off.
    notes: further figures.
    """

    scenario: str
    seconds: float = 0.0
    requests: int = 0
    tokens: int = 0
    wrong: int = 0
    ties: int = 0
    failed: int = 0
    leaks: int = 0
    crashes: int = 0
    notes: dict[str, float] = field(default_factory=dict)


class Plain:
    """Plain decoding's answers, asked once each."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self.client = client
        self._known: dict[Prompt, tuple[list[int], list[float]]] = {}
        self._asking: dict[Prompt, asyncio.Lock] = {}

    async def of(self, prompt: Prompt) -> tuple[list[int], list[float]]:
        """The longest answer, and by how much each of its tokens was the likeliest."""
        async with self._asking.setdefault(prompt, asyncio.Lock()):
            if prompt not in self._known:
                body = request(prompt, LONGEST) | {"return_logprob": True, "top_logprobs_num": 2}
                answer = (await self.client.post("/generate", json=body)).raise_for_status().json()
                two = answer["meta_info"]["output_top_logprobs"]
                self._known[prompt] = answer["output_ids"], [first[0] - second[0] for first, second in two]
        return self._known[prompt]


@dataclass
class Run:
    """One scenario's server and what is left of its time."""

    plain: Plain
    client: httpx.AsyncClient
    server: Server
    ends: float
    found: Found
    rng: random.Random

    def goes_on(self) -> bool:
        return time.monotonic() < self.ends

    async def ask(self, prompt: Prompt, tokens: int) -> dict[str, Any]:
        """One answer, judged. An empty one where there was none."""
        expected, leads = await self.plain.of(prompt)
        self.found.requests += 1
        try:
            answer = await self.client.post("/generate", json=request(prompt, tokens))
            told = dict(answer.raise_for_status().json())
        except (httpx.HTTPError, ValueError):
            self.found.failed += 1
            return {}
        ids = told["output_ids"]
        self.found.tokens += len(ids)
        if ids != expected[:tokens]:
            pairs = zip(ids, expected, leads, strict=False)
            lead = next((lead for found, wanted, lead in pairs if found != wanted), TIE)
            if lead < TIE:
                self.found.ties += 1
            else:
                self.found.wrong += 1
        return told

    async def each(self, users: int, act: Callable[[], Awaitable[Any]]) -> None:
        """So many users, each of whom acts again and again until the time is up."""

        async def user() -> None:
            while self.goes_on():
                await act()

        await asyncio.gather(*(user() for _ in range(users)))


def request(prompt: Prompt, tokens: int, **more: Any) -> dict[str, Any]:
    sampling = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
    return {"input_ids": list(prompt), "sampling_params": sampling, **more}


def prompts(rng: random.Random, count: int, shortest: int, longest: int) -> list[Prompt]:
    return [tuple(rng.choices(range(32, 127), k=rng.randint(shortest, longest))) for _ in range(count)]


async def overload(run: Run) -> None:
    """Twice as many arrivals as are served, for half of the time; then the queue is worked off."""
    known = prompts(run.rng, 24, 10, 60)
    await asyncio.gather(*map(run.plain.of, known))  # what is measured next is this server's capacity
    start, half = time.monotonic(), (run.ends - time.monotonic()) / 2
    whole, run.ends = run.ends, start + half / 4
    await run.each(8, lambda: run.ask(run.rng.choice(known), LONGEST))
    rate = 2 * run.found.requests / (time.monotonic() - start)
    run.ends, under_way = start + half, []
    while run.goes_on():
        under_way.append(asyncio.create_task(run.ask(run.rng.choice(known), LONGEST)))
        await asyncio.sleep(run.rng.expovariate(rate))
    run.found.notes |= {
        "arrivals_per_second": rate,
        "waiting_at_the_end": sum(not t.done() for t in under_way),
    }
    await asyncio.gather(*under_way)
    run.ends = whole


async def short(run: Run) -> None:
    """Many requests of a few tokens, up to 10,000."""
    known = prompts(run.rng, 200, 2, 9)

    async def act() -> None:
        if run.found.requests >= 10_000:
            run.ends = 0.0
        await run.ask(run.rng.choice(known), run.rng.randint(1, 4))

    await run.each(8, act)


async def eviction(run: Run) -> None:
    """Prompts of ten times as many tokens as the cache holds; running requests are pushed out, too."""
    known = prompts(run.rng, 80, 120, 160)
    await run.each(8, lambda: run.ask(run.rng.choice(known), run.rng.randint(8, LONGEST)))


async def branching(run: Run) -> None:
    """Fifty conversations that branch, on both servers alike: what is read from the cache, side by side."""
    stems, cached, prompt_tokens = prompts(run.rng, 50, 40, 60), {"plain": 0, "whiflash": 0}, 0
    turns = prompts(run.rng, 6, 8, 12)
    while run.goes_on():
        place = run.rng.randrange(len(stems))
        stem = stems[place]
        # First: what is expected of the answer is asked there, too, and would be cached.
        body = request(stem, 16)
        beside = (await run.plain.client.post("/generate", json=body)).raise_for_status().json()
        answer = await run.ask(stem, 16)
        if not answer:
            return
        cached["whiflash"] += answer["meta_info"]["cached_tokens"]
        cached["plain"] += beside["meta_info"]["cached_tokens"]
        prompt_tokens += answer["meta_info"]["prompt_tokens"]
        longer = (*stem, *answer["output_ids"], *run.rng.choice(turns))
        # A branch begins anywhere in what there is.
        stems[place] = longer[: run.rng.randint(30, len(longer))] if len(longer) > 160 else longer
    run.found.notes |= {f"reuse_{who}": count / max(prompt_tokens, 1) for who, count in cached.items()}


async def disconnects(run: Run) -> None:
    """Clients that go away in mid-answer, beside others that stay."""
    known, left = prompts(run.rng, 16, 10, 60), 0

    async def leave() -> None:
        nonlocal left
        body = request(run.rng.choice(known), 400, stream=True)
        async with run.client.stream("POST", "/generate", json=body) as stream:
            lines = stream.aiter_lines()
            for _ in range(run.rng.randint(0, 20)):
                await anext(lines, None)
        left += 1

    stay = run.each(3, lambda: run.ask(run.rng.choice(known), LONGEST))
    await asyncio.gather(stay, run.each(12, leave))
    run.found.notes["left"] = left


async def policies(run: Run) -> None:
    """The policy changes while requests run, and what is remembered is forgotten."""
    known, changes = prompts(run.rng, 24, 10, 60), 0

    async def change() -> None:
        nonlocal changes
        wanted = {"router": run.rng.choice(["auto", "none", "random", "ar", "diffusion", "lookup"])}
        (await run.client.post("/whiflash/policy", json=wanted)).raise_for_status()
        (await run.client.post("/whiflash/forget", json={"all": True})).raise_for_status()
        changes += 1
        await asyncio.sleep(0.2)

    asking = run.each(6, lambda: run.ask(run.rng.choice(known), LONGEST))
    await asyncio.gather(asking, run.each(1, change))
    run.found.notes["changes"] = changes


async def kill(run: Run) -> None:
    """The scheduler is killed in mid-answer: every client hears of it, and no process is left."""
    known = prompts(run.rng, 8, 10, 60)
    for prompt in known:
        await run.plain.of(prompt)
    asking = [asyncio.create_task(run.ask(prompt, LONGEST)) for prompt in known * 4]
    await asyncio.sleep(0.3)
    family = run.server.pids
    for pid in family:
        with suppress(psutil.NoSuchProcess):
            if "scheduler" in " ".join(psutil.Process(pid).cmdline()):
                psutil.Process(pid).send_signal(signal.SIGKILL)
    await asyncio.gather(*asking)
    while run.goes_on() and any(map(runs, family)):
        await asyncio.sleep(0.2)
    found = run.found
    found.notes["cut_off"], found.failed = found.failed, 0
    found.leaks = sum(map(runs, family))


SCENARIOS: dict[str, tuple[Callable[[Run], Awaitable[None]], tuple[str, ...]]] = {
    "overload": (overload, ROOMY),
    "short": (short, ROOMY),
    "eviction": (eviction, ("--max-total-tokens", "1200", "--max-running-requests", "8")),
    "branching": (branching, ROOMY),
    "disconnects": (disconnects, ROOMY),
    "policies": (policies, (*ROOMY, "--whiflash-lookup-memory-mib", "8")),
    "kill": (kill, ROOMY),
}
