"""Readings as tables of a terminal."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from whiflash_sdk.render.aligned import printable

_COLOURS = {
    "ar": "blue",
    "diffusion": "yellow",
    "lookup": "green",
    "structure": "cyan",
    "none": "bright_black",
}


def screen(records: Sequence[Mapping[str, Any]]) -> RenderableType:
    """All servers as `Watch.look` found them, one below the other."""
    return Group(*map(_server, records))


def _server(found: Mapping[str, Any]) -> RenderableType:
    if "error" in found:
        return Panel(
            Text(printable(found["error"])),
            title=_plain(found["url"]),
            border_style="red",
            title_align="left",
        )
    state, now, total = found["state"], found["now"] or {}, found["total"]
    title = f"[bold]{_plain(found['model'])}[/] {_plain(found['url'])}"
    lines: list[RenderableType] = [_headline(state, now, total)]
    if "arms" in total:
        lines += ["", _arms(state, now, total), ""]
    facts = Table.grid(padding=(0, 1))
    facts.add_column(style="dim", width=8)
    for name, words in _facts(state, total):
        facts.add_row(name, Text(printable(words)))
    lines.append(facts)
    return Panel(Group(*lines), title=title, title_align="left")


def _headline(state: Mapping[str, Any], now: Mapping[str, Any], total: Mapping[str, Any]) -> RenderableType:
    table = Table(box=None, padding=(0, 3, 0, 0), header_style="dim")
    cells = {
        "policy": str(state.get("policy", "")),
        "running": str(state.get("requests", "")),
        "tokens a second": _both(now, total, "tokens_per_second", "{:.1f}"),
        "tokens a round": _both(now, total, "acceptance_length", "{:.2f}"),
        "gain": _both(now, total, "gain", "{:.2f}×"),
        "switches a second": _both(now, total, "switches_per_second", "{:.1f}"),
        "tokens": f"{state.get('tokens', 0):,}",
    }
    for name in cells:
        table.add_column(name)
    table.add_row(*map(_plain, cells.values()))
    return table


def _arms(state: Mapping[str, Any], now: Mapping[str, Any], total: Mapping[str, Any]) -> RenderableType:
    table = Table(box=None, padding=(0, 3, 0, 0), header_style="dim")
    for name in ("drafter", "share", "", "tokens a round", "drafts accepted", "a draft costs"):
        table.add_column(name, justify="left" if name in ("drafter", "") else "right")
    lately, drafts = now.get("arms") or {}, (state.get("costs") or {}).get("draft") or {}
    for arm, always in sorted(total["arms"].items(), key=lambda entry: -(entry[1]["share"] or 0)):
        recent = lately.get(arm) or {}
        share = recent.get("share") if recent.get("share") is not None else always["share"]
        colour = _COLOURS.get(arm, "magenta")
        table.add_row(
            Text(printable(arm), style=colour),
            _both(recent, always, "share", "{:.0%}"),
            Text("█" * round(20 * (share or 0)), style=colour),
            _both(recent, always, "acceptance_length", "{:.2f}"),
            _both(recent, always, "drafts_accepted", "{:.0%}"),
            _milliseconds(drafts[arm]) if drafts.get(arm) else "",
        )
    return table


def _facts(state: Mapping[str, Any], total: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if out := state.get("quarantined"):
        yield "out", " · ".join(f"{arm} is quarantined: {reason}" for arm, reason in sorted(out.items()))
    reasons = {reason: share for reason, share in (total.get("reasons") or {}).items() if share}
    if reasons:
        ordered = sorted(reasons.items(), key=lambda entry: -entry[1])
        yield "reasons", " · ".join(f"{reason} {share:.0%}" for reason, share in ordered)
    costs = state.get("costs") or {}
    named = {
        "verify": "a plain round of one request",
        "verify_draft": "one more draft verified",
        "verify_request": "one more request",
        "between": "between rounds",
    }
    told = [f"{_milliseconds(costs[name])} {meaning}" for name, meaning in named.items() if costs.get(name)]
    if told:
        yield "costs", " · ".join(told)
    if memory := state.get("memory"):
        held = sorted(memory.items(), key=lambda entry: -entry[1])
        yield "memory", " · ".join(f"{scope.replace('_', ' ')} {_bytes(size)}" for scope, size in held)
    if replicas := state.get("replicas"):
        parts = (f"{one['replica']}: {one['requests']} running, {one['tokens']} tokens" for one in replicas)
        yield "replicas", " · ".join(parts)


def _both(now: Mapping[str, Any], total: Mapping[str, Any], name: str, form: str) -> str:
    """What was last, and in brackets what was in all."""
    lately, always = now.get(name), total.get(name)
    if always is None:
        return "–"
    return f"{'–' if lately is None else form.format(lately)} ({form.format(always)})"


def _plain(text: str) -> str:
    """What a server says, as text: neither markup nor a terminal's commands."""
    return escape(printable(text))


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.2f} ms"


def _bytes(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
