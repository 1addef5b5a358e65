"""The lookup arm over a stored answer: the same index, calibration and width rule as in a server."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from whiflash_sglang.config import Lookup
from whiflash_sglang.drafters.lookup import WORTH
from whiflash_sglang.lookup.calibration import MatchCalibration
from whiflash_sglang.lookup.index import SuffixIndex


class Copied(NamedTuple):
    """`accepted` [P] copied tokens that were right in a round at answer position i; `matched` [P] bool: whether
    there was something to copy.
    """

    accepted: NDArray[np.int64]
    matched: NDArray[np.bool_]


def replay_lookup(tokens: Sequence[int], prompt_length: int, calibration: MatchCalibration) -> Copied:
    """Replay the arm at every position of an answer.

    `calibration` learns from those rounds only that the arm would have drafted itself, were it alone.

    Args:
        tokens: prompt and answer. prompt_length: tokens of the prompt.
    """
    settings = Lookup()
    positions = len(tokens) - prompt_length - 1
    accepted = np.zeros(positions, dtype=np.int64)
    matched = np.zeros(positions, dtype=np.bool_)
    index = SuffixIndex(tokens[:prompt_length])
    own_round = 0
    for position in range(positions):
        known = prompt_length + position + 1  # the bonus token is known, its KV is not
        index.extend(tokens[known - 1 : known])
        match = index.match()
        proposed = right = 0
        if match.length >= settings.min_match:
            matched[position] = True
            proposed = calibration.width(match.length, min(settings.max_width, positions - position), WORTH)
            drafts = index.continuation(match.source, proposed)
            wanted = tokens[known : known + proposed]
            while right < len(wanted) and drafts[right] == wanted[right]:
                right += 1
        accepted[position] = right
        if position == own_round:
            if proposed:
                calibration.observe(match.length, proposed, right)
            own_round += right + 1
    return Copied(accepted, matched)
