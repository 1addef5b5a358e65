"""SGLang's norms, activations and rotations on the CPU as compiled functions (:mod:`whiflash_kernels.layers`), where
torch runs a dozen operators each; decoder layers that call them directly; torch versions of gates and experts.

Functions are registered for exact classes, as SGLang requires of a platform. Inputs that the kernels do not support go
to the class's own torch code, and all inputs do if the kernels cannot be compiled.
"""

from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.layers.moe.token_dispatcher import StandardCombineInput
from torch import Tensor, nn
from whiflash_kernels import layers
from whiflash_kernels.cpu.compiler import available
from whiflash_kernels.cpu.layers import compiled_layers
from whiflash_kernels.packed import linear

from whiflash_cpu.attention import CpuAttentionBackend
from whiflash_sglang.embedded import cache_root
from whiflash_sglang.files.cpu import ATTENTION_BACKEND


def use_compiled_layers() -> None:
    """Let targets and drafters compute norms, activations and rotations by compiled functions, if possible."""
    if compiled := available("CPU arithmetic of layers", compiled_layers, cache_root() / "compiled"):
        layers.use(compiled)
        _register()


def _register() -> None:
    """Register forwards with SGLang's layers that look up the compiled functions at every call."""
    from sglang.kernels.fused_op import BaseFusedOp
    from sglang.srt.layers.activation import SiluAndMul
    from sglang.srt.layers.layernorm import GemmaRMSNorm, RMSNorm
    from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding
    from sglang.srt.platforms import current_platform

    key = current_platform.get_dispatch_key_name()
    BaseFusedOp.register_oot_forward(RMSNorm, rms_norm, key)
    BaseFusedOp.register_oot_forward(GemmaRMSNorm, gemma_norm, key)
    BaseFusedOp.register_oot_forward(SiluAndMul, silu_and_mul, key)
    for kind in _with_subclasses(RotaryEmbedding):
        if kind.forward_native is RotaryEmbedding.forward_native:  # others compute other angles
            BaseFusedOp.register_oot_forward(kind, rotate, key)


def _with_subclasses(kind: Any) -> list[Any]:
    children: list[Any] = kind.__subclasses__()
    return [kind, *(below for child in children for below in _with_subclasses(child))]


def rms_norm(
    self: Any,
    x: Tensor,
    residual: Tensor | None = None,
    post_residual_addition: Tensor | None = None,
    quant_linear: Any = None,
) -> Any:
    """Replace the forward of `RMSNorm`: x [..., H] → its norm; with `residual`, the norm of their sum, and the sum."""
    plain = self.variance_size_override is None and self.override_orig_dtype is None
    if not plain or self.cast_x_before_out_mul or self.fp32_residual:
        return self.forward_native(x, residual, post_residual_addition)
    return _norm(self, x, residual, post_residual_addition, 0.0)


def gemma_norm(
    self: Any, x: Tensor, residual: Tensor | None = None, post_residual_addition: Tensor | None = None
) -> Any:
    """Replace the forward of `GemmaRMSNorm`, which multiplies by 1 + weight."""
    return _norm(self, x, residual, post_residual_addition, 1.0)


def _norm(self: Any, x: Tensor, residual: Tensor | None, addition: Tensor | None, offset: float) -> Any:
    weight = self.weight
    tensors = (x, weight) if residual is None else (x, weight, residual)
    compiled = layers.compiled_for(*tensors)
    if addition is not None or compiled is None:
        return self.forward_native(x, residual, addition)
    total, normed = compiled.norm(x, weight, self.variance_epsilon, offset, residual)
    return normed if residual is None else (normed, total)


def silu_and_mul(self: Any, x: Tensor) -> Tensor:
    """Replace the forward of `SiluAndMul`: x [..., 2 * H] → [..., H]."""
    compiled = layers.compiled_for(x)
    return self.forward_native(x) if compiled is None else compiled.silu_and_mul(x)


def rotate(
    self: Any,
    positions: Tensor,
    query: Tensor,
    key: Tensor,
    offsets: Tensor | None = None,
    fused_set_kv_buffer_arg: Any = None,
) -> tuple[Tensor, Tensor]:
    """Rotate query and key [T, heads * D] in place: `RotaryEmbedding`'s forward, as SGLang's kernels do."""
    compiled = layers.compiled_for(query, key)
    plain = (
        self.is_neox_style
        and offsets is None
        and fused_set_kv_buffer_arg is None
        and positions.ndim == 1
        and positions.dtype == torch.int64
        and positions.is_contiguous()
    )
    if compiled is None or not plain:
        return self.forward_native(positions, query, key, offsets, fused_set_kv_buffer_arg)
    q, k = (x.view(len(positions), -1, self.head_size) for x in (query, key))
    compiled.rotate(q, k, self.cos_sin_cache, positions)
    return query, key


_PLAIN = "_whiflash_plain"
"""Attribute of a layer that stores the result of `_is_plain` from its first forward."""


