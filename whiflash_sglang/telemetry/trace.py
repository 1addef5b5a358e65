"""The routing trace of a response: who wrote what, and why. Schema: docs/reference/traces.md. Imports no SGLang."""

import codecs
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from typing import Any

from whiflash_sdk.hints import WIRE_VERSION, TraceLevel

from whiflash_sglang.drafts.candidates import Part, first_of

SAVED_DIGITS = 4
"""Digits of a second: estimates are no better known."""

FIGURES = ("proposed", "accepted", "saved")
"""Figures of a source: drafts, those that were right, and estimated seconds, less than 0 if they cost more."""


@dataclass(slots=True)
class Stretch:
    """Rounds of one request that followed each other with the same arm, reason and span.

    start: output token that the first of them committed first. tokens: committed by each round, the bonus token
    included. proposed: draft tokens of each.
    """

    start: int
    arm: str
    reason: str
    span: str | None
    tokens: list[int] = field(default_factory=list)
    proposed: list[int] = field(default_factory=list)
    end: int = field(init=False)

    def __post_init__(self) -> None:
        self.end = self.start + sum(self.tokens)  # kept, since every round asks for it


@dataclass(slots=True)
class Recording:
    """The rounds of one traced request. It belongs to the request: it ends with it, and outlives a retraction.

    level: what was asked for; None of one that only an OpenTelemetry span carries. prompt_tokens: where the output
    begins. spanned: whether an OpenTelemetry span is to carry its sums. began, ended: of its rounds, in seconds of the
    host's clock; 0 before they have. spent: what its rounds cost by the worker's fitted prices, in seconds; plain: what
    its tokens would have cost without drafts; saved: the difference by arm. sources: what its drafts were taken from,
    each with its `FIGURES`. policy: in force when the request ended. cached: tokens of its prompt whose KV was kept, by
    place. agent, tenant: who asked, for spans: a hint's name, and a hash of the tenant's keys.
    """

    level: TraceLevel | None
    prompt_tokens: int
    stretches: list[Stretch] = field(default_factory=list)
    spanned: bool = False
    began: float = 0.0
    ended: float = 0.0
    spent: float = 0.0
    plain: float = 0.0
    saved: dict[str, float] = field(default_factory=dict)
    sources: dict[str, dict[str, float]] = field(default_factory=dict)
    policy: str = ""
    cached: dict[str, int] = field(default_factory=dict)
    agent: str | None = None
    tenant: str | None = None

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
        last.end += tokens
        last.proposed.append(proposed)

    def price(self, arm: str, tokens: int, *, round_seconds: float, plain_seconds: float) -> float:
        """A round of `arm` that costs `round_seconds` committed `tokens`; one without drafts costs `plain_seconds`.

        Returns the seconds that it saved.
        """
        self.spent += round_seconds
        self.plain += tokens * plain_seconds
        saved = tokens * plain_seconds - round_seconds
        self.saved[arm] = self.saved.get(arm, 0.0) + saved
        return saved

    def credit(self, parts: Sequence[Part], *, proposed: int, accepted: int, saved: float) -> None:
        """A round verified the first `proposed` of these drafts, of which `accepted` were right. It saved so many
        seconds, which are shared out by what was right, else by what was wrong.
        """
        verified, right = list(first_of(parts, proposed)), list[int]()
        for part in verified:
            right.append(min(part.drafts, accepted - sum(right)))
        whole = accepted or sum(part.drafts for part in verified)
        for part, accepted_here in zip(verified, right, strict=True):
            figures = self.sources.setdefault(part.source, dict.fromkeys(FIGURES, 0))
            figures["proposed"] += part.drafts
            figures["accepted"] += accepted_here
            figures["saved"] += saved * (accepted_here if accepted else part.drafts) / whole

    def until(self, completion_tokens: int) -> Iterator[Stretch]:
        """Its stretches without what was committed beyond a stop."""
        for stretch in self.stretches:
            end, kept = stretch.start, []
            for tokens in stretch.tokens:
                if end < completion_tokens:
                    kept.append(min(tokens, completion_tokens - end))
                end += tokens
            if kept:
                proposed = stretch.proposed[: len(kept)]
                yield Stretch(stretch.start, stretch.arm, stretch.reason, stretch.span, kept, proposed)


