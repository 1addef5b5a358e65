"""The CPU as an out-of-tree SGLang platform (``sglang==0.5.23``).

SGLang's own CPU engine needs operators that the published ``sgl_kernel`` wheel does not have. As an
out-of-tree platform the CPU runs SGLang's torch-native code instead, with this package's KV pool and
attention backend, and :mod:`whiflash_cpu.seams` replaces the helpers that need Triton.

SGLang imports this module by its name while it is itself being imported; nothing else should import it first.
"""

import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from sglang.srt.arg_groups import choices
from sglang.srt.model_executor.cuda_graph_config import Backend, Phase, with_phase
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import KVPoolKind, PlatformCapabilities, SRTPlatform

from whiflash_sglang.files.cpu import ATTENTION_BACKEND, CHILD_ENVIRONMENT

logger = logging.getLogger(__name__)

DEFAULT_KV_TOKENS = 65536
"""Number of KV slots if neither ``--max-total-tokens`` nor ``--mem-fraction-static`` was given.

SGLang sizes its pool to fill the device. On a CPU the device is the whole machine's memory.
"""


def _offer_attention_backend() -> None:
    """Add the backend's name to every list of choices that SGLang checks it against."""
    for names in (
        choices.ATTENTION_BACKEND_CHOICES,
        choices.DRAFT_ATTENTION_BACKEND_CHOICES,
        # SGLang reads `sampling_seed` only under --enable-deterministic-inference, which asks for these two.
        choices.DETERMINISTIC_ATTENTION_BACKEND_CHOICES,
        choices.RADIX_SUPPORTED_DETERMINISTIC_ATTENTION_BACKEND,
    ):
        if ATTENTION_BACKEND not in names:
            names.append(ATTENTION_BACKEND)


def _seeds_without_batch_invariance(enable_bmm: bool = True) -> None:
    """Warn, and do not install SGLang's batch-invariant matrix products, which are Triton kernels."""
    logger.warning(
        "deterministic inference on the CPU: sampling seeds are honoured, but matrix products may differ in "
        "their last bits between batch shapes"
    )


def chosen(server_args: Any, field: str) -> Any:
    """Return the value that the user gave for an argument, before SGLang's own rules filled it in; else None."""
    return getattr(server_args, "_raw_input", {}).get(field)


