"""Recurrent states that a verification reads and leaves, against decoding one by one."""

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from whiflash_cpu.recurrent_ops import causal_conv1d_update, scatter_mamba_states_after_mtp_verify
from whiflash_sglang.engine.forward import recurrent
from whiflash_sglang.engine.forward.recurrent import commit, tracked_rows, verify_packed

WIDTH, TAPS, SLOTS, STEPS, EVERY = 6, 3, 7, 5, 4


def attention(caches: Any, slots: torch.Tensor) -> Any:
    """Part of SGLang's attention backend that commits."""

    def update(*, last_correct_step_indices: torch.Tensor, model: Any, **tracks: torch.Tensor | None) -> None:
        scatter_mamba_states_after_mtp_verify(caches, slots, last_correct_step_indices, *tracks.values())

    return SimpleNamespace(linear_attn_backend=None, update_mamba_state_after_mtp_verify=update)


@pytest.mark.parametrize("kept_in", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biased", [False, True])
def test_rounds_are_what_decoding_one_by_one_gives(
    kept_in: torch.dtype, biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packed rows of different widths, of which requests accept different numbers: the accepted rows' outputs, and the
    state afterwards, are those of the accepted inputs alone; so is what is kept of the last multiple of an interval."""
    monkeypatch.setattr(recurrent, "mamba_track_grid", lambda page: EVERY)
    torch.manual_seed(0)
    rng = random.Random(0)
    conv = SimpleNamespace(conv_weight=torch.randn(WIDTH, TAPS), conv_bias=torch.randn(WIDTH) if biased else None)
    alone = torch.randn(SLOTS, WIDTH, TAPS - 1).to(kept_in)
    # Behind each slot of a request the one where its state is kept for the tree.
    states = torch.cat([alone, torch.zeros_like(alone)])[None]
    lengths, kept = [0] * SLOTS, torch.zeros_like(alone)
    windows = torch.zeros(1, 5, STEPS, WIDTH, TAPS - 1, dtype=kept_in)
    nothing = torch.zeros(1, 2 * SLOTS, 0)
    caches = SimpleNamespace(conv=[states], intermediate_conv_window=[windows], temporal=nothing, intermediate_ssm=None)
    cache = SimpleNamespace(conv=[states[0]], intermediate_conv_window=[windows[0]])
    for _ in range(12):
        requests = rng.randint(1, 4)
        slots = torch.tensor(rng.sample(range(1, SLOTS), requests))
        widths = [rng.randint(1, STEPS) for _ in range(requests)]
        accepted = [rng.randint(1, width) for width in widths]
        starts = torch.tensor([0, *widths], dtype=torch.int32).cumsum(0)
        x = torch.randn(sum(widths), WIDTH)
        meta = SimpleNamespace(query_start_loc=starts, cache_indices=slots, layer_cache=cache)
        before = states.clone()
        out = verify_packed(None, conv, x, meta, STEPS, "tiny")
        assert torch.equal(states, before), "a verification only reads"
        batch = SimpleNamespace(mamba_track_indices=slots + SLOTS, tree_cache=SimpleNamespace(page_size=1))
        begins = torch.tensor([lengths[slot] for slot in slots.tolist()])
        commit(attention(caches, slots), None, batch, begins, torch.tensor(accepted, dtype=torch.int32))
        for i, slot in enumerate(slots.tolist()):
            for row in range(int(starts[i]), int(starts[i]) + accepted[i]):
                single = causal_conv1d_update(
                    x[row][None], alone, conv.conv_weight, conv.conv_bias, conv_state_indices=torch.tensor([slot])
                )
                torch.testing.assert_close(out[row], single[0])
                lengths[slot] += 1
                if lengths[slot] % EVERY == 0:
                    kept[slot] = alone[slot]
        assert torch.equal(states[0, :SLOTS], alone)
        assert torch.equal(states[0, SLOTS:], kept)
    assert bool(kept.any())


def test_without_intervals_nothing_is_kept_beside() -> None:
    """SGLang's record of a batch has no second slots then."""
    seen: dict[str, Any] = {}
    backend = SimpleNamespace(linear_attn_backend=None, update_mamba_state_after_mtp_verify=seen.update)
    one = torch.tensor([1])
    commit(backend, None, SimpleNamespace(mamba_track_indices=None), one, one)
    assert (seen["mamba_track_indices"], seen["mamba_steps_to_track"]) == (None, None)


def test_the_last_multiple_among_the_accepted_rows_is_kept() -> None:
    starts = torch.tensor([6, 7, 8, 7, 0, 3])
    accepted = torch.tensor([1, 1, 3, 9, 8, 17], dtype=torch.int32)
    assert tracked_rows(starts, accepted, 8).tolist() == [-1, 0, -1, 8, 7, 12]
