"""SGLang's kernels of the gated delta rule on our verifications, as `RaggedDeltaBackend` calls them, and its commit.

Run by `test_attention.py` in a child process, as `interpreted_attention.py`. Windows overlap, as SGLang lays them out
on CUDA. Expected is what decoding row by row gives, of each request alone.
"""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from interpreted_attention import CONFIGURED, REQUESTS, WIDTHS
from sglang.kernels.ops.mamba.mamba_state_scatter_triton import scatter_mamba_states_after_mtp_verify
from sglang.srt.layers.attention.hybrid_linear_attn_backend import MambaAttnBackendBase
from sglang.srt.mem_cache.memory_pool import MambaPool

from whiflash_sglang.compat.ragged_recurrent import RaggedDeltaBackend
from whiflash_sglang.compat.recurrent import tracked_rows
from whiflash_sglang.platform.recurrent_ops import Rows, causal_conv1d_update, gated_delta_rule

KEY_HEADS, HEADS, KEY, VALUE, TAPS, SLOTS = 1, 2, 16, 16, 4, 8
WIDE = 2 * KEY_HEADS * KEY + HEADS * VALUE
OWN = [3, 6, 1]
"""Slots of requests' states."""


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape)


LAYER = SimpleNamespace(
    layer_id=0, bias=None, activation="silu", head_q_dim=KEY, head_k_dim=KEY, head_v_dim=VALUE
)
LAYER.q_dim = LAYER.k_dim = KEY_HEADS * KEY
LAYER.v_dim = HEADS * VALUE


def drawn_pool() -> Any:
    """Of one layer, as SGLang's record of a verification has it."""
    layout = SimpleNamespace(conv_window_axis=1, device="cpu")
    whole, windows = MambaPool._allocate_deduplicated_conv_window(
        layout,
        conv_shape=(WIDE, TAPS - 1),
        num_mamba_layers=1,
        spec_state_size=REQUESTS,
        speculative_num_draft_tokens=CONFIGURED,
        conv_dtype=torch.float32,
    )
    whole.normal_()
    return SimpleNamespace(
        conv=[draw(1, SLOTS, WIDE, TAPS - 1)],
        temporal=draw(1, SLOTS, HEADS, VALUE, KEY),
        intermediate_ssm=draw(1, REQUESTS + 1, CONFIGURED, HEADS, VALUE, KEY),
        intermediate_conv_window=[windows],
    )


def backend_of(pool: Any, starts: torch.Tensor, slots: torch.Tensor) -> Any:
    """The backend without its constructor, which wants a GPU; captured for more slots than there are requests."""
    cache = SimpleNamespace(
        conv=[pool.conv[0][0]],
        temporal=pool.temporal[0],
        intermediate_ssm=pool.intermediate_ssm[0],
        intermediate_conv_window=[pool.intermediate_conv_window[0][0]],
    )
    backend = object.__new__(RaggedDeltaBackend)
    backend.__dict__.update(
        req_to_token_pool=SimpleNamespace(mamba2_layer_cache=lambda _: cache, size=REQUESTS),
        forward_metadata=SimpleNamespace(query_start_loc=starts.int(), mamba_cache_indices=slots.int()),
        verify_intermediate_state_indices=torch.arange(REQUESTS, dtype=torch.int32),
    )
    with patch.object(MambaAttnBackendBase, "init_cuda_graph_state"):
        backend.init_cuda_graph_state(len(slots), len(slots))
    return backend


def decoded(pool: Any, slot: int, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> list[Any]:
    """Row by row: the output, and the state and the convolution's inputs behind each."""
    inputs, state, found = pool.conv[0][0].clone(), pool.temporal[0, slot][None], []
    one = torch.tensor([0, 1])
    for i in range(len(x)):
        mixed = causal_conv1d_update(
            x[i][None], inputs, LAYER.conv_weights, None, "silu", conv_state_indices=torch.tensor([slot])
        )
        q, k, v = mixed.split([LAYER.q_dim, LAYER.k_dim, LAYER.v_dim], -1)
        out, state, _ = gated_delta_rule(
            q.unflatten(-1, (-1, KEY)),
            k.unflatten(-1, (-1, KEY)),
            v.unflatten(-1, (-1, VALUE)),
            -LAYER.A_log.exp() * F.softplus(a[i][None] + LAYER.dt_bias),
            b[i][None].sigmoid(),
            state,
            one,
            Rows.of(one, 1),
            every=False,
        )
        found.append((out[0], state[0], inputs[slot].clone()))
    return found


@pytest.mark.parametrize("padding", [(0, ()), (20, ()), (5, (0, 5)), (6, (-1, 3, 0, 1, 0, 0, 0, 2, -1, 0))])
@pytest.mark.parametrize("widths", WIDTHS.values(), ids=WIDTHS)
def test_a_verification_is_what_decoding_row_by_row_gives(
    widths: Sequence[int], padding: tuple[int, Sequence[int]]
) -> None:
    """Alone, with more rows behind than there are steps, and with more slots than there are requests, as SGLang marks
    them or as the reserved slot 0. `padding`: rows behind, and slots as pairs of a state's slot and its rows."""
    torch.manual_seed(0)
    LAYER.conv_weights, LAYER.A_log, LAYER.dt_bias = draw(WIDE, TAPS), draw(HEADS), draw(HEADS)
    behind, spare = padding
    slots = [*OWN[: len(widths)], *spare[::2]]
    starts = torch.tensor([0, *widths, *spare[1::2]]).cumsum(0)
    total = sum(widths) + behind
    x, a, b = draw(total, WIDE), draw(total, HEADS), draw(total, HEADS)
    pool = drawn_pool()
    before = [pool.conv[0].clone(), pool.temporal.clone()]
    out = backend_of(pool, starts, torch.tensor(slots))._verify(LAYER, x, a, b)
    assert torch.equal(pool.conv[0], before[0])
    assert torch.equal(pool.temporal, before[1]), "a verification only reads"
    assert bool(out.isfinite().all())
    for i, width in enumerate(widths):
        rows = slice(int(starts[i]), int(starts[i]) + width)
        for j, (row, state, inputs) in enumerate(decoded(pool, OWN[i], x[rows], a[rows], b[rows])):
            torch.testing.assert_close(out[0, rows][j], row, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(pool.intermediate_ssm[0, i, j], state, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(pool.intermediate_conv_window[0][0, i, j], inputs)


def test_the_commit_takes_the_accepted_row_and_the_one_that_is_tracked() -> None:
    """SGLang's kernels on what `commit` hands them; they ask only whether tensors are CUDA's."""
    torch.manual_seed(1)
    pool = drawn_pool()
    accepted, starts = torch.tensor([5, 1, 17], dtype=torch.int32), torch.tensor([6, 9, 0])
    tracks, steps = torch.tensor([2, 4, 7]), tracked_rows(starts, accepted, 8)
    assert steps.tolist() == [1, -1, 15]
    conv, temporal = pool.conv[0].clone(), pool.temporal.clone()
    windows, states = pool.intermediate_conv_window[0], pool.intermediate_ssm
    for i, slot in enumerate(OWN):
        for place, row in ((slot, accepted[i] - 1), (tracks[i], steps[i])):
            if row >= 0:
                conv[:, place], temporal[:, place] = windows[:, i, row], states[:, i, row]
    with patch.object(torch.Tensor, "is_cuda", True):
        scatter_mamba_states_after_mtp_verify(pool, torch.tensor(OWN), accepted.long() - 1, tracks, steps)
    assert torch.equal(pool.conv[0], conv)
    assert torch.equal(pool.temporal, temporal)
