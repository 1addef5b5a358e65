"""What SGLang's backends of layers with a recurrent state have in common on the CPU.

They stand in for backends whose kernels are Triton's and whose verifications have one width: here rows are packed. A
verification reads the states and writes down the one behind each of its rows; the commit follows
(:func:`whiflash_sglang.models.recurrent.scatter_mamba_states_after_mtp_verify`).
"""

from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.layers.attention.hybrid_linear_attn_backend import MambaAttnBackendBase

from whiflash_sglang.models.recurrent import (
    Rows,
    activated,
    packed_convolution,
    packed_verification,
)

Rule = Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
"""What follows the convolution, of its outputs and the requests' states; `starts`, `rows`, `every` and `marks`, and
what comes back, are those of `recurrence`."""


class CpuRecurrentBackend(MambaAttnBackendBase):  # type: ignore[misc]
    """Prefill, decoding and verification of one kind of layer: a convolution, and a matrix that a rule updates."""

    def __init__(self, model_runner: Any) -> None:
        super().__init__(model_runner)
        self.conv_states_shape = model_runner.req_to_token_pool.mamba_pool.mamba_cache.conv[0].shape

    def cache_of(self, layer_id: int) -> Any:
        """SGLang's record of a layer's states: ``conv[0]`` [slots, D, K - 1], ``temporal`` [slots, H, X, Y], and of a
        verification ``intermediate_conv_window[0]`` and ``intermediate_ssm``, [requests + 1, steps, …] of each."""
        return self.req_to_token_pool.mamba2_layer_cache(layer_id)

    def go_on(
        self,
        layer_id: int,
        forward_batch: Any,
        x: torch.Tensor,
        convolution: tuple[torch.Tensor, torch.Tensor | None, str | None],
        rule: Rule,
    ) -> torch.Tensor:
        """Convolve `x` [T, D] (weight, bias, activation), apply `rule`, keep what the next forward goes on from.

        Returns the rule's outputs, [T, …].
        """
        metadata, mode, cache = self.forward_metadata, forward_batch.forward_mode, self.cache_of(layer_id)
        starts, slots = metadata.query_start_loc.long(), metadata.mamba_cache_indices.long()
        rows, verifies = Rows.of(starts, len(x)), mode.is_target_verify()
        states, (weight, bias, activation) = cache.temporal[slots], convolution
        if verifies:
            mixed = packed_verification(x, weight, bias, cache, slots, rows)
        else:
            inputs = cache.conv[0][slots]
            if mode.is_extend():
                goes_on = forward_batch.extend_prefix_lens > 0
                inputs = inputs.to(x.dtype).where(goes_on[:, None, None], 0.0)
                states = states.where(goes_on[:, None, None, None], 0.0)
            mixed, behind = packed_convolution(x, weight, bias, inputs, rows)
        marks = _marks(metadata, forward_batch)
        out, after, marked = rule(
            activated(mixed, activation), states, starts=starts, rows=rows, every=verifies, marks=marks
        )
        if verifies:
            cache.intermediate_ssm[: after.shape[0], : after.shape[1]] = after.to(states.dtype)
        else:
            cache.conv[0][slots] = behind[starts[1:] - 1].to(cache.conv[0].dtype)
            cache.temporal[slots] = after.to(states.dtype)
        if marks is not None:
            kept = marks > 0
            beside = metadata.mamba_track_indices[kept]
            cache.conv[0][beside] = behind[(starts[:-1] + marks - 1)[kept]].to(cache.conv[0].dtype)
            cache.temporal[beside] = marked[kept].to(states.dtype)
        return out


def _marks(metadata: Any, forward_batch: Any) -> torch.Tensor | None:
    """[B] int64: of how many of its rows each request's state is kept for the tree too, 0 for none; None where nobody's
    is. Of a verification the commit keeps them.
    """
    if not metadata.has_mamba_track_mask or forward_batch.forward_mode.is_target_verify():
        return None
    mask = forward_batch.mamba_track_mask
    if forward_batch.forward_mode.is_decode():
        return mask.long()
    return forward_batch.mamba_track_aligned_lens().long().where(mask, 0)
