"""Read the facts of a launch and fill in arguments that the user left open, before any weight is loaded."""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from sglang.srt.arg_groups.overrides import model_config_of, resolving_view
from sglang.srt.model_executor.cuda_graph_config import Backend
from sglang.srt.platforms import current_platform
from sglang.srt.runtime_context import get_platform

from whiflash_sglang.engine.carried import asks_for_ours, settings_of
from whiflash_sglang.engine.patching import around
from whiflash_sglang.files.cpu import PLATFORM

logger = logging.getLogger(__name__)

ATTENTION_FIELDS = ("attention_backend", "prefill_attention_backend", "decode_attention_backend")


@dataclass(frozen=True, slots=True)
class Launch:
    """The facts by which a launch is judged.

    args: SGLang's arguments as resolved so far. given: the arguments as the user gave them. model: SGLang's
    configuration of the target; None if only flags are known. device: `cpu`, `cuda` or another accelerator's name.
    own_platform: the platform of whiflash-cpu is active. xqa: TRT-LLM's attention would be its XQA kernel here (Hopper,
    SM120), which verifies drafts of one length only. draft_kv: a drafter keeps KV of its own at the target's slots.
    uno: the target drafts under an adapter. tenant_header: a gateway's header names the tenant.
    """

    args: Any
    given: Mapping[str, Any]
    model: Any
    device: str
    own_platform: bool
    xqa: bool = False
    draft_kv: bool = True
    uno: bool = False
    tenant_header: bool = False
    environment: Mapping[str, str] = field(default_factory=lambda: os.environ)

    @classmethod
    def of(cls, server_args: Any) -> "Launch":
        cfg = resolving_view(server_args)
        platform = get_platform()
        device = "hip" if cfg.device == "cuda" and platform.is_hip else str(cfg.device)
        own = type(current_platform).__module__.partition(".")[0] == PLATFORM
        xqa = bool(platform.is_sm90 or platform.is_sm120)
        settings = settings_of(server_args)
        ours = bool(settings.drafters), settings.uno is not None, settings.trust_tenant_header
        return cls(cfg, cfg._raw_input, model_config_of(cfg), device, own, xqa, *ours)

    @property
    def attention_backends(self) -> set[str]:
        """Return all attention backends that these arguments name."""
        return {name for f in ATTENTION_FIELDS if (name := getattr(self.args, f))}

    @property
    def architecture(self) -> str:
        return "the target" if self.model is None else str(self.model.hf_config.architectures[0])

    def is_set(self, variable: str) -> bool:
        """Whether a switch of SGLang's environment is on."""
        return self.environment.get(variable, "").lower() in ("1", "true", "yes", "y", "t", "on")


def choose(server_args: Any) -> None:
    """Fill in arguments that work with WHIFLASH where the user left the choice open."""
    if server_args.swa_full_tokens_ratio is None:
        # One KV pool for all layers, since no GPU has run a verification in two.
        server_args.disable_hybrid_swa_memory = True
    if server_args.enable_multimodal is None:
        # Unless it is asked for, a target that takes images is served for text, as SGLang serves Gemma 3 by itself.
        server_args.enable_multimodal = False
    if server_args.enable_mixed_chunk:
        logger.warning("--enable-mixed-chunk is switched off: WHIFLASH's step is a prefill or a round, never both")
        server_args.enable_mixed_chunk = False
    if torch.cuda.is_available() and not torch.version.hip and server_args.device in (None, "cuda"):
        for sentence in choose_for_cuda(server_args):
            logger.warning("%s", sentence)


def choose_for_cuda(server_args: Any) -> list[str]:
    """Fill in arguments that work on CUDA where the user left the choice open. The user's own choices are judged by
    :mod:`whiflash_sglang.engine.launch.refusals`.

    Returns: a sentence for each of the user's choices that is replaced.
    """
    # FA3 is SGLang's default on Hopper. Elsewhere its default is FlashInfer, for whose plan every round would wait.
    attention = "fa3" if get_platform().is_sm90 else "triton"
    replaced = [name for name in ATTENTION_FIELDS if getattr(server_args, name) == "flashinfer"]
    for name in replaced:
        # A prefill or decode backend that is None follows --attention-backend, which is filled in next.
        setattr(server_args, name, None)
    if server_args.attention_backend is None:
        server_args.attention_backend = attention
    attention = server_args.attention_backend
    if server_args.lora_backend == "csgmv":  # SGLang's default, which lays rows out for drafts of one length
        server_args.lora_backend = "triton"
    if server_args.cuda_graph_config is None and server_args.cuda_graph_backend_prefill is None:
        server_args.cuda_graph_backend_prefill = Backend.DISABLED
    # The autotuner's dummy forward would be a verification without a layout of its rows.
    server_args.disable_flashinfer_autotune = True
    return [
        f"--{name.replace('_', '-')} flashinfer is replaced by {attention} (--attention-backend, or else fa3 on Hopper "
        "and triton on other cards): FlashInfer plans a verification on the host, so every round would wait for its "
        "drafts. The text stays the target's own; only another kernel computes attention"
        for name in replaced
    ]


@around(
    "sglang.srt.arg_groups.lora_hook:check_lora_speculative_compatibility",
    params=("server_args",),
    why="SGLang names the algorithms that go with LoRA",
    until="it asks the algorithm",
)
def _adapters_beside_drafts(original: Any, server_args: Any) -> None:
    """Let a server with LoRA adapters start with WHIFLASH."""
    if not asks_for_ours(server_args):
        original(server_args)
