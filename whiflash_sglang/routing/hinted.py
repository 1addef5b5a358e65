"""What a request's hints do to its own scores; never to text, never to another request's scores."""

from collections.abc import Mapping
from typing import NamedTuple

from whiflash_sglang import arms
from whiflash_sglang.routing.signals import OpenSpan

PREFERENCE = 1.5
"""Expected accepted tokens that a preferred arm gains."""


class Hinted(NamedTuple):
    """Scores after the hints, and what decided: `score`, `span`, `pin` or `off`."""

    scores: Mapping[str, float]
    reason: str


def apply_hints(
    scores: Mapping[str, float], span: OpenSpan | None, allowed: frozenset[str], *, off: bool
) -> Hinted:
    """Apply the open span's wishes to a policy's scores.

    A pin routes to its arm whatever the policy says; a preference or a bias moves scores of arms that the
    policy offers. An arm that may not draft for the request is never routed to.
    """
    if off:
        return Hinted({arms.NONE: 1.0}, "off")
    if span is None:
        return Hinted(scores, "score")
    if span.pin and (span.prefer in allowed or span.prefer == arms.NONE):
        return Hinted({str(span.prefer): 1.0}, "pin")
    wishes = dict(span.bias)
    if span.prefer is not None:
        wishes[span.prefer] = wishes.get(span.prefer, 0.0) + PREFERENCE
    if not wishes.keys() & scores.keys():
        return Hinted(scores, "score")
    return Hinted({arm: score + wishes.get(arm, 0.0) for arm, score in scores.items()}, "span")
