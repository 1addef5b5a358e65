"""`whiflash train router`: stored answers in, a router file, its report and its calibration plot out."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from whiflash_sglang.checkpoints.manifest import NAMES, check_arms
from whiflash_sglang.models.router import ROUTER_FILE, Router
from whiflash_sglang.train.answers.provenance import Provenance, trained_on
from whiflash_sglang.train.answers.store import FeatureStore, open_stores
from whiflash_sglang.train.config import RouterTraining, TrainConfig
from whiflash_sglang.train.drafters.initialisation import origin_of
from whiflash_sglang.train.regression import (
    Bin,
    RouterData,
    Split,
    calibration_bins,
    fit,
    inputs_of,
    router_data,
    router_quality,
    run_key,
    split,
)
from whiflash_sglang.train.replay import Pair, Parts, Replay, ReplayLog, Source, replay_answers
from whiflash_sglang.train.walk import RouterWalk, choices_above, tabulate


def plot_calibration(bins: Sequence[Bin], path: Path) -> None:
    """Predicted against measured ΔAL, the mean of each tenth of the predictions."""
    figure, axes = pyplot().subplots(figsize=(4, 4))
    axes.plot([part.predicted for part in bins], [part.measured for part in bins], "o-")
    axes.axline((0, 0), slope=1, linestyle="dotted", color="black")
    axes.set_xlabel("predicted ΔAL (EAGLE-3 - DFlash)")
    axes.set_ylabel("measured ΔAL")
    save_picture(figure, path)


def plot_thresholds(
    curves: Mapping[str, Mapping[float, float]],
    chosen: Mapping[str, float],
    frame: Mapping[str, float],
    path: Path,
) -> None:
    """Tokens per second against each router's threshold.

    Args:
        curves: router → threshold → tokens per second. chosen: router → threshold.
        frame: name → tokens per second of what does not depend on a threshold.
    """
    figure, rows = pyplot().subplots(1, len(curves), figsize=(5 * len(curves), 4), sharey=True, squeeze=False)
    for axes, (name, curve) in zip(rows[0], curves.items(), strict=True):
        axes.plot(list(curve), list(curve.values()), ".-", label=name)
        axes.axvline(chosen[name], color="tab:green", label=f"chosen: {chosen[name]:.3g}")
        for style, (level, value) in zip(
            ("dotted", "dashed", "dashdot", (0, (1, 6))), frame.items(), strict=False
        ):
            axes.axhline(value, linestyle=style, color="black", linewidth=1, label=level)
        axes.set_xlabel(
            "entropy threshold (nats)" if name == "entropy" else "threshold on predicted ΔAL (tokens)"
        )
        axes.legend(fontsize="small")
    rows[0][0].set_ylabel("tokens per second")
    save_picture(figure, path)


def pyplot() -> Any:
    """matplotlib without a display; imported when a picture is drawn."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as drawn

    return drawn


def save_picture(figure: Any, path: Path) -> None:
    """Write a figure whole, in the format that the file's name ends with, and close it."""
    figure.tight_layout()
    staged = path.with_name(f".{path.name}")
    figure.savefig(staged, dpi=120, format=path.suffix.lstrip(".") or "png")
    staged.replace(path)
    pyplot().close(figure)


REPORT = "report.json"
PLOT = "calibration.png"
_HEAD_ROWS = 2048


@dataclass(frozen=True)
class TrainedRouter:
    """`directory` holds the router file, its report, its plot and its provenance."""

    directory: Path
    report: dict[str, Any]


def choose_answers(stores: Sequence[FeatureStore], checkpoints: Sequence[Path], limit: int) -> list[Source]:
    """Stored answers, those first that no checkpoint was trained on: there drafters accept what they will accept
    later, elsewhere a little more. Raises `ValueError` where there are none.
    """
    known: dict[str, Source] = {}
    later: dict[str, Source] = {}
    for store in stores:
        count = max(trained_on(path, store) for path in checkpoints)
        known |= {record.id: Source(store, record) for record in store.records[:count]}
        later |= {record.id: Source(store, record) for record in store.records[count:]}
    # A prompt that two shards answered counts once, and as known where either answer was trained on.
    fresh = [source for name, source in later.items() if name not in known]
    if not fresh and not known:
        raise ValueError("there is no data yet: run `whiflash train data` first")
    order = torch.randperm(len(known), generator=torch.Generator().manual_seed(0)).tolist()
    trained = list(known.values())
    return [*fresh, *(trained[index] for index in order)][:limit]


