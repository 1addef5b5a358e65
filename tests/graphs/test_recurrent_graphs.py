"""Targets with a recurrent state where every verification is replayed: text is plain decoding's, states one pass's.

SGLang's own plan of a replay for such layers, its padded slots and its commit, on a tape of CPU operators. Its kernels
of the gated delta rule and of Mamba 2 are a step of the tape each, computed by torch:
`tests/compat/interpreted_recurrent.py` runs them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import op_tape
import pytest
import torch
import torch.nn.functional as F
from captured_attention import CapturedAttention
from emulated import emulated_graphs
from engine import Engine, engine
from families import FAMILIES, LAYERS, Family, tiny_family
from matrix import sampled
from overlap import overlapped
from reference import Comparison
from sglang.srt.layers.attention.hybrid_linear_attn_backend import Mamba2AttnBackend
from test_recurrent_trees import CASES, POOL, check_states, conversations, with_chunks
from tiny_models import tiny_pair
from traffic import play

from whiflash_cpu.recurrent_backends import CpuChannelDeltaBackend, CpuDeltaBackend, CpuMamba2Backend
from whiflash_cpu.recurrent_ops import gated_delta_rule, selective_scan
from whiflash_sglang.engine.forward import recurrent_untried as ragged_recurrent
from whiflash_sglang.engine.forward.recurrences import Rows
from whiflash_sglang.engine.forward.recurrent_untried import RaggedConvBackend, RaggedDelta, RaggedMamba2


def fused_sigmoid_gating_delta_rule_update(
    *,
    a: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    b: torch.Tensor,
    initial_state_source: torch.Tensor,
    initial_state_indices: torch.Tensor,
    cu_seqlens: torch.Tensor,
    is_kda: bool,
    intermediate_states_buffer: torch.Tensor,
    intermediate_state_indices: torch.Tensor,
    **gate: Any,
) -> torch.Tensor:
    """SGLang's kernel as a formula; it leaves rows after the last request's as they were in memory."""
    starts = cu_seqlens.long()
    rows, places = Rows.of(starts, v.shape[1]), intermediate_state_indices[: len(starts) - 1].long()
    states = initial_state_source[initial_state_indices.long().clamp(min=0)]
    layer = SimpleNamespace(num_v_heads=v.shape[2], head_k_dim=k.shape[3], **gate)
    formula = CpuChannelDeltaBackend if is_kda else CpuDeltaBackend
    decay = formula.decay(object.__new__(formula), layer, a)
    out, behind, _ = gated_delta_rule(
        q[0], k[0], v[0], decay, b.flatten(0, -2).float().sigmoid(), states, starts, rows, every=True
    )
    intermediate_states_buffer[places, : behind.shape[1]] = behind
    return out.masked_fill(~rows.covered[:, None, None], torch.nan)[None]


def selective_state_update(
    state: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    d: torch.Tensor,
    *,
    dt_bias: torch.Tensor,
    state_batch_indices: torch.Tensor,
    pad_slot_id: int,
    out: torch.Tensor,
    intermediate_states_buffer: torch.Tensor,
    intermediate_state_indices: torch.Tensor,
    **_: Any,
) -> None:
    """SGLang's kernel as a formula, whose rows have one width: [B, W, H, P]."""
    slots, width = x.shape[:2]
    starts = torch.arange(slots + 1, device=x.device) * width
    time = F.softplus(dt[..., 0] + dt_bias[:, 0])
    packed = [rows.flatten(0, 1) for rows in (x, time, b, c)]
    y, behind, _ = selective_scan(
        *packed[:2],
        a[:, 0, 0],
        *packed[2:],
        d[:, 0],
        state[state_batch_indices.long().clamp(min=0)],
        starts,
        Rows.of(starts, slots * width),
        every=True,
    )
    out.copy_(y.unflatten(0, (slots, width)))
    kept = state_batch_indices != pad_slot_id
    intermediate_states_buffer[intermediate_state_indices[kept].long(), :width] = behind[kept]


KERNELS = (fused_sigmoid_gating_delta_rule_update, selective_state_update)


class TapedDelta(RaggedDelta, CpuDeltaBackend):
    """A card's verification, over the CPU's prefills."""

    def __init__(self, runner: Any) -> None:
        super().__init__(runner)
        self.verify_intermediate_state_indices = torch.arange(self.req_to_token_pool.size, dtype=torch.int32)