def shared_cores(ranks: int, cores: Sequence[int]) -> dict[str, str]:
    """Return the environment in which `ranks` processes share `cores`: each has neighbouring cores, a thread per core.

    If there are more ranks than cores, several ranks share a core. SGLang starts at most one rank per memory node
    unless the environment names the cores of each rank.
    """
    cores_each = max(len(cores) // ranks, 1)
    own = [[cores[(rank * cores_each + n) % len(cores)] for n in range(cores_each)] for rank in range(ranks)]
    named = "|".join(",".join(map(str, some)) for some in own)
    return {"SGLANG_CPU_OMP_THREADS_BIND": named, "OMP_NUM_THREADS": str(cores_each)}


_shared: dict[str, str] = {}
"""Environment that `share_cores` has set in this process."""


def share_cores(ranks: int) -> None:
    """Set the environment of `shared_cores`; values that the user set stay, those of an earlier engine are replaced."""
    cores = shared_cores(ranks, sorted(os.sched_getaffinity(0))) if ranks > 1 else {}
    for name in {**_shared, **cores}:
        if os.environ.get(name) != _shared.pop(name, None):
            continue
        os.environ.pop(name, None)
        if name in cores:
            os.environ[name] = _shared[name] = cores[name]


class CpuPlatform(CpuDeviceMixin, SRTPlatform):
    """The SGLang platform of a machine without an accelerator: no Triton, no graphs, no streams."""

    _enum = PlatformEnum.OOT
    capabilities = PlatformCapabilities()

    def __init__(self) -> None:
        super().__init__()
        _offer_attention_backend()
        for name, value in CHILD_ENVIRONMENT.items():
            os.environ.setdefault(name, value)

    def init_backend(self) -> None:
        from whiflash_cpu.attention import register_attention_backend

        register_attention_backend()
        from sglang.srt import batch_invariant_ops

        batch_invariant_ops.enable_batch_invariant_mode = _seeds_without_batch_invariance
        if not torch.cuda.is_available():
            # With a torch built for CUDA, Qwen3-Next's norms ask it for the current device, which would raise an error.
            torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment,return-value]

    def apply_server_args_defaults(self, server_args: Any) -> None:
        """Choose values that work on a CPU for every argument that the command line leaves open."""
        if server_args.device != "cpu":
            return
        if server_args.enable_prefill_delayer:
            raise ValueError(
                "--enable-prefill-delayer needs overlap scheduling, which the CPU platform does not have; remove it"
            )
        if server_args.enable_forward_pass_metrics:
            raise ValueError("--enable-forward-pass-metrics times forwards with a GPU's events; remove it")
        if server_args.speculative_algorithm == "NGRAM":
            raise ValueError(
                "--speculative-algorithm NGRAM verifies trees, which a CPU cannot; use EAGLE3, DFLASH or WHIFLASH"
            )
        from whiflash_cpu.seams import install_early_seams

        install_early_seams()
        # SGLang has already turned `--device cpu` into intel_amx, whose operators no published wheel has. A user who
        # names that backend gets it.
        if chosen(server_args, "attention_backend") is None:
            server_args.attention_backend = ATTENTION_BACKEND
        if chosen(server_args, "swa_full_tokens_ratio") is None:
            # One pool serves all layers: a window is a mask, and the slots are those of the request table.
            server_args.disable_hybrid_swa_memory = True
        if server_args.lora_backend == "csgmv":  # SGLang's default, which needs Triton
            server_args.lora_backend = "torch_native"
        if server_args.moe_runner_backend == "auto":
            # This only selects the layout of the experts' weights that torch functions need; no Triton kernel runs.
            server_args.moe_runner_backend = "triton"
        graphs = server_args.cuda_graph_config
        for phase in Phase.ALL:
            graphs = with_phase(graphs, phase, backend=Backend.DISABLED)
        server_args.cuda_graph_config = graphs
        # Torch makes the host copies here (`host_copies`), and it supports the layouts of this backend only.
        server_args.hicache_io_backend = "direct"
        if server_args.hicache_mem_layout not in ("layer_first", "page_first", "page_first_direct"):
            server_args.hicache_mem_layout = "layer_first"
        server_args.disable_overlap_schedule = True
        server_args.sampling_backend = "pytorch"
        if server_args.max_total_tokens is None and server_args.mem_fraction_static is None:
            server_args.max_total_tokens = DEFAULT_KV_TOKENS
        share_cores(server_args.tp_size * server_args.dp_size * server_args.pp_size)
        # Otherwise an idle scheduler keeps a core busy that the next request needs.
        server_args.sleep_on_idle = True

    def get_device(self, device_id: int = 0) -> str:
        # Returns a string, as DeviceMixin declares: without `--device`, SGLang parses it.
        return self.device_type

    def get_default_attention_backend(self) -> str:
        return ATTENTION_BACKEND

    def get_default_speculative_draft_attention_backend(self, algorithm: str) -> str:
        return ATTENTION_BACKEND

    def supports_speculative_algorithm(self, algorithm: str) -> bool:
        return True

    def supports_speculative_draft_attention_backend(self, algorithm: str, backend: str) -> bool:
        return backend == ATTENTION_BACKEND

    def support_mamba_cache_extra_buffer(self) -> bool:
        return True

    def get_kv_pool_cls(self, *, kind: KVPoolKind) -> type | None:
        if kind != "mha":
            return None
        from whiflash_cpu.attention import CpuKVPool

        return CpuKVPool

    def get_torch_profiler_activity_str(self) -> str:
        return "CPU"

    def get_torch_profiler_activity(self) -> torch.profiler.ProfilerActivity:
        return torch.profiler.ProfilerActivity.CPU

    def get_speculative_cache_locs_fn(self) -> Callable[..., torch.Tensor]:
        from whiflash_cpu.spec_ops import extend_cache_locs

        return extend_cache_locs

    def get_speculative_worker_cls(self, algorithm: str) -> type | None:
        from whiflash_cpu.seams import install_seams

        install_seams()
        return None  # Upstream's own worker runs once the seams are in place.

    def post_load_model(self, model: torch.nn.Module) -> None:
        from whiflash_kernels import attention

        from whiflash_cpu.attention import attention_kernel
        from whiflash_cpu.layers import use_compiled_layers
        from whiflash_cpu.packed_weights import pack_model, use_compiled_products
        from whiflash_cpu.seams import install_model_seams, install_seams

        install_seams()
        install_model_seams({type(module).__name__ for module in model.modules()})
        use_compiled_products()
        use_compiled_layers()
        attention.use(attention_kernel())
        pack_model(model)
