"""SGLang's layers on the CPU: what is compiled agrees with their torch code, and what is not taken goes there."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from engine import engine
from sglang.srt.layers.activation import SiluAndMul
from sglang.srt.layers.aux_hidden_states import AuxHiddenStateList
from sglang.srt.layers.layernorm import GemmaRMSNorm, RMSNorm
from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding
from torch import Tensor
from whiflash_kernels import layers as kernels

from whiflash_cpu import layers

from .conftest import Checkpoints

PROMPTS = [[7, 8, 9, 10], [50, 60, 70], list(range(100, 130))]


@pytest.fixture
def compiled() -> Iterator[None]:
    layers.use_compiled_layers()
    if kernels._compiled is None:
        pytest.skip("nothing can be compiled here")
    with torch.no_grad():
        yield
    kernels.use(None)


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.04)


@pytest.mark.parametrize(("kind", "forward"), [(RMSNorm, layers.rms_norm), (GemmaRMSNorm, layers.gemma_norm)])
def test_norms(kind: Any, forward: Any, compiled: None) -> None:
    norm, x, residual = kind(64).bfloat16(), normal(5, 64), normal(5, 64, seed=1)
    norm.weight.copy_(normal(64, seed=2))
    close(forward(norm, x), norm.forward_native(x))
    close(forward(norm, x, residual), norm.forward_native(x, residual))
    assert torch.equal(residual, normal(5, 64, seed=1)), "SGLang's torch code leaves it as it was"


def test_activations(compiled: None) -> None:
    x = normal(5, 64)
    close(layers.silu_and_mul(SiluAndMul(), x), SiluAndMul().forward_native(x))


def rope() -> RotaryEmbedding:
    return RotaryEmbedding(16, 16, 64, 10_000, True, torch.bfloat16)


def test_rotations(compiled: None) -> None:
    """Queries and keys of one projection, turned where they are."""
    qkv, positions = normal(3, 80), torch.tensor([63, 0, 5])
    q, k, v = qkv.split([48, 16, 16], dim=-1)
    expected = rope().forward_native(positions, q, k)
    before = v.clone()
    found = layers.rotate(rope(), positions, q, k)
    close(found, expected)
    assert found[0].data_ptr() == q.data_ptr()
    assert torch.equal(v, before)


def test_what_is_not_taken_goes_to_torch(compiled: None) -> None:
    x = normal(3, 64)
    partial = RMSNorm(64, var_hidden_size=32).bfloat16()
    half, added = RMSNorm(64).half(), normal(3, 64, seed=1)
    norm = RMSNorm(64).bfloat16()
    assert torch.equal(layers.rms_norm(partial, x), partial.forward_native(x))
    assert torch.equal(layers.rms_norm(half, x.half()), half.forward_native(x.half()))
    for found, expected in zip(layers.rms_norm(norm, x, added, x), norm.forward_native(x, added, x), strict=True):
        assert torch.equal(found, expected)
    q, k, offsets = normal(3, 32), normal(3, 16), torch.tensor([4, 4, 4])
    found = layers.rotate(rope(), torch.arange(3), q, k, offsets)
    for one, other in zip(found, rope().forward_native(torch.arange(3), q, k, offsets), strict=True):
        assert torch.equal(one, other)


def test_the_short_way_through_a_layer_is_the_same(checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    """Token by token, logprob by logprob, feature by feature; a hook keeps a layer on SGLang's way."""
    taken: list[int] = []
    features: list[Tensor] = []
    attention = layers._attention

    def watched(self: Any, *arguments: Any) -> Tensor:
        taken.append(self.attn.layer_id)
        return attention(self, *arguments)

    def capture(self: list[Tensor], hidden: Tensor, *, owned: bool = False) -> None:
        self.append(hidden.clone())
        features.append(self[-1])

    monkeypatch.setattr(layers, "_attention", watched)
    monkeypatch.setattr(AuxHiddenStateList, "capture", capture)
    with engine(checkpoints.target, dtype="bfloat16", disable_radix_cache=True) as e:
        model = e.scheduler.tp_worker.model_runner.model
        found, model.model.layers_to_capture, model.capture_aux_hidden_states = model.model.layers, [1], True

        def answers(name: str) -> list[Any]:
            for i, prompt in enumerate(PROMPTS):
                e.submit(f"{name}{i}", prompt, max_new_tokens=16, return_logprob=True)
            e.run()
            made = [e.requests[f"{name}{i}"] for i in range(len(PROMPTS))]
            return [(list(r.output_ids), r.logprob.output_token_logprobs_val) for r in made]

        short = answers("short")
        assert set(taken) == set(range(1, len(found))), "the first layer of a stack starts the residual stream"
        kept = features.copy()
        taken.clear()
        features.clear()
        for layer in found:
            del layer.__dict__[layers._PLAIN]
            layer.mlp.register_forward_hook(lambda *_: None)
        assert answers("whole") == short
        assert taken == []
        assert len(kept) == len(features) >= 16
        assert all(torch.equal(one, other) for one, other in zip(kept, features, strict=True))
