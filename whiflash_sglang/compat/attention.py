"""Attention backends of SGLang's that plan verifications of several widths where a method of ours does: by their names.

Each is imported when a server asks for it: FlashInfer is not installed everywhere, and slow to import.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

from sglang.srt.arg_groups.model_override_base import attention_backends_of, resolved_view
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS, register_attention_backend

from whiflash_sglang.compat.carried import serves_ours

OURS = {
    "triton": "whiflash_sglang.compat.triton_backend",
    "flashinfer": "whiflash_sglang.compat.flashinfer_backend",
}
"""Modules whose `backend_of(model_runner)` makes the backend of a server of ours."""

PLAN = 8 << 20
"""Bytes that FlashInfer takes on the device for a plan."""

_upstreams = {name: ATTENTION_BACKENDS[name] for name in OURS}


def install() -> None:
    """Let the names name ours in a server of ours. Idempotent."""
    for name in OURS:
        register_attention_backend(name)(_maker(name))


def bytes_for(runner: Any, graphs: int, requests: int, context: int) -> int:
    """What attention keeps on the device for so many captured verifications of up to `requests` requests.

    FlashInfer a plan (for latent attention one a graph) and a list of all slots that are read; 0 for others, whose
    tables SGLang's own reserve for graphs has room for.
    """
    if "flashinfer" not in attention_backends_of(resolved_view(runner.server_args)):
        return 0
    return PLAN * (graphs if runner.use_mla_backend else 1) + requests * context * 4


def _maker(name: str) -> Callable[[Any], Any]:
    def make(runner: Any) -> Any:
        create = import_module(OURS[name]).backend_of if serves_ours() else _upstreams[name]
        return create(runner)

    return make
