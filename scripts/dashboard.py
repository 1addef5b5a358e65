"""Writes the Grafana dashboard: `python scripts/dashboard.py`. Imports nothing but the standard library.

What Grafana needs beside a `Panel` of `ROWS` (places, ids, data source) is the same for all. Every query is run in
`tests/telemetry/test_server_metrics.py` against a Prometheus that has scraped a server under load.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

TARGET = Path(__file__).parents[1] / "deploy" / "grafana" / "whiflash.json"
SELECTOR = 'model_name=~"$model",instance=~"$instance"'
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
WIDTH, HEIGHT = 24, 8
"""Columns of Grafana's grid, and rows of a panel in it."""


@dataclass(frozen=True)
class Panel:
    """title, meaning: for the reader. unit: Grafana's name of it. queries: expression and legend of each.

    kind: how it is drawn; `stack` is a time series whose curves are stacked, `names` a value's legend in words.
    """

    title: str
    meaning: str
    unit: str
    queries: tuple[tuple[str, str], ...]
    kind: Literal["value", "names", "lines", "stack"] = "lines"
    width: int = 8


def whole(name: str, labels: str = "") -> str:
    """A series of ours, of the chosen models and servers."""
    return f"sglang:whiflash_{name}{{{SELECTOR}{',' + labels if labels else ''}}}"


def rate(name: str, *by: str, labels: str = "") -> str:
    """What a counter grows by in a second, summed up but for the labels `by`."""
    grouped = f" by ({', '.join(by)})" if by else ""
    return f"sum{grouped} (rate({whole(name, labels)}[$__rate_interval]))"


def ratio(above: str, below: str, *by: str) -> str:
    return f"{rate(above, *by)} / {rate(below, *by)}"


def quantile(of: str, name: str) -> str:
    return f"histogram_quantile({of}, {rate(name + '_bucket', 'le')})"


SPEED_UP = ratio("plain_decode_seconds_total", "decode_seconds_total")