def train_router(config: TrainConfig, target_path: Path, drafters: Parts) -> TrainedRouter:
    """Replay both drafters, fit, and judge on held-out answers. Every part goes on where a killed run stopped.

    Raises:
        WhiflashError: a checkpoint does not fit. ValueError: there are too few answers.
    """
    check_arms("a router", NAMES, drafters.arms)
    settings = config.router
    if config.hardware.threads:
        torch.set_num_threads(config.hardware.threads)
    stores = open_stores(config)
    target = origin_of(
        config, target_path, stores, device=config.hardware.device, dtype=config.hardware.torch_dtype
    )
    provenance = Provenance.start(config, stores)
    pair = Pair.load(drafters, target)
    sources = choose_answers(stores, drafters.checkpoints, settings.answers)
    work = config.work / "router"
    answers = replay_answers(pair, sources, ReplayLog(work, pair))
    parts = split(answers, settings.held_out)
    learn, held_out = router_data(parts.learn), router_data(parts.held_out)
    run = work / "runs" / run_key(pair.digest, parts, settings, config.seed)
    router = fit(learn, held_out, run, settings, config.seed)
    entropy = entropy_of(held_out.states, target.head)
    report = {
        "answers": {"learn": len(parts.learn), "held_out": len(parts.held_out)},
        "positions": {"learn": len(learn.states), "held_out": len(held_out.states)},
        **_judge(router, parts.held_out, held_out, entropy),
    }
    if settings.judge_confidences:
        report["with_confidences"] = _with_confidences(parts, entropy, run, settings, config.seed)
    out = work / "checkpoint"
    out.mkdir(parents=True, exist_ok=True)
    router.save(out / ROUTER_FILE)
    (out / REPORT).write_text(json.dumps(report, indent=1) + "\n")
    plot_calibration(calibration_bins(router, held_out), out / PLOT)
    log = json.loads((run / "log.json").read_text())
    provenance.finish(out, {"log": log, "drafters": pair.digest})
    return TrainedRouter(out, report)


def _with_confidences(
    parts: Split, entropy: Tensor, run: Path, settings: RouterTraining, seed: int
) -> dict[str, Any]:
    """What the same training makes of both drafters' confidences beside the state."""
    learn, held_out = (router_data(part, confidences=True) for part in (parts.learn, parts.held_out))
    router = fit(learn, held_out, run.with_name(f"{run.name}-confidences"), settings, seed)
    return _judge(router, parts.held_out, held_out, entropy, confidences=True)


@torch.inference_mode()
def _judge(
    router: Router,
    answers: Sequence[Replay],
    data: RouterData,
    entropy: Tensor,
    confidences: bool = False,
) -> dict[str, Any]:
    """Quality of the regression, and what routing by it is worth at threshold 0, without dwell."""
    quality = router_quality(router, data, entropy)
    deltas = [router(inputs_of(one, confidences)).tolist() for one in answers]
    walks = {"neural": RouterWalk([choices_above(one, 0) for one in deltas])}
    figures: Mapping[str, Any] = tabulate(answers, walks)
    keys = ("acceptance_length", "rounds_won", "oracle_gain_share")
    return {
        **quality._asdict(),
        "calibration": [part._asdict() for part in calibration_bins(router, data)],
        "overall": {key: figures["overall"][key] for key in keys},
        "categories": {name: part["acceptance_length"] for name, part in figures["categories"].items()},
    }


@torch.inference_mode()
def entropy_of(states: Tensor, head: Tensor) -> Tensor:
    """Nats of the target's own distribution: `states` [N, H] after its final norm, `head` [V, H] → [N] fp32."""
    parts = []
    for part in torch.split(states, _HEAD_ROWS):
        log = F.linear(part.to(head.device, head.dtype), head).float().log_softmax(-1)
        parts.append(-(log.exp() * log).sum(-1).cpu())
    return torch.cat(parts)
