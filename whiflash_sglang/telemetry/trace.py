"""Routing trace of a response: which arm drafted which tokens, and why. Schema: docs/reference/traces.md. Imports no
SGLang."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from typing import Any

from whiflash_sdk.hints import WIRE_VERSION, TraceLevel

from whiflash_sglang.drafts.candidates import Part, first_of

SAVED_DIGITS = 4
"""Decimal places of saved seconds, which are estimates."""

FIGURES = ("proposed", "accepted", "saved")
"""Figures of a source of drafts: drafts, accepted drafts, and estimated seconds saved (negative if they cost more)."""


@dataclass(slots=True)
class Stretch:
    """Consecutive rounds of one request with the same arm, reason and span.

    start, end: half-open range of output tokens that they committed. tokens: that each round committed, the bonus token
    included. proposed: drafts of each round.
    """

    start: int
    arm: str
    reason: str
    span: str | None
    tokens: list[int] = field(default_factory=list)
    proposed: list[int] = field(default_factory=list)
    end: int = field(init=False)

    def __post_init__(self) -> None:
        self.end = self.start + sum(self.tokens)  # stored, since every round reads it


@dataclass(slots=True)
class Recording:
    """The rounds of one traced request. It lives as long as the request, also through a retraction.

    level: of the trace; None if only an OpenTelemetry span carries the sums. prompt_tokens: length of the prompt.
    spanned: whether an OpenTelemetry span carries the sums. began, ended: start of the first round and end of the last
    in seconds of the host's clock; 0 before. spent: seconds of its rounds by the worker's prices; plain: seconds
    that plain decoding would take for its tokens; saved: the difference by arm. sources: of its drafts, each with its
    `FIGURES`. policy: in force when the request ended. cached: prompt tokens whose KV was cached, by place. agent,
    tenant: the caller, for OpenTelemetry spans: the hint's agent, and a hash of the tenant's keys.
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
        """Note that a round begins; the first one starts the clock."""
        self.began = self.began or time.perf_counter()

    def add(self, length: int, arm: str, tokens: int, *, proposed: int, reason: str, span: str | None) -> None:
        """Add a round of `arm` that has ended. length: tokens committed before it, prompt included, without the bonus
        token."""
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
        """Add the price of a round that committed `tokens`; return the seconds that it saved.

        round_seconds: price of this round. plain_seconds: price of a round without drafts, which commits one token.
        """
        self.spent += round_seconds
        self.plain += tokens * plain_seconds
        saved = tokens * plain_seconds - round_seconds
        self.saved[arm] = self.saved.get(arm, 0.0) + saved
        return saved

    def credit(self, parts: Sequence[Part], *, proposed: int, accepted: int, saved: float) -> None:
        """Credit the sources of a round that verified the first `proposed` of these drafts and accepted `accepted`. The
        seconds `saved` are divided in proportion to accepted drafts; if none was accepted, to verified ones.
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
        """Yield the stretches cut to the first `completion_tokens`: rounds may commit tokens beyond a stop."""
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
    """Return the trace as JSON-ready data: sums, and at level `full` the stretches, whose characters `place` adds."""
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


def span_attributes(recording: Recording, policy: str, completion_tokens: int) -> dict[str, str | int | float]:
    """Return the trace's sums as flat attributes of an OpenTelemetry span, such as `whiflash.arm.ar.accepted`."""
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
        text: that the client gets. It may end earlier, at a stop. If it differs from the pieces, the trace also carries
            their text, in which its offsets count.
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
