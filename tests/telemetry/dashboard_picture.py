"""The picture of the dashboard: `python tests/telemetry/dashboard_picture.py docs/pictures/dashboard.svg`.

The embedded model answers the tests' prompts, four at a time, under `auto`, then under `none`, then under `auto` again,
while a Prometheus scrapes it; then the dashboard's queries are asked and their answers drawn where its panels lie.
"""

import json
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

import matplotlib.pyplot as plt
import numpy as np
from prometheus_server import ROOT, Prometheus, prometheus
from server_host import Server, ServerHost

from whiflash_sglang.checkpoints.manifest import embedded_bundle
from whiflash_sglang.embedded import ensure_target

PHASES = (("auto", 80.0), ("none", 40.0), ("auto", 60.0))
"""Policies, and seconds under each."""

STEP, WINDOW = 2, "20s"
"""Seconds between two points of a curve, and what a rate is taken over."""


def serve(server: Server) -> None:
    """Prompts of all kinds, four at a time, for the seconds of `PHASES`."""
    lines = (ROOT / "tests" / "data" / "prompts.jsonl").read_text("utf-8").splitlines()
    messages = cycle([json.loads(line)["messages"] for line in lines])

    def ask(number: int, asked: Any, until: float) -> None:
        if time.monotonic() < until:
            body = {"model": "m", "messages": asked, "max_tokens": 96, "temperature": 0}
            if number % 6 == 5:
                body["custom_params"] = {"whiflash": '{"off": true}'}
            server.post("/v1/chat/completions", body)

    for router, seconds in PHASES:
        server.post("/whiflash/policy", {"router": router})
        until = time.monotonic() + seconds
        with ThreadPoolExecutor(4) as pool:
            waiting = [pool.submit(ask, n, next(messages), until) for n in range(2000)]
            for one in waiting:
                one.result()


def draw(watching: Prometheus, began: float, ended: float, pictures: list[Path]) -> None:
    """Every panel at its place."""
    dashboard = json.loads((ROOT / "deploy" / "grafana" / "whiflash.json").read_text("utf-8"))
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    rows = [panel for panel in dashboard["panels"] if panel["type"] == "row"]
    height = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels)
    plt.switch_backend("agg")
    plt.rcParams |= {
        "font.size": 6.5,
        "svg.fonttype": "none",
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    figure = plt.figure(figsize=(11, height * 0.24))

    def box(place: dict[str, int]) -> tuple[float, float, float, float]:
        top = 1 - place["y"] / height
        return place["x"] / 24, top - place["h"] / height, place["w"] / 24, place["h"] / height

    for row in rows:
        x, y, _, h = box(row["gridPos"])
        figure.text(x + 0.005, y + h / 4, row["title"], weight="bold", size=9)
    for panel in panels:
        x, y, w, h = box(panel["gridPos"])
        figure.text(x + 0.01, y + h - 0.12 / height * 8, panel["title"], size=7.5)
        if panel["type"] == "stat":
            figure.text(x + w / 2, y + h / 3, value(watching, panel, ended), size=14, ha="center")
            continue
        axes = figure.add_axes((x + 0.035, y + 0.18 * h, w - 0.045, 0.62 * h))
        curves = [curve for target in panel["targets"] for curve in asked(watching, target, began, ended)]
        stacked = "stacking" in panel["fieldConfig"]["defaults"]["custom"]
        if stacked and curves:
            points = curves[0][1]
            axes.stackplot(
                points, [np.nan_to_num(heights) for _, _, heights in curves], labels=[c[0] for c in curves]
            )
        else:
            for legend, points, heights in curves:
                axes.plot(points, heights, label=legend, linewidth=0.9)
        axes.set_ylim(bottom=0)
        axes.set_xlim(0, ended - began)
        axes.tick_params(length=2, pad=1)
        below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.1), "ncols": 6, "frameon": False}
        axes.legend(**below, fontsize=5, columnspacing=0.8, handlelength=1)
    for path in pictures:
        figure.savefig(path, dpi=110)


def expression(target: dict[str, Any]) -> str:
    replaced = target["expr"].replace("$__rate_interval", WINDOW)
    return str(replaced.replace("$model", ".*").replace("$instance", ".*"))


def named(target: dict[str, Any], labels: dict[str, str]) -> str:
    legend = str(target["legendFormat"])
    for label in (
        "arm",
        "work",
        "stage",
        "scope",
        "reason",
        "hints",
        "policy",
        "version",
        "bundle",
        "dp_rank",
    ):
        legend = legend.replace("{{" + label + "}}", labels.get(label, ""))
    return legend.replace("{{instance}}", "server").strip()


def value(watching: Prometheus, panel: dict[str, Any], at: float) -> str:
    target = panel["targets"][0]
    found = watching.ask("query", query=expression(target), time=at)["result"]
    if panel["options"]["textMode"] == "name":
        return ", ".join(named(target, one["metric"]) for one in found)
    return ", ".join(f"{float(one['value'][1]):.2f}" for one in found)


def asked(
    watching: Prometheus, target: dict[str, Any], began: float, ended: float
) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Legend, seconds and values of every curve, gaps as NaN."""
    found = watching.ask("query_range", query=expression(target), start=began, end=ended, step=STEP)["result"]
    times = np.arange(0, ended - began + STEP / 2, STEP)
    curves = []
    for one in found:
        heights = np.full(len(times), np.nan)
        for at, text in one["values"]:
            heights[min(round((at - began) / STEP), len(times) - 1)] = float(text)
        curves.append((named(target, one["metric"]), times, heights))
    return curves


def main(pictures: list[Path]) -> None:
    arguments = [
        *("--model-path", str(ensure_target()), "--dtype", "bfloat16", "--enable-metrics"),
        *("--speculative-algorithm", "WHIFLASH", "--speculative-draft-model-path", str(embedded_bundle())),
        *("--served-model-name", "m"),
    ]
    with (
        ServerHost() as host,
        host.running(*arguments, threads=2) as server,
        tempfile.TemporaryDirectory() as kept,
    ):
        address = server.url.removeprefix("http://")
        with prometheus(Path(kept), [address]) as watching:
            began = time.time()
            serve(server)
            draw(watching, began, time.time(), pictures)


if __name__ == "__main__":
    main([Path(path) for path in sys.argv[1:]])
