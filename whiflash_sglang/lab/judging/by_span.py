"""Which drafter is better in which stretch of an answer: reasoning in prose, tool calls, JSON, code."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.table import Table

from whiflash_sglang.spans.infer import infer_spans
from whiflash_sglang.spans.tracker import SpanTracker
from whiflash_sglang.train.replay import ARMS, Replay

PROSE = "prose"
"""Outside of all spans."""


def kinds_of(
    row: Mapping[str, Any], answer: Sequence[int], tool_parser: str | None, token_bytes: Sequence[bytes]
) -> list[str]:
    """For every answer token, the kind of the span that it is written into, as a server infers spans without hints.

    Args:
        row: the prompt; where it offers tools and asks for no format, a call was forced. answer: token ids.
        token_bytes: of every token id.
    """
    has_tools = bool(row.get("tools"))
    form = (row.get("response_format") or {}).get("type")
    hints = infer_spans(tool_parser, None, has_tools, form, has_tools and form is None)
    tracker = SpanTracker(hints.spans, token_bytes)
    kinds = []
    for token in answer:
        kinds.append(tracker.span.kind if tracker.span else PROSE)
        tracker.push([token])
    return kinds


def by_span(answers: Sequence[Replay], kinds: Mapping[str, Sequence[str]]) -> dict[str, dict[str, Any]]:
    """Kind → figures of the rounds that begin with a token of it, before loops; the most frequent first.

    Args:
        answers: replays of two drafters. kinds: an answer's id → the kind of each of its tokens.

    Returns:
        positions; acceptance_length by drafter, the mean over these positions; rounds_won by drafter, the share of them
        at which it accepts strictly more than the other. Rounds of a walk begin less often where much is accepted, so
        lengths are above those of `tabulate`.
    """
    found: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for answer in answers:
        pairs = zip(*(answer.accepted[arm][: answer.loop_from].tolist() for arm in ARMS), strict=True)
        # A round at i has answer token i as its bonus token: its drafts begin with the next one.
        for kind, pair in zip(kinds[answer.id][1:], pairs, strict=False):
            found[kind].append(pair)
    return {
        kind: _figures(np.array(pairs))
        for kind, pairs in sorted(found.items(), key=lambda item: -len(item[1]))
    }


def _figures(pairs: Any) -> dict[str, Any]:
    """`pairs` [n, 2] accepted drafts."""
    lengths = 1 + pairs.mean(0)
    better = (pairs[:, 0] > pairs[:, 1]).mean(), (pairs[:, 1] > pairs[:, 0]).mean()
    return {
        "positions": len(pairs),
        "acceptance_length": dict(zip(ARMS, map(float, lengths), strict=True)),
        "rounds_won": dict(zip(ARMS, map(float, better), strict=True)),
    }


def spans_table(result: Mapping[str, Mapping[str, Any]]) -> Table:
    """For a terminal."""
    table = Table(title="tokens per round at every position, by what is being written")
    for column in ("span", "positions", *ARMS, *(f"{arm} better" for arm in ARMS)):
        table.add_column(column, justify="left" if column == "span" else "right")
    for kind, one in result.items():
        lengths = [f"{one['acceptance_length'][arm]:.2f}" for arm in ARMS]
        won = [f"{one['rounds_won'][arm]:.0%}" for arm in ARMS]
        table.add_row(kind, str(one["positions"]), *lengths, *won)
    return table
