"""Settings that the algorithm fixes before the server starts."""

from types import SimpleNamespace

import pytest
import torch

from whiflash_sglang.checkpoints.manifest import Lookup, Structure
from whiflash_sglang.engine import algorithm
from whiflash_sglang.engine.forward import triton_backend


def widths_of(monkeypatch: pytest.MonkeyPatch, *, copies: int, forced: int = 4, uno: int = 4) -> int:
    """Draft tokens that the KV reservation is computed from, with blocks of 8 and chains of 5."""
    settings = SimpleNamespace(
        drafters={"ar": "e", "diffusion": "d"},
        eagle_steps=5,
        block_size=None,
        uno="u",
        uno_drafts=uno,
        lookup=Lookup(max_width=copies),
        structure=Structure(max_width=forced),
    )
    monkeypatch.setattr(algorithm, "settings_of", lambda _: settings)
    monkeypatch.setattr(algorithm, "block_size_of", lambda *_: 8)
    monkeypatch.setattr(algorithm, "resolving_view", lambda args: args)
    arguments = SimpleNamespace(max_running_requests=4)
    algorithm.WhiflashAlgorithm.handle_server_args(SimpleNamespace(), arguments)
    return int(arguments.speculative_num_draft_tokens)


def test_the_widest_arm_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    assert widths_of(monkeypatch, copies=24) == 25
    assert widths_of(monkeypatch, copies=2) == 8
    assert widths_of(monkeypatch, copies=2, forced=30) == 31
    assert widths_of(monkeypatch, copies=2, uno=20) == 21


@pytest.mark.parametrize("asked", [True, False])
def test_lengths_come_to_the_host_where_the_attention_asks_for_them(asked: bool) -> None:
    """TRT-LLM's does; fa3 and Triton do without, and a plan does with bounds (`tests/phantom/test_server.py`)."""
    ours = algorithm.WhiflashAlgorithm("WHIFLASH", lambda _: object, supports_overlap=True)
    pool = SimpleNamespace(req_to_token=torch.zeros(3, 8, dtype=torch.int32))
    future_map = ours.create_future_map("cpu", pool, needs_cpu_seq_lens=asked)
    future_map.new_seq_lens_buf[:] = torch.tensor([0, 5, 7])
    draft = SimpleNamespace(future_indices=torch.tensor([2, 1]))
    batch = SimpleNamespace(spec_info=draft, seq_lens=None, seq_lens_cpu=None, seq_lens_sum=None)
    future_map.resolve_seq_lens_cpu(batch)
    assert batch.seq_lens.tolist() == [7, 5]
    assert (batch.seq_lens_cpu is None) is not asked


@pytest.mark.parametrize("algorithm_served", ["WHIFLASH", "EAGLE3", None])
def test_attention_is_ours_in_a_server_of_ours(monkeypatch: pytest.MonkeyPatch, algorithm_served: str | None) -> None:
    monkeypatch.setitem(triton_backend.ATTENTION_BACKENDS, "triton", None)
    served = SimpleNamespace(speculative_algorithm=algorithm_served)
    monkeypatch.setattr("sglang.srt.runtime_context.get_spec", lambda: served)
    monkeypatch.setattr(triton_backend, "RaggedTritonBackend", lambda _: "ours")
    monkeypatch.setattr(triton_backend, "_upstreams", lambda _: "upstream's")
    triton_backend.install()
    made = triton_backend.ATTENTION_BACKENDS["triton"](object())
    assert made == ("ours" if algorithm_served == "WHIFLASH" else "upstream's")
