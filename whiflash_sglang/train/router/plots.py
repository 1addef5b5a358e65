"""Pictures of routers: how well ΔAL is predicted, and what every threshold is worth."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from whiflash_sglang.train.router.regression import Bin


def plot_calibration(bins: Sequence[Bin], path: Path) -> None:
    """Predicted against measured ΔAL, the mean of each tenth of the predictions."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(4, 4))
    axes.plot([part.predicted for part in bins], [part.measured for part in bins], "o-")
    axes.axline((0, 0), slope=1, linestyle="dotted", color="black")
    axes.set_xlabel("predicted ΔAL (EAGLE-3 - DFlash)")
    axes.set_ylabel("measured ΔAL")
    _save(figure, path)


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
    pyplot = _pyplot()
    figure, rows = pyplot.subplots(1, len(curves), figsize=(5 * len(curves), 4), sharey=True, squeeze=False)
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
    _save(figure, path)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    staged = path.with_name(f".{path.name}")
    figure.savefig(staged, dpi=120, format=path.suffix.lstrip(".") or "png")
    staged.replace(path)
    _pyplot().close(figure)
