"""States of servers, read over HTTP, and what happened between two of them."""

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx

from whiflash_sglang.errors import WhiflashError

TIMEOUT = 5.0
"""Seconds until a server that does not answer counts as gone."""


class ServerUnreadableError(WhiflashError):
    """A server does not tell its state; the message names it and says why."""


@dataclass(frozen=True, slots=True)
class Reading:
    """A server's state (`GET /whiflash/state`) at `at`, in seconds of a clock that does not jump."""

    at: float
    state: Mapping[str, Any]


class Watched:
    """One server. url: of its root. model: what it serves, known from the first reading on."""

    def __init__(self, url: str, client: httpx.Client) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self.model = ""
        self._client = client

    def read(self) -> Reading:
        """Its state now. Raises: ServerUnreadableError."""
        if not self.model:
            self.model = str(self._get("/whiflash/capabilities").get("model", ""))
        state = self._get("/whiflash/state")
        return Reading(time.monotonic(), state)

    def _get(self, path: str) -> Mapping[str, Any]:
        try:
            answer = self._client.get(f"{self.url}{path}")
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise ServerUnreadableError(f"{self.url} does not answer: {error}") from None
        if answer.status_code in (401, 403):
            raise ServerUnreadableError(
                f"{self.url} wants a key for {path}: --api-key, or WHIFLASH_API_KEY in the environment"
            )
        if answer.status_code == 404:
            raise ServerUnreadableError(
                f"{self.url} has no {path}: it is no SGLang server with --speculative-algorithm WHIFLASH"
            )
        try:
            found = answer.json() if answer.status_code == 200 else None
        except ValueError:
            found = None
        if not isinstance(found, Mapping):
            raise ServerUnreadableError(f"{self.url}{path} answers {answer.status_code}, not what it should")
        return found


class Watch:
    """Several servers, read together, each against its last reading."""

    def __init__(self, servers: Sequence[Watched]) -> None:
        self._servers = servers
        self._before: list[Reading | None] = [None] * len(servers)

    def look(self) -> list[dict[str, Any]]:
        """Of each server `url` and `error`, or `model`, `state`, and `figures` since the last look and the start."""

        def read(server: Watched) -> Reading | ServerUnreadableError:
            try:
                return server.read()
            except ServerUnreadableError as error:
                return error

        with ThreadPoolExecutor(len(self._servers)) as pool:
            found = list(pool.map(read, self._servers))
        told: list[dict[str, Any]] = []
        for place, (server, now) in enumerate(zip(self._servers, found, strict=True)):
            if isinstance(now, ServerUnreadableError):
                told.append({"url": server.url, "error": str(now)})
                continue
            # Seconds of rounds, not of the clock on the wall: a server that waits for requests is not slow.
            total = figures(now.state, now.state.get("round_seconds", 0))
            lately = since(self._before[place], now)
            told.append(
                {"url": server.url, "model": server.model, "state": now.state, "now": lately, "total": total}
            )
            self._before[place] = now
        return told


def since(before: Reading | None, after: Reading) -> dict[str, Any] | None:
    """What happened between two readings (`figures`), with its `seconds`; None where the server began anew."""
    if before is None or after.state.get("rounds", 0) < before.state.get("rounds", 0):
        return None
    seconds = after.at - before.at
    if seconds <= 0:
        return None
    return {"seconds": seconds, **figures(_less(after.state, before.state), seconds)}


def figures(counts: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    """Rates and shares of what a state counts; None where nothing happened, nothing where the server does not tell.

    counts: a state's, of some time. seconds: how long that was.
    """
    tokens, by_arm = counts.get("tokens", 0), counts.get("by_arm") or {}
    rounds = sum(arm["rounds"] for arm in by_arm.values())
    made = sum(arm["tokens"] for arm in by_arm.values())
    found: dict[str, Any] = {
        "tokens_per_second": _ratio(tokens, seconds),
        "switches_per_second": _ratio(counts.get("switches", 0), seconds),
    }
    if by_arm:
        found["acceptance_length"] = _ratio(made, rounds)
        found["arms"] = {
            arm: {
                "share": _ratio(one["tokens"], made),
                "acceptance_length": _ratio(one["tokens"], one["rounds"]),
                "drafts_accepted": _ratio(one["accepted"], one["proposed"]),
            }
            for arm, one in by_arm.items()
        }
    if "plain_seconds" in counts:
        found["gain"] = _ratio(counts["plain_seconds"], counts.get("timed_seconds", 0))
    if reasons := counts.get("reasons"):
        found["reasons"] = {reason: _ratio(count, sum(reasons.values())) for reason, count in reasons.items()}
    return found


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole > 0 else None


def _less(after: Any, before: Any) -> Any:
    """Numbers of `after` less those of `before`, also those inside; what is no number as it is."""
    if isinstance(after, Mapping):
        known = before if isinstance(before, Mapping) else {}
        return {key: _less(value, known.get(key, 0)) for key, value in after.items()}
    if isinstance(after, int | float) and isinstance(before, int | float):
        return after - before
    return after