def forward(upstream: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the forward of `LlamaDecoderLayer` and `Qwen2DecoderLayer` with a shorter one for one CPU rank:
    hidden states [T, H] and the batch's residual stream → the next hidden states and stream.

    It skips the checks that SGLang repeats at every stage and that have one answer here: stage boundaries (sums over
    ranks, scattered rows), linear layers' groups, attention's graphs. They take longer than the layer's norms, rotation
    and activation together. The residual stream has SGLang's form, so layers of both kinds may follow each other. The
    first layer of a model uses SGLang's forward.
    """
    from sglang.srt.layers.layer_boundary.residual.add_norm import PLAIN_ADD
    from sglang.srt.model_executor.forward_context import get_attn_backend

    def forward(
        self: Any, positions: Tensor, hidden_states: Tensor, forward_batch: Any, capture_output: Any = None
    ) -> Any:
        stream, backend = forward_batch.residual_stream, get_attn_backend()
        pending = None if stream is None else stream.pending
        usual = (
            pending is not None
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
        if capture_output is not None:
            capture_output(residual)  # the call copies it, so the tensor may be overwritten
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
    """Whether a layer has only SGLang's own unquantised parts, all of them on this rank and without forward hooks."""
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
    attention, mlp = parts.self_attn, parts.mlp
    products = [attention.qkv_proj, attention.o_proj, mlp.gate_up_proj, mlp.down_proj]
    whole = (linears.QKVParallelLinear, linears.RowParallelLinear, linears.MergedColumnParallelLinear)
    return (
        all(type(linear) in whole and not linear.skip_bias_add for linear in products)  # LoRA wraps them
        and all(type(linear.quant_method) is UnquantizedLinearMethod for linear in products)
        and type(attention.attn) is RadixAttention
        and not any(module._forward_hooks or module._forward_pre_hooks for module in layer.modules())
    )


def attention_backends_of(cfg: Any) -> tuple[str | None, str | None]:
    """Return the (prefill, decode) attention backends that SGLang's rules for single models compare.

    Upstream lists by name the backends that serve gpt-oss (attention sinks and windows) and Gemma 4 (windows, heads of
    two sizes). Ours supports the same there as Triton's, so "triton" is returned for it.
    """
    base = cfg.attention_backend
    named = (cfg.prefill_attention_backend or base, cfg.decode_attention_backend or base)
    prefill, decode = ("triton" if name == ATTENTION_BACKEND else name for name in named)
    return prefill, decode


def fused_gate_sigmoid_mul(
    hidden_states: torch.Tensor, gate_weight: torch.Tensor, shared_output: torch.Tensor
) -> torch.Tensor:
    """Return ``sigmoid(hidden_states @ gate_weight) * shared_output``, [T, H] in the dtype of ``shared_output``.

    hidden_states, shared_output: [T, H]. gate_weight: [H] or [1, H].
    """
    gate = torch.sigmoid(hidden_states.float() @ gate_weight.view(-1, 1).float())
    return (gate * shared_output.float()).to(shared_output.dtype)


def fused_gate_sigmoid_mul_add(
    hidden_states: torch.Tensor,
    gate_weight: torch.Tensor,
    shared_output: torch.Tensor,
    final_hidden_states: torch.Tensor,
) -> None:
    """Add :func:`fused_gate_sigmoid_mul` of the first three arguments to ``final_hidden_states`` [T, H] (mutable)."""
    final_hidden_states += fused_gate_sigmoid_mul(hidden_states, gate_weight, shared_output)


def experts_of_kimi(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """Compute Kimi Linear's `KimiMoE`, routed scaling factor included. Its own forward leaves that to the experts'
    kernel, but SGLang's torch experts do not apply it. hidden_states: [T, H]. Returns [T, H]."""
    routed = self.experts(hidden_states, self.topk(hidden_states, self.gate(hidden_states)[0]))
    routed = routed * self.routed_scaling_factor
    return routed if self.num_shared_experts is None else routed + self.shared_experts(hidden_states)


def of_own_experts(upstream: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `UnquantizedFusedMoEMethod.forward_native` for experts on several ranks. An id of -1 means another rank's
    expert, but upstream's loop over experts would use it as an index. So upstream receives only this rank's pairs of a
    token and an expert, each as a token with one expert.
    """

    def forward_native(self: Any, layer: Any, dispatch_output: Any) -> Any:
        if layer.moe_ep_size == 1:
            return upstream(self, layer, dispatch_output)
        states, chosen = dispatch_output.hidden_states, dispatch_output.topk_output
        tokens, places = (chosen.topk_ids >= 0).nonzero(as_tuple=True)
        found = torch.zeros_like(states)
        if len(tokens):
            ids, weights = (t[tokens, places, None] for t in (chosen.topk_ids, chosen.topk_weights))
            own = chosen._replace(topk_ids=ids, topk_weights=weights)
            pairs = dispatch_output._replace(hidden_states=states[tokens], topk_output=own)
            found.index_add_(0, tokens, upstream(self, layer, pairs).hidden_states)
        return StandardCombineInput(hidden_states=found)

    return forward_native
