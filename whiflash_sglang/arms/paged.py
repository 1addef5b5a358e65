"""Parts that every neural arm shares: KV beside the target's slots, attention over it, drafts as long as they pay."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from whiflash_kernels import DFlashWeights, Drafts, Eagle3Weights, PassInputs, draft_attention, packed

from whiflash_sglang.arms.base import KVDrafter
from whiflash_sglang.arms.length import DraftLength
from whiflash_sglang.cache.backlog import FeatureRows
from whiflash_sglang.cache.tokens import DraftKV
from whiflash_sglang.device.capture import CapturedPass, Recorder, graded
from whiflash_sglang.formats.choice import Choice
from whiflash_sglang.formats.dflash.dflash import DFlashDrafter
from whiflash_sglang.formats.dflash.dflash_config import LayerSpan
from whiflash_sglang.formats.eagle3 import Eagle3Drafter
from whiflash_sglang.formats.layers import Attend, AttentionShape
from whiflash_sglang.formats.packed import pack
from whiflash_sglang.prices.costs import Worth
from whiflash_sglang.records.core import DraftBatch
from whiflash_sglang.records.request import Request

LOGIT_BYTES = 2.5
"""Bytes that choosing takes at its peak for one logit of 16 bits on a GPU, itself included: most of what a pass takes.

