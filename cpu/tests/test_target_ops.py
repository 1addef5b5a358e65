"""Torch functions in the place of targets' Triton operators, against their formulas."""

from types import SimpleNamespace

import torch

from whiflash_cpu import layers


def test_a_shared_expert_is_gated_row_by_row() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, shared, routed = (torch.randn(5, 8, generator=generator) for _ in range(3))
    weight = torch.randn(8, generator=generator)
    gates = [1 / (1 + float(torch.exp(-(row @ weight)))) for row in hidden]
    expected = torch.stack([gate * row for gate, row in zip(gates, shared, strict=True)])
    torch.testing.assert_close(layers.fused_gate_sigmoid_mul(hidden, weight, shared), expected)
    added = routed.clone()
    assert layers.fused_gate_sigmoid_mul_add(hidden, weight, shared, added) is None
    torch.testing.assert_close(added, routed + expected)


def test_only_this_platforms_attention_goes_by_another_name() -> None:
    def named(base: str | None, prefill: str | None = None) -> tuple[str | None, str | None]:
        cfg = SimpleNamespace(attention_backend=base, prefill_attention_backend=prefill, decode_attention_backend=None)
        return layers.attention_backends_of(cfg)

    assert named("whiflash_cpu") == ("triton", "triton")
    assert named("torch_native", "whiflash_cpu") == ("triton", "torch_native")
    assert named(None) == (None, None)
