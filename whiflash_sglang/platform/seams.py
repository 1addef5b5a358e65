"""Every private SGLang name that the CPU platform replaces, in one table, and the one place that replaces them.

``sglang==0.5.23`` offers hooks for some of what speculation needs on a new platform
(``get_speculative_cache_locs_fn``, ``get_kv_pool_cls``, ``capabilities``); :mod:`whiflash_sglang.platform.cpu` uses
those. What is left launches Triton kernels, calls ``None`` where ``sgl_kernel`` has no operator, or refuses an
out-of-tree platform. :func:`install_seams` puts :mod:`whiflash_sglang.platform.spec_ops` in their place.

With the seams installed these upstream functions work on the CPU, for any speculative algorithm: KV reservation
(``alloc_for_spec_decode``, through ``assign_req_to_token_pool_func``), slots of a window
(``assign_extend_cache_locs_func``, ``assign_extend_cache_locs_uniform_func``,
``assign_draft_cache_locs_contiguous_func``), the future map (``gather_spec_extras``), ``Tensor.record_stream``,
chain trees (``build_tree_kernel_efficient``, ``verify_tree_greedy_func``, ``fill_bonus_tokens_func``), sampled
verification (``eagle_sample``, ``compute_dflash_sampling_correct_drafts_and_bonus``) and
``RaggedVerifyLayout.from_verify_lens`` (torch upstream). Upstream's ``EAGLE3`` (chain), ``DFLASH`` and ``NGRAM``
(trees; its corpus is compiled at the first start, by the machine's C++ compiler) run unmodified.
"""

import ast
import importlib
import inspect
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

from whiflash_sglang.platform import recurrent_ops, spec_ops, spec_trees, target_ops
from whiflash_sglang.platform.attention import CpuAttentionBackend, CpuMultiStepDraftBackend
from whiflash_sglang.platform.defaults import ATTENTION_BACKEND
from whiflash_sglang.platform.kv_pool import CpuKVPool

_CACHE_LOCS = "sglang.kernels.ops.speculative.cache_locs"
_EAGLE = "sglang.kernels.ops.speculative.eagle"
_SPEC_TREE = "sglang.kernels.ops.speculative.spec_tree"
_EAGLE_UTILS = "sglang.srt.speculative.eagle_utils"
_DFLASH_UTILS = "sglang.srt.speculative.dflash_utils"
_ELEMENTWISE = "sglang.kernels.ops.elementwise.elementwise"
_CONV = "sglang.srt.layers.attention.mamba.causal_conv1d"


class Seam(NamedTuple):
    """One replaced name."""

    module: str
    name: str
    replacement: Any
    """A function with the parameters of the original, or a value."""
    absent: bool = False
    """Upstream's value on this platform is None or False: no operator exists for it."""

    @property
    def label(self) -> str:
        return f"{self.module}.{self.name}"


class SeamCheck(NamedTuple):
    """What :func:`verify_seams` found about one name."""

    name: str
    ok: bool
    detail: str


def _tree_mask_mode() -> Any:
    from sglang.kernels.ops.speculative.spec_tree import TreeMaskMode

    return TreeMaskMode.QLEN_ONLY


EARLY_SEAMS: tuple[Seam, ...] = (
    Seam("sglang.srt.arg_groups.model_hook", "attention_backends_of", target_ops.attention_backends_of),
)
"""What is asked while the arguments are read, in the launcher's process too; put in place by
:func:`install_early_seams`."""

