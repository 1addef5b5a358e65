"""Replace SGLang's private names for the CPU platform; `whiflash_cpu/seam_tables.py` lists them.

``sglang==0.5.23`` offers hooks for some of what speculation needs on a new platform (``get_speculative_cache_locs_fn``,
``get_kv_pool_cls``, ``capabilities``); :mod:`whiflash_cpu.cpu` uses those. The rest launches Triton
kernels, calls ``None`` if ``sgl_kernel`` has no operator, or refuses an out-of-tree platform. :func:`install_seams`
puts :mod:`whiflash_cpu.spec_ops` in their place.

With the seams installed these upstream functions work on the CPU, for any speculative algorithm: KV reservation
(``alloc_for_spec_decode``, through ``assign_req_to_token_pool_func``), slots of a window
(``assign_extend_cache_locs_func``, ``assign_extend_cache_locs_uniform_func``,
``assign_draft_cache_locs_contiguous_func``), the future map (``gather_spec_extras``), ``Tensor.record_stream``,
chain trees (``build_tree_kernel_efficient``, ``verify_tree_greedy_func``, ``fill_bonus_tokens_func``), sampled
verification (``eagle_sample``, ``compute_dflash_sampling_correct_drafts_and_bonus``) and
``RaggedVerifyLayout.from_verify_lens`` (torch upstream). Upstream's ``EAGLE3`` (chain) and ``DFLASH`` run
unmodified; nothing verifies trees (``NGRAM``).
"""

import importlib
import inspect
from collections.abc import Collection, Iterable
from functools import cache
from types import ModuleType
from typing import Any

import torch

from whiflash_cpu.seam_tables import EARLY_SEAMS, MODEL_SEAMS, PINNING, SEAMS, Seam
from whiflash_sglang.engine.patching import Finding, replace, upstreams


def install_early_seams() -> None:
    """Replace every name of :data:`EARLY_SEAMS`, only in its own module. Idempotent.

    Raises:
        RuntimeError: a name is missing or has other parameters than its replacement.
    """
    _require(map(_check, EARLY_SEAMS))
    for seam in EARLY_SEAMS:
        replace(seam.path, seam.made)


@cache
def install_seams() -> None:
    """Replace every name of :data:`SEAMS`, wherever SGLang has already imported it. Idempotent.

    Raises:
        RuntimeError: a name is missing or has other parameters than its replacement.
    """
    _require(verify_seams())
    _install(SEAMS)
    _install_record_stream()
    _install_pin_memory()


def install_model_seams(layers: Collection[str]) -> None:
    """Install the seams that a model with layers of these classes needs, after :func:`install_seams`. Idempotent.

    Raises:
        RuntimeError: a name is missing or has other parameters than its replacement.
    """
    for seams_of in (MODEL_SEAMS[layer] for layer in MODEL_SEAMS if layer in layers):
        seams = seams_of()
        _require(map(_check, seams))
        _install(seams)


def _install(seams: Iterable[Seam]) -> None:
    for seam in seams:
        replace(seam.path, seam.made, everywhere=not (seam.wraps or seam.absent))


def _require(checks: Iterable[Finding]) -> None:
    broken = [check for check in checks if not check.ok]
    if broken:
        listed = "; ".join(f"{check.name}: {check.detail}" for check in broken)
        raise RuntimeError(
            f"the CPU platform was written for another SGLang ({listed}): install the release that `whiflash check` "
            "names"
        )


def verify_seams() -> list[Finding]:
    """Check that every name exists with the parameters of its replacement. Imports SGLang; changes nothing."""
    return [*map(_check, (*EARLY_SEAMS, *SEAMS))]


def _check(seam: Seam) -> Finding:
    """Whether upstream's function is there and takes exactly the parameters of its replacement.

    An older SGLang may lack the last parameters, if they are optional in the replacement.
    """
    try:
        module = importlib.import_module(seam.module)
        # The module imports the name for accelerators only, so it may appear in the source and not be an attribute.
        skipped = seam.absent and not hasattr(module, seam.name) and seam.name in inspect.getsource(module)
        upstream = None if skipped else upstreams(seam.path)
    except (ImportError, AttributeError) as error:
        return Finding(seam.path, False, f"missing: {error}")
    if seam.absent:
        if upstream in (None, False):
            return Finding(seam.path, True, "no operator upstream; torch version in place of it")
        return Finding(seam.path, False, f"expected no operator on this platform, found {upstream!r}")
    if not callable(upstream):
        return Finding(seam.path, False, f"expected a function, found {upstream!r}")
    names = list(inspect.signature(upstream).parameters)
    parameters = inspect.signature(seam.made(upstream)).parameters
    expected, required = list(parameters), [p.name for p in parameters.values() if p.default is p.empty]
    if names != expected[: len(names)] or not set(required) <= set(names):
        return Finding(seam.path, False, f"parameters are {names}, expected {expected}")
    return Finding(seam.path, True, f"{len(names)} parameters as expected")


def _install_record_stream() -> None:
    """Let `Tensor.record_stream` ignore CPU tensors, where torch raises an error: they belong to no stream."""
    upstream = torch.Tensor.record_stream

    def record_stream(self: torch.Tensor, stream: Any) -> None:
        if self.device.type != "cpu":
            upstream(self, stream)

    torch.Tensor.record_stream = record_stream  # type: ignore[method-assign,assignment]


def _install_pin_memory() -> None:
    """Let `Tensor.pin_memory` return the tensor without an accelerator: torch would ask for its driver."""
    upstream = torch.Tensor.pin_memory

    def pin_memory(self: torch.Tensor, *device: Any) -> torch.Tensor:
        return upstream(self, *device) if torch.cuda.is_available() else self

    torch.Tensor.pin_memory = pin_memory  # type: ignore[method-assign,assignment]
    for name in PINNING:
        module = importlib.import_module(name)
        vars(module)["torch"] = Unpinned(torch.__name__)


class Unpinned(ModuleType):
    """The module torch with `tensor` and `zeros` that ignore `pin_memory` unless there is an accelerator."""

    def __getattr__(self, name: str) -> Any:
        member = getattr(torch, name)
        if name not in ("tensor", "zeros") or torch.cuda.is_available():
            return member
        return lambda *args, pin_memory=False, **named: member(*args, **named)
