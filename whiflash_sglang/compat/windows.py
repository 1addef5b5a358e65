"""Targets whose layers attend through a sliding window: which attention backends verify drafts in them on CUDA.

A verification is a plain causal block at the end of each request, so a backend is right where every row of it, not the
request as a whole, sees the keys of its window, and where attention sinks (gpt-oss) reach the kernel. K and V of all
layers lie in one pool for the whole context (:func:`whiflash_sglang.compat.launch.choose`): draft KV lies at the
target's slots, and a pool of their own for windowed layers would give up slots that are still drafted from.
"""

from typing import Any

from sglang.srt.configs.model_config import is_hybrid_swa_model

ATTENTIONS = ("triton", "fa3", "fa4", "trtllm_mha")
"""Of those that CUDA may have. `triton` runs under Triton's interpreter as a formula says; the others are handed what
their documentation asks for (`tests/compat/interpreted_windows.py`; no GPU has run any). `flashinfer` clips a request's
keys to the window of its first row, plans no mask for the others, and takes no sinks."""


def has_windows(model: Any) -> bool:
    """Whether layers of a target (SGLang's `ModelConfig`) have one, also where SGLang itself keeps their KV whole
    (Gemma 2 and 3, OLMo 3)."""
    text = model.hf_text_config
    return bool(
        model.is_hybrid_swa
        or is_hybrid_swa_model(model.hf_config.architectures, text)
        or "sliding_attention" in (getattr(text, "layer_types", None) or ())
    )


def has_heads_of_two_shapes(model: Any) -> bool:
    """Whether windowed layers have other heads of K and V than the others (Gemma 4, MiMo-V2), so that one pool does not
    hold both."""
    if not has_windows(model):
        return False
    windowed = (model.swa_head_dim, model.swa_v_head_dim, model.get_swa_num_kv_heads(1))
    return bool(windowed != (model.head_dim, model.v_head_dim, model.get_num_kv_heads(1)))
