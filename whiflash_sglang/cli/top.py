"""`whiflash top`: reads servers' states over HTTP and shows the rates between two readings as tables."""

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from whiflash_sdk.render.aligned import printable
from whiflash_sdk.render.text import COLOURS, OTHER

from whiflash_sglang.errors import ServerRefusedError
from whiflash_sglang.files.hosts import ServedModel, ServerState, ask, replicas_of, without_password


def screen(records: Sequence[Mapping[str, Any]]) -> RenderableType:
    """Return a panel for each record of `LiveView.look`, one below the other."""
    return Group(*map(_server, records))


def _server(record: Mapping[str, Any]) -> RenderableType:
    if "error" in record:
        return Panel(
            Text(printable(record["error"])), title=_plain(record["url"]), border_style="red", title_align="left"
        )
    state, now, total = record["state"], record["now"] or {}, record["total"]
    title = f"[bold]{_plain(record['model'])}[/] {_plain(record['url'])}"
    lines: list[RenderableType] = [_headline(state, now, total)]
    if "arms" in total:
        lines += ["", _arms(state, now, total), ""]
    facts = Table.grid(padding=(0, 1))
    facts.add_column(style="dim", width=8)
    for name, words in _facts(state, now, total):
        facts.add_row(name, Text(printable(words)))
    lines.append(facts)
    return Panel(Group(*lines), title=title, title_align="left")


def _headline(state: Mapping[str, Any], now: Mapping[str, Any], total: Mapping[str, Any]) -> RenderableType:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    cells = {
        "policy": str(state.get("policy", "")),
        "running": str(state.get("requests", "")),
        "tokens a second": _both(now, total, "tokens_per_second", "{:.1f}"),
        "tokens a round": _both(now, total, "acceptance_length", "{:.2f}"),
        "gain": _both(now, total, "gain", "{:.2f}×"),
        "tokens": f"{state.get('tokens', 0):,}",
    }
    for name in cells:
        table.add_column(name)
    table.add_row(*map(_plain, cells.values()))
    return table


def _arms(state: Mapping[str, Any], now: Mapping[str, Any], total: Mapping[str, Any]) -> RenderableType:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("drafter", "share", "", "tokens a round", "drafts accepted", "costs"):
        table.add_column(name, justify="left" if name in ("drafter", "") else "right")
    lately, drafts = now.get("arms") or {}, (state.get("costs") or {}).get("draft") or {}
    for arm, always in sorted(total["arms"].items(), key=lambda entry: -(entry[1]["share"] or 0)):
        recent = lately.get(arm) or {}
        share = recent.get("share") if recent.get("share") is not None else always["share"]
        colour = f"color({COLOURS.get(arm, OTHER)})"  # an index of the terminal's palette
        table.add_row(
            Text(printable(arm), style=colour),
            _both(recent, always, "share", "{:.0%}"),
            Text("█" * round(10 * (share or 0)), style=colour),
            _both(recent, always, "acceptance_length", "{:.2f}"),
            _both(recent, always, "drafts_accepted", "{:.0%}"),
            _milliseconds(drafts[arm]) if drafts.get(arm) else "",
        )
    return table


def _facts(state: Mapping[str, Any], now: Mapping[str, Any], total: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if total.get("gain") is None and (price := state.get("plain_price")):
        yield "gain", unknown(price)
    if (switches := _both(now, total, "switches_per_second", "{:.1f}")) != "–":
        yield "switches", f"{switches} a second"
    if out := state.get("quarantined"):
        yield "out", " · ".join(f"{arm} is quarantined: {reason}" for arm, reason in sorted(out.items()))
    reasons = {reason: share for reason, share in (total.get("reasons") or {}).items() if share}
    if reasons:
        ordered = sorted(reasons.items(), key=lambda entry: -entry[1])
        yield "reasons", " · ".join(f"{reason} {share:.0%}" for reason, share in ordered)
    costs = state.get("costs") or {}
    named = {
        "verify": "a plain round of one request",
        "verify_row": "one more row verified",
        "between": "between rounds",
    }
    priced = [f"{_milliseconds(costs[name])} {meaning}" for name, meaning in named.items() if costs.get(name)]
    if priced:
        yield "costs", " · ".join(priced)
    if memory := state.get("memory"):
        held = sorted(memory.items(), key=lambda entry: -entry[1])
        yield "memory", " · ".join(f"{scope.replace('_', ' ')} {_bytes(size)}" for scope, size in held)
    if replicas := state.get("replicas"):
        parts = (f"{own['replica']}: {own['requests']} running, {own['tokens']} tokens" for own in replicas)
        yield "replicas", " · ".join(parts)


def _both(now: Mapping[str, Any], total: Mapping[str, Any], name: str, form: str) -> str:
    """Return a figure's value in the last interval, and in brackets since the start."""
    lately, always = now.get(name), total.get(name)
    if always is None:
        return "–"
    return f"{'' if lately is None else form.format(lately)} ({form.format(always)})".lstrip()


def _plain(text: str) -> str:
    """Return a server's text without effect as markup or as a terminal's control characters."""
    return escape(printable(text))


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.2f} ms"


