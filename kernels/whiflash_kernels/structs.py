"""The records that ops take and return, with every tensor's shape and dtype."""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

PADDING = -(1 << 20)
"""``starts`` of a padding request: its positions stay below 0 at every step of a pass."""

PAD_ROW = -1
"""``cache_slots`` and ``request_of_row`` of padding rows of a backlog, which no request owns."""


@dataclass(frozen=True)
class BacklogRings:
    """Rings of parked target features: position p of request slot r is at ``[r, p % capacity]``."""

    features: Tensor
    """[slots, capacity, width], as captured (bf16 on a GPU); last dimension contiguous."""
    next_tokens: Tensor
    """[slots, capacity] int64, contiguous: the token at p + 1, which EAGLE-3 pairs with feature p."""

    def __post_init__(self) -> None:
        if self.features.ndim != 3 or self.features.stride(2) != 1:
            raise ValueError("rings.features must be [slots, capacity, width] with a contiguous last dimension")
        if self.next_tokens.shape != self.features.shape[:2] or not self.next_tokens.is_contiguous():
            raise ValueError(
                f"rings.next_tokens must be a contiguous {tuple(self.features.shape[:2])}, "
                f"got {tuple(self.next_tokens.shape)}"
            )

    @classmethod
    def allocate(
        cls, slots: int, capacity: int, width: int, *, dtype: torch.dtype, device: torch.device | str
    ) -> "BacklogRings":
        """Allocate zeroed rings: ``slots * capacity * (width * itemsize + 8)`` bytes."""
        return cls(
            features=torch.zeros(slots, capacity, width, dtype=dtype, device=device),
            next_tokens=torch.zeros(slots, capacity, dtype=torch.int64, device=device),
        )

    @property
    def capacity(self) -> int:
        """Positions that each request can hold."""
        return self.features.shape[1]


PLACES = 8
"""Number of earlier occurrences that are compared, the newest ones."""
MOST_MATCHED = 32
"""Longest match that is measured; longer matches count as this long."""
SURE = 0.995
"""Largest chance of a copied token: even a long copy ends."""


class Drafts(NamedTuple):
    """Drafts, one row per request: those of one drafter, copies, or those of a whole batch after `lay_drafts`."""

    tokens: Tensor
    """[M, W] int64, for the positions after each text; undefined past ``counts``."""
    counts: Tensor
    """[M] int64 drafts of each request; 0 if no drafter drafted for it."""
    alive: Tensor | None = None
    """[M, W] float32: the chance that a token and all before it are accepted; None where the drafter cannot say."""
    confidences: Tensor | None = None
    """[M, C] float32, the drafter's top-1 probabilities, from which it learns; None if it has none, 0 in a batch."""
    faults: Tensor | None = None
    """[M] int32, 1 if a drafter's tokens were invalid (id or NaN) and left out; None before that is checked."""
    matched: Tensor | None = None
    """[M] int64, copies only: tokens before the place copied from that match the text's end, at most 32."""
    agreements: Tensor | None = None
    """[M, W] int32, copies only: how the places judge each token (`propose_copies`); 0 past ``counts``."""


class Chosen(NamedTuple):
    """The drafts that were chosen for verification."""

    tokens: Tensor
    """[B, W] int64; undefined from column ``widths`` - 1 on."""
    widths: Tensor
    """[B] int32, rows that each request verifies: its drafts and the bonus token."""
    first_drafts: Tensor
    """[B] int32: the smaller of a request's verified drafts and those that `lay_drafts` laid for it."""
    source: Tensor
    """[B] int32, source of the drafts: 0 `lay_drafts`, k the host's k-th candidate, -1 the device's copies."""
    wanted: Tensor
    """[B] int32: drafts of each request that are worth a row, before requests competed for rows."""


@dataclass(frozen=True)
class KVPools:
    """The paged K and V of a drafter, one pair of tensors for each of its L layers.

    All tensors share shape ``[slots, Hkv, D]``, dtype, strides and device; the last dimension is contiguous.
    """

    k: tuple[Tensor, ...]
    v: tuple[Tensor, ...]

    def __post_init__(self) -> None:
        if not self.k or len(self.k) != len(self.v):
            raise ValueError(f"pools need as many K as V tensors and at least one, got {len(self.k)}/{len(self.v)}")
        first = self.k[0]
        if first.ndim != 3 or first.stride(2) != 1:
            raise ValueError("pools must be [slots, Hkv, D] with a contiguous last dimension")
        for pool in (*self.k, *self.v):
            if (pool.shape, pool.dtype, pool.stride(), pool.device) != (
                first.shape,
                first.dtype,
                first.stride(),
                first.device,
            ):
                raise ValueError("all pools must share shape, dtype, strides and device")

    @cached_property
    def addresses(self) -> Tensor:
        """Data pointers of K, then of V, [2, L] int64 on the pools' device; built before any capture."""
        pointers = [[pool.data_ptr() for pool in self.k], [pool.data_ptr() for pool in self.v]]
        return torch.tensor(pointers, dtype=torch.int64, device=self.k[0].device)

    @cached_property
    def aligned(self) -> bool:
        """Whether every pool starts on 16 bytes, so that a kernel may store 16 bytes at a time."""
        return all(pool.data_ptr() % 16 == 0 for pool in (*self.k, *self.v))


