"""Table of every private SGLang name that the CPU platform replaces; `seams.py` installs the replacements."""

from collections.abc import Callable, Mapping
from functools import wraps
from types import ModuleType
from typing import Any, NamedTuple

import torch
from sglang.srt.layers.dp_attention import memcpy_cpu
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

from whiflash_cpu import collectives, host_copies, layers, packed_weights, recurrent_ops, spec_ops
from whiflash_cpu.attention import CpuAttentionBackend, CpuKVPool, CpuMultiStepDraftBackend
from whiflash_sglang.files.cpu import ATTENTION_BACKEND

_SPECULATIVE = "sglang.kernels.ops.speculative"
_SPEC_TREE = f"{_SPECULATIVE}.spec_tree"
_STATE_SCATTER = "sglang.kernels.ops.mamba.mamba_state_scatter_triton"
_EAGLE_UTILS = "sglang.srt.speculative.eagle_utils"
_DFLASH_UTILS = "sglang.srt.speculative.dflash_utils"
_ELEMENTWISE = "sglang.kernels.ops.elementwise.elementwise"
_WEIGHT_UPDATER = "sglang.srt.model_executor.model_runner_components.weight_updater"
_PARALLEL = "sglang.srt.distributed.parallel_state"
_CONV = "sglang.srt.layers.attention.mamba.causal_conv1d"
_RUNNER = "sglang.srt.model_executor.model_runner"
_UNQUANTISED = "sglang.srt.layers.quantization.unquant"
_SAMPLING = ("tree_speculative_sampling_target_only", "top_k_renorm_prob", "top_p_renorm_prob")


class Seam(NamedTuple):
    """One replaced name: a module's `name`, or the member `Owner.name` of one of its classes."""

    module: str
    name: str
    replacement: Any
    """A function with the parameters of the original, or a value."""
    absent: bool = False
    """Upstream's value on this platform is None or False, or its module skips the import: no operator exists."""
    wraps: bool = False
    """The replacement is made by calling `replacement` with the original."""

    @property
    def path(self) -> str:
        return f"{self.module}:{self.name}"

    def made(self, original: Any) -> Any:
        """Return the replacement of SGLang's `original`."""
        if not self.wraps:
            return self.replacement
        return self.replacement(original.__func__ if isinstance(original, staticmethod) else original)


def _same(module: str, ours: ModuleType, *names: str, absent: bool = False) -> tuple[Seam, ...]:
    """Return a seam for each of the names, which `module` of SGLang and our module `ours` both define."""
    return tuple(Seam(module, name, getattr(ours, name), absent=absent) for name in names)


def _wrapped(module: str, owner: str, name: str, wrap: Callable[[Callable[..., Any]], Any]) -> Seam:
    return Seam(module, f"{owner}.{name}", wrap, wraps=True)


def _tree_mask_mode() -> Any:
    from sglang.kernels.ops.speculative.spec_tree import TreeMaskMode

    return TreeMaskMode.QLEN_ONLY


def _leave_unregistered(buffer: Any, registration_granularity_bytes: int | None = None) -> None:
    """Skip the registration of host memory with a driver: no accelerator copies from it."""


EARLY_SEAMS = _same("sglang.srt.arg_groups.model_hook", layers, "attention_backends_of")
"""Names that SGLang calls while it reads the arguments, also in the launcher (:func:`install_early_seams`)."""

PINNING = (
    "sglang.srt.lora.layers",
    "sglang.srt.lora.backend.torch_backend",
    "sglang.srt.model_executor.forward_batch_info",
)
"""Modules that request pinned tensors from torch, for the target's adapters and for DP attention."""

