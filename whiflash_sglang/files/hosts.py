"""HTTP requests to a server's own routes, the shapes of its answers, and sums over replicas. Imports no SGLang."""

import math
import re
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from typing import Annotated, Any, Final

import httpx
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from whiflash_sglang.errors import ServerRefusedError, WhiflashError
from whiflash_sglang.files.jsonl import NOT_AS_WRITTEN, read_json

LIMITS = httpx.Limits(max_keepalive_connections=20, keepalive_expiry=2.0)
"""Connections close after two idle seconds: SGLang closes them after five, which is httpx's default too, so that a
request could meet a connection that is just being closed."""
MOST_ANSWER: Final = 16 << 20
"""Most bytes of an answer that are read."""
FEW: Final = Field(max_length=1024)
"""Bound on the number of arms, reasons or replicas in an answer."""

Count = Annotated[int, Field(strict=True, ge=0, lt=1 << 53)]
Amount = Annotated[
    float,
    Field(strict=True, ge=0, lt=1e12, allow_inf_nan=False),
    AfterValidator(lambda amount: amount if amount >= 1e-9 else 0.0),
]
"""Seconds. Less than a nanosecond is read as 0, so that a ratio of two amounts is never infinite."""
Names = Annotated[list[str], FEW]
TokenIds = Annotated[list[Count], Field(max_length=1 << 20)]


class Answer(BaseModel):
    """JSON that a server sends. Fields of the class are checked for their types; others are passed on unread."""

    model_config = ConfigDict(extra="allow")


class ServedModel(Answer):
    model: str


class ServedArms(Answer):
    arms: Names
    tenant_header: bool = False


class ServedType(Answer):
    dtype: str


class Tokenized(Answer):
    tokens: Annotated[TokenIds, Field(min_length=1)]


class ArmSums(Answer):
    """Counts of rounds, tokens and drafts of one arm (`ArmCounts`)."""

    rounds: Count
    tokens: Count
    proposed: Count
    accepted: Count


class PlainPrice(Answer):
    """Rounds observed, and rounds needed, before the price of plain decoding is known (`Costs.plain_price`)."""

    rounds: Count
    needed: Count


class Prices(Answer):
    """Prices of a round's parts, in seconds (`Costs.snapshot`)."""

    verify: Amount = 0.0
    verify_row: Amount = 0.0
    between: Amount = 0.0
    draft: Annotated[dict[str, Amount], FEW] = {}


class ReplicaState(Answer):
    """State of one replica: the fields that commands show."""

    replica: Count | None
    requests: Count
    tokens: Count


class ServerState(Answer):
    """Answer of `GET /whiflash/state`: the fields that commands read."""

    policy: str
    arms: Names = []
    requests: Count = 0
    rounds: Count = 0
    tokens: Count = 0
    switches: Count = 0
    round_seconds: Amount = 0.0
    timed_tokens: Count = 0
    timed_seconds: Amount = 0.0
    priced_tokens: Count = 0
    priced_seconds: Amount = 0.0
    plain_seconds: Amount = 0.0
    plain_price: PlainPrice | None = None
    by_arm: Annotated[dict[str, ArmSums], FEW] = {}
    reasons: Annotated[dict[str, Count], FEW] = {}
    quarantined: Annotated[dict[str, str], FEW] = {}
    costs: Prices = Prices()
    memory: Annotated[dict[str, Count], FEW] = {}
    replicas: Annotated[list[ReplicaState], FEW] = []


def without_password(url: str) -> str:
    """Return the URL of a server's root, safe to show and store: without a user, a password or a query.

    A malformed URL may hold a password with any character in it, so everything before the last `@` is removed.
    """
    url = re.sub("^([a-z]*://)?.*@", r"\1", url, flags=re.DOTALL | re.IGNORECASE)
    return re.split("[?#]", url, maxsplit=1)[0].rstrip("/").removesuffix("/v1")


