"""Rule by which two greedy decodings count as equal (losslessness).

Their tokens are identical, or they have a tie at the first difference: plain decoding's two best logits after that
prefix are within 1e-4 (fp32) or two units in the last place (bf16), so that rounding, which differs by batch shape,
decides. Ties are counted and shown, never ignored.
"""

import math
from dataclasses import dataclass
from enum import StrEnum

FP32_GAP = 1e-4
BF16_ULPS = 2
_BF16_FRACTION_BITS = 7


class Verdict(StrEnum):
    """Result of comparing two decodings: identical, a tie at the first difference, or different."""

    IDENTICAL = "identical"
    TIE = "tie"
    DIFFERENT = "different"


@dataclass(frozen=True, slots=True)
class TopTwo:
    """Plain decoding's two best logits at a position. best: the larger one's value; gap: best minus second."""

    best: float
    gap: float


def is_tie(top_two: TopTwo, dtype: str) -> bool:
    """Whether rounding may decide between the two best tokens; `dtype`: float32 or bfloat16."""
    if dtype == "float32":
        return top_two.gap <= FP32_GAP
    if dtype == "bfloat16":
        best = abs(top_two.best)
        ulp = 2.0 ** (math.floor(math.log2(best)) - _BF16_FRACTION_BITS) if best else 0.0
        return top_two.gap <= BF16_ULPS * ulp
    raise ValueError(f"no tie rule for dtype {dtype!r}; known: float32, bfloat16")
