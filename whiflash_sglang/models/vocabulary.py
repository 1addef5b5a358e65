"""The target's embedding and head where several processes have parts of them. Imports no SGLang."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from whiflash_sglang.models.choice import Shard


@dataclass(frozen=True, slots=True)
class SharedVocabulary:
    """What drafters read of a target whose vocabulary is split.

    size: V. embed: token ids [N] int64 → [N, H], the same in every process; all must call it alike. shard: of the head,
    None where every process has all of it.
    """

    size: int
    embed: Callable[[Tensor], Tensor]
    shard: Shard | None