ROWS: dict[str, tuple[Panel, ...]] = {
    "Does it pay?": (
        Panel(
            "Speed-up, estimated",
            "Seconds that plain decoding would have taken for the same tokens, by fitted costs, over the seconds that "
            "rounds took. Below 1 drafting costs more than it brings.",
            "none",
            ((SPEED_UP, "times"),),
            "value",
            6,
        ),
        Panel(
            "Tokens a second",
            "Committed by rounds; the first token of an answer is the prefill's and not among them.",
            "none",
            ((rate("tokens_total"), "tokens"),),
            "value",
            6,
        ),
        Panel(
            "Policy",
            "In force now. `none` is the kill switch.",
            "none",
            ((f"max by (policy) ({whole('policy')}) == 1", "{{policy}}"),),
            "names",
            6,
        ),
        Panel(
            "Version and bundle",
            "More than one where servers differ.",
            "none",
            ((f"max by (version, bundle) ({whole('info')})", "{{version}} {{bundle}}"),),
            "names",
            6,
        ),
        Panel(
            "Speed-up, by server",
            "As above. Servers of one model that differ serve other text, or run on other machines.",
            "none",
            (
                (
                    ratio(
                        "plain_decode_seconds_total",
                        "decode_seconds_total",
                        "instance",
                        "dp_rank",
                    ),
                    "{{instance}} {{dp_rank}}",
                ),
            ),
        ),
        Panel(
            "Tokens a second, by who drafted",
            "The bonus token of a round counts for its arm.",
            "none",
            ((rate("tokens_total", "arm"), "{{arm}}"),),
            "stack",
        ),
        Panel(
            "Requests",
            "Running and waiting, as SGLang counts them.",
            "none",
            (
                (f"sum (sglang:num_running_reqs{{{SELECTOR}}})", "running"),
                (f"sum (sglang:num_queue_reqs{{{SELECTOR}}})", "waiting"),
            ),
        ),
    ),
    "Who drafts, and how well": (
        Panel(
            "Rounds by arm",
            "Share of requests' rounds.",
            "percentunit",
            (
                (
                    f"{rate('rounds_total', 'arm')} / ignoring (arm) group_left () {rate('rounds_total')}",
                    "{{arm}}",
                ),
            ),
            "stack",
        ),
        Panel(
            "Drafts that were right",
            "Accepted over verified drafts. Near 0 for an arm that drafts a lot: its checkpoint is not this target's.",
            "percentunit",
            ((ratio("accepted_draft_tokens_total", "draft_tokens_total", "arm"), "{{arm}}"),),
        ),
        Panel(
            "Tokens a round",
            "Of the rounds of each arm, the bonus token among them; plain decoding has 1.",
            "none",
            ((ratio("tokens_total", "rounds_total", "arm"), "{{arm}}"),),
        ),
        Panel(
            "Tokens a round, of requests",
            "Of requests that ended. A median far above the usual is often text that repeats itself, one of 1 text "
            "that nobody could draft.",
            "none",
            tuple(
                (quantile(of, "request_acceptance_length"), name)
                for of, name in (("0.1", "10 % below"), ("0.5", "median"), ("0.9", "90 % below"))
            ),
        ),
        Panel(
            "Joined drafts",
            "Drafts that another arm put behind an arm's own, such as the copy that a chain leads into.",
            "none",
            (
                (rate("joined_draft_tokens_total"), "verified"),
                (rate("accepted_joined_draft_tokens_total"), "right"),
            ),
        ),
        Panel(
            "Drafts that were none",
            "With ids of no token, or NaN: damaged files, or a fault. Requests left out went on without the drafter; 1 "
            "says which drafter is quarantined, left out for everybody until it is tried again.",
            "none",
            (
                (rate("faulty_drafts_total", "arm"), "{{arm}}"),
                (rate("left_out_requests_total", "arm"), "requests left out: {{arm}}"),
                (
                    f"max by (arm, instance) ({whole('quarantined')})",
                    "quarantined: {{arm}} on {{instance}}",
                ),
            ),
        ),
        Panel(
            "Acceptance, as SGLang reports it",
            "Its own gauges, averages over --decode-log-interval steps.",
            "none",
            (
                (f"avg (sglang:spec_accept_length{{{SELECTOR}}})", "tokens a round"),
                (f"avg (sglang:spec_accept_rate{{{SELECTOR}}})", "share of drafts"),
            ),
        ),
    ),
    "Why": (
        Panel(
            "What decided",
            "Rounds by reason: the policy (score, policy), or the request's own hints (span, pin, off).",
            "none",
            ((rate("routes_total", "reason"), "{{reason}}"),),
            "stack",
        ),
        Panel(
            "Switches",
            "Share of rounds that another arm drafted than the request's round before.",
            "percentunit",
            ((ratio("switches_total", "rounds_total"), "switches"),),
        ),
        Panel(
            "Hints",
            "Requests that began, by where their hints come from.",
            "reqps",
            ((rate("requests_total", "hints"), "{{hints}}"),),
            "stack",
        ),
        Panel(
            "Drafters' version",
            "Version of the weights that serves, its gain when it was learned, and versions taken or refused.",
            "none",
            (
                (f"max by (instance) ({whole('drafter_version')})", "version on {{instance}}"),
                (f"max by (drafter) ({whole('drafter_gain')})", "gain of {{drafter}}"),
                (rate("drafter_swaps_total", "outcome"), "{{outcome}}"),
            ),
        ),
        Panel(
            "Samples for learning",
            "Finished requests by what became of their tokens (--whiflash-learn), and bytes of samples on disk.",
            "none",
            (
                (rate("learn_samples_total", "outcome"), "{{outcome}}"),
                (f"sum ({whole('learn_spool_bytes')})", "bytes"),
            ),
        ),
    ),
    "What it costs": (
        Panel(
            "Round",
            "Seconds of a round of the whole batch.",
            "s",
            tuple(
                (quantile(of, "round_seconds"), name)
                for of, name in (("0.5", "median"), ("0.99", "99 % below"))
            ),
        ),
        Panel(
            "Stages",
            "Seconds of each second; what is left of one is prefill, scheduling and waiting.",
            "percentunit",
            ((rate("stage_seconds_total", "stage"), "{{stage}}"),),
            "stack",
        ),
        Panel(
            "Fitted latencies",
            "What the policy reckons with.",
            "s",
            ((f"avg by (work, arm) ({whole('cost_seconds')})", "{{work}} {{arm}}"),),
        ),
        Panel(
            "Catching up",
            "Tokens that drafters ingested after others had drafted.",
            "none",
            ((rate("catch_up_tokens_total", "arm"), "{{arm}}"),),
        ),
        Panel(
            "Backlog",
            "Tokens of running requests that a drafter has yet to ingest.",
            "none",
            ((f"sum by (arm) ({whole('backlog_tokens')})", "{{arm}}"),),
        ),
        Panel(
            "Memory",
            "Beside the target and its cache.",
            "bytes",
            ((f"sum by (scope) ({whole('memory_bytes')})", "{{scope}}"),),
            "stack",
        ),
        Panel(
            "Prompts from the cache",
            "Prompt tokens whose KV was kept, by place.",
            "none",
            ((rate("cached_prompt_tokens_total", "place"), "{{place}}"),),
            "stack",
        ),
        Panel(
            "Acceptance length after a load",
            "Tokens a round of requests whose prompt came in part from the host or from storage.",
            "none",
            ((ratio("loaded_tokens_total", "loaded_rounds_total", "arm"), "{{arm}}"),),
        ),
    ),
}


