"""`whiflash calibrate`: a bundle, answers and the cost of a round in; thresholds, curves and a picture out."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from whiflash_sglang.checkpoints.manifest import NAMES, check_arms, load_manifest
from whiflash_sglang.errors import ConfigError
from whiflash_sglang.lab.judging.evaluation import (
    EvaluationSettings,
    answer_and_replay,
    load_router,
)
from whiflash_sglang.lab.judging.round_costs import (
    RoundSeconds,
    measure,
    measure_with_own_server,
    parse_round_costs,
    sample,
)
from whiflash_sglang.lab.judging.thresholds import frame, sweep
from whiflash_sglang.train.answers.data import LoadedTarget, load_target, target_path
from whiflash_sglang.train.answers.prompts import read_rows
from whiflash_sglang.train.answers.store import open_stores
from whiflash_sglang.train.bundle import update_manifest
from whiflash_sglang.train.config import TrainConfig
from whiflash_sglang.train.regression import is_held_out
from whiflash_sglang.train.replay import Pair, Parts, Replay, ReplayLog, replay_answers, replay_name
from whiflash_sglang.train.router import choose_answers, entropy_of, plot_thresholds
from whiflash_sglang.train.walk import RouterWalk, choices_above, tabulate


@dataclass(frozen=True)
class CalibrationSettings:
    """What to calibrate on.

    Attributes:
        config: take stored answers that the router was not trained on. prompts: answer these instead.
        per_category: answers of each category, at most.
        server: a running server of the bundle. round_ms: a round's milliseconds instead (`parse_round_costs`). With
            neither, a server is started for the measurement.
        evaluation: how `prompts` are answered, and on what.
    """

    config: TrainConfig | None = None
    prompts: Path | None = None
    per_category: int = 48
    server: str | None = None
    round_ms: str | None = None
    picture: Path | None = None
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)


def calibrate(bundle: Path, settings: CalibrationSettings) -> dict[str, Any]:
    """Replay, measure rounds, choose thresholds; the result of `calibrate_bundle`.

    Raises:
        WhiflashError: the bundle, the server or an option cannot be used. ValueError: prompts cannot.
    """
    manifest = load_manifest(bundle)
    check_arms("calibration of the routers between two drafters", NAMES, manifest.drafters)
    if (settings.config is None) == (settings.prompts is None):
        raise ConfigError("give either --config (stored answers) or --prompts (answered now)")
    seconds = None if settings.round_ms is None else parse_round_costs(settings.round_ms)
    if settings.config is not None:
        config, hardware = settings.config, settings.config.hardware
        if hardware.threads:
            torch.set_num_threads(hardware.threads)
        template = None if manifest.chat_template is None else bundle / manifest.chat_template
        target = load_target(manifest.target, template, config.capture, hardware)
        answers = stored_answers(config, bundle, target, settings.per_category)
    else:
        rows = _per_category(read_rows(settings.prompts or Path()), settings.per_category)
        done = answer_and_replay(bundle, rows, settings.evaluation)
        target, answers = done.target, done.answers
    if seconds is None and settings.server is not None:
        seconds = measure(settings.server, sample())
    elif seconds is None:
        dtype = settings.evaluation.hardware.dtype
        seconds = measure_with_own_server(bundle, target_path(manifest.target), dtype)
    said = ",".join(f"{arm}={1000 * value:.2f}" for arm, value in seconds.items())
    Console(stderr=True).print(f"rounds in milliseconds, for --round-ms: {said}", highlight=False)
    return calibrate_bundle(bundle, answers, target, seconds, settings.picture)


def _per_category(rows: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    taken: Counter[str] = Counter()
    chosen = []
    for row in rows:
        taken[row["category"]] += 1
        if taken[row["category"]] <= count:
            chosen.append(row)
    return chosen


def stored_answers(
    config: TrainConfig, bundle: Path, target: LoadedTarget, per_category: int
) -> list[Replay]:
    """Replays of stored answers that the router was not trained on, at most `per_category` each.

    Replays that `whiflash train router` made are used again.
    """
    parts = Parts.of_bundle(bundle, config.router.eagle_steps)
    pair = Pair.load(parts, target.model)
    log = ReplayLog(config.work / "router", pair)
    stores = open_stores(config)
    held_out = [
        source
        for source in choose_answers(stores, parts.checkpoints, sum(len(store.records) for store in stores))
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
    target: LoadedTarget,
    seconds: RoundSeconds,
    picture: Path | None,
) -> dict[str, Any]:
    """Choose the thresholds of the bundle's routers and write them into its `whiflash.json`.

    Returns:
        Answers per category, the seconds of a round, the frame, and per router its curve, choice, and what the
        choice is worth in acceptance length.
    """
    manifest = load_manifest(bundle)
    head = target.model.head
    entropy = [entropy_of(answer.final, head).double().clamp(min=0).numpy() for answer in answers]
    dwell = manifest.entropy.min_dwell
    curves = {"entropy": sweep(answers, entropy, seconds, lowest=0.0, min_dwell=dwell)}
    signals, dwells = {"entropy": entropy}, {"entropy": dwell}
    changes: dict[str, Any] = {"entropy": {"tau": round(curves["entropy"].chosen, 4), "min_dwell": dwell}}
    if manifest.router is not None:
        router, dwell = load_router(bundle, target), manifest.router.min_dwell
        with torch.inference_mode():
            deltas = [router(answer.final).double().cpu().numpy() for answer in answers]
        lowest = min(float(delta.min()) for delta in deltas) - 1.0
        curve = curves["neural"] = sweep(answers, deltas, seconds, lowest=lowest, min_dwell=dwell)
        signals["neural"], dwells["neural"] = deltas, dwell
        changes["router"] = {
            **manifest.router.model_dump(exclude_none=True),
            "threshold": round(curve.chosen, 4),
        }
    around = frame(answers, seconds)
    walks = {
        name: RouterWalk([choices_above(signal, curves[name].chosen) for signal in parts], dwells[name])
        for name, parts in signals.items()
    }
    figures = tabulate(answers, walks)
    update_manifest(bundle, changes)
    if picture is not None:
        chosen = {name: curve.chosen for name, curve in curves.items()}
        plot_thresholds({n: c.rates for n, c in curves.items()}, chosen, around._asdict(), picture)
    return {
        "bundle": manifest.name,
        "answers": dict(Counter(answer.category for answer in answers)),
        "round_seconds": dict(seconds),
        "tokens_per_second": around._asdict(),
        "routers": {
            name: {
                "threshold": curve.chosen,
                "tokens_per_second": curve.rates[curve.chosen],
                "oracle_gain_share": figures["overall"]["oracle_gain_share"][name],
                "curve": [{"threshold": t, "tokens_per_second": r} for t, r in curve.rates.items()],
            }
            for name, curve in curves.items()
        },
        "acceptance_length": figures["overall"]["acceptance_length"],
    }
