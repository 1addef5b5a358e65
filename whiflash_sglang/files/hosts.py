"""Questions to a server, and the answers of its replicas. Imports no SGLang."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import httpx

from whiflash_sglang.errors import ServerRefusedError, WhiflashError

LIMITS = httpx.Limits(max_connections=100, max_keepalive_connections=20, keepalive_expiry=2.0)
"""SGLang closes a connection that is idle for five seconds, httpx's default; one is while another arm answers."""


def ask(
    client: httpx.Client, url: str, path: str, holds: str, body: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The answer of the server at `url` on a route of ours, after `body` was sent to it if there is one.

    url: or an OpenAI client's. holds: a key without which it is somebody else's answer. Raises: ServerRefusedError.
    """
    url = url.rstrip("/").removesuffix("/v1")
    try:
        answer = client.get(f"{url}{path}") if body is None else client.post(f"{url}{path}", json=body)
    except httpx.ReadTimeout:
        hint = "it may be busy with a long step; ask again"
        raise ServerRefusedError(f"{url} has not answered: {hint}") from None
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ServerRefusedError(
            f"{url} does not answer ({error}): check the URL, and whether the server has started"
        ) from None
    path = path.partition("?")[0]
    if answer.status_code in (401, 403):
        raise ServerRefusedError(
            f"{url} refused the key for {path} ({answer.status_code}): set WHIFLASH_API_KEY, or --api-key, to its "
            "admin key, or to its API key where that opens the route"
        )
    if answer.status_code == 404:
        raise ServerRefusedError(
            f"{url} has no {path} (404): it is no SGLang server with --speculative-algorithm WHIFLASH; check the URL"
        )
    try:
        content = answer.json()
        why = None if answer.status_code == 200 else content.get("error", content)["message"]
    except (AttributeError, ValueError, KeyError, TypeError):
        content, why = None, None
    if isinstance(why, str):
        raise ServerRefusedError(f"{url}{path} answered {answer.status_code}: {why}")
    if answer.status_code != 200 or not isinstance(content, dict) or holds not in content:
        raise ServerRefusedError(
            f"{url}{path} answered {answer.status_code} without the expected JSON, as a gateway does: give the URL "
            "of the server itself"
        )
    return content


class SilentReplicaError(WhiflashError):
    """A replica has not answered.

    Args:
        heard: numbers of those that have. size: replicas of the server. seconds: that it was waited.
    """

    def __init__(self, heard: Collection[int], size: int, seconds: float) -> None:
        silent = [number for number in range(size) if number not in heard]
        who = "the scheduler has"
        if size > 1:
            names = ", ".join(map(str, silent))
            who = f"replica {names} of {size} has" if len(silent) == 1 else f"replicas {names} of {size} have"
        super().__init__(f"{who} not answered in {seconds:g} s")


def together(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One state, that of the only replica, or what all of them sum up to (`costs`: on average) with each one's own
    under `replicas`.

    Args:
        states: of every replica, with its number as `replica`; in any order, at least one.
    """
    ordered = sorted(states, key=lambda state: state["replica"] or 0)
    total = {**_sum(ordered), "costs": _mean([state["costs"] for state in ordered])}
    del total["replica"]
    return total if len(ordered) == 1 else {**total, "replicas": ordered}


def replicas_of(state: Mapping[str, Any]) -> int:
    """Replicas of the server whose state it is: they decode beside one another, so its time is not their sum."""
    return len(state.get("replicas") or (state,))


def _mean(states: Sequence[Any]) -> Any:
    """Numbers on average, also those inside: what work costs does not add up."""
    if isinstance(states[0], Mapping):
        return {key: _mean([state[key] for state in states]) for key in states[0]}
    return sum(states) / len(states)


def _sum(states: Sequence[Any]) -> Any:
    """Numbers are added up, also those inside; what is no number is the same in all. Not all have every key."""
    first = states[0]
    if isinstance(first, Mapping):
        keys = dict.fromkeys(key for state in states for key in state)
        return {key: _sum([state[key] for state in states if key in state]) for key in keys}
    return sum(states) if isinstance(first, int | float) else first
