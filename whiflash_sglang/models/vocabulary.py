"""The target's embedding and head where they are no plain matrices of this process. Imports no SGLang."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from whiflash_sglang.models.choice import DraftHead, Projection, Shard


@dataclass(frozen=True, slots=True)
class SharedVocabulary:
    """What drafters read of a target whose vocabulary is split, or quantised.

    size: V. embed: token ids [N] int64 → [N, H], the same in every process; all must call it alike. None where the
    embedding is a plain matrix that every process has all of. shard: of the head, None where every process has all of
    it. head: where it is quantised; its rows of this process.
    """

    size: int
    embed: Callable[[Tensor], Tensor] | None
    shard: Shard | None
    head: Projection | None = None


def borrowed_head(matrix: Tensor, shared: SharedVocabulary | None) -> DraftHead:
    """The target's head as a drafter chooses from it.

    Args:
        matrix: [K, H], the rows of this process; not read where they are quantised.
    """
    if shared is None:
        return DraftHead(matrix, None)
    return DraftHead(matrix if shared.head is None else shared.head, None, shard=shared.shard)
