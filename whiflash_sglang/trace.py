"""The routing trace of a response: who wrote what, and why. Schema: docs/reference/traces.md. Imports no SGLang."""

import codecs
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

from whiflash_sglang.spans.hints import WIRE_VERSION, TraceLevel


@dataclass(slots=True)
class Stretch:
    """Rounds of one request that followed each other with the same arm, reason and span.

    start: output token that the first of them committed first. tokens: committed by each round, the bonus token
    included. proposed: draft tokens of all of them.
    """

    start: int
    arm: str
    reason: str
    span: str | None
    tokens: list[int] = field(default_factory=list)
    proposed: int = 0

    @property
    def end(self) -> int:
        return self.start + sum(self.tokens)


@dataclass(slots=True)
class Recording:
    """The rounds of one traced request. It belongs to the request: it ends with it, and outlives a retraction.

    level: what was asked for; None of one that only the operator has a sample of. prompt_tokens: where the output
    begins. sampled: whether the operator has. began, ended: of its rounds, in seconds of the host's clock; 0 before
    they have. spent: what its rounds cost by the worker's fitted prices, in seconds; plain: what its tokens would have
    cost without drafts.
    """

    level: TraceLevel | None
    prompt_tokens: int
    stretches: list[Stretch] = field(default_factory=list)
    sampled: bool = False
    began: float = 0.0
    ended: float = 0.0
    spent: float = 0.0
    plain: float = 0.0

    def begin(self) -> None:
        """A round begins; the first one starts the clock."""
        self.began = self.began or time.perf_counter()

    def add(
        self, length: int, arm: str, tokens: int, *, proposed: int, reason: str, span: str | None
    ) -> None:
        """A round of `arm` that began behind `length` committed tokens and a bonus token has ended."""
        self.ended = time.perf_counter()
        start = length + 1 - self.prompt_tokens
        last = self.stretches[-1] if self.stretches else None
        if last is None or (last.arm, last.reason, last.span, last.end) != (arm, reason, span, start):
            last = Stretch(start, arm, reason, span)
            self.stretches.append(last)
        last.tokens.append(tokens)
        last.proposed += proposed

    def price(self, tokens: int, *, round_seconds: float, plain_seconds: float) -> None:
        """A round that costs `round_seconds` committed `tokens`; one that drafts nothing costs `plain_seconds`."""
        self.spent += round_seconds
        self.plain += tokens * plain_seconds

    def until(self, completion_tokens: int) -> Iterator[Stretch]:
        """Its stretches without what was committed beyond a stop."""
        for stretch in self.stretches:
            end, kept = stretch.start, []
            for tokens in stretch.tokens:
                if end < completion_tokens:
                    kept.append(min(tokens, completion_tokens - end))
                end += tokens
            if kept:
                yield Stretch(
                    stretch.start, stretch.arm, stretch.reason, stretch.span, kept, stretch.proposed
                )


def build_trace(recording: Recording, policy: str, completion_tokens: int) -> dict[str, Any]:
    """The trace as JSON-ready data: sums, and with the level `full` the stretches, whose characters `place` adds."""
    stretches = list(recording.until(completion_tokens))
    arms: dict[str, dict[str, int]] = {}
    reasons: dict[str, int] = {}
    for stretch in stretches:
        arm = arms.setdefault(stretch.arm, dict.fromkeys(("rounds", "tokens", "proposed", "accepted"), 0))
        for name, count in _counts(stretch).items():
            arm[name] += count
        reasons[stretch.reason] = reasons.get(stretch.reason, 0) + len(stretch.tokens)
    trace = {
        "version": WIRE_VERSION,
        "policy": policy,
        "choice": 0,
        "rounds": sum(arm["rounds"] for arm in arms.values()),
        "tokens": sum(arm["tokens"] for arm in arms.values()),
        "switches": sum(a.arm != b.arm for a, b in pairwise(stretches)),
        "arms": arms,
        "reasons": reasons,
    }
    if recording.began and recording.ended:
        trace["seconds"] = round(recording.ended - recording.began, 6)
    if recording.spent:
        trace["gain"] = round(recording.plain / recording.spent, 3)
    if recording.level == "full":
        trace["stretches"] = [_described(stretch) for stretch in stretches]
    return trace


def _counts(stretch: Stretch) -> dict[str, int]:
    rounds, tokens = len(stretch.tokens), sum(stretch.tokens)
    return {"rounds": rounds, "tokens": tokens, "proposed": stretch.proposed, "accepted": tokens - rounds}


def _described(stretch: Stretch) -> dict[str, Any]:
    counts = _counts(stretch)
    return {
        "start": stretch.start,
        "end": stretch.end,
        "arm": stretch.arm,
        "rounds": counts["rounds"],
        "proposed": counts["proposed"],
        "accepted": counts["accepted"],
        "reason": stretch.reason,
        "span": stretch.span,
        "round_tokens": stretch.tokens,
    }


def place(trace: dict[str, Any], pieces: Sequence[str], text: str | None) -> None:
    """Give every stretch of a full trace its characters: `chars`, half-open offsets into the text.

    Args:
        pieces: text of every output token.
        text: what the client gets. It may end earlier, at a stop; where it is another text, the trace carries the
            one that its offsets count in.
    """
    raw = "".join(pieces)
    if text is None or not raw.startswith(text):
        text = trace["text"] = raw
    ends = [0, *(min(end, len(text)) for end in accumulate(map(len, pieces)))]
    for stretch in trace["stretches"]:
        stretch["chars"] = [ends[stretch["start"]], ends[stretch["end"]]]


def pieces_of(tokens: Iterable[int], vocabulary: Sequence[bytes], left_out: frozenset[int]) -> list[str]:
    """Text of every token. A character whose bytes two tokens share belongs to the one that completes it.

    Args:
        tokens: output token ids; one beyond the vocabulary counts as token 0, as it does to SGLang's detokeniser.
        vocabulary: bytes of every token. left_out: ids that stand for no text, such as special tokens where these are
            skipped.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    known = (token if token < len(vocabulary) else 0 for token in tokens)
    pieces = [decoder.decode(b"" if token in left_out else vocabulary[token]) for token in known]
    if pieces:
        pieces[-1] += decoder.decode(b"", final=True)
    return pieces