_NAMES: tuple[Seam, ...] = (
    *_same(f"{_SPECULATIVE}.cache_locs", spec_ops, "assign_draft_cache_locs_contiguous_func"),
    *_same(_SPEC_TREE, spec_ops, "build_tree_kernel_efficient_func", "verify_tree_greedy_func"),
    *_same("sglang.kernels.ops.attention.table_qk_norm_rope", spec_ops, "table_qk_norm_rope_"),
    *_same(_CONV, recurrent_ops, "causal_conv1d_fn", "causal_conv1d_update"),
    *_same(_STATE_SCATTER, recurrent_ops, "scatter_mamba_states_after_mtp_verify"),
    Seam("sglang.srt.layers.dp_attention", "memcpy_func", memcpy_cpu),
    *_same(_PARALLEL, collectives, "reg_all_gather_into_tensor", "reg_reduce_scatter_tensor", "reg_all_to_all_single"),
    *_same(_ELEMENTWISE, layers, "fused_gate_sigmoid_mul", "fused_gate_sigmoid_mul_add"),
    *_same("sglang.srt.mem_cache.allocation", spec_ops, "assign_req_to_token_pool_func", "get_last_loc"),
    Seam("sglang.srt.mem_cache.pool_host.common", "_cuda_host_register", _leave_unregistered),
    *_same(f"{_SPECULATIVE}.eagle", spec_ops, "fill_bonus_tokens_func"),
    *_same(f"{_SPECULATIVE}.gather_spec_extras", spec_ops, "gather_spec_extras"),
    *_same("sglang.kernels.ops.sampling.murmur_hash", spec_ops, "murmur_hash32"),
    Seam(_EAGLE_UTILS, "default_tree_mask_mode", _tree_mask_mode),
    *_same(_EAGLE_UTILS, spec_ops, *_SAMPLING, absent=True),
    *_same(_DFLASH_UTILS, spec_ops, *_SAMPLING, absent=True),
    Seam(_DFLASH_UTILS, "_DFLASH_SAMPLING_VERIFY_AVAILABLE", True, absent=True),
    *(
        seam
        for pool in ("mha", "mla", "mamba")
        for seam in _same(
            f"sglang.srt.mem_cache.pool_host.{pool}",
            host_copies,
            "transfer_kv_direct",
            "transfer_kv_per_layer_direct_pf_lf",
            "transfer_kv_all_layer_direct_lf_pf",
            absent=True,
        )
    ),
)


def _create_draft_backend(upstream: Callable[..., Any]) -> Callable[..., Any]:
    """Add the CPU backend to both maps of the draft backend factory, which are local to its methods."""

    def create(
        self: Any, backend_name: str, backend_map: Any, error_template: str, stamps_children: bool = False
    ) -> Any:
        def ours() -> tuple[str, Any]:
            if not stamps_children:  # only the multi-step decode backend has children to stamp
                return ATTENTION_BACKEND, CpuAttentionBackend(self.draft_model_runner)
            return ATTENTION_BACKEND, CpuMultiStepDraftBackend(
                self.draft_model_runner, self.topk, self.speculative_num_steps
            )

        backends = {**backend_map, ATTENTION_BACKEND: ours}
        return upstream(self, backend_name, backends, error_template, stamps_children)

    return create


def _keep_embedding_dtype(upstream: Callable[..., Any]) -> Callable[..., Any]:
    """Convert input embeddings to the model's dtype: upstream makes them bfloat16, even for a float32 drafter."""

    def kwargs_of(self: Any, forward_batch: Any, pp_proxy_tensors: Any) -> Any:
        kwargs = upstream(self, forward_batch, pp_proxy_tensors)
        if forward_batch.input_embeds is not None and forward_batch.replace_embeds is None:
            kwargs["input_embeds"] = forward_batch.input_embeds.to(self.dtype)
        return kwargs

    return kwargs_of


def _hybrid_pool(upstream: Callable[..., Any]) -> Callable[..., Any]:
    """Use `CpuKVPool` for hybrid models too: for them SGLang takes its own pool, which needs Triton."""

    def pool_of(self: Any, *, mha_pool_class: type, mla_pool_class: type, dsa_pool_class: type) -> Any:
        found = upstream(
            self, mha_pool_class=mha_pool_class, mla_pool_class=mla_pool_class, dsa_pool_class=dsa_pool_class
        )
        return CpuKVPool if found is MHATokenToKVPool else found

    return pool_of


def _mask_on_host(upstream: Callable[..., Any]) -> Callable[..., Any]:
    """Apply vocabulary masks on the CPU for requests without a grammar (--enable-strict-thinking): upstream's grammar
    objects have a CPU branch, its grammar backend has none.
    """

    def apply_vocab_mask(logits: torch.Tensor, vocab_mask: torch.Tensor) -> None:
        if logits.device.type != "cpu":
            upstream(logits, vocab_mask)
            return
        from xgrammar import apply_token_bitmask_inplace

        apply_token_bitmask_inplace(logits, vocab_mask, backend="cpu")

    return staticmethod(apply_vocab_mask)