SEAMS: tuple[Seam, ...] = (
    Seam(_CONV, "causal_conv1d_fn", recurrent_ops.causal_conv1d_fn),
    Seam(_CONV, "causal_conv1d_update", recurrent_ops.causal_conv1d_update),
    Seam(
        "sglang.kernels.ops.mamba.mamba_state_scatter_triton",
        "scatter_mamba_states_after_mtp_verify",
        recurrent_ops.scatter_mamba_states_after_mtp_verify,
    ),
    Seam(_ELEMENTWISE, "fused_gate_sigmoid_mul", target_ops.fused_gate_sigmoid_mul),
    Seam(_ELEMENTWISE, "fused_gate_sigmoid_mul_add", target_ops.fused_gate_sigmoid_mul_add),
    Seam(
        _CACHE_LOCS,
        "assign_draft_cache_locs_contiguous_func",
        spec_ops.assign_draft_cache_locs_contiguous_func,
    ),
    Seam(
        "sglang.srt.mem_cache.allocation",
        "assign_req_to_token_pool_func",
        spec_ops.assign_req_to_token_pool_func,
    ),
    Seam("sglang.srt.mem_cache.allocation", "get_last_loc", spec_ops.get_last_loc),
    Seam(_CACHE_LOCS, "fill_front_out_cache_loc_func", spec_trees.fill_front_out_cache_loc_func),
    Seam(_EAGLE, "fill_accept_out_cache_loc_func", spec_trees.fill_accept_out_cache_loc_func),
    Seam(_EAGLE, "fill_bonus_tokens_func", spec_ops.fill_bonus_tokens_func),
    Seam(
        "sglang.kernels.ops.speculative.gather_spec_extras", "gather_spec_extras", spec_ops.gather_spec_extras
    ),
    Seam("sglang.kernels.ops.sampling.murmur_hash", "murmur_hash32", spec_ops.murmur_hash32),
    Seam(_SPEC_TREE, "build_tree_kernel_efficient_func", spec_ops.build_tree_kernel_efficient_func),
    Seam(_SPEC_TREE, "verify_tree_greedy_func", spec_ops.verify_tree_greedy_func),
    Seam(_EAGLE_UTILS, "default_tree_mask_mode", _tree_mask_mode),
    Seam(
        "sglang.kernels.ops.attention.table_qk_norm_rope", "table_qk_norm_rope_", spec_ops.table_qk_norm_rope_
    ),
    *(
        Seam(module, name, getattr(spec_ops, name), absent=True)
        for module in (_EAGLE_UTILS, _DFLASH_UTILS)
        for name in ("tree_speculative_sampling_target_only", "top_k_renorm_prob", "top_p_renorm_prob")
    ),
    Seam(_DFLASH_UTILS, "_DFLASH_SAMPLING_VERIFY_AVAILABLE", True, absent=True),
)


def _create_draft_backend(upstream: Callable[..., Any]) -> Callable[..., Any]:
    """Enter the CPU backend into both maps of the draft backend factory, which are local to its methods."""

    def create(
        self: Any, backend_name: str, backend_map: Any, error_template: str, stamps_children: bool = False
    ) -> Any:
        def decode_backend() -> tuple[str, Any]:
            return ATTENTION_BACKEND, CpuMultiStepDraftBackend(
                self.draft_model_runner, self.topk, self.speculative_num_steps
            )

        def extend_backend() -> tuple[str, Any]:
            return ATTENTION_BACKEND, CpuAttentionBackend(self.draft_model_runner)

        # Only the multi-step decode backend has children to stamp.
        ours = decode_backend if stamps_children else extend_backend
        backends = {**backend_map, ATTENTION_BACKEND: ours}
        return upstream(self, backend_name, backends, error_template, stamps_children)

    return create


def _keep_embedding_dtype(upstream: Callable[..., Any]) -> Callable[..., Any]:
    """Upstream turns every input embedding into bfloat16, which a float32 draft model cannot take."""

    def kwargs_of(self: Any, forward_batch: Any, pp_proxy_tensors: Any) -> Any:
        kwargs = upstream(self, forward_batch, pp_proxy_tensors)
        if forward_batch.input_embeds is not None and forward_batch.replace_embeds is None:
            kwargs["input_embeds"] = forward_batch.input_embeds.to(self.dtype)
        return kwargs

    return kwargs_of


def _hybrid_pool(upstream: Callable[..., Any]) -> Callable[..., Any]:
    """A platform names the pool of a model whose every layer attends; upstream's keeps KV with Triton's copies."""

    def pool_of(self: Any, *, mha_pool_class: type, mla_pool_class: type, dsa_pool_class: type) -> Any:
        found = upstream(
            self, mha_pool_class=mha_pool_class, mla_pool_class=mla_pool_class, dsa_pool_class=dsa_pool_class
        )
        return CpuKVPool if found is MHATokenToKVPool else found

    return pool_of


class MethodSeam(NamedTuple):
    """One wrapped method."""

    module: str
    owner: str
    name: str
    wrap: Callable[[Callable[..., Any]], Callable[..., Any]]

    @property
    def label(self) -> str:
        return f"{self.module}.{self.owner}.{self.name}"

    def find(self) -> Any:
        """The class that owns the method."""
        return getattr(importlib.import_module(self.module), self.owner)


METHOD_SEAMS: tuple[MethodSeam, ...] = (
    MethodSeam(
        "sglang.srt.mem_cache.kv_cache_configurator",
        "KVCacheConfigurator",
        "_hybrid_full_attention_pool_class",
        _hybrid_pool,
    ),
    MethodSeam(
        "sglang.srt.speculative.draft_utils", "DraftBackendFactory", "_create_backend", _create_draft_backend
    ),
    MethodSeam(
        "sglang.srt.model_executor.model_runner",
        "ModelRunner",
        "_extend_forward_kwargs",
        _keep_embedding_dtype,
    ),
)