def panel(given: Panel, number: int, x: int, y: int) -> dict[str, Any]:
    """A panel as Grafana has it."""
    custom = {"drawStyle": "line", "fillOpacity": 30 if given.kind == "stack" else 0, "showPoints": "never"}
    if given.kind == "stack":
        custom["stacking"] = {"mode": "normal", "group": "A"}
    value = given.kind in ("value", "names")
    options: dict[str, Any] = {"legend": {"displayMode": "list", "placement": "bottom"}}
    if value:
        options = {
            "textMode": "name" if given.kind == "names" else "value",
            "graphMode": "none",
            "reduceOptions": {"calcs": ["lastNotNull"], "values": False, "fields": ""},
        }
    return {
        "id": number,
        "type": "stat" if value else "timeseries",
        "title": given.title,
        "description": given.meaning,
        "datasource": SOURCE,
        "gridPos": {"h": HEIGHT // 2 if value else HEIGHT, "w": given.width, "x": x, "y": y},
        "fieldConfig": {
            "defaults": {
                "unit": given.unit,
                "decimals": 2,
                "min": 0,
                **({} if value else {"custom": custom}),
            },
            "overrides": [],
        },
        "options": options,
        "targets": [
            {
                "refId": chr(ord("A") + i),
                "datasource": SOURCE,
                "expr": expression,
                "legendFormat": legend,
                "range": not value,
                "instant": value,
            }
            for i, (expression, legend) in enumerate(given.queries)
        ],
    }


def laid_out() -> list[dict[str, Any]]:
    """All rows with their panels, from the left, and from the top."""
    found: list[dict[str, Any]] = []
    y = 0
    for title, panels in ROWS.items():
        found.append(
            {
                "id": len(found) + 1,
                "type": "row",
                "title": title,
                "collapsed": False,
                "gridPos": {"h": 1, "w": WIDTH, "x": 0, "y": y},
                "panels": [],
            }
        )
        x, y, tallest = 0, y + 1, 0
        for given in panels:
            if x + given.width > WIDTH:
                x, y, tallest = 0, y + tallest, 0
            found.append(panel(given, len(found) + 1, x, y))
            x, tallest = x + given.width, max(tallest, found[-1]["gridPos"]["h"])
        y += tallest
    return found


def variable(name: str, label: str) -> dict[str, Any]:
    """A choice of one or more values of a label of SGLang's."""
    query = f"label_values(sglang:whiflash_info, {label})"
    return {
        "name": name,
        "label": name,
        "type": "query",
        "datasource": SOURCE,
        "query": {"query": query, "refId": name},
        "refresh": 2,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
    }


def dashboard() -> dict[str, Any]:
    """The whole of it, as Grafana exports and imports dashboards."""
    source = {"name": "datasource", "label": "data source", "type": "datasource", "query": "prometheus"}
    return {
        "uid": "whiflash",
        "title": "WhiFlash for SGLang",
        "description": "Who drafts, whether it pays, and why. Needs servers that run with --enable-metrics.",
        "tags": ["sglang", "whiflash"],
        "schemaVersion": 38,
        "editable": True,
        "timezone": "browser",
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [source, variable("model", "model_name"), variable("instance", "instance")]},
        "panels": laid_out(),
    }


if __name__ == "__main__":
    TARGET.write_text(json.dumps(dashboard(), indent=1, ensure_ascii=False) + "\n", "utf-8")
