"""`whiflash lab calibrate`: a bundle, answers and the cost of a round in; thresholds and curves out."""

import asyncio
import tempfile
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

from whiflash_sglang import arms
from whiflash_sglang.checkpoints.bundles import update_manifest
from whiflash_sglang.checkpoints.manifest import NAMES, PARTS, check_arms, load_manifest
from whiflash_sglang.errors import ConfigError, WhiflashError
from whiflash_sglang.lab.bench.fleet import launcher
from whiflash_sglang.lab.bench.load import ANSWER_SECONDS, Asker
from whiflash_sglang.lab.bench.prompts import Prompt, load_prompts, sample, shipped
from whiflash_sglang.lab.bench.subject import build_subject
from whiflash_sglang.lab.evaluation import load_router
from whiflash_sglang.models.origin import Origin
from whiflash_sglang.progress import progress
from whiflash_sglang.train.answers.data import target_path
from whiflash_sglang.train.answers.store import open_stores
from whiflash_sglang.train.config import TrainConfig
from whiflash_sglang.train.drafters.initialisation import origin_of
from whiflash_sglang.train.replay import Pair, Parts, Replay, ReplayLog, replay_answers, replay_name
from whiflash_sglang.train.rounds import Tally
from whiflash_sglang.train.router import choose_answers, entropy_of, is_held_out
from whiflash_sglang.train.walk import Choices, choices_above, walk

GRID = 41
PLATEAU = 0.002

Signal = NDArray[np.float64]

RoundSeconds = Mapping[str, float]
"""Arm → seconds of one round, alone in the batch."""


class Curve(NamedTuple):
    """`rates` threshold → tokens per second; `chosen` one of the thresholds."""

    rates: dict[float, float]
    chosen: float


