"""Renders a report as a Markdown page. Needs no server."""

import shlex
from collections.abc import Iterable, Mapping, Sequence
from itertools import compress, pairwise, takewhile
from typing import Any

from whiflash_lab.bench.arms import NONE
from whiflash_lab.bench.cells import RoundMs, Turn
from whiflash_lab.bench.report import LOOPS, OVERALL, BenchReport, Figures, LoadReport, Ratios, name_of
from whiflash_sglang.files.equality import Verdict
from whiflash_sglang.telemetry.statistics import Interval, Percentiles


def render(report: BenchReport) -> str:
    """Return the page: for each load an overview of arms, rates by category; then rounds, differences, provenance."""
    parts = ["# Benchmark", _setting(report)]
    for load in report.loads:
        parts += [
            f"## Closed loop, concurrency {load.load.value}",
            _overview(load, report.over, report.base),
            _jobs(load, report.provenance["servers"]),
            _turns(load),
        ]
        if load.load.is_alone:
            parts += [_by_category(load, name_of(report.base)), _over(report, load)]
    lacking = "".join(f"\n- {arm}: {reason}" for arm, reason in report.unavailable.items())
    lacking += f"\n- The run {ended}" if (ended := report.provenance.get("ended")) else ""
    lacking = lacking and f"## Not available\n{lacking}"
    parts += [_rounds(report), _differences(report), lacking, _reproduce(report)]
    return "\n\n".join(section for section in parts if section) + "\n"


def _setting(report: BenchReport) -> str:
    p = report.provenance
    prompts = ", ".join(f"{count} {name}" for name, count in report.categories.items())
    renewed = p["interleaved"] and report.base == NONE
    several = f"{p['repetitions']} repetitions" + (", new servers for each" if renewed else "")
    repetitions = "1 repetition" if p["repetitions"] == 1 else several
    order = "interleaved" if p["interleaved"] else "one arm after the other"
    plain, counted = "whose plain answer", "as mismatches or ties, in no rate"
    machine = f"{p['hardware']['cpu']}, {p['hardware']['cores']} cores"
    if report.base == NONE:
        machine += f", {p['threads']} threads a server, {p['dtype']}, SGLang {p['packages']['sglang']}, "
        machine += f"torch {p['packages']['torch']}"
    else:
        plain, counted = f"to which the first answer of {report.base}", "in no rate"
        machine = f"Servers that ran already, asked from {machine}"
    return (
        f"{_origin(p)}. {machine}. {repetitions}, {order}. "
        f"Prompts: {prompts}; answers of at most {p['max_tokens']} tokens. Load of the machine before "
        f"{p['busy_before']['load_1min']:.1f}, after {p['busy_after']['load_1min']:.1f}."
        f"{_asked_with(p)}\n\n"
        "Rates include prefill and are medians of a prompt's repetitions. Brackets: 95 % paired bootstrap intervals. "
        f"*loops*: prompts {plain} ends in a repetition loop. They count {counted}. "
        "Acceptance length: tokens per target forward."
    )


def _origin(provenance: Mapping[str, Any]) -> str:
    """Return the model, this project's revision and the day of a run, as text."""
    words = [part for word in provenance["command"] for part in word.split("=", 1)]
    own = dict(pairwise(words)).get("--model-path", "SmolLM2-135M-Instruct, the embedded model")
    model = next((server["model"] for server in provenance["servers"].values() if "model" in server), own)
    changes = " with uncommitted changes" * provenance.get("uncommitted_changes", False)
    revision = f"revision {short}{changes}" if (short := provenance.get("revision", "")[:8]) else ""
    return ", ".join(filter(None, (model, revision, provenance.get("date"))))


def _asked_with(provenance: Mapping[str, Any]) -> str:
    """Return sentences on sampling, on recorded text and on prompts left out; empty without them."""
    ways = (", ".join(f"{name} {value:g}" for name, value in way.items()) for way in provenance["sampling"])
    sampled = " or ".join(ways)
    sentences = f" Sampled with {sampled}, a seed a prompt." if sampled else ""
    what = "prompts, which the server did not take"
    if recorded := provenance.get("recorded"):
        sentences += f" Forced along the recorded text of {', '.join(recorded)}."
        if longest := provenance.get("longest_wait"):
            sentences += f" Tools take the time that was recorded, at most {longest:g} s; rates include it."
        what = "answers of conversations, which had no room"
    cached = ", ".join(name for name, server in provenance["servers"].items() if not server.get("salted", True))
    sentences += f" Prompts may have been in the prefix cache of {cached}." if cached else ""
    left_out = len(provenance.get("left_out", ()))
    return sentences + (f" Left out: {left_out} {what}." if left_out else "")


