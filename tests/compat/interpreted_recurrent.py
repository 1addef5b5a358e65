"""SGLang's kernels of recurrent layers on our verifications, as the backends of `untried.recurrent` call them, and its
commit.

Run by `test_attention.py` in a child process, as `interpreted_attention.py`. Windows overlap, as SGLang lays them out
on CUDA, but KDA's. Expected is what decoding row by row gives, of each request alone, by the CPU's formulas.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from interpreted_attention import CONFIGURED, REQUESTS, WIDTHS
from recurrent_layers import HEADS, KEY, KINDS, TAPS, VALUE, Delta, draw
from sglang.kernels.ops.mamba.mamba_state_scatter_triton import scatter_mamba_states_after_mtp_verify
from sglang.srt.layers.attention.hybrid_linear_attn_backend import MambaAttnBackendBase
from sglang.srt.mem_cache.memory_pool import MambaPool

from whiflash_cpu.recurrent_ops import causal_conv1d_update
from whiflash_sglang.engine import patching
from whiflash_sglang.engine.forward import recurrent_untried as ragged_recurrent
from whiflash_sglang.engine.forward.recurrent import tracked_rows
from whiflash_sglang.engine.forward.recurrent_untried import (
    RaggedChannelDeltaBackend,
    RaggedConvBackend,
    RaggedDeltaBackend,
    RaggedMamba2Backend,
)

SLOTS = 8
OWN = [3, 6, 1]
"""Slots of requests' states."""


def drawn_pool(wide: int, turned: bool) -> Any:
    """Pool of one layer, as SGLang's record of a verification has it."""
    shape = (TAPS - 1, wide) if turned else (wide, TAPS - 1)
    if turned:
        windows = draw(1, REQUESTS + 1, CONFIGURED, *shape)
    else:
        layout = SimpleNamespace(conv_window_axis=1, device="cpu")
        whole, windows = MambaPool._allocate_deduplicated_conv_window(
            layout,
            conv_shape=shape,
            num_mamba_layers=1,
            spec_state_size=REQUESTS,
            speculative_num_draft_tokens=CONFIGURED,
            conv_dtype=torch.float32,
        )
        whole.normal_()
    return MambaPool.SpeculativeState(
        conv=[draw(1, SLOTS, *shape)],
        temporal=draw(1, SLOTS, HEADS, VALUE, KEY),
        intermediate_ssm=draw(1, REQUESTS + 1, CONFIGURED, HEADS, VALUE, KEY),
        intermediate_conv_window=[windows],
    )


def backend_of(kind: Any, pool: Any, starts: torch.Tensor, slots: torch.Tensor) -> Any:
    """The backend without its constructor, which wants a GPU; captured for more slots than there are requests."""
    cache = pool.at_layer_idx(0)
    backend = object.__new__(kind.backend)
    backend.__dict__.update(
        req_to_token_pool=SimpleNamespace(mamba2_layer_cache=lambda _: cache, size=REQUESTS),
        forward_metadata=SimpleNamespace(query_start_loc=starts.int(), mamba_cache_indices=slots.int()),
        verify_intermediate_state_indices=torch.arange(REQUESTS, dtype=torch.int32),
    )
    with patch.object(MambaAttnBackendBase, "init_cuda_graph_state"):
        backend.init_cuda_graph_state(len(slots), len(slots))
    return backend


def decoded(kind: Any, pool: Any, slot: int, rows: Mapping[str, torch.Tensor], own: range) -> list[Any]:
    """Row by row of `own`: the output, and the state and the convolution's inputs behind each, as the pool has them."""
    inputs, state, found = pool.conv[0][0].clone(), pool.temporal[0, slot][None], []
    upright = inputs.mT if kind.turned else inputs
    weight, bias = kind.convolution
    for i in own:
        x = kind.convolved(rows)[i][None]
        mixed = causal_conv1d_update(x, upright, weight, bias, "silu", conv_state_indices=torch.tensor([slot]))
        out, state = kind.decode(rows, i, mixed, state)
        found.append((out[0], state[0], inputs[slot].clone()))
    return found


def commit(pool: Any, slots: torch.Tensor, accepted: torch.Tensor, *tracks: torch.Tensor | None) -> None:
    """SGLang's kernels; they ask only whether tensors are CUDA's."""
    with patch.object(torch.Tensor, "is_cuda", True):
        scatter_mamba_states_after_mtp_verify(pool, slots, accepted.long() - 1, *(tracks or (None, None)))