class TapedChannelDelta(TapedDelta, CpuChannelDeltaBackend):
    """The same of KDA."""

    by_channel = True


class TapedMamba2(RaggedMamba2, CpuMamba2Backend):
    """The same of Mamba 2, which has a plan of replays of its own."""

    init_forward_metadata_out_graph = Mamba2AttnBackend.init_forward_metadata_out_graph


@pytest.fixture(autouse=True)
def as_on_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.layers.attention import hybrid_linear_attn_backend
    from sglang.srt.layers.attention.linear import gdn_backend, kda_backend, short_conv_backend

    from whiflash_cpu.seams import install_model_seams, install_seams

    install_seams()
    install_model_seams({"RadixLinearAttention", "MambaMixer2"})
    monkeypatch.setattr(gdn_backend, "GDNAttnBackend", TapedDelta)
    monkeypatch.setattr(kda_backend, "KDAAttnBackend", TapedChannelDelta)
    monkeypatch.setattr(hybrid_linear_attn_backend, "Mamba2AttnBackend", TapedMamba2)
    monkeypatch.setattr(short_conv_backend, "ShortConvAttnBackend", RaggedConvBackend)
    names = [f"{ragged_recurrent.__name__}.{kernel.__name__}" for kernel in KERNELS]
    for name, kernel in zip(names, KERNELS, strict=True):
        monkeypatch.setattr(name, kernel)
    monkeypatch.setattr(op_tape, "KERNELS", (*op_tape.KERNELS, *names))


def dense(family: Family) -> Family:
    """Without experts, of which SGLang's torch form reads on the host how many rows each has."""
    if family.kind != "kimi_linear":
        return family
    layers = range(LAYERS)
    return replace(
        family,
        changes={**family.changes, "mlp_layer_types": ["dense" for _ in layers]},
        published={f"layers.{i}.block_sparse_moe.": f"layers.{i}.mlp." for i in layers},
        said={**family.said, "first_k_dense_replace": LAYERS},
    )


def hybrid(runner: Any) -> Any:
    """The target's attention with its own recurrent part, which the commit asks, beside one that can be captured."""
    eager, captured = runner.attn_backend, CapturedAttention(runner)
    for name in ("token_to_kv_pool", "req_to_token_pool", "kv_index_translator"):
        setattr(captured, name, getattr(eager, name))
    return type(eager)(captured, eager.linear_attn_backend, eager.full_attn_layers)


@contextmanager
def serving(target: Path, lag: int, **options: Any) -> Iterator[Engine]:
    if lag:
        with overlapped(target, host_lengths=False, **options) as e:
            yield e
            assert not e.streams.races
        return
    with engine(target, **options) as e:
        yield e


@pytest.mark.parametrize(
    ("case", "lag"),
    sampled(
        [
            ("convolutions", 0),
            ("delta rule, intervals", 1),
            ("delta rule by channel, intervals", 0),
            ("Mamba 2, intervals", 1),
        ],
        ("convolutions", 0),
    ),
)
def test_replayed_rounds_leave_the_states_of_one_pass(
    case: str, lag: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In step with the scheduler, and under SGLang's overlap loop, which it runs with intervals alone."""
    name, strategy = CASES[case]
    family, target = dense(with_chunks(FAMILIES[name], strategy)), tmp_path / "target"
    model = tiny_family(target, family)
    with engine(target, disable_radix_cache=True) as e:
        turns, expected = conversations(e)
    drafters = {**tiny_pair(tmp_path, target), "whiflash_router": "random"}
    options = {"max_running_requests": 4, "context_length": 256, **POOL, **strategy}
    with serving(target, lag, whiflash=drafters, **options) as e, emulated_graphs(e, hybrid) as graphs:
        played = [turn[:5] for turn in turns[:2]]
        for turn in played:
            Comparison(model).check_all(turn, expected, play(e, turn))
        assert len(graphs.backend.replayed) == e.worker.clock.rounds > 0
        assert len(set(graphs.backend.replayed)) > 4
        assert check_states(e, model) > 4
        assert sum(e.requests[a.rid].cached_tokens for a in played[1]) > 0
