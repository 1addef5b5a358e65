"""Torch versions of the operators of recurrent layers, against their formulas."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from whiflash_cpu.recurrent_ops import (
    causal_conv1d_fn,
    causal_conv1d_update,
    gated_delta_rule,
    scatter_mamba_states_after_mtp_verify,
    selective_scan,
)
from whiflash_sglang.engine.forward.recurrences import Rows

WIDTH, TAPS, SLOTS = 6, 4, 7


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def whole(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """[D, T] of a sequence that begins at its first column."""
    out = torch.zeros_like(x)
    for t in range(x.shape[1]):
        for k in range(TAPS):
            if t - TAPS + 1 + k >= 0:
                out[:, t] += weight[:, k] * x[:, t - TAPS + 1 + k]
    return out if bias is None else out + bias[:, None]


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("biased", [False, True])
def test_chunks_and_single_inputs_go_on_from_each_other(activation: str | None, biased: bool) -> None:
    """Three sequences in chunks of different lengths, shorter than the state too, then input by input."""
    weight, bias = draw(WIDTH, TAPS, seed=1), draw(WIDTH, seed=2) if biased else None
    sequences = [draw(WIDTH, 12, seed=3 + i) for i in range(3)]
    expected = [whole(x, weight, bias) for x in sequences]
    if activation:
        expected = [F.silu(x) for x in expected]
    states = draw(SLOTS, WIDTH, TAPS - 1, seed=9)
    untouched = states[1].clone()
    slots, done = torch.tensor([4, 2, 6]), [0, 0, 0]
    for lengths in ([5, 1, 3], [1, 2, 4]):
        ends = [a + b for a, b in zip(done, lengths, strict=True)]
        parts = [x[:, a:b] for x, a, b in zip(sequences, done, ends, strict=True)]
        bounds = torch.tensor([0, *lengths]).cumsum(0)
        known = torch.tensor([n > 0 for n in done])
        out = causal_conv1d_fn(torch.cat(parts, 1), weight, bias, bounds, slots, known, states, activation)
        for i, part in enumerate(out.split(lengths, dim=1)):
            torch.testing.assert_close(part, expected[i][:, done[i] : ends[i]])
        done = ends
    for _ in range(3):
        x = torch.stack([x[:, n] for x, n in zip(sequences, done, strict=True)])
        out = causal_conv1d_update(x, states, weight, bias, activation, conv_state_indices=slots)
        for i, row in enumerate(out):
            torch.testing.assert_close(row, expected[i][:, done[i]])
        done = [n + 1 for n in done]
    assert torch.equal(states[1], untouched)


@pytest.mark.parametrize("by_channel", [False, True])
def test_the_delta_rule_is_transformers(by_channel: bool) -> None:
    """Three requests of different lengths, in two parts, the second with every state; by channel as KDA has it, else
    with two query heads a key head. The state behind some of a request's rows is kept beside the last one's."""
    from transformers.models.kimi_linear.modeling_kimi_linear import recurrent_kimi_delta_attention
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_recurrent_gated_delta_rule

    rule = recurrent_kimi_delta_attention if by_channel else torch_recurrent_gated_delta_rule
    heads, per_key, size, width, lengths = 4, 1 if by_channel else 2, 5, 3, [4, 1, 6]
    starts = torch.tensor([0, *lengths]).cumsum(0)
    total, rows = sum(lengths), Rows.of(starts, sum(lengths))
    states, marks = torch.zeros(3, heads, width, size), torch.tensor([4, 0, 2])
    for part in range(2):
        q, k = (draw(total, heads // per_key, size, seed=10 * part + i) for i in range(2))
        v = draw(total, heads, width, seed=10 * part + 2)
        decay = -draw(total, heads, *[size] * by_channel, seed=10 * part + 3).abs()
        beta = draw(total, heads, seed=10 * part + 4).sigmoid()
        out, behind, marked = gated_delta_rule(q, k, v, decay, beta, states, starts, rows, every=part == 1, marks=marks)
        for i, (begin, end) in enumerate(zip(starts.tolist(), starts[1:].tolist(), strict=False)):
            one = [x[None, begin:end] for x in (q, k, v, decay, beta)]
            expected, last = rule(
                *(x.repeat_interleave(per_key, 2) for x in one[:2]),
                *one[2:],
                initial_state=states[i][None].mT,
                output_final_state=True,
                use_qk_l2norm_in_kernel=True,
            )
            torch.testing.assert_close(out[begin:end], expected[0], atol=1e-5, rtol=1e-4)
            final = behind[i, end - begin - 1] if part else behind[i]
            torch.testing.assert_close(final, last[0].mT, atol=1e-5, rtol=1e-4)
            if part:
                assert torch.equal(marked[i], behind[i, marks[i] - 1] if marks[i] else states[i])
        states = behind


@pytest.mark.parametrize("bound", [None, -5.0])
def test_decays_by_channel_are_transformers(bound: float | None) -> None:
    """As prompts have them and as verifications do; Kimi Linear's without a bound, GLM-5-Next's with one."""
    from transformers.models.glm5_next.modeling_glm5_next import Glm5NextTextForgetGate

    from whiflash_cpu.recurrent_backends import CpuChannelDeltaBackend

    rows, heads, size = 7, 3, 4
    said = SimpleNamespace(hidden_size=size, linear_head_dim=size, linear_num_heads=heads, linear_lower_bound=bound)
    gate = Glm5NextTextForgetGate(said)
    gate.A_log.data, gate.dt_bias.data = draw(heads, seed=1), draw(heads * size, seed=2)
    x = draw(rows, size, seed=3)
    expected = gate(x[None])[0]
    layer = SimpleNamespace(
        A_log=gate.A_log, dt_bias=gate.dt_bias, lower_bound=bound, num_v_heads=heads, head_k_dim=size
    )
    projected = gate.f_b_proj(gate.f_a_proj(x))
    backend = CpuChannelDeltaBackend.__new__(CpuChannelDeltaBackend)
    for a in (projected, projected.view(1, rows, heads, size)):
        torch.testing.assert_close(backend.decay(layer, a), expected)


def test_mamba_2_is_its_formula() -> None:
    """Three requests of different lengths, in two parts, against a loop over each alone; three heads share B and C."""
    heads, groups, size, width, lengths = 6, 2, 5, 3, [4, 1, 6]
    starts = torch.tensor([0, *lengths]).cumsum(0)
    total, rows, marks = sum(lengths), Rows.of(starts, sum(lengths)), torch.tensor([2, 1, 0])
    a, skip = -draw(heads, seed=1).abs(), draw(heads, seed=2)
    states = draw(3, heads, width, size, seed=3)
    for part in range(2):
        x, dt = draw(total, heads, width, seed=10 * part + 4), draw(total, heads, seed=10 * part + 5).exp()
        b, c = (draw(total, groups, size, seed=10 * part + i) for i in (6, 7))
        out, behind, marked = selective_scan(x, dt, a, b, c, skip, states, starts, rows, every=part == 1, marks=marks)
        after = states.clone()
        for i, (begin, end) in enumerate(zip(starts.tolist(), starts[1:].tolist(), strict=False)):
            for t in range(begin, end):
                for h in range(heads):
                    group = h * groups // heads
                    taken = dt[t, h] * torch.outer(x[t, h], b[t, group])
                    after[i, h] = (dt[t, h] * a[h]).exp() * after[i, h] + taken
                    expected = after[i, h] @ c[t, group] + skip[h] * x[t, h]
                    torch.testing.assert_close(out[t, h], expected, atol=1e-5, rtol=1e-4)
                if part:
                    torch.testing.assert_close(behind[i, t - begin], after[i], atol=1e-5, rtol=1e-4)
            if part:
                assert torch.equal(marked[i], behind[i, marks[i] - 1] if marks[i] else states[i])
        if not part:
            torch.testing.assert_close(behind, after, atol=1e-5, rtol=1e-4)
        states = behind


def test_states_become_those_behind_the_accepted_rows() -> None:
    """States of every kind and layer do; a request without an accepted row, or without a slot, keeps its own."""
    layers, steps = 2, 5
    kept = SimpleNamespace(
        conv=[draw(layers, SLOTS, WIDTH, TAPS - 1, seed=1)],
        intermediate_conv_window=[draw(layers, 4, steps, WIDTH, TAPS - 1, seed=2)],
        temporal=draw(layers, SLOTS, 2, 3, 3, seed=3),
        intermediate_ssm=draw(layers, 4, steps, 2, 3, 3, seed=4),
    )
    conv, temporal = kept.conv[0].clone(), kept.temporal.clone()
    conv[:, [5, 1]] = kept.intermediate_conv_window[0][:, [0, 1], [4, 0]]
    temporal[:, [5, 1]] = kept.intermediate_ssm[:, [0, 1], [4, 0]]
    scatter_mamba_states_after_mtp_verify(kept, torch.tensor([5, 1, 2, -1]), torch.tensor([4, 0, -1, 3]), None, None)
    assert torch.equal(kept.conv[0], conv)
    assert torch.equal(kept.temporal, temporal)
