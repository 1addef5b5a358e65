"""What a round of each drafter costs on this machine, measured through a server of the bundle.

The server is pinned to one drafter after the other with every prompt, so that the machine's drift hits both alike. A
round's seconds are the time from an answer's first event to its last, over its verifications: drafting, verifying,
the engine and HTTP.
"""

import asyncio
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import httpx

from whiflash_sglang import arms
from whiflash_sglang.errors import ConfigError, WhiflashError
from whiflash_sglang.lab.bench.fleet import launcher
from whiflash_sglang.lab.bench.load import ANSWER_SECONDS, Asker
from whiflash_sglang.lab.bench.prompts import Prompt, load_prompts, shipped
from whiflash_sglang.lab.bench.subject import build_subject
from whiflash_sglang.progress import progress
from whiflash_sglang.train.replay import ARMS

SERVER_NAMES = dict(zip(ARMS, (arms.AR, arms.DIFFUSION), strict=True))
"""Arms of a replay → the same arms in a server."""

PROMPTS_PER_CATEGORY = 2
TOKENS = 64

RoundSeconds = Mapping[str, float]
"""Drafter (`eagle3`, `dflash`) → seconds of one round, alone in the batch."""


def parse_round_costs(text: str) -> dict[str, float]:
    """`eagle3=31.0,dflash=28.5`, in milliseconds. Raises `ConfigError` saying what is expected."""
    try:
        costs = {name: float(value) / 1000 for name, value in (part.split("=") for part in text.split(","))}
    except ValueError:
        costs = {}
    if set(costs) != set(ARMS) or not all(0 < value < float("inf") for value in costs.values()):
        raise ConfigError(
            f"--round-ms {text!r}: give milliseconds of a round of both drafters, e.g. eagle3=31.0,dflash=28.5"
        )
    return costs


def measure_with_own_server(bundle: Path, model_path: Path, dtype: str) -> dict[str, float]:
    """Start a server of the bundle, measure, stop it. Raises `ServerError` where it does not start."""
    with tempfile.TemporaryDirectory() as scratch:
        subject = build_subject(str(model_path), str(bundle), dtype, (), Path(scratch), ())
        arguments = [
            *("--model-path", str(subject.target), "--dtype", dtype, *subject.common),
            *("--speculative-algorithm", "WHIFLASH", "--speculative-draft-model-path", str(bundle)),
        ]
        with launcher(arguments, None) as server:
            return measure(server.base_url, sample())


def sample() -> list[Prompt]:
    """A few prompts of every category of the benchmark's sample."""
    by_category: dict[str, list[Prompt]] = {}
    for prompt in load_prompts(str(shipped())):
        by_category.setdefault(prompt.category, []).append(prompt)
    return [prompt for part in by_category.values() for prompt in part[:PROMPTS_PER_CATEGORY]]


def measure(url: str, prompts: Sequence[Prompt]) -> dict[str, float]:
    """Seconds of a round of each drafter at a running server of the bundle, whose router is changed and put back.

    Raises:
        WhiflashError: the server is none of ours, or refuses.
    """
    return asyncio.run(_measure(url, prompts))


async def _measure(url: str, prompts: Sequence[Prompt]) -> dict[str, float]:
    seconds, rounds = dict.fromkeys(ARMS, 0.0), dict.fromkeys(ARMS, 0)
    async with httpx.AsyncClient(base_url=url, timeout=ANSWER_SECONDS) as client:
        before = await _policy(client)
        asker = Asker(client, TOKENS)
        try:
            with progress() as bar:
                task = bar.add_task("measuring rounds", total=(len(prompts) + 1) * len(ARMS))
                for index, prompt in enumerate([prompts[0], *prompts]):
                    for arm in ARMS:
                        await _pin(client, SERVER_NAMES[arm])
                        answer = await asker.ask(prompt)
                        bar.advance(task)
                        if index:  # the first prompt warms up
                            seconds[arm] += answer.seconds - answer.ttft
                            rounds[arm] += answer.forwards
        finally:
            await _pin(client, before)
    return {arm: seconds[arm] / rounds[arm] for arm in ARMS}


async def _policy(client: httpx.AsyncClient) -> str:
    try:
        answer = await client.get("/whiflash/state")
        return str(answer.raise_for_status().json()["policy"])
    except (httpx.HTTPError, KeyError, ValueError) as error:
        raise WhiflashError(f"{client.base_url} is no WHIFLASH server: {error}") from None


async def _pin(client: httpx.AsyncClient, router: str) -> None:
    answer = await client.post("/whiflash/policy", json={"router": router})
    if answer.status_code != 200:
        raise WhiflashError(f"{client.base_url} did not take the policy {router}: {answer.text[:300]}")
