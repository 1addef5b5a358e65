"""The lookup arm over a stored answer: the same index, calibration and width rule as in a server."""

from collections.abc import Sequence
from itertools import takewhile
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from whiflash_sglang.checkpoints.manifest import Lookup
from whiflash_sglang.drafters.lookup import WORTH
from whiflash_sglang.lookup.calibration import MatchCalibration
from whiflash_sglang.lookup.copier import RULE_MATCH, Copier


class Copied(NamedTuple):
    """`accepted` [P] copied tokens that were right in a round at answer position i; `expected` [P] fp64: how many
    the arm expected; `matched` [P] bool: whether the plain rule would copy; `proposed` [P]: tokens that were copied.
    """

    accepted: NDArray[np.int64]
    expected: NDArray[np.float64]
    matched: NDArray[np.bool_]
    proposed: NDArray[np.int64]


def replay_lookup(
    tokens: Sequence[int], prompt_length: int, settings: Lookup, calibration: MatchCalibration
) -> Copied:
    """Replay the arm at every position of an answer, without memory across requests. Switched off it copies nothing.

    `calibration` and the request's own learn as it goes, a token at a time: from the first token of every proposal.

    Args:
        tokens: prompt and answer. prompt_length: tokens of the prompt.
    """
    positions = len(tokens) - prompt_length - 1
    accepted, proposed = (np.zeros(positions, dtype=np.int64) for _ in range(2))
    expected = np.zeros(positions)
    matched = np.zeros(positions, dtype=np.bool_)
    if not settings.enabled:
        return Copied(accepted, expected, matched, proposed)
    copier = Copier(calibration, settings.min_match)
    copier.extend(tokens[:prompt_length])
    for position in range(positions):
        known = prompt_length + position + 1  # the bonus token is known, its KV is not
        copier.extend(tokens[known - 1 : known])
        limit = min(settings.max_width, positions - position)
        proposal = copier.look(limit, WORTH)
        width = proposal.width(limit, WORTH)
        drafts, expected[position] = proposal.tokens[:width], proposal.expected(width)
        proposed[position] = width
        matched[position] = bool(drafts) and drafts[0].length >= RULE_MATCH
        pairs = zip(drafts, tokens[known : known + len(drafts)], strict=False)
        accepted[position] = sum(1 for _ in takewhile(lambda pair: pair[0].token == pair[1], pairs))
    return Copied(accepted, expected, matched, proposed)
