"""Choose a drafter's tokens from its logits, with a confidence for each."""

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
    """The choice for each row of logits: token [N] int64, the first of the largest; confidence [N] fp32, its chance."""

    token: Tensor
    confidence: Tensor


@dataclass(frozen=True, slots=True)
class Shard:
    """A process's rows of a head that several processes share.

    rows: [K'] int64, ascending: the row numbers of this process in the whole head, perhaps none. gather: collects a
    tensor [N, C] float32 from every process into [P, N, C]; all processes must call it in the same order.
    """

    rows: Tensor
    gather: Callable[[Tensor], Tensor]


def choose(logits: Tensor, shard: Shard | None = None) -> Choice:
    """Choose the likeliest token for every row of `logits` [N, V], any float type.

    With a `shard` the logits cover only its rows, [N, K'], and the choice is among all shards: each process sends its
    largest logit, that logit's row and its log-sum-exp, three floats for each row of logits. Exact ties go to the
    lowest row, as in one process; rows are exact in fp32 up to 2**24.
    """
    if shard is None:
        return _likeliest(logits)
    values, rows, sums = shard.gather(_candidates(logits, shard.rows)).unbind(-1)
    best = values.amax(0)
    token = rows.masked_fill(values < best, math.inf).amin(0)
    return Choice(token.long(), (best - sums.logsumexp(0)).exp())


def _candidates(logits: Tensor, rows: Tensor) -> Tensor:
    """Return [N, 3] float32: largest logit, its row in the whole head, log-sum-exp. A shard without rows never wins."""
    if not len(rows):
        nothing = torch.tensor([-math.inf, math.inf, -math.inf], device=logits.device)
        return nothing.expand(len(logits), 3).contiguous()
    row, value, total = _top(logits)
    return torch.stack([value, rows[row].float(), total], dim=-1)


def _by_kernel(logits: Tensor) -> bool:
    return bool(logits.shape[-1]) and not logits.requires_grad and backend_for(logits) == "triton"


def _likeliest(logits: Tensor) -> Choice:
    """Choose the likeliest token for each row of logits [N, V].

    On a GPU a kernel reads the logits once; torch reads them, and a float32 copy, about 16 times.

    The confidence is NaN for a row without any probability, such as NaN logits.
    """
    if not _by_kernel(logits):
        top = logits.max(-1)
        return Choice(top.indices, (top.values.float() - logits.float().logsumexp(-1)).exp())
    _, likeliest, argmax = routing_stats(logits)
    return Choice(argmax, likeliest.masked_fill(likeliest == 0, math.nan))


