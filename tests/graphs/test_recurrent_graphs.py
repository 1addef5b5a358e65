"""Targets with a recurrent state where every verification is replayed: text is plain decoding's, states one pass's.

SGLang's own plan of a replay for such layers, its padded slots and its commit, on a tape of CPU operators. Its kernel
of the gated delta rule is one step of the tape, computed by torch: `tests/compat/interpreted_recurrent.py` runs it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import op_tape
import pytest
import torch
import torch.nn.functional as F
from captured_attention import CapturedAttention
from emulated import emulated_graphs
from engine import Engine, engine
from families import FAMILIES, tiny_family
from overlap import overlapped
from reference import Comparison
from test_recurrent_trees import CASES, POOL, check_states, conversations, with_chunks
from tiny_models import tiny_dflash, tiny_eagle3
from traffic import play

from whiflash_sglang.compat import ragged_recurrent
from whiflash_sglang.compat.ragged_recurrent import RaggedConvBackend, RaggedDelta
from whiflash_sglang.platform.gated_delta import CpuDeltaBackend
from whiflash_sglang.platform.recurrent_ops import Rows, gated_delta_rule

KERNEL = "fused_sigmoid_gating_delta_rule_update"


def delta_rule(
    *,
    A_log: torch.Tensor,  # noqa: N803 (SGLang's)
    a: torch.Tensor,
    dt_bias: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    b: torch.Tensor,
    initial_state_source: torch.Tensor,
    initial_state_indices: torch.Tensor,
    cu_seqlens: torch.Tensor,
    intermediate_states_buffer: torch.Tensor,
    intermediate_state_indices: torch.Tensor,
    **_: Any,
) -> torch.Tensor:
    """What SGLang's kernel does; it leaves rows behind the last request's as they were in memory."""
    starts = cu_seqlens.long()
    rows, places = Rows.of(starts, v.shape[1]), intermediate_state_indices[: len(starts) - 1].long()
    states = initial_state_source[initial_state_indices.long().clamp(min=0)]
    decay = -A_log.exp() * F.softplus(a.float() + dt_bias)
    out, behind, _ = gated_delta_rule(
        q[0], k[0], v[0], decay, b.float().sigmoid(), states, starts, rows, every=True
    )
    intermediate_states_buffer[places, : behind.shape[1]] = behind
    return out.masked_fill(~rows.covered[:, None, None], torch.nan)[None]


class TapedDelta(RaggedDelta, CpuDeltaBackend):
    """What a card verifies with, over the CPU's prefills."""

    def __init__(self, runner: Any) -> None:
        super().__init__(runner)
        self.verify_intermediate_state_indices = torch.arange(self.req_to_token_pool.size, dtype=torch.int32)


@pytest.fixture(autouse=True)
def as_on_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.layers.attention.linear import gdn_backend, short_conv_backend

    from whiflash_sglang.platform.seams import install_model_seams, install_seams

    monkeypatch.setenv("SGLANG_MAMBA_CONV_DTYPE", "float32")
    install_seams()
    install_model_seams({"RadixLinearAttention"})
    monkeypatch.setattr(gdn_backend, "GDNAttnBackend", TapedDelta)
    monkeypatch.setattr(short_conv_backend, "ShortConvAttnBackend", RaggedConvBackend)
    monkeypatch.setattr(ragged_recurrent, KERNEL, delta_rule)
    name = f"{ragged_recurrent.__name__}.{KERNEL}"
    monkeypatch.setattr(op_tape, "KERNELS", (*op_tape.KERNELS, name))


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


@pytest.mark.parametrize(("case", "lag"), [("convolutions", 0), ("delta rule, intervals", 1)])
def test_replayed_rounds_leave_the_states_of_one_pass(
    case: str, lag: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In step with the scheduler, and under SGLang's overlap loop, which it runs with intervals alone."""
    monkeypatch.setenv("WHIFLASH_DEVICE_RESIDENT", str(lag))
    name, strategy = CASES[case]
    family, target = with_chunks(FAMILIES[name], strategy), tmp_path / "target"
    model = tiny_family(target, family)
    with engine(target, disable_radix_cache=True) as e:
        turns, expected = conversations(e)
    drafters = {
        "draft": tiny_dflash(tmp_path / "dflash", target),
        "whiflash_eagle_draft": str(tiny_eagle3(tmp_path / "eagle3", target)),
        "whiflash_router": "random",
    }
    options = {"max_running_requests": 4, "context_length": 256, **POOL, **strategy}
    comparison = Comparison(model)
    with serving(target, lag, whiflash=drafters, **options) as e, emulated_graphs(e, hybrid) as graphs:
        played = [turn[:5] for turn in turns[:2]]
        for turn in played:
            found = play(e, turn)
            for a in turn:
                comparison.check(a.prompt, expected[a.rid], found[a.rid], a.rid)
        assert len(graphs.backend.replayed) == e.worker.clock.rounds > 0
        assert len(set(graphs.backend.replayed)) > 4
        assert check_states(e, model) > 4
        assert sum(e.requests[a.rid].cached_tokens for a in played[1]) > 0
    print(comparison.summary())