def _overview(load: LoadReport, over: str | None, base: str = NONE) -> str:
    """Return a table with a row per arm, without columns that no arm fills. The JSON has more figures."""
    differing = "mismatches" if base == NONE else "texts that differ"
    base = base if base in load.arms else next(arm for arm in load.arms if arm not in load.ratios)
    header = ["arm", "tokens/s", f"over {base}", f"over `{over}`", "over faster static", "acceptance length"]
    header += ["answer s p50/p95", "TTFT ms p50/p95", "TPOT ms p50/p95", "switches/100", differing]
    rows = []
    for arm, groups in load.arms.items():
        figures = groups.get(OVERALL)
        if figures is None:
            continue
        ratios = load.ratios.get(arm, Ratios(none={}, static={}, static_arm={}))
        counted = [groups[name].mismatches for name in (OVERALL, LOOPS) if name in groups]
        row = (
            arm,
            _number(figures.output_tokens_per_s),
            *(_interval(by.get(OVERALL)) for by in (ratios.none, ratios.over, ratios.static)),
            _number(figures.acceptance_length, 2),
            _percentiles(figures.answer_ms, 2, 1000),
            _percentiles(figures.ttft_ms, 0),
            _percentiles(figures.tpot_ms, 1),
            _number(figures.switches_per_100_tokens),
            "" if None in counted else str(sum(filter(None, counted))),
        )
        rows.append(row)
    filled = [any(row[column] for row in rows) for column in range(len(header))]
    return table(list(compress(header, filled)), [tuple(compress(row, filled)) for row in rows])


