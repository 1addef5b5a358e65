"""Targets whose layers keep a state beside KV: what a verification reads, and what it leaves behind.

The state goes on with every row, drafts included, so a verification only reads it and writes down the state behind each
of its rows; when it is known which are accepted, the last one's is committed (:func:`commit`), as SGLang's own workers
do. SGLang verifies blocks of one width; rows here are packed.

Known: short convolutions (LFM2), whose state are a request's last K - 1 inputs, and on the CPU the gated delta rule of
Qwen3-Next and Qwen3.5 (:mod:`whiflash_sglang.platform.gated_delta`), which has a matrix beside them.
"""

import sys
from typing import Any

import torch
from sglang.srt.configs.hybrid_arch import mambaish_config
from sglang.srt.configs.lfm2 import Lfm2Config
from sglang.srt.configs.lfm2_moe import Lfm2MoeConfig
from sglang.srt.configs.lfm2_vl import Lfm2VlConfig
from sglang.srt.configs.qwen3_5 import Qwen3_5MoeTextConfig, Qwen3_5TextConfig
from sglang.srt.configs.qwen3_next import Qwen3NextConfig

from whiflash_sglang.compat.patching import replace
from whiflash_sglang.platform.recurrent_ops import Rows, packed_convolution

KNOWN = (Lfm2Config, Lfm2MoeConfig, Lfm2VlConfig, Qwen3NextConfig, Qwen3_5TextConfig, Qwen3_5MoeTextConfig)
"""Not what inherits from them: that has states of its own beside (Qwen4-Exp)."""
VERIFY = "shortconv_target_verify"
"""What modules of models with short convolutions call in a verification."""


def has_state(model_config: Any) -> bool:
    """Whether a target of this configuration has recurrent layers."""
    return mambaish_config(model_config) is not None


def is_known(model_config: Any) -> bool:
    """Whether they are of a kind whose state is read and committed here."""
    return type(mambaish_config(model_config)) in KNOWN


def install(model: Any) -> None:
    """Let the short convolutions of a loaded `model` of SGLang's verify packed rows, if it has some. Idempotent."""
    for name in {type(part).__module__ for part in model.modules()}:
        if hasattr(sys.modules[name], VERIFY):
            replace(sys.modules[name], VERIFY, lambda _: verify_packed)


def commit(attention: Any, model: Any, accept_lens: torch.Tensor) -> None:
    """After a verification: let the state behind each request's last accepted row be its state, if it has one.

    Args:
        attention: SGLang's attention backend, as it verified. accept_lens: [B] int, rows that were accepted, the bonus
            token's row included.
    """
    if not hasattr(attention, "linear_attn_backend"):
        return
    attention.update_mamba_state_after_mtp_verify(
        last_correct_step_indices=accept_lens.long() - 1,
        mamba_track_indices=None,
        mamba_steps_to_track=None,
        model=model,
    )


def verify_packed(conv: Any, x: torch.Tensor, meta: Any, draft_token_num: int, arch: str) -> torch.Tensor:
    """A short convolution over the packed rows of B requests, each of which goes on from its state.

    Args:
        conv: the layer: `conv_weight` [D, K], `conv_bias` [D] or None. x: [T, D], its inputs.
        meta: SGLang's record: `query_start_loc` [B + 1] int, where requests' rows begin; `cache_indices` [B] int, slots
            of `layer_cache.conv[0]` [slots, D, K - 1], which stays; the states behind the rows go to
            `layer_cache.intermediate_conv_window[0]` [requests, steps, D, K - 1].
        draft_token_num, arch: SGLang's; unused.

    Returns:
        [T, D] in the dtype of `x`.
    """
    rows = Rows.of(meta.query_start_loc.long(), len(x))
    states = meta.layer_cache.conv[0][meta.cache_indices.long()]
    out, behind = packed_convolution(x, conv.conv_weight, conv.conv_bias, states, rows)
    meta.layer_cache.intermediate_conv_window[0][rows.owner, rows.step] = behind
    return out
