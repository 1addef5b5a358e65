"""Where a round's time goes, operator by operator: torch's profiler in a running server."""

import gzip
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
from pydantic import BaseModel

from whiflash_sglang.errors import WhiflashError
from whiflash_sglang.jsonl import read_json


class Operator(BaseModel, frozen=True, extra="forbid"):
    """ms: its own time in a round, without the operators that it calls. calls: in a round."""

    name: str
    ms: float
    calls: float


class Profile(BaseModel, frozen=True, extra="forbid"):
    """Of `rounds` rounds, with cached prompts between them. round_ms: WHIFLASH's own clock, under the profiler.

    operators: the most expensive first. kinds: ms of a round by kind of operator, as `kind_of` sorts them.
    elsewhere_ms: of a round, outside every operator: Python and waiting.
    """

    rounds: int
    round_ms: float
    operators: list[Operator]
    kinds: dict[str, float]
    elsewhere_ms: float


_PRODUCTS = {"aten::mm", "aten::addmm", "aten::linear", "mkldnn::_linear_pointwise", "whiflash::product"}


def kind_of(operator: str) -> str:
    """Products (of matrices), attention, or small operators."""
    if operator in _PRODUCTS:
        return "products"
    return "attention" if "attention" in operator or operator == "aten::bmm" else "small operators"


def profile(
    client: httpx.Client,
    requests: Iterable[Mapping[str, Any]],
    keep: Path | None = None,
    *,
    at_once: int = 1,
    on_answer: Callable[[], None] = lambda: None,
) -> Profile:
    """Ask chat completions, so many `at_once`, while the server's scheduler is profiled.

    Each is asked once before, so that its prompt is in the prefix cache and rounds are nearly all that is profiled.

    Args:
        client: of a WHIFLASH server on this machine, whose files this process can read.
        requests: bodies of `/v1/chat/completions`. keep: existing directory that the trace is left in.
        on_answer: called after each of the two times that a request is asked.

    Raises:
        WhiflashError: the server is not WHIFLASH's, refused, or left no trace.
    """
    bodies = [dict(request) for request in requests]
    _clock(client)

    def ask(body: dict[str, Any]) -> None:
        _post(client, "/v1/chat/completions", body)
        on_answer()

    def ask_all() -> None:
        with ThreadPoolExecutor(at_once) as threads:
            list(threads.map(ask, bodies))

    ask_all()
    before = _clock(client)
    with tempfile.TemporaryDirectory() as scratch:
        directory = keep or Path(scratch)
        known = set(directory.glob("*.trace.json.gz"))
        wanted = {
            "output_dir": str(directory),
            "activities": ["CPU"],
            "with_stack": False,
            "record_shapes": False,
        }
        _post(client, "/start_profile", wanted)
        try:
            ask_all()
        finally:
            _post(client, "/stop_profile", {})
        after = _clock(client)
        events = _read(_written(directory, known))
    rounds = int(after["rounds"] - before["rounds"])
    if not rounds:
        raise WhiflashError(
            "no round was profiled, because every answer ended with its first token: raise --max-tokens or give other "
            "--prompts"
        )
    operators, elsewhere = own_times(events)
    if not operators:
        raise WhiflashError(
            f"the trace of {client.base_url} holds no operator, so its profiler recorded nothing: end other profilers "
            "of this server, and profile again"
        )
    kinds: dict[str, float] = defaultdict(float)
    for name, (seconds, _) in operators.items():
        kinds[kind_of(name)] += seconds * 1000 / rounds
    return Profile(
        rounds=rounds,
        round_ms=1000 * (after["round_seconds"] - before["round_seconds"]) / rounds,
        operators=[
            Operator(name=name, ms=seconds * 1000 / rounds, calls=calls / rounds)
            for name, (seconds, calls) in sorted(operators.items(), key=lambda item: -item[1][0])
        ],
        kinds=dict(kinds),
        elsewhere_ms=elsewhere * 1000 / rounds,
    )


def own_times(events: Iterable[Mapping[str, Any]]) -> tuple[dict[str, tuple[float, int]], float]:
    """Operator → own seconds and calls; and the seconds between the first and the last that belong to none.

    Args:
        events: of a Chrome trace; complete ones (`ph` X) of category `cpu_op` count. `ts`, `dur` in microseconds.
            Only the thread with the most of them counts: the scheduler's.
    """
    threads: dict[Any, list[Mapping[str, Any]]] = defaultdict(list)
    for event in events:
        if event.get("ph") == "X" and event.get("cat") == "cpu_op":
            threads[event["tid"]].append(event)
    if not threads:
        return {}, 0.0
    busiest = max(threads, key=lambda thread: len(threads[thread]))
    main = sorted(threads[busiest], key=lambda event: (event["ts"], -event["dur"]))
    spent: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    callers: list[Mapping[str, Any]] = []
    outermost = 0.0
    for event in main:
        while callers and event["ts"] >= callers[-1]["ts"] + callers[-1]["dur"]:
            callers.pop()
        spent[event["name"]] += event["dur"]
        calls[event["name"]] += 1
        if callers:
            spent[callers[-1]["name"]] -= event["dur"]
        else:
            outermost += event["dur"]
        callers.append(event)
    whole = max(event["ts"] + event["dur"] for event in main) - main[0]["ts"]
    found = {name: (micros * 1e-6, calls[name]) for name, micros in spent.items()}
    return found, (whole - outermost) * 1e-6


def _clock(client: httpx.Client) -> dict[str, float]:
    response = client.get("/whiflash/state")
    if response.status_code != 200:
        raise WhiflashError(
            f"{client.base_url}/whiflash/state answered {response.status_code}: give --server a server that was "
            "started with --speculative-algorithm WHIFLASH"
        )
    state: dict[str, float] = response.json()
    return state


def _post(client: httpx.Client, path: str, body: dict[str, Any]) -> None:
    response = client.post(path, json=body)
    if response.status_code != 200:
        raise WhiflashError(
            f"{client.base_url}{path} answered {response.status_code}, so nothing was profiled: {response.text[:200]}"
        )


def _written(directory: Path, known: set[Path]) -> Path:
    """The new trace: SGLang writes it before it answers /stop_profile."""
    for path in directory.glob("*.trace.json.gz"):
        if path not in known:
            return path
    raise WhiflashError(
        f"the server wrote no trace into {directory}: it must run on this machine, as a user that may write there"
    )


def _read(path: Path) -> list[Mapping[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as text:
        events: list[Mapping[str, Any]] = read_json(text.read(), finite=False)["traceEvents"]
    return events