@pytest.mark.parametrize("padding", [(0, ()), (20, ()), (5, (0, 5)), (6, (-1, 3, 0, 1, 0, 0, 0, 2, -1, 0))])
@pytest.mark.parametrize("widths", WIDTHS.values(), ids=WIDTHS)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_verification_is_what_decoding_row_by_row_gives(
    kind: Callable[[], Any], widths: Sequence[int], padding: tuple[int, Sequence[int]]
) -> None:
    """Bare, with more rows after it than there are steps, and with more slots than requests, as SGLang marks them or as
    the reserved slot 0. `padding`: rows after the last, and slots as pairs of a state's slot and its rows.

    The state committed afterwards is that after the accepted row, whichever of each request that is.
    """
    torch.manual_seed(0)
    layer = kind()
    behind, spare = padding
    slots = [*OWN[: len(widths)], *spare[::2]]
    starts = torch.tensor([0, *widths, *spare[1::2]]).cumsum(0)
    rows, pool = layer.rows(sum(widths) + behind), drawn_pool(layer.wide, layer.turned)
    before = [pool.conv[0].clone(), pool.temporal.clone()]
    expected = [
        decoded(layer, pool, slot, rows, range(int(starts[i]), int(starts[i]) + widths[i]))
        for i, slot in enumerate(slots[: len(widths)])
    ]
    out = layer.verify(backend_of(layer, pool, starts, torch.tensor(slots)), rows)
    assert torch.equal(pool.conv[0], before[0])
    assert torch.equal(pool.temporal, before[1]), "a verification only reads"
    assert bool(out.isfinite().all())
    for i, found in enumerate(expected):
        for j, (row, state, inputs) in enumerate(found):
            torch.testing.assert_close(out[int(starts[i]) + j], row, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(pool.intermediate_ssm[0, i, j], state, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(pool.intermediate_conv_window[0][0, i, j], inputs)
    for most in range(1, max(widths) + 1):
        accepted = [min(most, width) for width in widths]
        commit(pool, torch.tensor(slots[: len(widths)]), torch.tensor(accepted))
        for i, rows_accepted in enumerate(accepted):
            _, state, inputs = expected[i][rows_accepted - 1]
            torch.testing.assert_close(pool.temporal[0, OWN[i]], state, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(pool.conv[0][0, OWN[i]], inputs)
    others = [slot for slot in range(SLOTS) if slot not in OWN[: len(widths)]]
    assert torch.equal(pool.temporal[:, others], before[1][:, others])
    assert torch.equal(pool.conv[0][:, others], before[0][:, others])


@pytest.mark.parametrize("turned", [False, True])
def test_the_commit_takes_the_accepted_row_and_the_one_that_is_tracked(turned: bool) -> None:
    """SGLang's kernels on what `commit` hands them."""
    torch.manual_seed(1)
    pool = drawn_pool(Delta.wide, turned)
    accepted, starts = torch.tensor([5, 1, 17], dtype=torch.int32), torch.tensor([6, 9, 0])
    tracks, steps = torch.tensor([2, 4, 7]), tracked_rows(starts, accepted, 8)
    assert steps.tolist() == [1, -1, 15]
    conv, temporal = pool.conv[0].clone(), pool.temporal.clone()
    windows, states = pool.intermediate_conv_window[0], pool.intermediate_ssm
    for i, slot in enumerate(OWN):
        for place, row in ((slot, accepted[i] - 1), (tracks[i], steps[i])):
            if row >= 0:
                conv[:, place], temporal[:, place] = windows[:, i, row], states[:, i, row]
    commit(pool, torch.tensor(OWN), accepted, tracks, steps)
    assert torch.equal(pool.conv[0], conv)
    assert torch.equal(pool.temporal, temporal)


@pytest.mark.parametrize("serves_ours", [True, False])
@pytest.mark.parametrize(
    "ours", [RaggedConvBackend, RaggedDeltaBackend, RaggedChannelDeltaBackend, RaggedMamba2Backend]
)
def test_attention_is_ours_in_a_server_of_ours_alone(
    ours: Any, serves_ours: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process may serve another one afterwards; SGLang asks of both what they are instances of."""
    upstreams = ours.__bases__[-1]
    patching.install(ragged_recurrent)
    monkeypatch.setattr(upstreams, "__init__", lambda self, runner: setattr(self, "runner", runner))
    monkeypatch.setattr(ragged_recurrent, "serves_ours", lambda: serves_ours)
    made = upstreams("a runner")
    assert type(made) is (ours if serves_ours else upstreams)
    assert isinstance(made, upstreams)
    assert made.runner == "a runner"


def test_sglang_asks_whether_accepted_states_are_found_without_a_commit() -> None:
    upstreams = RaggedChannelDeltaBackend.__bases__[-1]
    assert upstreams.__name__ == "KDAAttnBackend"
    assert "_can_fuse_accept_state" in vars(upstreams)
    assert "self._can_fuse_accept_state(" in inspect.getsource(upstreams.__init__)
