"""The base of neural arms: KV at the target's slots, attention over it, and drafts cut to the length that pays."""

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
"""Peak bytes per 16-bit logit while a GPU chooses drafts, the logit included: most of the memory of a pass.

`tests/worker/test_memory.py` checks it.
"""

MOST_ROWS = 128
"""Largest number of ingested rows that attend at once: on a CPU each row copies the KV that it sees."""


class PagedArm(KVDrafter):
    """Base of the arms that have KV.

    Args:
        layers: number of draft layers with KV. shape: heads of each. dtype, device: the target's; `build_drafters`
            may give KV another dtype.
    """

    fills = True

    def __init__(self, layers: int, shape: AttentionShape, dtype: torch.dtype, device: torch.device) -> None:
        self._layers, self._shape, self.kv_dtype, self._device = layers, shape, dtype, device
        self.length = DraftLength(device)
        self._captured: dict[int, CapturedPass[Drafts]] | None = None
        self._inputs: DraftBatch

    @abstractmethod
    def whole(self, batch: DraftBatch, wanted: int) -> Choice:
        """Draft `wanted` tokens for every request: target ids [G, wanted] and the drafter's confidence in each.

        Reads nothing on the host.
        """

    def capture(self, recorder: Recorder, inputs: DraftBatch) -> None:
        # Arms share the inputs' memory, except the tail, whose width differs.
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
        """Return the largest number of logits that a pass for `requests` requests holds at a time."""

    def captured_bytes(self, requests: int) -> int:
        return int(self.logits_at_once(requests) * LOGIT_BYTES)

    def captured_for(self, batch: DraftBatch) -> CapturedPass[Drafts] | None:
        """Return the shortest captured pass that drafts enough for the batch; None if none has its size."""
        if self._captured is None:
            return None
        wanted = max(batch.limits)
        captured = self._captured[min(length for length in self.lengths if length >= wanted)]
        return None if captured.size_for(len(batch)) is None else captured

    def draft(self, batch: DraftBatch) -> Drafts:
        """Draft for a batch, and cut the drafts. Those of a captured pass are valid until its next replay."""
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
        """Return the bytes that its KV adds to one target slot."""
        return DraftKV.bytes_per_token(self._layers, self._shape.kv_heads, self._shape.head_dim, self.kv_dtype)

    def allocate(self, slots: int) -> None:
        """Allocate KV for `slots` target slots."""
        shape = self._shape
        self.kv = DraftKV(self._layers, slots, shape.kv_heads, shape.head_dim, self.kv_dtype, self._device)

    def calibration(self, requests: Sequence[Request], worth: Worth) -> Sequence[float]:
        """Return `DraftLength.calibration(worth)`."""
        return self.length.calibration(worth)

    def cut(self, tokens: torch.Tensor, confidences: torch.Tensor, batch: DraftBatch) -> Drafts:
        """Cut `tokens` [B, W] int64, drafted with `confidences` [B, W] float32, to those worth their rows."""
        counts, alive = self.length.cut(confidences, batch)
        return Drafts(tokens, counts, alive, confidences)

    def observe(self, row: int, proposed: int, accepted: int, confidences: Sequence[float]) -> None:
        """Learn from a round in which `accepted` of `proposed` drafts were right."""
        self.length.observe(proposed, accepted, confidences)

    def attend_at(
        self, slots: torch.Tensor, batch: DraftBatch, spans: Sequence[LayerSpan], *, extra: int, width: int
    ) -> Attend:
        """Return attention of `width` rows a request that first stores their k and v at `slots` [G * width] int64.

        The rows are the last of n + `extra` entries. A layer's span says which entries they see.
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
        """Return attention for ingested rows, which first stores their k and v; each row sees its request up to itself.

        A padding row writes to slot 0, which belongs to no request, and sees nothing.
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
    """Cut packed rows into blocks (begin, end, width): rows [begin, end) attend at once, and each `width` successive
    rows of them belong to one request.

    If the host does not know the `runs` of rows per request, width is 1. Otherwise runs are cut into powers of two: a
    kernel is compiled for each width, so there should be few.
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
    """Return `weight` without gradients; the same object if it has none, since a packed copy belongs to an object."""
    return weight.detach() if weight.requires_grad else weight


def dflash_weights(model: DFlashDrafter) -> DFlashWeights:
    """Return a DFlash drafter's ingestion weights. K and V of all layers are stacked: a catch-up is one product."""
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
    """Return the ingestion weights of a one-layer EAGLE-3 drafter, with those norms before `fc` that it has."""
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
