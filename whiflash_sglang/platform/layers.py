"""SGLang's norms, activations and rotations on the CPU: compiled (:mod:`whiflash_kernels.layers`) instead of a dozen
operators of torch each.

Registered for exact classes, as SGLang wants it of a platform; what the kernels do not take goes to the class's own
torch code, and all of it does where they cannot be compiled.
"""

import logging
import os
from typing import Any

import torch
from torch import Tensor
from whiflash_kernels import layers
from whiflash_kernels.cpu.layers import compiled_layers
from whiflash_kernels.processor import has_avx2

from whiflash_sglang.embedded import cache_root

logger = logging.getLogger(__name__)


def use_compiled_layers() -> None:
    """Compute norms, activations and rotations of targets and drafters by compiled functions.

    ``WHIFLASH_KERNELS=torch`` leaves torch's. A log line says if they cannot be had.
    """
    if os.environ.get("WHIFLASH_KERNELS") == "torch" or not has_avx2():
        return
    try:
        layers.use(compiled_layers(cache_root() / "compiled"))
    except OSError as error:
        logger.warning("compiled CPU layers are unavailable, torch's are used: %s", error)
        return
    _register()


def _register() -> None:
    """Let SGLang's layers ask for what is in `whiflash_kernels.layers.use`, at every call."""
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
        if kind.forward_native is RotaryEmbedding.forward_native:  # others turn by other angles
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
    """Of `RMSNorm`: x [..., H] → its norm; with `residual`, the norm of their sum, and the sum."""
    plain = (
        self.variance_size_override is None
        and self.override_orig_dtype is None
        and not (self.cast_x_before_out_mul or self.fp32_residual)
    )
    if not plain:
        return self.forward_native(x, residual, post_residual_addition)
    return _norm(self, x, residual, post_residual_addition, 0.0)


def gemma_norm(
    self: Any, x: Tensor, residual: Tensor | None = None, post_residual_addition: Tensor | None = None
) -> Any:
    """Of `GemmaRMSNorm`, whose weight is relative to one."""
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
    """Of `SiluAndMul`: [..., 2 * H] → [..., H]."""
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
    """Of `RotaryEmbedding`: query and key [T, heads * D], turned where they are, as SGLang's own kernels do."""
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
    rows = len(positions)
    compiled.rotate(
        query.view(rows, -1, self.head_size),
        key.view(rows, -1, self.head_size),
        self.cos_sin_cache,
        positions,
    )
    return query, key
