"""Verify targets whose layers keep a state beside KV, and commit the state of the last accepted row.

The state changes with every row, drafts included, so a verification only reads it and stores the state after each of
its rows. When the accepted rows are known, the state after the last one is committed (:func:`commit`), as SGLang's own
workers do. SGLang verifies blocks of one width; rows here are packed.

SGLang's tree keeps such a state for where a prefill or a request ended, or with its extra buffer for multiples of an
interval: then a commit also copies the state after the row that reached one.

Known: short convolutions (LFM2), whose state is a request's last K - 1 inputs; and layers that have a matrix, too: the
gated delta rule (Qwen3-Next and Qwen3.5), that rule with a decay for each channel (Kimi Linear's KDA), and Mamba 2
(Nemotron-H).
"""

import sys
from typing import Any

import torch
from sglang.srt.configs.hybrid_arch import mambaish_config
from sglang.srt.configs.kimi_linear import KimiLinearConfig
from sglang.srt.configs.lfm2 import Lfm2Config
from sglang.srt.configs.lfm2_moe import Lfm2MoeConfig
from sglang.srt.configs.lfm2_vl import Lfm2VlConfig
from sglang.srt.configs.model_config import is_kimi_k3
from sglang.srt.configs.nemotron_h import NemotronHConfig
from sglang.srt.configs.qwen3_5 import Qwen3_5MoeTextConfig, Qwen3_5TextConfig
from sglang.srt.configs.qwen3_next import Qwen3NextConfig
from sglang.srt.runtime_context import get_spec, mamba_track_grid

from whiflash_sglang.engine import patching
from whiflash_sglang.engine.forward.recurrences import Rows, packed_verification
from whiflash_sglang.engine.patching import around

KNOWN = (
    *(Lfm2Config, Lfm2MoeConfig, Lfm2VlConfig, Qwen3NextConfig, Qwen3_5TextConfig),
    *(Qwen3_5MoeTextConfig, KimiLinearConfig, NemotronHConfig),
)
"""Configurations whose layers are known. Their subclasses are not, which may have further states (Qwen4-Exp)."""


def has_state(model_config: Any) -> bool:
    """Whether a target of this configuration has recurrent layers."""
    return mambaish_config(model_config) is not None


def is_known(model_config: Any) -> bool:
    """Whether the recurrent layers of this configuration are of a kind whose state is read and committed here."""
    if is_kimi_k3(model_config.hf_config):  # Kimi Linear's configuration, but layers that no test has run
        return False
    return type(mambaish_config(model_config)) in KNOWN


def install(model_config: Any, device: torch.device) -> None:
    """Let the recurrent layers of a loaded model of SGLang's verify packed rows, if it has some. Idempotent.

    Called before SGLang makes the target's attention. The CPU platform has its own backends for layers with a matrix.
    """
    if device.type == "cuda" and has_state(model_config):
        from whiflash_sglang.engine.forward import recurrent_untried as untried

        patching.install(untried)
    if has_state(model_config) and "sglang.srt.models.lfm2" in sys.modules:
        patching.install(sys.modules[__name__])


def commit(attention: Any, model: Any, batch: Any, starts: torch.Tensor, accept_lens: torch.Tensor) -> None:
    """Commit the recurrent state after each request's last accepted row, if the target has such states, and copy those
    that the radix tree stores. Called after a verification.

    Args:
        attention: SGLang's attention backend, as it verified. batch: SGLang's, whose verification this was.
        starts: [B] int, tokens with KV before the round. accept_lens: [B] int, accepted rows, bonus token's included.
    """
    if not hasattr(attention, "linear_attn_backend"):
        return
    # The interval in tokens at which the radix tree stores states.
    every = None if batch.mamba_track_indices is None else int(mamba_track_grid(batch.tree_cache.page_size))
    attention.update_mamba_state_after_mtp_verify(
        last_correct_step_indices=accept_lens.long() - 1,
        mamba_track_indices=None if every is None else batch.mamba_track_indices,
        mamba_steps_to_track=None if every is None else tracked_rows(starts, accept_lens, every),
        model=model,
    )


def tracked_rows(starts: torch.Tensor, accept_lens: torch.Tensor, every: int) -> torch.Tensor:
    """Return each request's last accepted row after which its length is a multiple of `every` tokens, [B] int64; -1
    without one. starts, accept_lens: [B] int, as in `commit`."""
    before = starts.long()
    reached = (before + accept_lens) // every * every
    return torch.where(reached > before, reached - before - 1, -1)


@around(
    "sglang.srt.models.lfm2:shortconv_target_verify",
    params=("conv", "meta", "draft_token_num", "arch"),
    why="SGLang verifies blocks of one width",
    until="its short convolutions read a ragged layout",
    everywhere=True,
)
def verify_packed(_: Any, conv: Any, x: torch.Tensor, meta: Any, draft_token_num: int, arch: str) -> torch.Tensor:
    """Let short convolutions verify packed rows. Each of the B requests continues from its own state.

    Args:
        conv: the layer: `conv_weight` [D, K], `conv_bias` [D] or None. x: [T, D], its inputs.
        meta: SGLang's record: `query_start_loc` [B + 1] int, where requests' rows begin; `cache_indices` [B] int and
            `layer_cache`, as in `packed_verification`.
        draft_token_num, arch: SGLang's; unused.

    Returns:
        [T, D] in the dtype of `x`.
    """
    rows = Rows.of(meta.query_start_loc.long(), len(x))
    return packed_verification(x, conv.conv_weight, conv.conv_bias, meta.layer_cache, meta.cache_indices, rows)


PADDED_ATTENTIONS = frozenset({"trtllm_mla"})
"""Backends that pad the rows of every request to one width (see `rows_counted`)."""


def rows_counted(runner: Any, widest: int) -> int:
    """Return the query rows per request to declare to attention: the server's widest block if required, else `widest`.

    TRT-LLM's MLA ends each request's keys one widest block (the server's) after its context, and takes its query rows
    for the last positions of that block. With fewer rows each would get a later position than its own. If layers keep a
    state, SGLang gives every slot of a graph, also those with its unused rows, at most the declared rows.
    """
    names = {runner.prefill_attention_backend_str, runner.decode_attention_backend_str}
    if names & PADDED_ATTENTIONS or has_state(runner.model_config):
        return int(get_spec().speculative_num_draft_tokens)
    return widest
