"""A launch of SGLang as WHIFLASH sees it when the arguments are read, before any weight is loaded."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from sglang.srt.arg_groups.overrides import model_config_of, resolving_view
from sglang.srt.model_executor.cuda_graph_config import Backend
from sglang.srt.platforms import current_platform
from sglang.srt.runtime_context import get_platform

CUDA_ATTENTIONS = ("flashinfer", "fa3", "triton")
"""What plans a verification of several widths rightly without graphs, `triton` with
:class:`whiflash_sglang.compat.triton_backend.RaggedTritonBackend` (shown on CPU tensors; no GPU has run any of them).
The first is set where the choice was left open."""


@dataclass(frozen=True, slots=True)
class Launch:
    """What a launch is judged by.

    args: SGLang's arguments as resolved so far. given: the same as the user gave them. model: SGLang's configuration
    of the target. device: `cpu` or `cuda`, or another accelerator's name. own_platform: this package's CPU platform
    is active.
    """

    args: Any
    given: Mapping[str, Any]
    model: Any
    device: str
    own_platform: bool
    environment: Mapping[str, str] = field(default_factory=lambda: os.environ)

    @classmethod
    def of(cls, server_args: Any) -> "Launch":
        cfg = resolving_view(server_args)
        device = "hip" if cfg.device == "cuda" and get_platform().is_hip else str(cfg.device)
        own = type(current_platform).__module__.startswith("whiflash_sglang.")
        return cls(cfg, cfg._raw_input, model_config_of(cfg), device, own)

    @property
    def attention_backends(self) -> set[str]:
        """Every attention backend that these arguments name."""
        fields = ("attention_backend", "prefill_attention_backend", "decode_attention_backend")
        return {name for f in fields if (name := getattr(self.args, f))}

    @property
    def architecture(self) -> str:
        return str(self.model.hf_config.architectures[0])

    def is_set(self, variable: str) -> bool:
        """Whether a switch of SGLang's environment is on."""
        return self.environment.get(variable, "").lower() in ("1", "true", "yes", "y", "t", "on")


def choose_for_cuda(server_args: Any) -> None:
    """On CUDA, fill in what works where the user left the choice open; what he chose is judged by
    :mod:`whiflash_sglang.compat.refusals`."""
    if not torch.cuda.is_available() or torch.version.hip or server_args.device not in (None, "cuda"):
        return
    if server_args.attention_backend is None:
        server_args.attention_backend = CUDA_ATTENTIONS[0]
    if server_args.cuda_graph_config is None:
        for phase in ("cuda_graph_backend_decode", "cuda_graph_backend_prefill"):
            if getattr(server_args, phase) is None:
                setattr(server_args, phase, Backend.DISABLED)
    server_args.disable_overlap_schedule = True