def sweep(
    answers: Sequence[Replay],
    signals: Sequence[Signal],
    seconds: RoundSeconds,
    *,
    lowest: float,
    min_dwell: int,
) -> Curve:
    """EAGLE-3 where the signal exceeds the threshold, for a grid of thresholds from `lowest` on: that at which the walk
    takes the least time is chosen.

    Every category weighs the same. Thresholds are the quantiles of the signal itself, so both ends are the static
    drafters. Among thresholds within `PLATEAU` of the best rate the middle one is taken: the top of a noisy curve is
    flat.

    Args:
        signals: per answer [P], what is compared with the threshold. seconds: of a round of each drafter.

    Raises:
        ValueError: there is no answer before a loop.
    """
    quantiles = np.quantile(np.concatenate(signals), np.linspace(0, 1, GRID))
    rates = {}
    for threshold in sorted({lowest, *(float(value) for value in quantiles)}):
        choices = [choices_above(signal, threshold) for signal in signals]
        rates[threshold] = _rate(answers, choices, seconds, min_dwell)
    best = max(rates.values())
    level = [threshold for threshold, rate in rates.items() if rate >= best * (1 - PLATEAU)]
    return Curve(rates, level[len(level) // 2])


def _rate(
    answers: Sequence[Replay], choices: Sequence[Choices | str], seconds: RoundSeconds, min_dwell: int = 0
) -> float:
    """Tokens per second, the mean over the categories."""
    tallies: Mapping[str, Tally] = defaultdict(Tally)
    for answer, choose in zip(answers, choices, strict=True):
        if answer.loop_from:
            walk(answer, choose, 0, answer.loop_from, tallies[answer.category], min_dwell)
    if not tallies:
        raise ValueError("no answer has text before a loop; calibrate with other prompts")
    return float(
        np.mean(
            [
                tally.tokens / sum(rounds * seconds[arm] for arm, rounds in tally.won.items())
                for tally in tallies.values()
            ]
        )
    )


@dataclass(frozen=True)
class CalibrationSettings:
    """Settings of a calibration.

    Attributes:
        config: of the training whose stored answers are taken, those that the router was not trained on.
        per_category: answers of each category, at most.
        round_ms: a round's milliseconds (`parse_round_costs`). None: a server is started to measure them.
    """

    config: TrainConfig
    per_category: int = 48
    round_ms: str | None = None


def calibrate(bundle: Path, settings: CalibrationSettings) -> dict[str, Any]:
    """Replay, measure rounds, choose thresholds; the result of `calibrate_bundle`.

    Raises:
        WhiflashError: the bundle, the server or an option cannot be used.
    """
    manifest = load_manifest(bundle)
    check_arms("calibration of the routers between two drafters", NAMES, manifest.drafters)
    seconds = None if settings.round_ms is None else parse_round_costs(settings.round_ms)
    config, hardware = settings.config, settings.config.hardware
    if hardware.threads:
        torch.set_num_threads(hardware.threads)
    path = target_path(manifest.target)
    target = origin_of(config, path, open_stores(config), **hardware.place)
    answers = stored_answers(config, bundle, target, settings.per_category)
    if seconds is None:
        seconds = measure_with_own_server(bundle, path, hardware.dtype)
    said = ",".join(f"{PARTS[arm]}={1000 * value:.2f}" for arm, value in seconds.items())
    Console(stderr=True).print(f"rounds in milliseconds, for --round-ms: {said}", highlight=False)
    return calibrate_bundle(bundle, answers, target, seconds)


def stored_answers(config: TrainConfig, bundle: Path, target: Origin, per_category: int) -> list[Replay]:
    """Replays of stored answers that the router was not trained on, at most `per_category` each.

    Replays that `whiflash train --step router` made are used again.
    """
    parts = Parts.of_bundle(bundle, config.router.eagle_steps)
    pair = Pair.load(parts, target)
    log = ReplayLog(config.work / "router", pair)
    stores = open_stores(config)
    held_out = [
        source
        for source in choose_answers(
            stores, parts.checkpoints.values(), sum(len(store.records) for store in stores)
        )
        if is_held_out(source.record.id, config.router.held_out)
    ]
    taken: Counter[str] = Counter()
    chosen = []
    for source in sorted(held_out, key=lambda source: replay_name(*source) not in log.known):
        taken[source.record.category] += 1
        if taken[source.record.category] <= per_category:
            chosen.append(source)
    return replay_answers(pair, chosen, log)


def calibrate_bundle(
    bundle: Path,
    answers: Sequence[Replay],
    target: Origin,
    seconds: RoundSeconds,
) -> dict[str, Any]:
    """Choose the thresholds of the bundle's routers and write them into its `whiflash.json`.

    Returns:
        Answers per category, the seconds of a round, each drafter's tokens a second, and per router its curve and
        choice.
    """
    manifest = load_manifest(bundle)
    entropy = [entropy_of(answer.final, target.head).double().clamp(min=0).numpy() for answer in answers]
    dwell = manifest.entropy.min_dwell
    curves = {"entropy": sweep(answers, entropy, seconds, lowest=0.0, min_dwell=dwell)}
    changes: dict[str, Any] = {"entropy": {"tau": round(curves["entropy"].chosen, 4), "min_dwell": dwell}}
    if manifest.router is not None:
        router, dwell = load_router(bundle, target), manifest.router.min_dwell
        with torch.inference_mode():
            deltas = [router(answer.final).double().cpu().numpy() for answer in answers]
        lowest = min(float(delta.min()) for delta in deltas) - 1.0
        curve = curves["neural"] = sweep(answers, deltas, seconds, lowest=lowest, min_dwell=dwell)
        changes["router"] = {
            **manifest.router.model_dump(exclude_none=True),
            "threshold": round(curve.chosen, 4),
        }
    alone = {arm: _rate(answers, [arm] * len(answers), seconds) for arm in arms.PAIR}
    update_manifest(bundle, changes)
    return {
        "bundle": manifest.name,
        "answers": dict(Counter(answer.category for answer in answers)),
        "round_seconds": dict(seconds),
        "tokens_per_second": alone,
        "routers": {
            name: {
                "threshold": curve.chosen,
                "tokens_per_second": curve.rates[curve.chosen],
                "curve": [{"threshold": t, "tokens_per_second": r} for t, r in curve.rates.items()],
            }
            for name, curve in curves.items()
        },
    }


PROMPTS_PER_CATEGORY = 2
TOKENS = 64


def parse_round_costs(text: str) -> dict[str, float]:
    """`eagle3=31.0,dflash=28.5`, in milliseconds. Raises `ConfigError` saying what is expected."""
    try:
        costs = {name: float(value) / 1000 for name, value in (part.split("=") for part in text.split(","))}
    except ValueError:
        costs = {}
    if costs.keys() != set(PARTS.values()) or not all(0 < value < float("inf") for value in costs.values()):
        raise ConfigError(
            f"--round-ms {text!r}: give milliseconds of a round of both drafters, e.g. eagle3=31.0,dflash=28.5"
        )
    return {arm: costs[part] for arm, part in PARTS.items()}


def measure_with_own_server(bundle: Path, model_path: Path, dtype: str) -> dict[str, float]:
    """Start a server of the bundle, measure, end it. Raises `WhiflashError` where it does not start, or refuses."""
    prompts = sample(load_prompts(str(shipped())), PROMPTS_PER_CATEGORY)
    with tempfile.TemporaryDirectory() as scratch:
        subject = build_subject(str(model_path), str(bundle), dtype, (), Path(scratch), ())
        arguments = [
            *("--model-path", str(subject.target), "--dtype", dtype, *subject.common),
            *("--speculative-algorithm", "WHIFLASH", "--speculative-draft-model-path", str(bundle)),
        ]
        with launcher(arguments, None) as server:
            return measure_rounds(server.base_url, prompts)


def measure_rounds(url: str, prompts: Sequence[Prompt]) -> dict[str, float]:
    """Seconds of a round of each drafter at a server of the bundle, which keeps the last router.

    The server is pinned to one drafter after the other with every prompt, so that the machine's drift hits both alike.
    A round's seconds are the time from an answer's first event to its last, over its verifications: drafting,
    verifying, the engine and HTTP.

    Raises:
        WhiflashError: the server refuses.
    """
    return asyncio.run(_measure(url, prompts))


async def _measure(url: str, prompts: Sequence[Prompt]) -> dict[str, float]:
    seconds, rounds = dict.fromkeys(arms.PAIR, 0.0), dict.fromkeys(arms.PAIR, 0)
    async with httpx.AsyncClient(base_url=url, timeout=ANSWER_SECONDS) as client:
        asker = Asker(client, TOKENS)
        with progress() as bar:
            task = bar.add_task("measuring rounds", total=(len(prompts) + 1) * len(arms.PAIR))
            for index, prompt in enumerate([prompts[0], *prompts]):
                for arm in arms.PAIR:
                    await _pin(client, arm)
                    answer = await asker.ask(prompt)
                    bar.advance(task)
                    if index:  # the first prompt warms up
                        seconds[arm] += answer.seconds - (answer.ttft or 0.0)
                        rounds[arm] += answer.forwards
    return {arm: seconds[arm] / rounds[arm] for arm in arms.PAIR}


async def _pin(client: httpx.AsyncClient, router: str) -> None:
    answer = await client.post("/whiflash/policy", json={"router": router})
    if answer.status_code != 200:
        raise WhiflashError(f"{client.base_url} did not take the policy {router}: {answer.text[:300]}")