def _top(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return each row's largest logit in [N, V]: its index, int64; its value, fp32; and the row's log-sum-exp, fp32."""
    row, chance = _likeliest(logits)
    value = logits.gather(-1, row[:, None])[:, 0].float()
    total = value - chance.log() if _by_kernel(logits) else logits.float().logsumexp(-1)
    return row, value, total


@dataclass(frozen=True, slots=True)
class Projection:
    """The target's quantised head, used in place of a plain matrix.

    rows: its number of rows in this process. project: [N, H] → [N, rows], by the target's own quantisation.
    """

    rows: int
    project: Callable[[Tensor], Tensor]

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, rows: Tensor) -> "Projection":
        """Select `rows` [K'] int64 of the head. Each product still computes all rows and then selects."""
        return Projection(len(rows), lambda hidden: self.project(hidden)[:, rows])


@dataclass(frozen=True, slots=True)
class DraftHead:
    """Computes logits over the tokens that a drafter chooses from.

    weight: [K, H], or a `Projection` of K rows. ids: [K] int64, the target's id of each row; None: the rows are the
    target's vocabulary. matrix: [K, R], a second matrix over the same rows, for drafters whose tokens depend on one
    another. bias: [K], added to the logits of `weight`. shard: set if other processes have the other rows; then
    `weight`, `matrix` and `bias` have this process's rows, and `ids` has all. kept: [K] int64, the numbers of these
    rows in the larger head that `within` selected from.
    """

    weight: Tensor | Projection
    ids: Tensor | None
    matrix: Tensor | None = None
    shard: Shard | None = None
    kept: Tensor | None = None
    bias: Tensor | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """Compute the logits of `hidden`, [..., H] → [..., K], for the K tokens whose rows this process has."""
        # Flattened, because for rows [B, D, H] that are not contiguous (a block without its first row) torch would copy
        # the matrix B times: 88 ms instead of 2 for four requests and 12,288 rows.
        flat = hidden.flatten(0, -2)
        rows = self.weight
        logits = rows.project(flat) if isinstance(rows, Projection) else linear(flat, rows, self.bias)
        return logits.view(*hidden.shape[:-1], len(rows))

    def second(self, latent: Tensor) -> Tensor:
        """Multiply `latent` by the second matrix, [..., R] → [..., K]. Raises ValueError if there is none."""
        if self.matrix is None:
            raise ValueError("this head has no second matrix")
        return linear(latent, self.matrix)

    def choose(self, logits: Tensor) -> Choice:
        """Choose the likeliest row of the whole head for every row of `logits` [N, K]; see `target_ids`."""
        return choose(logits, self.shard)

    def candidates(self, logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Return the `count` largest of every row of `logits` [N, K]: target ids [N, count] int64, logits float32.

        Each of several processes sends its shard's largest, two floats per candidate. A head with fewer rows gives
        fewer candidates.
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
        """Return the log-sum-exp [N] float32 of every row of `logits` [N, K], over the shards of all processes."""
        sums = _top(logits)[2] if _by_kernel(logits) else logits.float().logsumexp(-1)
        return sums if self.shard is None else self.shard.gather(sums[:, None])[..., 0].logsumexp(0)

    def beside(self, matrix: Tensor | None) -> "DraftHead":
        """Return this head with `matrix` [rows of the whole head, R] as its second matrix."""
        if matrix is not None and self.shard is not None:
            matrix = matrix[self.shard.rows]
        return replace(self, matrix=matrix)

    def target_ids(self, rows: Tensor) -> Tensor:
        """Map rows of the whole head to the target's ids, any shape."""
        return rows if self.ids is None else self.ids[rows]

    def within(self, vocabulary: Tensor) -> "DraftHead":
        """Return this head reduced to the target ids `vocabulary` [K'] int64.

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
    """The embedding and head of a target whose vocabulary is split over processes, or quantised.

    size: V. embed: token ids [N] int64 → [N, H], equal in every process; all processes must call it in the same order.
    None if every process has the whole embedding as a plain matrix. shard: this process's rows of the head, None if
    every process has all. head: this process's rows of a quantised head, else None.
    """

    size: int
    embed: Callable[[Tensor], Tensor] | None
    shard: Shard | None
    head: Projection | None = None


class TargetsParts(nn.Module):
    """Base of the drafters: embeds tokens and chooses drafts with the target's matrices, unless a format has its own.

    Attributes:
        target_embedding, target_lm_head: [V, H], the target's, not part of the checkpoint.
        config: sizes and variants, a record of its format.
        shared: set if the target's vocabulary is split or quantised; then the matrices have this process's rows, if
            any. quantised: whether the drafter's products use float8.
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
        """The function that embeds token ids if this process lacks the whole matrix, else None."""
        return None if self.shared is None else self.shared.embed

    def embed(self, tokens: Tensor) -> Tensor:
        """Embed token ids [T] int64 → [T, H]; floating-point input is returned unchanged."""
        if tokens.is_floating_point():
            return tokens
        shared = self.shared_embedding
        return F.embedding(tokens, self.target_embedding) if shared is None else shared(tokens)

    @property
    def head(self) -> DraftHead:
        """The head that chooses the drafts: here the target's."""
        shared = self.shared
        if shared is None:
            return DraftHead(self.target_lm_head, None)
        rows = self.target_lm_head if shared.head is None else shared.head
        return DraftHead(rows, None, shard=shared.shard)

    def logits(self, hidden: Tensor) -> Tensor:
        """Compute the logits of `hidden`, [T, H] → [T, K], for the K tokens whose rows this process has."""
        return self.head.logits(hidden)

    def choose(self, hidden: Tensor) -> Choice:
        """Choose the likeliest token for each state [T, H]: the target's id, and the drafter's confidence."""
        head = self.head
        choice = head.choose(head.logits(hidden))
        return Choice(self.target_ids(choice.token), choice.confidence)

    def target_ids(self, draft_ids: Tensor) -> Tensor:
        """Map ids of the draft vocabulary to the target's ids, any shape."""
        return draft_ids
