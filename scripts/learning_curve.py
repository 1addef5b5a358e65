"""Draw results/learning-curve.svg from results/learning-curve.json: what each version of the embedded pair accepts.

You add a version's line from `whiflash evaluate`'s figures for it; the picture is drawn from the lines.
"""

import json
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, NullFormatter

RESULTS = Path(__file__).parents[1] / "results"
LINES = {"oracle": "better of two in hindsight", "eagle3": "EAGLE-3", "dflash": "block drafter"}
"""Key of a version → what it is called; each in the order of its line from above."""


def main() -> None:
    """Write the picture."""
    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "whiflash"  # the same file from the same figures
    versions = json.loads((RESULTS / "learning-curve.json").read_text())["versions"]
    tokens = [version["answer_tokens"] for version in versions]
    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    for (key, name), style in zip(LINES.items(), ("--", "-", "-"), strict=True):
        axes.plot(tokens, [version[key] for version in versions], style, marker="o", label=name)
    for version in versions:
        axes.annotate(
            version["block"],
            (version["answer_tokens"], version["dflash"]),
            xytext=(0, -18),
            textcoords="offset points",
            ha="center",
            fontsize=8,
        )
    axes.set(
        xscale="log", xlabel="answer tokens trained on", ylabel="acceptance length, bonus token included"
    )
    axes.set_xticks(tokens)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1e6:.2f} M"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(x=0.12, y=0.15)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(RESULTS / "learning-curve.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