def _bytes(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


TIMEOUT = 5.0
"""Seconds until a server that does not answer counts as gone."""


@dataclass(frozen=True, slots=True)
class StateReading:
    """A server's state (`GET /whiflash/state`). at: time of the reading, in monotonic seconds."""

    at: float
    state: Mapping[str, Any]


class WatchedServer:
    """Reads one server. url: of its root, without a password. model: that it serves; empty before the first reading."""

    def __init__(self, url: str, client: httpx.Client) -> None:
        self.url = without_password(url)
        self.model = ""
        self._client, self._address = client, url

    def read(self) -> StateReading:
        """Read the server's state now. Raises: ServerRefusedError."""
        if not self.model:
            found = ask(self._client, self._address, "/whiflash/capabilities", ServedModel)
            self.model = str(found["model"])
        try:
            path = f"/whiflash/state?timeout={TIMEOUT - 1:g}"
            state = ask(self._client, self._address, path, ServerState)
        except ServerRefusedError:
            self.model = ""  # it may come back with another model
            raise
        return StateReading(time.monotonic(), state)


class LiveView:
    """Reads several servers at once and compares each with its last reading."""

    def __init__(self, servers: Sequence[WatchedServer]) -> None:
        self._servers = servers
        self._before: list[StateReading | None] = [None] * len(servers)

    def look(self) -> list[dict[str, Any]]:
        """Read all servers. Return for each `url` and `error`, or `url`, `model`, `state`, and its `figures` since the
        last look (`now`) and since the start (`total`)."""

        def read(server: WatchedServer) -> StateReading | ServerRefusedError:
            try:
                return server.read()
            except ServerRefusedError as error:
                return error

        with ThreadPoolExecutor(len(self._servers)) as pool:
            readings = list(pool.map(read, self._servers))
        looked: list[dict[str, Any]] = []
        for place, (server, now) in enumerate(zip(self._servers, readings, strict=True)):
            if isinstance(now, ServerRefusedError):
                looked.append({"url": server.url, "error": str(now)})
                continue
            # The seconds are those of rounds and not wall time: a server that waits for requests is not slow.
            total = figures(now.state, now.state.get("round_seconds", 0) / replicas_of(now.state))
            lately = since(self._before[place], now)
            looked.append({"url": server.url, "model": server.model, "state": now.state, "now": lately, "total": total})
            self._before[place] = now
        return looked


def since(before: StateReading | None, after: StateReading) -> dict[str, Any] | None:
    """Return the `figures` between two readings, and `seconds`; None without a first one or after a restart."""
    if before is None or after.state.get("rounds", 0) < before.state.get("rounds", 0):
        return None
    seconds = after.at - before.at
    if seconds <= 0:
        return None
    return {"seconds": seconds, **figures(less(after.state, before.state), seconds)}


def figures(counts: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    """Return rates and shares of a state's counts; None if the denominator is 0, and no keys for missing counts.

    counts: of a state, or the difference of two. seconds: that they were counted for.
    """
    tokens, by_arm = counts.get("tokens", 0), counts.get("by_arm") or {}
    rounds = sum(arm["rounds"] for arm in by_arm.values())
    made = sum(arm["tokens"] for arm in by_arm.values())
    rates: dict[str, Any] = {
        "tokens_per_second": _ratio(tokens, seconds),
        "switches_per_second": _ratio(counts.get("switches", 0), seconds),
    }
    if by_arm:
        rates["acceptance_length"] = _ratio(made, rounds)
        rates["arms"] = {
            arm: {
                "share": _ratio(sums["tokens"], made),
                "acceptance_length": _ratio(sums["tokens"], sums["rounds"]),
                "drafts_accepted": _ratio(sums["accepted"], sums["proposed"]),
            }
            for arm, sums in by_arm.items()
        }
    if "plain_seconds" in counts:
        rates["gain"] = _ratio(counts["plain_seconds"], counts.get("priced_seconds", 0)) or None
    if reasons := counts.get("reasons"):
        rates["reasons"] = {reason: _ratio(count, sum(reasons.values())) for reason, count in reasons.items()}
    return rates


def unknown(price: Mapping[str, Any]) -> str:
    """Return the words for a gain that is unknown: how far the server knows the price of plain decoding."""
    return f"not known yet ({price['rounds']} of {price['needed']} rounds)"


def _ratio(count: float, whole: float) -> float | None:
    return count / whole if whole > 0 else None


def less(after: Any, before: Any) -> Any:
    """Subtract the numbers of `before` from those of `after`, also in nested mappings; other values stay."""
    if isinstance(after, Mapping):
        earlier = before if isinstance(before, Mapping) else {}
        return {key: less(value, earlier.get(key, 0)) for key, value in after.items()}
    if isinstance(after, int | float) and isinstance(before, int | float):
        return after - before
    return after