def build_trace(recording: Recording, policy: str, completion_tokens: int) -> dict[str, Any]:
    """The trace as JSON-ready data: sums, and with the level `full` the stretches, whose characters `place` adds."""
    stretches = list(recording.until(completion_tokens))
    arms: dict[str, dict[str, Any]] = {}
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
        for name, counts in arms.items():
            counts["saved"] = round(recording.saved.get(name, 0.0), SAVED_DIGITS)
    if recording.sources:
        known = FIGURES if recording.spent else FIGURES[:2]
        trace["sources"] = {
            name: {each: round(figures[each], SAVED_DIGITS) for each in known}
            for name, figures in recording.sources.items()
        }
    if recording.cached:
        trace["cached"] = recording.cached
    if recording.level == "full":
        trace["stretches"] = [_described(stretch) for stretch in stretches]
    return trace


def span_attributes(
    recording: Recording, policy: str, completion_tokens: int
) -> dict[str, str | int | float]:
    """Sums of the trace as attributes of an OpenTelemetry span, which are flat: `whiflash.arm.ar.accepted`."""
    trace = build_trace(replace(recording, level="summary"), policy, completion_tokens)
    attributes: dict[str, Any] = {
        name: trace[name] for name in ("policy", "rounds", "switches", "gain") if name in trace
    }
    callers = {"agent": recording.agent, "tenant": recording.tenant}
    attributes |= {name: caller for name, caller in callers.items() if caller is not None}
    for arm, counts in trace["arms"].items():
        attributes |= {f"arm.{arm}.{name}": count for name, count in counts.items()}
    return {f"whiflash.{name}": value for name, value in attributes.items()}


def _counts(stretch: Stretch) -> dict[str, int]:
    rounds, tokens, proposed = len(stretch.tokens), sum(stretch.tokens), sum(stretch.proposed)
    return {"rounds": rounds, "tokens": tokens, "proposed": proposed, "accepted": tokens - rounds}


def _described(stretch: Stretch) -> dict[str, Any]:
    counts = {name: count for name, count in _counts(stretch).items() if name != "tokens"}
    return {
        "start": stretch.start,
        "end": stretch.end,
        "arm": stretch.arm,
        **counts,
        "reason": stretch.reason,
        "span": stretch.span,
        "round_tokens": stretch.tokens,
        "round_proposed": stretch.proposed,
    }


def place(trace: dict[str, Any], pieces: Sequence[str], text: str | None) -> None:
    """Give every stretch of a full trace its characters: `chars`, half-open offsets into the text, and `round_chars`.

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
        after = accumulate(stretch["round_tokens"], initial=stretch["start"])
        stretch["round_chars"] = [
            [ends[end - 1] - ends[begin], ends[end] - ends[end - 1]] for begin, end in pairwise(after)
        ]


def pieces_of(tokens: Iterable[int], vocabulary: Sequence[bytes], left_out: frozenset[int]) -> list[str]:
    """Text of every token. A character whose bytes two tokens share belongs to the one that completes it.

    Args:
        tokens: output token ids; one beyond the vocabulary counts as token 0, as it does to SGLang's detokeniser.
        vocabulary: bytes of every token. left_out: ids that have no text, such as special tokens where these are
            skipped.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    known = (token if token < len(vocabulary) else 0 for token in tokens)
    pieces = [decoder.decode(b"" if token in left_out else vocabulary[token]) for token in known]
    if pieces:
        pieces[-1] += decoder.decode(b"", final=True)
    return pieces