class ModuleSeam(NamedTuple):
    """One module that cannot be imported here, because it imports operators that no published wheel has."""

    module: str
    name: str
    replacement: Callable[..., Any]
    """The function that is wanted of it, with the parameters of the original."""

    @property
    def label(self) -> str:
        return f"{self.module}.{self.name}"


MODULE_SEAMS: tuple[ModuleSeam, ...] = (
    ModuleSeam(
        "sglang.kernels.ops.speculative.reconstruct_tree",
        "reconstruct_indices_from_tree_mask_func",
        spec_trees.reconstruct_indices_from_tree_mask_func,
    ),
)

_originals: dict[str, Any] = {}
"""What each installed seam replaced; empty before :func:`install_seams`."""
_early: dict[str, Any] = {}
"""The same of :func:`install_early_seams`."""


def install_early_seams() -> None:
    """Replace every name of :data:`EARLY_SEAMS` in its own module alone. Idempotent.

    Raises:
        RuntimeError: a name is missing or has other parameters than its replacement.
    """
    for seam in EARLY_SEAMS:
        if seam.label not in _early:
            check = _check(seam)
            if not check.ok:
                raise RuntimeError(
                    f"this SGLang is not the one that the CPU platform was written for ({check})"
                )
            module = importlib.import_module(seam.module)
            _early[seam.label] = getattr(module, seam.name)
            setattr(module, seam.name, seam.replacement)


def install_seams() -> None:
    """Replace every name of :data:`SEAMS`, wherever SGLang has already imported it. Idempotent.

    Raises:
        RuntimeError: a name is missing or has other parameters than its replacement.
    """
    if _originals:
        return
    _require(verify_seams())
    for absent in MODULE_SEAMS:
        sys.modules[absent.module] = stand_in = ModuleType(absent.module)
        setattr(stand_in, absent.name, absent.replacement)
    _install(SEAMS, METHOD_SEAMS)
    _install_record_stream()
    _install_pin_memory()


def install_model_seams(layers: Collection[str]) -> None:
    """After :func:`install_seams`, what a loaded model with layers of these classes needs. Idempotent.

    Raises:
        RuntimeError: a name is missing or has other parameters than its replacement.
    """
    for layer, seams_of in MODEL_SEAMS.items():
        if layer not in layers:
            continue
        seams, methods = seams_of()
        if seams[0].label not in _originals:
            _require([*map(_check, seams), *map(_check_method, methods)])
            _install(seams, methods)


def delta_seams() -> tuple[tuple[Seam, ...], tuple[MethodSeam, ...]]:
    """What models with a gated delta rule use: names and methods. Imported for them alone."""
    from whiflash_sglang.platform import gated_delta

    names = (
        Seam("sglang.srt.layers.attention.linear.gdn_backend", "GDNAttnBackend", gated_delta.CpuDeltaBackend),
        *(
            Seam("sglang.kernels.ops.attention.triton_gdn_fused_proj", name, getattr(gated_delta, name))
            for name in ("fused_qkvzba_split_reshape_cat", "fused_qkvzba_split_reshape_cat_contiguous")
        ),
        Seam(_ELEMENTWISE, "fused_sigmoid_mul", gated_delta.fused_sigmoid_mul),
    )
    fla = "sglang.kernels.ops.attention.fla"
    return names, (
        MethodSeam(
            f"{fla}.fused_norm_gate", "FusedRMSNormGated", "forward", lambda _: gated_delta.gated_norm
        ),
        MethodSeam(f"{fla}.layernorm_gated", "RMSNorm", "forward", lambda _: gated_delta.norm_gated),
    )


def mamba2_seams() -> tuple[tuple[Seam, ...], tuple[MethodSeam, ...]]:
    """What models with Mamba 2's mixer use."""
    from whiflash_sglang.platform.mamba2 import CpuMamba2Backend

    module = "sglang.srt.layers.attention.hybrid_linear_attn_backend"
    return (Seam(module, "Mamba2AttnBackend", CpuMamba2Backend),), ()


MODEL_SEAMS: Mapping[str, Callable[[], tuple[tuple[Seam, ...], tuple[MethodSeam, ...]]]] = {
    "RadixLinearAttention": delta_seams,
    "MambaMixer2": mamba2_seams,
}
"""What models with such a layer use beside :data:`SEAMS`; put in place by :func:`install_model_seams`."""