def _unpinned(upstream: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the initialiser of pools in host memory: without an accelerator their memory need not be pinned."""

    @wraps(upstream)
    def initialise(self: Any, **named: Any) -> None:
        upstream(self, **named | {"pin_memory": False})

    return initialise


_METHODS: tuple[Seam, ...] = (
    _wrapped(_PARALLEL, "GroupCoordinator", "reduce_scatterv", collectives.reduce_scatterv),
    _wrapped("sglang.srt.mem_cache.pool_host.base", "HostKVCache", "__init__", _unpinned),
    _wrapped(
        "sglang.srt.mem_cache.kv_cache_configurator",
        "KVCacheConfigurator",
        "_hybrid_full_attention_pool_class",
        _hybrid_pool,
    ),
    _wrapped("sglang.srt.speculative.draft_utils", "DraftBackendFactory", "_create_backend", _create_draft_backend),
    _wrapped(_RUNNER, "ModelRunner", "_extend_forward_kwargs", _keep_embedding_dtype),
    _wrapped("sglang.srt.constrained.xgrammar_backend", "XGrammarGrammarBackend", "apply_vocab_mask", _mask_on_host),
    _wrapped(_UNQUANTISED, "UnquantizedLinearMethod", "apply", packed_weights.apply),
    _wrapped(_UNQUANTISED, "UnquantizedFusedMoEMethod", "forward_native", layers.of_own_experts),
    _wrapped(
        "sglang.srt.layers.logits_processor", "LogitsProcessor", "_compute_lm_head", packed_weights.compute_lm_head
    ),
    *(
        _wrapped(_WEIGHT_UPDATER, "WeightUpdater", name, packed_weights.before_updates)
        for name in ("begin_weight_update", "update_weights_from_tensor", "load_weights_from_distributed")
    ),
    *(
        _wrapped(_WEIGHT_UPDATER, "WeightUpdater", name, packed_weights.around_updates)
        for name in ("update_weights_from_disk", "update_weights_from_ipc", "end_weight_update")
    ),
    _wrapped("sglang.srt.utils.weight_checker", "WeightChecker", "_reset_tensors", packed_weights.around_updates),
    _wrapped(_RUNNER, "ModelRunner", "finalize_startup_weight_load", packed_weights.around_updates),
)


SEAMS = (*_NAMES, *_METHODS)


def delta_seams() -> tuple[Seam, ...]:
    """Return the seams of models with a gated delta rule, by head or by channel. Only such models import its module."""
    from whiflash_cpu import recurrent_backends

    linear = "sglang.srt.layers.attention.linear"
    fla = "sglang.kernels.ops.attention.fla"
    return (
        Seam(f"{linear}.gdn_backend", "GDNAttnBackend", recurrent_backends.CpuDeltaBackend),
        Seam(f"{linear}.kda_backend", "KDAAttnBackend", recurrent_backends.CpuChannelDeltaBackend),
        *_same(
            "sglang.kernels.ops.attention.triton_gdn_fused_proj",
            recurrent_backends,
            "fused_qkvzba_split_reshape_cat",
            "fused_qkvzba_split_reshape_cat_contiguous",
        ),
        *_same(_ELEMENTWISE, recurrent_backends, "fused_sigmoid_mul"),
        _wrapped(f"{fla}.fused_norm_gate", "FusedRMSNormGated", "forward", lambda _: recurrent_backends.gated_norm),
        _wrapped(f"{fla}.layernorm_gated", "RMSNorm", "forward", lambda _: recurrent_backends.norm_gated),
    )


def mamba2_seams() -> tuple[Seam, ...]:
    """Return the seams of models with Mamba 2's mixer."""
    from whiflash_cpu.recurrent_backends import CpuMamba2Backend

    module = "sglang.srt.layers.attention.hybrid_linear_attn_backend"
    return (Seam(module, "Mamba2AttnBackend", CpuMamba2Backend),)


def _forward_of(model: str, layer: str, wrap: Callable[..., Any]) -> Callable[[], tuple[Seam, ...]]:
    return lambda: (_wrapped(f"sglang.srt.models.{model}", layer, "forward", wrap),)


MODEL_SEAMS: Mapping[str, Callable[[], tuple[Seam, ...]]] = {
    "RadixLinearAttention": delta_seams,
    "MambaMixer2": mamba2_seams,
    "KimiMoE": _forward_of("kimi_linear", "KimiMoE", lambda _: layers.experts_of_kimi),
    "LlamaDecoderLayer": _forward_of("llama", "LlamaDecoderLayer", layers.forward),
    "Qwen2DecoderLayer": _forward_of("qwen2", "Qwen2DecoderLayer", layers.forward),
}
"""Layer class → seams of models with such a layer, added to :data:`SEAMS` by :func:`install_model_seams`."""
