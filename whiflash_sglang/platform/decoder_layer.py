"""A decoder layer of Llama's or Qwen2's shape on one CPU rank, without what SGLang decides anew at every stage.

What is left out decides nothing here: boundaries between stages (sums over ranks, rows that are scattered), linear
layers' groups, attention's graphs. It takes longer than the layer's norms, rotation and activation together. The
residual stream is kept as SGLang keeps it, so layers of both ways may follow each other; results are the same.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from whiflash_kernels.packed import linear

from whiflash_sglang.platform.attention import CpuAttentionBackend

_PLAIN = "_whiflash_plain"
"""A layer's attribute: whether `_is_plain` was found of it at its first forward."""


def forward(upstream: Callable[..., Any]) -> Callable[..., Any]:
    """Of `LlamaDecoderLayer` and `Qwen2DecoderLayer`: hidden states [T, H] and the batch's residual stream → the same.

    A stack's first layer, and one whose input somebody captures, take SGLang's way.
    """
    from sglang.srt.layers.layer_boundary.residual.add_norm import PLAIN_ADD
    from sglang.srt.model_executor.forward_context import get_attn_backend

    def forward(
        self: Any, positions: Tensor, hidden_states: Tensor, forward_batch: Any, capture_output: Any = None
    ) -> Any:
        stream, backend = forward_batch.residual_stream, get_attn_backend()
        pending = None if stream is None else stream.pending
        usual = (
            capture_output is None
            and pending is not None
            and pending.value is hidden_states
            and pending.owed is None
            and pending.update.is_plain_add
            and stream.residual is not None
            and type(backend) is CpuAttentionBackend
            and not forward_batch.forward_mode.is_idle()
        )
        plain = self.__dict__.get(_PLAIN)
        if plain is None:
            plain = self.__dict__[_PLAIN] = _is_plain(self)
        if not (usual and plain):
            return upstream(self, positions, hidden_states, forward_batch, capture_output)
        normed, residual = self.input_layernorm(hidden_states, stream.residual)
        attended = _attention(self.self_attn, positions, normed, forward_batch, backend)
        normed, residual = self.post_attention_layernorm(attended, residual)
        mlp = self.mlp
        mixed = _times(mlp.down_proj, mlp.act_fn(_times(mlp.gate_up_proj, normed)))
        stream.write(residual)
        return stream.record(mixed, PLAIN_ADD)

    return forward


def _attention(
    self: Any, positions: Tensor, normed: Tensor, forward_batch: Any, backend: CpuAttentionBackend
) -> Tensor:
    q, k, v = _times(self.qkv_proj, normed).split([self.q_size, self.kv_size, self.kv_size], dim=-1)
    q, k = self.rotary_emb(positions, q, k)
    heads = (-1, self.num_kv_heads, self.head_dim)
    attended = backend.forward_extend(q, k.view(heads), v.view(heads), self.attn, forward_batch)
    return _times(self.o_proj, attended)


def _times(layer: Any, x: Tensor) -> Tensor:
    return linear(x, layer.weight, layer.bias)


def _is_plain(layer: nn.Module) -> bool:
    """Whether a layer is made of SGLang's own unquantised parts, whole on this rank, and nobody hooks into them."""
    from sglang.srt.layers import linear as linears
    from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.models import llama, qwen2
    from sglang.srt.runtime_context import get_parallel

    own = (
        (llama.LlamaDecoderLayer, llama.LlamaAttention, llama.LlamaMLP),
        (qwen2.Qwen2DecoderLayer, qwen2.Qwen2Attention, qwen2.Qwen2MLP),
    )
    parts: Any = layer
    if (type(layer), type(parts.self_attn), type(parts.mlp)) not in own or get_parallel().tp_size > 1:
        return False
    found = list(layer.modules())
    products = [part for part in found if isinstance(part, linears.LinearBase)]
    whole = (linears.QKVParallelLinear, linears.RowParallelLinear, linears.MergedColumnParallelLinear)
    return (
        len(products) == 4
        and all(type(part) in whole and not part.skip_bias_add for part in products)
        and all(type(part.quant_method) is UnquantizedLinearMethod for part in products)
        and type(parts.self_attn.attn) is RadixAttention
        and not any(part._forward_hooks or part._forward_pre_hooks for part in found)
    )