def ask(
    client: httpx.Client,
    url: str,
    path: str,
    shape: type[BaseModel],
    body: Mapping[str, Any] | None = None,
    headers: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Send a GET to the server's route `path`, or a POST of `body` if there is one; return the JSON of the answer.

    url: of the server's root, with or without `/v1`. shape: type that the answer must have. Raises: ServerRefusedError.
    """
    named = without_password(url)
    try:
        status, raw = _read(client, f"{url.rstrip('/').removesuffix('/v1')}{path}", body, headers)
    except httpx.ReadTimeout:
        raise ServerRefusedError(f"{named} has not answered: it may be busy with a long step; ask again") from None
    except httpx.HTTPError as error:
        raise ServerRefusedError(
            f"{named} does not answer ({error}): check the URL, and whether the server has started"
        ) from None
    except (httpx.InvalidURL, ValueError):  # their text may hold a part of a password
        raise ServerRefusedError(f"{named} is no URL of a server: give one such as http://127.0.0.1:30000") from None
    path = path.partition("?")[0]
    if status in (401, 403):
        raise ServerRefusedError(
            f"{named} refused the key for {path} ({status}): set WHIFLASH_API_KEY, or --api-key, to its admin key, or "
            "to its API key where that opens the route"
        )
    if status == 404:
        ours = "it is no SGLang server with --speculative-algorithm WHIFLASH; " * path.startswith("/whiflash")
        raise ServerRefusedError(f"{named} has no {path} (404): {ours}check the URL")
    why: object = None
    with suppress(*NOT_AS_WRITTEN):
        content = read_json(raw)
        if status == 200:
            return shape.model_validate(content).model_dump(exclude_unset=True)
        why = content.get("error", content)["message"]
    if isinstance(why, str):
        raise ServerRefusedError(f"{named}{path} answered {status}: {why[:500]}")
    raise ServerRefusedError(
        f"{named}{path} answered {status} without the expected JSON, as a gateway does: give the URL of the server "
        "itself"
    )


def _read(
    client: httpx.Client, url: str, body: Mapping[str, Any] | None, headers: Mapping[str, str] | None
) -> tuple[int, bytes]:
    """Return status and body of an answer. Raises httpx's errors, also for one that is too long or never ends."""
    content = bytearray()
    ends = time.monotonic() + (client.timeout.read or math.inf)
    with client.stream("GET" if body is None else "POST", url, json=body, headers=headers) as answer:
        for part in answer.iter_bytes():
            content += part
            if len(content) > MOST_ANSWER:
                raise httpx.DecodingError(f"its answer is longer than {MOST_ANSWER >> 20} MiB")
            if time.monotonic() > ends:
                raise httpx.ReadTimeout("its answer does not end")
    return answer.status_code, bytes(content)


class SilentReplicaError(WhiflashError):
    """One or more replicas have not answered in time.

    Args:
        heard: numbers of the replicas that answered. size: replicas of the server. seconds: of waiting.
    """

    def __init__(self, heard: Collection[int], size: int, seconds: float) -> None:
        silent = [number for number in range(size) if number not in heard]
        who = "the scheduler has"
        if size > 1:
            names = ", ".join(map(str, silent))
            who = f"replica {names} of {size} has" if len(silent) == 1 else f"replicas {names} of {size} have"
        super().__init__(f"{who} not answered in {seconds:g} s")


def together(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the server's state: of the only replica, or the sum over replicas (`costs`: the mean) with each replica's
    own state under `replicas`.

    Args:
        states: of each replica, with its number as `replica`; in any order, at least one.
    """
    ordered = sorted(states, key=lambda state: state["replica"] or 0)
    total = {**_sum(ordered), "costs": _mean([state["costs"] for state in ordered])}
    del total["replica"]
    return total if len(ordered) == 1 else {**total, "replicas": ordered}


def replicas_of(state: Mapping[str, Any]) -> int:
    """Number of replicas in a server's state. They decode in parallel, so its summed seconds are not wall time."""
    return len(state.get("replicas") or (state,))


def _mean(states: Sequence[Any]) -> Any:
    """Return the mean of numbers, also in nested mappings. For prices, which do not add up."""
    if isinstance(states[0], Mapping):
        return {key: _mean([state[key] for state in states]) for key in states[0]}
    return sum(states) / len(states)


def _sum(states: Sequence[Any]) -> Any:
    """Add numbers, also in nested mappings, which may lack keys; other values are the same in all states."""
    first = states[0]
    if isinstance(first, Mapping):
        keys = dict.fromkeys(key for state in states for key in state)
        return {key: _sum([state[key] for state in states if key in state]) for key in keys}
    return sum(states) if isinstance(first, int | float) else first