Held to it by `tests/worker/test_memory.py`.
"""

MOST_ROWS = 128
"""Ingested rows that attend at once: on a CPU each copies what it sees."""


class PagedArm(KVDrafter):
    """Base of the arms that keep KV.

    Args:
        layers: draft layers with KV. shape: heads of each. dtype, device: the target's.
    """

    def __init__(self, layers: int, shape: AttentionShape, dtype: torch.dtype, device: torch.device) -> None:
        self._layers, self._shape, self._dtype, self._device = layers, shape, dtype, device
        self.length = DraftLength(device)
        self._captured: dict[int, CapturedPass[Drafts]] | None = None
        self._inputs: DraftBatch

    @abstractmethod
    def whole(self, batch: DraftBatch, wanted: int) -> Choice:
        """The first `wanted` drafts of every request: target ids [G, wanted] and how sure the drafter is of each.

        Reads nothing on the host.
        """

    def capture(self, recorder: Recorder, inputs: DraftBatch) -> None:
        # Arms share what they read but for their own columns.
        self._inputs = replace(inputs, tail=inputs.tail.new_zeros((len(inputs), self.tail_width)))
        self._captured = {
            length: CapturedPass(
                f"the pass of {self.arm!r}" + f" for {length} drafts" * (length < self.max_drafts),
                partial(self._of_first, length),
                graded(len(inputs)),
                recorder,
            )
            for length in reversed(self.lengths)
        }

    def _of_first(self, length: int, size: int) -> Drafts:
        inputs = self._inputs.first(size)
        return self.cut(*self.whole(inputs, length), inputs)

    def place(self, requests: int) -> PassInputs | None:
        if self._captured is None:
            return None
        size = self._captured[self.max_drafts].size_for(requests)
        return None if size is None else self._inputs.place(size)

    @abstractmethod
    def logits_at_once(self, requests: int) -> int:
        """How many logits a pass for so many requests holds at a time."""

    def captured_bytes(self, requests: int) -> int:
        return int(self.logits_at_once(requests) * LOGIT_BYTES)

    def captured_for(self, batch: DraftBatch) -> CapturedPass[Drafts] | None:
        """The shortest pass that was captured for so many requests and drafts, if one was."""
        if self._captured is None:
            return None
        wanted = max(batch.limits)
        captured = self._captured[min(length for length in self.lengths if length >= wanted)]
        return None if captured.size_for(len(batch)) is None else captured

    def drafted(self, batch: DraftBatch) -> Drafts:
        """`whole` for a batch, and cut; replayed where it was captured: then it is good until the next replay."""
        wanted, size, captured = max(batch.limits), len(batch), self.captured_for(batch)
        if captured is None:
            return self.cut(*self.whole(batch, wanted), batch)
        assert batch.rows.data_ptr() == self._inputs.rows.data_ptr(), "a captured pass reads its own place"
        tokens, counts, alive, confidences, *_ = captured.replay(size)
        assert alive is not None
        assert confidences is not None
        first = slice(size), slice(wanted)
        return Drafts(tokens[first], counts[:size], alive[first], confidences[first])

    def kv_bytes_per_token(self) -> int:
        """Bytes its KV adds to one target slot."""
        return DraftKV.bytes_per_token(self._layers, self._shape.kv_heads, self._shape.head_dim, self._dtype)

    def allocate(self, slots: int) -> None:
        """Allocate KV for `slots` target slots."""
        shape = self._shape
        self.kv = DraftKV(self._layers, slots, shape.kv_heads, shape.head_dim, self._dtype, self._device)

    def calibration(self, requests: Sequence[Request], worth: Worth) -> Sequence[float]:
        """As of `DraftLength`."""
        return self.length.calibration(worth)

    def cut(
        self, tokens: torch.Tensor, confidences: torch.Tensor, batch: DraftBatch, *, passes: int = 1
    ) -> Drafts:
        """`tokens` [B, W] int64, drafted with `confidences` [B, W] float32, as far as they are worth their rows."""
        counts, alive = self.length.cut(confidences, batch)
        return Drafts(tokens, counts, alive, confidences, passes=passes)

    def observe(self, row: int, proposed: int, accepted: int, confidences: Sequence[float]) -> None:
        """`accepted` of its `proposed` drafts of a round were right."""
        self.length.observe(proposed, accepted, confidences)

    def attend_at(
        self, slots: torch.Tensor, batch: DraftBatch, spans: Sequence[LayerSpan], *, extra: int, width: int
    ) -> Attend:
        """Attention of `width` rows of each request that first stores their k and v at `slots` [G * width] int64.

        The rows are the last of n + `extra` entries, of which each layer's rows see what its span says.
        """
        scale = self._shape.head_dim**-0.5

        def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            self.kv.write(layer, slots, k, v)
            return draft_attention(
                q,
                self.kv.k[layer],
                self.kv.v[layer],
                batch.slot_table,
                batch.rows,
                batch.starts,
                extra=extra,
                width=width,
                causal=spans[layer].causal,
                window=spans[layer].window,
                scale=scale,
                longest=batch.longest + extra,
            )

        return attend

    def attend_text(self, rows: FeatureRows) -> Attend:
        """Attention of rows that are ingested: their k and v are stored, then each sees its request up to itself.

        A padding row writes to slot 0, which is nobody's, and sees nothing.
        """
        requests, table = rows.requests, rows.slot_table
        assert requests is not None
        assert table is not None
        scale, slots = self._shape.head_dim**-0.5, rows.slots.clamp(min=0)
        ends = (rows.positions + 1).masked_fill(rows.slots < 0, 0)
        blocks = list(blocks_of(len(rows), rows.runs))

        def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            self.kv.write(layer, slots, k, v)
            parts = []
            for begin, end, width in blocks:
                last = slice(begin + width - 1, end, width)
                parts.append(
                    draft_attention(
                        q[begin:end],
                        self.kv.k[layer],
                        self.kv.v[layer],
                        table,
                        requests[last],
                        ends[last],
                        extra=0,
                        width=width,
                        causal=True,
                        scale=scale,
                    )
                )
            return torch.cat(parts)

        return attend


def blocks_of(rows: int, runs: Sequence[int] | None) -> Iterator[tuple[int, int, int]]:
    """Packed rows cut into (begin, end, width): rows [begin, end) attend at once, and every `width` of them are one
    request's and follow each other.

    If the host knows no `runs`, each row is a run; else a run is cut into powers of two, so that there are few
    widths: a kernel is compiled for each.
    """
    if runs is None:
        yield from ((begin, min(begin + MOST_ROWS, rows), 1) for begin in range(0, rows, MOST_ROWS))
        return
    begin = 0
    for run in runs:
        stop = begin + run
        while begin < stop:
            width = min(1 << (stop - begin).bit_length() - 1, MOST_ROWS)
            yield begin, begin + width, width
            begin += width


def _without_gradients(weight: torch.Tensor) -> torch.Tensor:
    """Itself where it wants none: a packed copy stays with the tensor object, and one is enough."""
    return weight.detach() if weight.requires_grad else weight


def dflash_weights(model: DFlashDrafter) -> DFlashWeights:
    """K and V projections of all layers stacked, so that one product serves the whole catch-up."""
    with torch.no_grad():
        kv, kv_bias, k_norm = model.stacked()
    weights = DFlashWeights(
        fc=_without_gradients(model.fc.weight),
        hidden_norm=model.hidden_norm.scale().detach(),
        kv=kv,
        k_norm=k_norm,
        eps=model.config.rms_norm_eps,
        kv_bias=kv_bias,
        k_eps=model.config.head_norm_eps,
    )
    pack([weights.fc, weights.kv])
    return weights


def eagle3_weights(model: Eagle3Drafter) -> Eagle3Weights:
    """Weights of a one-layer drafter; the norm variants before `fc` included."""
    layer: Any = model.layers[0]
    attention = layer.attention
    norms: list[Any] = list(model.fc_norm or ())
    weights = Eagle3Weights(
        fc=_without_gradients(model.fc.weight),
        embedding=model.target_embedding,
        input_norm=layer.embedding_norm.weight.detach(),
        hidden_norm=layer.hidden_norm.weight.detach(),
        kv=packed.rows(_without_gradients(attention.qkv.weight), slice(attention.query_size, None)),
        kv_bias=None if attention.qkv.bias is None else attention.qkv.bias.detach()[attention.query_size :],
        k_norm=None if attention.k_norm is None else attention.k_norm.weight.detach()[None],
        eps=model.config.rms_norm_eps,
        fc_bias=None if model.fc.bias is None else model.fc.bias.detach(),
        chunk_norms=torch.stack([norm.weight.detach() for norm in norms]) if norms else None,
        concat_norm=None if model.input_norm is None else model.input_norm.weight.detach(),
    )
    pack([weights.fc, weights.kv])
    return weights