@dataclass(frozen=True)
class DFlashWeights:
    """Weights of DFlash's KV-only pass (arXiv 2602.06036): C context features, hidden size H, L layers."""

    fc: Tensor
    """[H, C*Ht], projects the concatenated target features."""
    hidden_norm: Tensor
    """[H], RMSNorm after ``fc``."""
    kv: Tensor
    """[L*2*Hkv*D, H], for each layer its K rows and then its V rows."""
    k_norm: Tensor | None
    """[L, D] RMSNorm over each K head, or None."""
    eps: float
    """Added to the mean square in both norms."""
    fc_bias: Tensor | None = None
    """[H]"""
    kv_bias: Tensor | None = None
    """[L*2*Hkv*D]"""
    k_eps: float | None = None
    """In the K norm, if it is not ``eps``."""


@dataclass(frozen=True)
class Eagle3Weights:
    """Weights of EAGLE-3's KV-only pass (arXiv 2503.01840): one layer, hidden size H, V embeddings."""

    fc: Tensor
    """[H, C*Ht]"""
    embedding: Tensor
    """[V, H]"""
    input_norm: Tensor
    """[H], the layer's ``input_layernorm``, applied to the embedding."""
    hidden_norm: Tensor
    """[H], applied to the fused feature."""
    kv: Tensor
    """[2*Hkv*D, 2H], K rows and then V rows; columns are [embedding | fused feature]."""
    eps: float
    """Added to the mean square in every norm."""
    fc_bias: Tensor | None = None
    """[H]"""
    kv_bias: Tensor | None = None
    """[2*Hkv*D]"""
    k_norm: Tensor | None = None
    """[1, D], for checkpoints whose layer norms K heads."""
    chunk_norms: Tensor | None = None
    """[C, Ht]: the ``fc_norm`` variant, one RMSNorm for each captured layer before ``fc``."""
    concat_norm: Tensor | None = None
    """[C*Ht]: the ``norm_before_fc`` variant, one RMSNorm over the whole concatenation."""


class MixedBlock(NamedTuple):
    """The packed rows of a verification whose requests have different widths."""

    input_ids: Tensor
    """[T] int64: each request's bonus token and then its drafts; 0 on padding rows."""
    positions: Tensor
    """[T] int64; 0 on padding rows."""
    cache_slots: Tensor
    """[T] int64; 0 on padding rows."""
    request_of_row: Tensor
    """[T] int64, index into the batch; -1 on padding rows."""
    qo_indptr: Tensor
    """[B + 1] int32: request b owns rows ``qo_indptr[b] : qo_indptr[b + 1]``."""
    ids_and_requests: Tensor
    """[2, T] int64: ``input_ids`` and ``request_of_row``, which are views of it, for one copy to the host."""


class GraphSlots(NamedTuple):
    """The tensors from which a verification's graph reads its requests. The rows of a slot without a request are
    padding."""

    widths: Tensor
    """[S] int32, rows of each slot."""
    qo_indptr: Tensor
    """[S + 1] int32: slot s owns rows ``qo_indptr[s] : qo_indptr[s + 1]``."""
    seq_lens: Tensor
    """[S] int64, tokens that have KV before these rows."""
    ends: Tensor
    """[S] int32, ``seq_lens + widths``."""
    request_slots: Tensor
    """[S] int64; 0 without a request."""


class PassInputs(NamedTuple):
    """The inputs of a draft pass for S requests."""

    request_slots: Tensor
    """[S] int64."""
    seq_lens: Tensor
    """[S] int64."""
    bonus: Tensor
    """[S] int64, the last committed token of each."""
    limits: Tensor
    """[S] int64, drafts at most."""
    tail: Tensor
    """[S, columns] in the rings' dtype: the feature that a chain starts from, of length - 1."""
    calibration: Tensor
    """[C] float32, chances by which all requests' drafts are cut (`cut_drafts`)."""


class Claims(NamedTuple):
    """Positions [begin, end) that each of A drafters ingests of S requests; none if end <= begin."""

    request_slots: Tensor
    """[S] int64."""
    begins: Tensor
    """[A, S] int64."""
    ends: Tensor
    """[A, S] int64."""


class SamplingTable(NamedTuple):
    """Sampling parameters of the request in each slot; slot 0 has no request."""

    parameters: Tensor
    """[slots, 4] float32, contiguous: temperature above 0, top_k, top_p, min_p; min_p below 0: its absolute value, and
    top_p counts from what top_k keeps."""
    seeds: Tensor
    """[slots] int64, seed of each request's noise."""


class PenaltyTable(NamedTuple):
    """Penalties and bias of the request in each slot; slot 0 has no request."""

    factors: Tensor
    """[slots, 3] float32, contiguous: frequency, presence and repetition penalty."""
    places: Tensor
    """[slots, 4] int64, contiguous: a request's row of ``bias``, its row while it must not end, the position of its
    first generated token, and the position from which on it may end. The first is below 0 without penalties."""
    bias: Tensor
    """[places, V] float32, contiguous."""
    counts: Tensor
    """[places, V] int32, contiguous: scratch memory for counts of tokens."""


class Committed(NamedTuple):
    """The outcome of a verification for each request."""

    accept_lens: Tensor
    """[B] int32, accepted drafts plus the bonus token; 0 for a request without rows."""
    tokens: Tensor
    """[B, stride] int64: the committed tokens, then 0."""
    bonus: Tensor
    """[B] int64, the last committed token, which starts the next block; 0 without rows."""
    seq_lens: Tensor
    """[B], ``seq_lens + accept_lens`` in the dtype of ``seq_lens``."""
    last_rows: Tensor
    """[B] int64, the packed row of the last committed token; the first row of a request without rows."""
