"""Fill in arguments that the user left open, before any weight is loaded."""

import logging
from typing import Any

import torch
from sglang.srt.runtime_context import get_platform

from whiflash_sglang.engine.carried import asks_for_ours
from whiflash_sglang.engine.launch.facts import fill_in, fill_in_for_cuda
from whiflash_sglang.engine.patching import around

logger = logging.getLogger(__name__)


def choose(server_args: Any) -> None:
    """Fill in arguments that work with WHIFLASH where the user left the choice open."""
    replaced = fill_in(server_args)
    if torch.cuda.is_available() and not torch.version.hip and server_args.device in (None, "cuda"):
        replaced += fill_in_for_cuda(server_args, hopper=get_platform().is_sm90)
    for sentence in replaced:
        logger.warning("%s", sentence)


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
