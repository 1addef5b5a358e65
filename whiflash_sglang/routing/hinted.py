"""What a request's hints do to its own scores; never to text, never to another request's scores."""

from collections.abc import Mapping
from typing import NamedTuple

from whiflash_sglang import arms
from whiflash_sglang.routing.mean import Mean
from whiflash_sglang.routing.signals import OpenSpan

PREFERENCE = 1.0
"""Expected accepted tokens that a preferred arm gains before the request has measured it in this kind of span.

The gain is shared with the rounds that were measured, as if it were one of them: after n rounds it is 1/(n + 1) of
this. Simulated (`tests/routing/test_hinted.py`), a wrong preference costs at most 4 % of the speed; as a constant of
1.5 tokens it cost 2 to 19 %.
"""

RANKS = 1.5
"""The same where a policy measures nothing and only orders its arms: one rank up, and past a tie."""


class Hinted(NamedTuple):
    """Scores after the hints, and what decided, one of `telemetry.tally.REASONS` (docs/reference/hints.md)."""

    scores: Mapping[str, float]
    reason: str


def apply_hints(
    scores: Mapping[str, float],
    span: OpenSpan | None,
    allowed: frozenset[str],
    *,
    off: bool,
    measured: Mapping[str, Mean] | None = None,
) -> Hinted:
    """Apply the open span's wishes to a policy's scores.

    A pin routes to its arm whatever the policy says. A bias is added as it is. A preference is a belief: what the
    request measures overrules it. Preference and bias move scores of arms that the policy offers; an arm that may
    not draft for the request is never routed to.

    measured: the request's own rounds in this kind of span, by arm; None if the policy goes by no measurement.
    """
    if off:
        return Hinted({arms.NONE: 1.0}, "off")
    unmoved = Hinted(scores, "policy" if measured is None else "score")
    if span is None:
        return unmoved
    if span.pin and (span.prefer in allowed or span.prefer == arms.NONE):
        return Hinted({str(span.prefer): scores.get(str(span.prefer), 1.0)}, "pin")
    wishes = dict(span.bias)
    if span.prefer is not None:
        wishes[span.prefer] = wishes.get(span.prefer, 0.0) + _preference(span.prefer, measured)
    if not wishes.keys() & scores.keys():
        return unmoved
    return Hinted({arm: score + wishes.get(arm, 0.0) for arm, score in scores.items()}, "span")


def _preference(arm: str, measured: Mapping[str, Mean] | None) -> float:
    if measured is None:
        return RANKS
    own = measured.get(arm)
    return PREFERENCE / (1.0 + (own.weight if own else 0.0))
