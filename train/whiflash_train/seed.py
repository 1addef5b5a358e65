"""Measure the initial chances of copied tokens that a bundle ships, on a target's own answers."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from whiflash_kernels.cpu.copies import CompiledCopies, compiled_copies

from whiflash_sglang.copying.calibration import BUCKETS, SEED_WEIGHT, Agreement, MatchCalibration
from whiflash_sglang.copying.copier import Copier
from whiflash_sglang.embedded import cache_root


def search() -> CompiledCopies:
    """Return the compiled search for copies.

    Raises:
        OSError: there is no C++ compiler.
    """
    return compiled_copies(cache_root() / "compiled")


class AnsweredPrompt(NamedTuple):
    """A prompt with its answer. tokens: of both. prompt_length: tokens of the prompt."""

    tokens: Sequence[int]
    prompt_length: int


def measure_seed(answers: Iterable[AnsweredPrompt], width: int = 16) -> tuple[tuple[float, ...], ...]:
    """Measure the share of copied tokens that are right, by bucket of match length and by `Agreement` of the places.

    Copies up to `width` tokens at every position of every answer; a token counts if all before it were right. A
    combination that hardly occurs stays near even odds.
    """
    right = [[0.5 * SEED_WEIGHT] * len(Agreement) for _ in BUCKETS]
    seen = [[SEED_WEIGHT] * len(Agreement) for _ in BUCKETS]
    for tokens, prompt_length in answers:
        copier = Copier(search(), MatchCalibration())
        copier.extend(tokens[: prompt_length + 1])
        for position in range(prompt_length + 1, len(tokens)):
            copy = copier.look(width, worth=0.0)
            compared = zip(copy.tokens, copy.agreements, tokens[position : position + width], strict=False)
            for length, (copied, agreement, token) in enumerate(compared, copy.matched):
                bucket = MatchCalibration.bucket(length)
                seen[bucket][agreement] += 1
                right[bucket][agreement] += copied == token
                if copied != token:
                    break
            copier.extend(tokens[position : position + 1])
    return tuple(
        tuple(round(r / s, 3) for r, s in zip(rights, seens, strict=True))
        for rights, seens in zip(right, seen, strict=True)
    )
