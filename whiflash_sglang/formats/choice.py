"""A drafter's choice of tokens, and its confidence."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from whiflash_kernels import routing_stats
from whiflash_kernels.dispatch import backend_for
from whiflash_kernels.packed import linear


class Choice(NamedTuple):
    """Choices by row of logits: token [N] int64, the first of the largest; confidence [N] fp32, its probability."""

    token: Tensor
    confidence: Tensor


@dataclass(frozen=True, slots=True)
class Shard:
    """A process's rows of a head that several processes share.

    rows: [K'] int64, ascending: numbers in the whole head of the rows that this process has, perhaps none. gather: a
    tensor [N, C] float32 of every process → [P, N, C], the same in all of them; all must call it alike.
    """

    rows: Tensor
    gather: Callable[[Tensor], Tensor]


def choose(logits: Tensor, shard: Shard | None = None) -> Choice:
    """The drafter's first choice for every row of `logits` [N, V], any float type.

    With a `shard` the logits are of its rows alone, [N, K'], and the choice is that of all shards together: each sends
    its largest logit, that one's row and the logarithm of its sum, three floats a row of logits. Exact ties go to the
    lowest row, as in one process; rows are exact in fp32 up to 2**24.
    """
    if shard is None:
        return _likeliest(logits)
    values, rows, sums = shard.gather(_candidates(logits, shard.rows)).unbind(-1)
    best = values.amax(0)
    token = rows.masked_fill(values < best, math.inf).amin(0)
    return Choice(token.long(), (best - sums.logsumexp(0)).exp())


def _candidates(logits: Tensor, rows: Tensor) -> Tensor:
    """[N, 3] float32: largest logit, its row in the whole head, log-sum-exp; of a shard without rows none counts."""
    if not len(rows):
        nothing = torch.tensor([-math.inf, math.inf, -math.inf], device=logits.device)
        return nothing.expand(len(logits), 3).contiguous()
    row, value, total = _top(logits)
    return torch.stack([value, rows[row].float(), total], dim=-1)


def _by_kernel(logits: Tensor) -> bool:
    return bool(logits.shape[-1]) and not logits.requires_grad and backend_for(logits) == "triton"


def _likeliest(logits: Tensor) -> Choice:
    """The first choice for each row of logits [N, V].

    On a GPU in one read of the logits: torch reads them, and a copy in 32 bits, some 16 times over.

    A row without any probability, as of a drafter that gives NaN, has NaN there.
    """
    if not _by_kernel(logits):
        top = logits.max(-1)
        return Choice(top.indices, (top.values.float() - logits.float().logsumexp(-1)).exp())
    _, likeliest, argmax = routing_stats(logits)
    return Choice(argmax, likeliest.masked_fill(likeliest == 0, math.nan))


def _top(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Largest logit of each row of [N, V]: its index, int64; its value, and the row's log-sum-exp, fp32."""
    row, chance = _likeliest(logits)
    value = logits.gather(-1, row[:, None])[:, 0].float()
    total = value - chance.log() if _by_kernel(logits) else logits.float().logsumexp(-1)
    return row, value, total


@dataclass(frozen=True, slots=True)
class Projection:
    """A head that is no plain matrix: the target's own, quantised.

    rows: that it has here. project: [N, H] → [N, rows], by the target's own quantisation.
    """

    rows: int
    project: Callable[[Tensor], Tensor]

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, rows: Tensor) -> "Projection":
        """Some of its rows [K'] int64; the others are computed all the same."""
        return Projection(len(rows), lambda hidden: self.project(hidden)[:, rows])


@dataclass(frozen=True, slots=True)
class DraftHead:
    """Logits over what a drafter chooses from.

    weight: [K, H], or a `Projection` of as many rows. ids: [K] int64, the target's id of each row; None: the rows are
    the target's vocabulary. matrix: [K, R], a second one over the same rows, of drafters whose tokens depend on one
    another. bias: [K], of the logits by `weight`. shard: where other processes have the other rows; then `weight`,
    `matrix` and `bias` have those of this process, and `ids` all. kept: [K] int64, which rows these are of the head
    that this one is `within`.
    """

    weight: Tensor | Projection
    ids: Tensor | None
    matrix: Tensor | None = None
    shard: Shard | None = None
    kept: Tensor | None = None
    bias: Tensor | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., H] → [..., K], of this process's rows."""
        # Flat: of rows [B, D, H] that are not contiguous, as a block's without its first, torch would copy the matrix
        # B times, 88 ms instead of 2 for four requests and 12,288 rows.
        flat = hidden.flatten(0, -2)
        rows = self.weight
        logits = rows.project(flat) if isinstance(rows, Projection) else linear(flat, rows, self.bias)
        return logits.view(*hidden.shape[:-1], len(rows))

    def second(self, latent: Tensor) -> Tensor:
        """[..., R] → [..., K], by the second matrix. Raises ValueError where there is none."""
        if self.matrix is None:
            raise ValueError("this head has no second matrix")
        return linear(latent, self.matrix)

    def choose(self, logits: Tensor) -> Choice:
        """The first choice for every row of `logits` [N, K]; its tokens are rows of the whole head."""
        return choose(logits, self.shard)

    def candidates(self, logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The `count` largest of every row of `logits` [N, K]: the target's ids [N, count] int64 and logits, float32.

        Each of several processes sends the largest of its shard, two floats a candidate. Fewer where the head has fewer
        rows.
        """
        here = logits.topk(min(count, logits.shape[-1]))
        if self.shard is None:
            return self.target_ids(here.indices), here.values.float()
        missing = (0, count - here.values.shape[-1])
        values = F.pad(here.values.float(), missing, value=-math.inf)
        rows = F.pad(self.shard.rows[here.indices].float(), missing)
        gathered = self.shard.gather(torch.cat([values, rows], -1))
        values, rows = gathered.view(-1, len(logits), 2, count).permute(2, 1, 0, 3).flatten(2)
        top = values.topk(count)
        return self.target_ids(rows.gather(-1, top.indices).long()), top.values

    def total(self, logits: Tensor) -> Tensor:
        """Log-sum-exp [N] float32 of every row of `logits` [N, K], of all processes' shards together."""
        sums = _top(logits)[2] if _by_kernel(logits) else logits.float().logsumexp(-1)
        return sums if self.shard is None else self.shard.gather(sums[:, None])[..., 0].logsumexp(0)

    def beside(self, matrix: Tensor | None) -> "DraftHead":
        """The same head with `matrix`, over all of its rows, as its second."""
        if matrix is not None and self.shard is not None:
            matrix = matrix[self.shard.rows]
        return replace(self, matrix=matrix)

    def target_ids(self, rows: Tensor) -> Tensor:
        """Rows of the whole head → the target's ids, any shape."""
        return rows if self.ids is None else self.ids[rows]

    def within(self, vocabulary: Tensor) -> "DraftHead":
        """The same head over the ids `vocabulary` [K'] int64 only.

        Raises:
            ValueError: an id that this head does not draft.
        """
        rows = vocabulary
        if self.ids is not None:
            rows = torch.isin(self.ids, vocabulary).nonzero()[:, 0]
            if len(rows) != len(vocabulary):
                raise ValueError("the vocabulary has tokens that this drafter's own head does not draft")
            vocabulary = self.ids[rows]
        shard = self.shard
        if shard is not None:
            here = torch.isin(rows, shard.rows).nonzero()[:, 0]
            rows = torch.searchsorted(shard.rows, rows[here])
            shard = replace(shard, rows=here)
        matrix = None if self.matrix is None else self.matrix[rows]
        bias = None if self.bias is None else self.bias[rows]
        return DraftHead(self.weight[rows], vocabulary, matrix, shard, rows, bias)


@dataclass(frozen=True, slots=True)
class SharedVocabulary:
    """The parts of a target that drafters read if its vocabulary is split, or quantised.

    size: V. embed: token ids [N] int64 → [N, H], the same in every process; all must call it alike. None where the
    embedding is a plain matrix that every process has all of. shard: of the head, None where every process has all of
    it. head: where it is quantised; its rows of this process.
    """

    size: int
    embed: Callable[[Tensor], Tensor] | None
    shard: Shard | None
    head: Projection | None = None


class TargetsParts(nn.Module):
    """A drafter, which embeds and chooses as the target does unless it has a matrix of its own.

    Attributes:
        target_embedding, target_lm_head: [V, H], the target's, not part of the checkpoint.
        config: sizes and variants, a record of its format.
        shared: the target's parts if its vocabulary is split or quantised: the matrices hold this process's rows, if
            any. quantised: whether it multiplies in float8.
    """

    config: Any
    target_embedding: Tensor
    target_lm_head: Tensor
    shared: SharedVocabulary | None = None
    quantised: bool = False

    def __init__(self, target_embedding: Tensor, target_lm_head: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("target_embedding", target_embedding, persistent=False)
        self.register_buffer("target_lm_head", target_lm_head, persistent=False)

    @property
    def shared_embedding(self) -> Callable[[Tensor], Tensor] | None:
        """It embeds by this if its process does not have the whole matrix."""
        return None if self.shared is None else self.shared.embed

    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids [T] int64 → [T, H]; what is embedded already stays as it is."""
        if tokens.is_floating_point():
            return tokens
        shared = self.shared_embedding
        return F.embedding(tokens, self.target_embedding) if shared is None else shared(tokens)

    @property
    def head(self) -> DraftHead:
        """The head that it chooses by: its own, or the target's."""
        shared = self.shared
        if shared is None:
            return DraftHead(self.target_lm_head, None)
        rows = self.target_lm_head if shared.head is None else shared.head
        return DraftHead(rows, None, shard=shared.shard)

    def logits(self, hidden: Tensor) -> Tensor:
        """[T, H] → [T, K], by its head, this process's part of it."""
        return self.head.logits(hidden)

    def choose(self, hidden: Tensor) -> Choice:
        """[T, H] → the first choice for each: the target's id, and how sure the drafter is of it."""
        head = self.head
        choice = head.choose(head.logits(hidden))
        return Choice(self.target_ids(choice.token), choice.confidence)

    def target_ids(self, draft_ids: Tensor) -> Tensor:
        """Ids in the draft vocabulary → ids in the target's, any shape."""
        return draft_ids
