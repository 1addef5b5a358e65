"""Torch versions of the Triton-only operators that targets use beside attention; see
:mod:`whiflash_sglang.platform.seams`."""

from typing import Any

import torch

from whiflash_sglang.device.cpu import ATTENTION_BACKEND


def attention_backends_of(cfg: Any) -> tuple[str | None, str | None]:
    """(prefill, decode) attention backends as the rules for single models see them.

    Upstream lists the backends that serve gpt-oss (attention sinks beside windows) and Gemma 4 (windows, heads of two
    sizes) by name. Ours does what Triton's does there, so it goes by that name.
    """
    base = cfg.attention_backend
    named = (cfg.prefill_attention_backend or base, cfg.decode_attention_backend or base)
    prefill, decode = ("triton" if name == ATTENTION_BACKEND else name for name in named)
    return prefill, decode


def fused_gate_sigmoid_mul(
    hidden_states: torch.Tensor, gate_weight: torch.Tensor, shared_output: torch.Tensor
) -> torch.Tensor:
    """``sigmoid(hidden_states @ gate_weight) * shared_output``.

    Args:
        hidden_states, shared_output: [T, H]. gate_weight: [H] or [1, H].

    Returns:
        [T, H] in the dtype of ``shared_output``, a new tensor.
    """
    gate = torch.sigmoid(hidden_states.float() @ gate_weight.view(-1, 1).float())
    return (gate * shared_output.float()).to(shared_output.dtype)


def fused_gate_sigmoid_mul_add(
    hidden_states: torch.Tensor,
    gate_weight: torch.Tensor,
    shared_output: torch.Tensor,
    final_hidden_states: torch.Tensor,
) -> None:
    """``final_hidden_states`` [T, H] (mutable) += :func:`fused_gate_sigmoid_mul` of the others."""
    final_hidden_states += fused_gate_sigmoid_mul(hidden_states, gate_weight, shared_output)


def experts_of_kimi(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """In place of the forward of Kimi Linear's `KimiMoE`, which leaves the routed experts' factor to their kernel, and
    SGLang's torch experts leave it out. hidden_states: [T, H]. Returns [T, H]."""
    routed = self.experts(hidden_states, self.topk(hidden_states, self.gate(hidden_states)[0]))
    routed = routed * self.routed_scaling_factor
    return routed if self.num_shared_experts is None else routed + self.shared_experts(hidden_states)
