"""Compute the target's matrix products by a CPU's matrix kernels (`whiflash_kernels.packed`).

The wrappers here replace methods of SGLang (`whiflash_cpu/seam_tables.py`). Packed copies are made when a model is
loaded and again whenever its weights are updated; other code sees the layer's weight itself, not the copy.
"""

import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from whiflash_kernels.cpu.compiler import available
from whiflash_kernels.cpu.products import compiled_products
from whiflash_kernels.packed import has_kernel, is_packed, linear, packable, unpack, use
from whiflash_kernels.processor import onednn_has_bfloat16

from whiflash_sglang.embedded import cache_root
from whiflash_sglang.formats import packed

logger = logging.getLogger(__name__)

_had_room: WeakSet[nn.Module] = WeakSet()
"""Models that were packed once. An update frees their copies first, so the same memory is available for new ones."""


def use_compiled_products() -> None:
    """Use a compiled bfloat16 product if oneDNN has none: on a CPU with only AVX2, torch takes 4 to 7 times as long."""
    if not onednn_has_bfloat16():
        use(available("CPU multiplication", compiled_products, cache_root() / "compiled"))


def pack_model(model: nn.Module) -> None:
    """Pack the model's unquantised matrices; log the memory that the copies take, or why none were made."""
    missing = {id(weight): weight for weight in _weights(model) if packable(weight) and not is_packed(weight)}
    size = sum(weight.nbytes for weight in missing.values())
    taken = packed.pack(missing.values(), at_most=size if model in _had_room else None)
    if taken:
        _had_room.add(model)
        logger.info("weights laid out for this CPU's matrix kernels: %.2f GB more memory", taken / 1e9)
    elif size:
        share = f"{packed.MEMORY_SHARE:.0%}"
        logger.info(
            "weights are not laid out for this CPU's matrix kernels: the copies' %.2f GB would be more than %s of the "
            "free memory; small batches take up to twice as long without",
            size / 1e9,
            share,
        )


def _weights(model: nn.Module) -> Iterator[Tensor]:
    from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
    from sglang.srt.utils import use_intel_amx_backend

    for name, module in model.named_modules(remove_duplicate=False):
        weight = getattr(module, "weight", None)
        if use_intel_amx_backend(module):  # the usual shape, but the block layout of SGLang's own kernels
            continue
        plain = type(getattr(module, "quant_method", None)) is UnquantizedLinearMethod
        if isinstance(weight, Tensor) and (plain or name.rpartition(".")[2] == "lm_head"):
            yield weight


def apply(upstream: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Wrap `UnquantizedLinearMethod.apply`: multiply by the weight's packed copy if it has one."""

    def apply(self: Any, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        weight = layer.weight
        if isinstance(weight, Tensor) and has_kernel(weight):
            return linear(x, weight, bias)
        return upstream(self, layer, x, bias)

    return apply


def compute_lm_head(upstream: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Wrap `LogitsProcessor._compute_lm_head` (hidden states [T, H] → logits [T, V]) to use the head's packed copy."""

    def compute(
        self: Any,
        hidden_states: Tensor,
        lm_head: nn.Module,
        embedding_bias: Tensor | None = None,
        *,
        out: Tensor | None = None,
    ) -> Tensor:
        into = {} if out is None else {"out": out}
        weight = getattr(lm_head, "weight", None)
        otherwise = (
            embedding_bias is not None
            or self.use_fp32_lm_head
            or self.rl_on_policy_target is not None
            or hasattr(lm_head, "set_lora")
        )
        if otherwise or not isinstance(weight, Tensor) or not has_kernel(weight):
            return upstream(self, hidden_states, lm_head, embedding_bias, **into)
        return linear(hidden_states.to(torch.bfloat16), weight)

    return compute


def _model_of(holder: Any) -> nn.Module:
    """Return the model of a weight updater, a weight checker or a model runner."""
    for getter in ("get_model", "_get_model"):
        if hasattr(holder, getter):
            return getattr(holder, getter)()
    return holder.model


def before_updates(upstream: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a method that begins a session of weight updates or writes some weights: packed copies are dropped first.

    Only the session's end makes new copies (:func:`around_updates`): until then more weights may come, and SGLang lets
    other processes write into the weights' memory directly.
    """

    @functools.wraps(upstream)
    def update(self: Any, *args: Any, **kwargs: Any) -> Any:
        unpack(_weights(_model_of(self)))
        return upstream(self, *args, **kwargs)

    return update


def around_updates(upstream: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a method that writes into a loaded model's weights: copies are dropped before it and made again after it."""

    @functools.wraps(upstream)
    def update(self: Any, *args: Any, **kwargs: Any) -> Any:
        model = _model_of(self)
        unpack(_weights(model))
        try:
            return upstream(self, *args, **kwargs)
        finally:
            pack_model(model)

    return update
