"""The facts by which a launch is judged, and the defaults that suit WHIFLASH. Imports torch and SGLang in `Launch.of`
only, so that `whiflash check --recipe` needs neither."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from whiflash_sglang.engine.carried import settings_of
from whiflash_sglang.files.cpu import PLATFORM

ATTENTION_FIELDS = ("attention_backend", "prefill_attention_backend", "decode_attention_backend")
DISABLED = "disabled"
"""SGLang's name of a phase without CUDA graphs."""


@dataclass(frozen=True, slots=True)
class Launch:
    """The facts by which a launch is judged.

    args: SGLang's arguments as resolved so far. given: the arguments as the user gave them. model: SGLang's
    configuration of the target; None if a recipe is judged without the target's `config.json`. device: `cpu`, `cuda`
    or another accelerator's name. own_platform: the platform of whiflash-cpu is active. xqa: TRT-LLM's attention would
    be its XQA kernel here (Hopper, SM120), which verifies drafts of one length only. draft_kv: a drafter keeps KV of
    its own at the target's slots. uno: the target drafts under an adapter. tenant_header: a gateway's header names the
    tenant.
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
        from sglang.srt.arg_groups.overrides import model_config_of, resolving_view
        from sglang.srt.platforms import current_platform
        from sglang.srt.runtime_context import get_platform

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


def fill_in(arguments: Any) -> list[str]:
    """Fill in arguments that work with WHIFLASH where the user left the choice open.

    Returns: a sentence for each of the user's choices that is replaced.
    """
    if arguments.swa_full_tokens_ratio is None:
        # One KV pool for all layers, since no GPU has run a verification in two.
        arguments.disable_hybrid_swa_memory = True
    if arguments.enable_multimodal is None:
        # Unless it is asked for, a target that takes images is served for text, as SGLang serves Gemma 3 by itself.
        arguments.enable_multimodal = False
    if not arguments.enable_mixed_chunk:
        return []
    arguments.enable_mixed_chunk = False
    return ["--enable-mixed-chunk is switched off: WHIFLASH's step is a prefill or a round, never both"]


def fill_in_for_cuda(arguments: Any, *, hopper: bool) -> list[str]:
    """Fill in arguments that work on CUDA where the user left the choice open. The user's own choices are judged by
    :mod:`whiflash_sglang.engine.launch.refusals`.

    Returns: a sentence for each of the user's choices that is replaced.
    """
    replaced = [name for name in ATTENTION_FIELDS if getattr(arguments, name) == "flashinfer"]
    for name in replaced:
        # A prefill or decode backend that is None follows --attention-backend, which is filled in next.
        setattr(arguments, name, None)
    if arguments.attention_backend is None:
        # FA3 is SGLang's default on Hopper. Elsewhere its default is FlashInfer, for whose plan every round would wait.
        arguments.attention_backend = "fa3" if hopper else "triton"
    attention = arguments.attention_backend
    if arguments.lora_backend == "csgmv":  # SGLang's default, which lays rows out for drafts of one length
        arguments.lora_backend = "triton"
    if arguments.cuda_graph_config is None and arguments.cuda_graph_backend_prefill is None:
        arguments.cuda_graph_backend_prefill = DISABLED
    # The autotuner's dummy forward would be a verification without a layout of its rows.
    arguments.disable_flashinfer_autotune = True
    return [
        f"--{name.replace('_', '-')} flashinfer is replaced by {attention} (--attention-backend, or else fa3 on Hopper "
        "and triton on other cards): FlashInfer plans a verification on the host, so every round would wait for its "
        "drafts. The text stays the target's own; only another kernel computes attention"
        for name in replaced
    ]
