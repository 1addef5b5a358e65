"""The routing trace of a response: which drafter wrote which stretch. Schema: docs/hints.md."""

import codecs
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from whiflash_sglang.spans.hints import WIRE_VERSION


class TraceRound(NamedTuple):
    """One round of one request, as it travels from the scheduler to the HTTP process.

    tokens: committed by the round, bonus token included.
    """

    arm: str
    tokens: int
    reason: str
    span: str | None


class TraceLog:
    """Rounds of traced requests that were not sent to the HTTP process yet; bounded by requests.

    The scheduler's output streamer empties it. A request whose end is never streamed is pushed out by newer ones.
    """

    def __init__(self, requests: int = 4096) -> None:
        self._limit = requests
        self._pending: dict[str, list[TraceRound]] = {}

    def open(self, rid: str) -> None:
        """Start recording `rid`."""
        while len(self._pending) >= self._limit:
            self._pending.pop(next(iter(self._pending)))
        self._pending.setdefault(rid, [])

    def record(self, rid: str, entry: TraceRound) -> None:
        """Keep a round of a request that is being recorded; other requests are ignored."""
        rounds = self._pending.get(rid)
        if rounds is not None:
            rounds.append(entry)

    def take(self, rid: str, *, last: bool) -> list[TraceRound]:
        """The rounds since the last call; `last` ends the recording."""
        rounds = self._pending.get(rid)
        if rounds is None:
            return []
        if last:
            del self._pending[rid]
        else:
            self._pending[rid] = []
        return rounds

    def __len__(self) -> int:
        return len(self._pending)


def build_trace(
    rounds: Sequence[Sequence[Any]],
    policy: str,
    completion_tokens: int,
    *,
    choice: int = 0,
    text_of: Callable[[int, int], str] | None = None,
) -> dict[str, Any]:
    """The trace as JSON-ready data.

    Args:
        rounds: `TraceRound` fields, in order. What was committed beyond a stop is cut at `completion_tokens`.
        text_of: text of output tokens [start, end), where it is known.

    Token 0 comes from the prefill and belongs to no round; its text, where it is known, is `prefill_text`.
    """
    stretches: list[dict[str, Any]] = []
    position = 1
    for arm, tokens, reason, span in rounds:
        tokens = min(tokens, completion_tokens - position)
        if tokens <= 0:
            break
        last = stretches[-1] if stretches else None
        if last is None or (last["arm"], last["reason"], last["span"]) != (arm, reason, span):
            last = {"start": position, "arm": arm, "reason": reason, "span": span, "round_tokens": []}
            stretches.append(last)
        last["round_tokens"].append(tokens)
        position += tokens
        last["end"] = position
    arms: dict[str, dict[str, int]] = {}
    for stretch in stretches:
        counts = stretch["round_tokens"]
        stretch["rounds"] = len(counts)
        stretch["accepted"] = sum(counts) - len(counts)
        total = arms.setdefault(stretch["arm"], {"rounds": 0, "tokens": 0})
        total["rounds"] += len(counts)
        total["tokens"] += sum(counts)
        if text_of is not None:
            stretch["text"] = text_of(stretch["start"], stretch["end"])
    prefill = {} if text_of is None else {"prefill_text": text_of(0, min(1, completion_tokens))}
    return {
        "version": WIRE_VERSION,
        "policy": policy,
        "stretches": stretches,
        "rounds": sum(total["rounds"] for total in arms.values()),
        "tokens": sum(total["tokens"] for total in arms.values()),
        "switches": sum(a["arm"] != b["arm"] for a, b in pairwise(stretches)),
        "arms": arms,
        "choice": choice,
        **prefill,
    }


def pieces_of(tokens: Sequence[int], vocabulary: Sequence[bytes]) -> Callable[[int, int], str]:
    """`text_of` for `build_trace`. A character whose bytes two tokens share belongs to the one that completes it.

    Args:
        tokens: output token ids. vocabulary: bytes of every token.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    pieces = [decoder.decode(vocabulary[token] if token < len(vocabulary) else b"") for token in tokens]
    return lambda start, end: "".join(pieces[start:end])
