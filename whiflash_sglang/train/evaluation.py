"""`whiflash evaluate`: a bundle against held-out prompts; answers in, table, picture and JSON out."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import track
from rich.table import Table

from whiflash_sglang.config import load_manifest
from whiflash_sglang.errors import ConfigError
from whiflash_sglang.models.dflash import DFlashDrafter
from whiflash_sglang.models.eagle3 import Eagle3Drafter
from whiflash_sglang.train.config import Data, Hardware, Slots
from whiflash_sglang.train.data import LoadedTarget, answer_rows, load_target
from whiflash_sglang.train.evaluate import ARMS, LOOP, ORACLE, Replay, replay, tabulate
from whiflash_sglang.train.prompts import balanced, read_rows
from whiflash_sglang.train.store import FeatureStore


@dataclass(frozen=True)
class EvaluationSettings:
    """How a bundle is evaluated.

    Attributes:
        limit: prompts used, balanced over the categories; None takes all.
        work: where the target's answers are kept for the next evaluation; None keeps nothing.
    """

    limit: int | None = None
    max_new_tokens: int = 160
    eagle_steps: int = 5
    seed: int = 1
    work: Path | None = None
    hardware: Hardware = field(default_factory=Hardware)


SLOTS = (Slots(rows=24, capacity=512), Slots(rows=6, capacity=1152), Slots(rows=3, capacity=4096))


def evaluate_bundle(bundle: Path, prompts: Path, settings: EvaluationSettings) -> dict[str, Any]:
    """The figures of `tabulate`, with what they were measured on.

    Raises `WhiflashError` for a bundle and `ValueError` for prompts that cannot be used.
    """
    manifest = load_manifest(bundle)
    drafters = _capture_union(bundle / manifest.eagle3, bundle / manifest.dflash)
    template = None if manifest.chat_template is None else bundle / manifest.chat_template
    if settings.hardware.threads:
        torch.set_num_threads(settings.hardware.threads)
    target = load_target(manifest.target, template, drafters, settings.hardware)
    rows = list(balanced(read_rows(prompts), {}, settings.seed))[: settings.limit]
    with tempfile.TemporaryDirectory() as scratch:
        store = FeatureStore(
            (settings.work or Path(scratch)) / "answers",
            vectors=len(drafters) + 1,
            hidden=target.model.hidden_size,
            layers=drafters,
        )
        store.truncate_to_index()
        data = Data(
            prompts=[],
            tool_choice_required=1.0,
            max_new_tokens=settings.max_new_tokens,
            slots=list(SLOTS),
        )
        summary = answer_rows(rows, target, data, drafters, store, keep_loops=True)
        wanted = {row["id"] for row in rows}
        answers = replay_store(bundle, target, store, settings.eagle_steps, wanted)
    routers = {"entropy": [entropy_choices(answer, target, manifest.entropy.tau) for answer in answers]}
    return {
        "bundle": manifest.name,
        "prompts": len(rows),
        "skipped": summary.skipped,
        "max_new_tokens": settings.max_new_tokens,
        "dtype": settings.hardware.dtype,
        **tabulate(answers, routers),
    }


def replay_store(
    bundle: Path, target: LoadedTarget, store: FeatureStore, eagle_steps: int, wanted: set[str] | None = None
) -> list[Replay]:
    """Replay both of the bundle's drafters over the stored answers (those with an id in `wanted`)."""
    manifest = load_manifest(bundle)
    model = target.model
    eagle3 = Eagle3Drafter.load(
        bundle / manifest.eagle3,
        device=model.device,
        dtype=model.dtype,
        target_embedding=model.embedding,
        target_lm_head=model.head,
    )
    dflash = DFlashDrafter.load(
        bundle / manifest.dflash,
        device=model.device,
        dtype=model.dtype,
        target_embedding=model.embedding,
        target_lm_head=model.head,
    )
    capture = store.layers
    answers = []
    records = [record for record in store.records if wanted is None or record.id in wanted]
    for record in track(records, description="replaying drafters"):
        answer = replay(store.read(record), eagle3, dflash, capture, eagle_steps)
        if answer is not None:
            answers.append(answer)
    if not answers:
        raise ConfigError("no answer is long enough to evaluate: raise max_new_tokens or use other prompts")
    return answers


def entropies(answer: Replay, target: LoadedTarget) -> torch.Tensor:
    """The target's entropy in nats at the start of every possible round: [P] fp32."""
    head = target.model.head
    log = F.linear(answer.final.to(head.dtype), head).float().log_softmax(-1)
    return -(log.exp() * log).sum(-1)


def entropy_choices(answer: Replay, target: LoadedTarget, tau: float) -> dict[int, str]:
    """The published entropy rule without dwell: DFlash up to `tau` nats, EAGLE-3 above."""
    eagle3, dflash = ARMS
    values = entropies(answer, target).tolist()
    return {position: eagle3 if value > tau else dflash for position, value in enumerate(values)}


def _capture_union(eagle3: Path, dflash: Path) -> list[int]:
    from whiflash_sglang.models.dflash import DFlashConfig
    from whiflash_sglang.models.eagle3 import Eagle3Config

    layers = {*Eagle3Config.read(eagle3).target_layer_ids, *DFlashConfig.read(dflash).target_layer_ids}
    return sorted(layers)


def figures_table(result: Mapping[str, Any]) -> Table:
    """The result for a terminal."""
    names = list(result["overall"]["acceptance_length"])
    table = Table(title=f"acceptance length, {result['bundle']}, {result['prompts']} prompts")
    table.add_column("category")
    for name in names:
        table.add_column(name, justify="right")
    for arm in ARMS:
        table.add_column(f"{arm} better", justify="right")
    groups = [*result["categories"].items(), ("overall", result["overall"]), (LOOP, result[LOOP])]
    for category, figures in groups:
        if figures is None:
            continue
        lengths = [f"{figures['acceptance_length'][name]:.2f}" for name in names]
        shares = [f"{figures['rounds_won'][arm]:.0%}" for arm in ARMS]
        table.add_row(category, *lengths, *shares)
    return table


def write_picture(result: Mapping[str, Any], path: Path) -> None:
    """Grouped bars of the acceptance lengths."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    categories: Sequence[str] = [*result["categories"], "overall"]
    names = [name for name in result["overall"]["acceptance_length"] if name != ORACLE]
    figure, axes = pyplot.subplots(figsize=(1.4 * len(categories) + 2, 4))
    width = 0.8 / len(names)
    for index, name in enumerate(names):
        values = [
            {**result["categories"], "overall": result["overall"]}[c]["acceptance_length"][name]
            for c in categories
        ]
        axes.bar([place + index * width for place in range(len(categories))], values, width, label=name)
    for place, category in enumerate(categories):
        group = {**result["categories"], "overall": result["overall"]}[category]
        level = group["acceptance_length"][ORACLE]
        axes.hlines(level, place - width / 2, place + 0.8 - width / 2, colors="black", linestyles="dotted")
    axes.set_xticks([place + 0.4 - width / 2 for place in range(len(categories))], categories)
    axes.set_ylabel("tokens per round (dotted: oracle)")
    axes.set_ylim(bottom=1)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def write_json(result: Mapping[str, Any], path: Path) -> None:
    """Write the result, complete or not at all."""
    staged = path.with_suffix(".partial")
    staged.write_text(json.dumps(result, indent=1) + "\n")
    staged.replace(path)
