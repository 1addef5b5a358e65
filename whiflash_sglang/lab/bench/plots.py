"""The report as pictures. Needs no server."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from whiflash_sglang.lab.bench.arms import NONE
from whiflash_sglang.lab.bench.report import LoadReport, Report
from whiflash_sglang.lab.bench.scaling import SHORT, ScalePoint
from whiflash_sglang.lab.bench.selection import OVERALL


def draw(report: Report, directory: Path) -> list[Path]:
    """Write the pictures that the report has figures for; returns their files."""
    import matplotlib

    matplotlib.use("Agg")
    directory.mkdir(parents=True, exist_ok=True)
    written = []
    for load in report.loads:
        if load.load.is_alone:
            written.append(_save(_speedups(load), directory / "speedup.svg"))
            written.append(_save(_acceptance(load), directory / "acceptance.svg"))
            rounds = _rounds(load)
            if rounds is not None:
                written.append(_save(rounds, directory / "round.svg"))
    if len(closed_loads(report)) > 1:
        written.append(_save(_concurrency(report), directory / "concurrency.svg"))
    if report.scaling:
        written.append(_save(_scaling(report.scaling), directory / "scaling.svg"))
    return written


def closed_loads(report: Report) -> list[LoadReport]:
    """Closed loops by concurrency."""
    return sorted((x for x in report.loads if x.load.kind == "closed"), key=lambda x: x.load.value)


def _save(figure: Any, path: Path) -> Path:
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    from matplotlib import pyplot

    pyplot.close(figure)
    return path


def _axes(names: Sequence[str]) -> tuple[Any, Any]:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(max(6.0, 1.5 * len(names) + 2), 4))
    return figure, axes


def _speedups(load: LoadReport) -> Any:
    names = list(dict.fromkeys(name for ratios in load.ratios.values() for name in ratios.none))
    figure, axes = _axes(names)
    width = 0.8 / max(len(load.ratios), 1)
    for index, (arm, ratios) in enumerate(load.ratios.items()):
        present = [(place, ratios.none[name]) for place, name in enumerate(names) if name in ratios.none]
        places = [place + (index + 0.5) * width - 0.4 for place, _ in present]
        heights = [interval.ratio for _, interval in present]
        # An interval of few repetitions may lie beside its ratio; an error bar cannot.
        below = [max(0.0, interval.ratio - interval.low) for _, interval in present]
        above = [max(0.0, interval.high - interval.ratio) for _, interval in present]
        axes.bar(places, heights, width, yerr=(below, above), label=arm, error_kw={"linewidth": 0.8})
    axes.axhline(1, color="black", linewidth=0.8, linestyle="dotted")
    axes.set_xticks(range(len(names)), names)
    axes.set_ylabel("output tokens/s over plain decoding")
    axes.legend(fontsize="small", ncols=2)
    return figure


def _acceptance(load: LoadReport) -> Any:
    names = list(dict.fromkeys(name for groups in load.arms.values() for name in groups))
    figure, axes = _axes(names)
    arms = {arm: groups for arm, groups in load.arms.items() if arm != NONE}
    width = 0.8 / max(len(arms), 1)
    for index, (arm, groups) in enumerate(arms.items()):
        present = [(place, groups[name]) for place, name in enumerate(names) if name in groups]
        places = [place + (index + 0.5) * width - 0.4 for place, _ in present]
        axes.bar(places, [figures.acceptance_length for _, figures in present], width, label=arm)
    axes.set_ylim(bottom=1)
    axes.set_xticks(range(len(names)), names)
    axes.set_ylabel("tokens per target forward")
    axes.legend(fontsize="small", ncols=2)
    return figure


def _rounds(load: LoadReport) -> Any:
    rounds = {arm: groups[OVERALL].round_ms for arm, groups in load.arms.items() if OVERALL in groups}
    breakdowns = {arm: found.model_dump() for arm, found in rounds.items() if found is not None}
    if not breakdowns:
        return None
    figure, axes = _axes(list(breakdowns))
    bottoms = [0.0] * len(breakdowns)
    for stage in next(iter(breakdowns.values())):
        heights = [max(0.0, breakdown[stage]) for breakdown in breakdowns.values()]
        axes.bar(list(breakdowns), heights, 0.6, bottom=bottoms, label=stage.replace("_", "-"))
        bottoms = [below + height for below, height in zip(bottoms, heights, strict=True)]
    axes.set_ylabel("ms of a round")
    axes.legend(fontsize="small")
    return figure


def _concurrency(report: Report) -> Any:
    loads = closed_loads(report)
    figure, axes = _axes([load.load.label for load in loads])
    for arm in loads[0].arms:
        points = [
            (load.load.value, load.arms[arm][OVERALL].output_tokens_per_s)
            for load in loads
            if OVERALL in load.arms.get(arm, {})
        ]
        axes.plot([x for x, _ in points], [y for _, y in points], marker="o", label=arm)
    axes.set_xlabel("requests in flight")
    axes.set_ylabel("output tokens/s")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize="small")
    return figure


def _scaling(points: Sequence[ScalePoint]) -> Any:
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True)
    by_batch = [point for point in points if point.context == SHORT]
    by_context = sorted((point for point in points if point.batch == 1), key=lambda point: point.context)
    for axes, chosen, name in ((panels[0], by_batch, "batch"), (panels[1], by_context, "context")):
        places = [getattr(point, name) for point in chosen]
        axes.plot(places, [point.round_ms.total for point in chosen], marker="o", label="round")
        axes.plot(places, [point.round_ms.draft for point in chosen], marker="o", label="draft")
        axes.plot(
            places,
            [point.round_ms.overhead for point in chosen],
            marker="o",
            label="neither draft nor verify",
        )
        axes.set_xlabel("requests in the batch" if name == "batch" else "tokens of the prompt")
        axes.set_ylim(bottom=0)
    panels[0].set_ylabel("ms of a round")
    panels[0].legend(fontsize="small")
    return figure