def _require(checks: list[SeamCheck]) -> None:
    broken = [check for check in checks if not check.ok]
    if broken:
        listed = "; ".join(f"{check.name}: {check.detail}" for check in broken)
        raise RuntimeError(f"this SGLang is not the one that the CPU platform was written for ({listed})")


def _install(seams: Sequence[Seam], methods: Sequence[MethodSeam]) -> None:
    for seam in seams:
        module = importlib.import_module(seam.module)
        original = getattr(module, seam.name)
        _originals[seam.label] = original
        setattr(module, seam.name, seam.replacement)
        if not seam.absent:
            _rebind(seam.name, original, seam.replacement)
    for method in methods:
        owner = method.find()
        _originals[method.label] = getattr(owner, method.name)
        setattr(owner, method.name, method.wrap(_originals[method.label]))


def verify_seams() -> list[SeamCheck]:
    """Check that every name exists with the parameters of its replacement. Imports SGLang; changes nothing."""
    return [
        *(_check(seam) for seam in (*EARLY_SEAMS, *SEAMS)),
        *(_check_method(seam) for seam in METHOD_SEAMS),
        *(_check_module(seam) for seam in MODULE_SEAMS),
    ]


def _check(seam: Seam) -> SeamCheck:
    try:
        found = getattr(importlib.import_module(seam.module), seam.name)
        upstream = _originals.get(seam.label, _early.get(seam.label, found))
    except (ImportError, AttributeError) as error:
        return SeamCheck(seam.label, False, f"missing: {error}")
    if seam.absent:
        if upstream in (None, False):
            return SeamCheck(seam.label, True, "no operator upstream; torch version in place of it")
        return SeamCheck(seam.label, False, f"expected no operator on this platform, found {upstream!r}")
    return _compare(seam.label, upstream, seam.replacement)


def _check_method(seam: MethodSeam) -> SeamCheck:
    try:
        upstream = _originals.get(seam.label, getattr(seam.find(), seam.name))
    except (ImportError, AttributeError) as error:
        return SeamCheck(seam.label, False, f"missing: {error}")
    return _compare(seam.label, upstream, seam.wrap(upstream))


def _check_module(seam: ModuleSeam) -> SeamCheck:
    """The module's source says what the function takes; importing it is what fails."""
    parent, _, name = seam.module.rpartition(".")
    source = Path(str(importlib.import_module(parent).__file__)).parent / f"{name}.py"
    functions = ast.parse(source.read_text()).body if source.exists() else []
    for function in functions:
        if isinstance(function, ast.FunctionDef) and function.name == seam.name:
            found = [argument.arg for argument in function.args.args]
            return _compare_parameters(seam.label, found, seam.replacement)
    return SeamCheck(seam.label, False, "missing")


def _compare(label: str, upstream: Any, replacement: Any) -> SeamCheck:
    """Whether upstream's function takes exactly the parameters of its replacement."""
    if not callable(upstream):
        return SeamCheck(label, False, f"expected a function, found {upstream!r}")
    return _compare_parameters(label, list(inspect.signature(upstream).parameters), replacement)


def _compare_parameters(label: str, found: list[str], replacement: Callable[..., Any]) -> SeamCheck:
    expected = list(inspect.signature(replacement).parameters)
    if found != expected:
        return SeamCheck(label, False, f"parameters are {found}, expected {expected}")
    return SeamCheck(label, True, f"{len(found)} parameters as expected")


def _rebind(name: str, original: Any, replacement: Any) -> None:
    """Follow ``from module import name`` into every SGLang module that has already run it."""
    for module_name, module in list(sys.modules.items()):
        if module_name.startswith("sglang.") and vars(module).get(name) is original:
            setattr(module, name, replacement)


def _install_record_stream() -> None:
    """A CPU tensor has no stream that could recycle it: recording one is nothing to do, not an error."""
    upstream = torch.Tensor.record_stream

    def record_stream(self: torch.Tensor, stream: Any) -> None:
        if self.device.type != "cpu":
            upstream(self, stream)

    torch.Tensor.record_stream = record_stream  # type: ignore[method-assign,assignment]


def _install_pin_memory() -> None:
    """Where there is no accelerator, no memory needs to be pinned for one; torch asks for its driver."""
    upstream = torch.Tensor.pin_memory

    def pin_memory(self: torch.Tensor, *device: Any) -> torch.Tensor:
        return upstream(self, *device) if torch.cuda.is_available() else self

    torch.Tensor.pin_memory = pin_memory  # type: ignore[method-assign,assignment]