def _jobs(load: LoadReport, servers: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a table of the times, cached tokens and evictions of recorded agents' jobs, a row per arm."""
    header = ["arm", "seconds a job p50/p95", f"faster than {NONE}", "first token ms p50/p95", "cached"]
    header += ["computed again", "evicted", "retracted", "KV pool"]
    rows = []
    for arm, jobs in load.jobs.items():
        counts = (jobs.again, jobs.evicted, jobs.retracted, servers.get(arm, {}).get("max_total_num_tokens"))
        row = (
            arm,
            _percentiles(jobs.ms, 1, 1000),
            _interval(jobs.faster),
            _percentiles(jobs.ttft_ms, 0),
            f"{jobs.cached / jobs.prompt:.1%} of {jobs.prompt:,}",
            *("" if count is None else f"{count:,}" for count in counts),
        )
        rows.append(row)
    return f"### Jobs\n\n{table(header, rows)}" if rows else ""


def _turns(load: LoadReport) -> str:
    """Return a table of recorded conversations' turns: the first, every tenth, the last, and all together."""
    rows = []
    last = max(map(len, load.turns.values()), default=0)
    for number in sorted({1, *range(10, last, 10), last}) if last > 1 else ():
        rows += [_turn(number, arm, turns[number - 1 : number]) for arm, turns in load.turns.items()]
    rows += [_turn("all", arm, turns) for arm, turns in load.turns.items() if last > 1]
    header = ("turn", "arm", "prompt", "cached", "first token ms", "tokens/s", "tokens/s after the first")
    return f"### Turns\n\n{table(header, rows)}" if rows else ""


def _turn(name: object, arm: str, turns: Sequence[Turn]) -> tuple[str, ...]:
    """Return a table's row for several turns: sums of their tokens, mean time to the first token, and rates."""
    prompt, cached, tokens, ttft, seconds, _ = (
        sum(getattr(turn, field) for turn in turns) for field in Turn.model_fields
    )
    rates = tokens / seconds, (tokens - len(turns)) / (seconds - ttft) if seconds > ttft else None
    first = 1000 * ttft / len(turns)
    return str(name), arm, f"{prompt:,.0f}", f"{cached:,.0f}", f"{first:.0f}", *map(_number, rates)


def _by_category(load: LoadReport, base: str) -> str:
    """Return a table of speed-up and acceptance length by category, if there are several."""
    names = _categories(load)
    if len(names) < 2:
        return ""
    rows = []
    for arm, ratios in load.ratios.items():
        groups = load.arms[arm]
        pairs = [
            (_interval(ratios.none[name]), _number(groups[name].acceptance_length, 2)) if name in ratios.none else ()
            for name in names
        ]
        rows.append((arm, *("; ".join(filter(None, pair)) for pair in pairs)))
    title = f"### Speed-up over {base}; acceptance length"
    return f"{title}\n\n{table(('arm', *names), rows)}" if rows else ""


def _over(report: BenchReport, load: LoadReport) -> str:
    compared = {arm: ratios.over for arm, ratios in load.ratios.items() if ratios.over}
    names = [name for name in _categories(load) if any(name in own for own in compared.values())]
    if len(names) < 2:
        return ""
    rows = [(arm, *(_interval(own.get(name)) for name in names)) for arm, own in compared.items()]
    return f"### Output tokens per second, over `{report.over}`\n\n{table(('arm', *names), rows)}"


def _rounds(report: BenchReport) -> str:
    rows, kept = [], []
    for load in report.loads:
        for arm, groups in load.arms.items():
            figures: Figures | None = groups.get(OVERALL)
            if figures is None or figures.round_ms is None or figures.switch_share is None:
                continue
            times = figures.round_ms
            shares = [f"{value:.2f}" for value in (*times.model_dump().values(), times.total)]
            rows.append((arm, load.load.label, *shares, f"{100 * figures.switch_share:.1f} %"))
            if arm == "pinned-none":
                share = 100 * (times.catch_up + times.park) / times.total
                kept.append(f"{share:.1f} % ({load.load.label})")
    if not rows:
        return ""
    stages = (name.replace("_", "-") for name in RoundMs.model_fields)
    page = "## A round, in ms\n\n" + table(("arm", "load", *stages, "round", "switching"), rows)
    if kept:
        page += f"\n\nShare of a round that keeps both drafters' KV while `none` decodes: {', '.join(kept)}."
    return page


def _differences(report: BenchReport) -> str:
    """Return a section that lists mismatches and counts ties. The JSON lists both."""
    if report.provenance.get("recorded"):
        return "Every answer is the recorded one, token for token."
    sampled = "" if report.provenance["compared"] else "Sampled answers were not compared. "
    if not report.differences:
        counted = any(OVERALL in of and of[OVERALL].mismatches is not None for of in report.arms.values())
        which = "greedy answer" if sampled else "answer"
        by = "token for token" if report.base == NONE else "character for character"
        equal = f"Every {which} of every arm equals {name_of(report.base)}'s, {by}." if counted else ""
        return f"{sampled}{equal}".strip()
    ties = [d for d in report.differences if d["verdict"] == Verdict.TIE]
    base = name_of(report.base)
    parts = [f"## Answers that differ from {base}'s", *filter(None, [sampled.strip()])]
    if ties:
        gap = max(d["gap"] for d in ties)
        apart = f"Plain decoding's two best logits are at most {gap:.4f} apart there."
        parts += [f"Ties: {len(ties)}, listed in the JSON. {apart}"]
    others = [d for d in report.differences if d["verdict"] != Verdict.TIE]
    own = [d for d in others if d.get("of_plain")]
    if own:
        parts += [f"Left out: {len(own)} that {base} at the same load has in the same place, in the JSON."]
    header = ["arm", "load", "mismatch", "first difference", "gap of plain decoding's two best logits"]
    mismatches = [
        [d["arm"], d["load"], d["prompt"], str(d["position"]), _number(d["gap"], 4)] for d in others if d not in own
    ]
    if report.base != NONE:
        parts += ["Whether rounding is the cause is not known: servers give no logits."]
        header = [*header[:2], "prompt", "first other character"]
    if mismatches:
        parts += [table(header, [row[: len(header)] for row in mismatches])]
    return "\n\n".join(parts)


def _reproduce(report: BenchReport) -> str:
    """Return a section with the command, the arguments that all servers share, and each arm's own."""
    servers = report.provenance["servers"]
    lines = ["## How to reproduce", "", f"`{shlex.join(report.provenance['command'])}`", ""]
    if report.base != NONE:
        told = {
            arm: ", ".join(f"{key} {value}" for key, value in of.items() if value not in (None, True, False))
            for arm, of in servers.items()
        }
        return "\n".join([*lines, *(f"- {arm}: {facts}" for arm, facts in told.items())])
    variables = {
        arm: " ".join(f"{name}={shlex.quote(value)}" for name, value in server["environment"].items())
        for arm, server in servers.items()
    }
    first = next(iter(variables.values()), "")
    columns = zip(*(server["arguments"] for server in servers.values()), strict=False)
    shared = [column[0] for column in takewhile(lambda column: len(set(column)) == 1, columns)]
    while shared and shared[-1].startswith("--"):
        shared.pop()  # a flag whose value differs between arms
    backends = ", ".join(dict.fromkeys(server["attention_backend"] for server in servers.values()))
    lines += [f"Every server (attention backend {backends}):", ""]
    lines += [f"`{first} python -m sglang.launch_server {shlex.join(shared)}`", "", "Each arm adds:", ""]
    for arm, server in servers.items():
        further = shlex.join(server["arguments"][len(shared) :])
        own = [*([variables[arm]] if variables[arm] != first else []), *filter(None, [further])]
        lines.append(f"- {arm}: `{' '.join(own)}`" if own else f"- {arm}: nothing")
    return "\n".join(lines)


def _categories(load: LoadReport) -> list[str]:
    """Return the categories of prompts whose answers do not loop."""
    names = dict.fromkeys(name for groups in load.arms.values() for name in groups)
    return [name for name in names if name not in (OVERALL, LOOPS)]


def _interval(interval: Interval | None) -> str:
    """Return a ratio with its interval, which is left out if it has no width: then it has a single measurement."""
    if interval is None:
        return ""
    width = f" [{interval.low:.2f}, {interval.high:.2f}]" if interval.low < interval.high else ""
    return f"{interval.ratio:.2f}{width}"


def _percentiles(values: Percentiles | None, digits: int, unit: int = 1) -> str:
    return "/".join(f"{v / unit:.{digits}f}" for v in (values.p50, values.p95)) if values else ""


def _number(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table; the first column is text, the others are figures."""
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, ["---"] + ["---:"] * (len(header) - 1), *rows])
