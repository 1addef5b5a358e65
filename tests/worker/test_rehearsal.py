"""Memory that the pool leaves free for the largest sampled verification, and its rehearsal."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from engine import engine
from model_set import Models
from sglang.srt.configs.model_config import AttentionArch
from sglang.srt.model_executor.cuda_graph_config import Backend, default_cuda_graph_config

from whiflash_sglang.cache.penalties import PenaltyRows
from whiflash_sglang.cache.tokens import FEW
from whiflash_sglang.engine.forward import graphs, triton_backend
from whiflash_sglang.engine.forward.sampling import SAMPLED_ROWS
from whiflash_sglang.engine.scheduler import kv_budget
from whiflash_sglang.errors import ConfigError
from whiflash_sglang.round.ends import GraphEnds
from whiflash_sglang.serve.assemble import reserve


def peak_bytes(body: Any, trace: Path) -> int:
    """Most bytes that `body` held at once, by torch's own count of a CPU's allocations."""
    with torch.profiler.profile(profile_memory=True) as profiler:
        body()
    profiler.export_chrome_trace(str(trace))
    events = [e for e in json.loads(trace.read_text())["traceEvents"] if e["name"] == "[memory]"]
    held, peak = 0, 0
    for event in sorted(events, key=lambda e: e["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


def test_the_pool_leaves_room_for_sampling_at_its_peak(models: Models, tmp_path: Path) -> None:
    with engine(models.target, whiflash=models.whiflash("none")) as e:
        runner, rows = e.worker.target.runner, SAMPLED_ROWS
        vocabulary = runner.model_config.vocab_size

        def sampled() -> None:
            kv_budget.rehearse_sampling(runner, 5 * rows)  # no more than are sampled at once

        sampled()
        peak = peak_bytes(sampled, tmp_path / "trace.json")
        print(f"{peak / (rows * vocabulary):.1f} bytes a logit")
        assert 0.8 * kv_budget.LOGIT_BYTES < peak / (rows * vocabulary) <= kv_budget.LOGIT_BYTES


def test_a_card_that_has_no_room_for_it_ends_the_start_with_a_sentence() -> None:
    full = Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory"))
    runner = SimpleNamespace(model_config=SimpleNamespace(vocab_size=8), device="cpu", sampler=full)
    with pytest.raises(ConfigError, match="16 rows of 8 logits"):
        kv_budget.rehearse_sampling(runner, 16)


def test_on_a_card_verified_rows_are_reckoned_with(monkeypatch: pytest.MonkeyPatch) -> None:
    config = default_cuda_graph_config()
    execution = SimpleNamespace(graph=SimpleNamespace(cuda_graph_config=config))
    monkeypatch.setattr(graphs, "get_exec", lambda: execution)
    monkeypatch.setattr(kv_budget.kv_cache_configurator, "get_req_to_token_extra_context_len", lambda: 6)

    def reserved(device: str) -> int:
        shape = SimpleNamespace(vocab_size=1000)
        target = SimpleNamespace(device=torch.device(device), shape=shape, context_len=90, row_bytes=10)
        return sum(kv_budget.for_requests(target, 2, 4, GraphEnds.bytes_for(4)).values())

    table = 3 * (90 + 6 + 4) * 8 + 3 * FEW * 8 + 3 * 24
    sampled = 8 * 1000 * kv_budget.LOGIT_BYTES
    assert reserved("cpu") == table
    row = 10 + GraphEnds.bytes_for(4)
    plain = 1 + 2  # graphs of rounds without drafts
    captured = table + sampled + 8 * 1000 * 4 + (1 + 2 + 3 + 4 + 6 + 8 + plain) * row
    assert reserved("cuda") == captured
    config.decode.backend = Backend.DISABLED
    assert reserved("cuda") == table + sampled


def test_sums_of_cut_prefixes_are_reckoned_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """Qwen3-8B on an H100 has 33 shares (66 on two ranks): twice as many less two may leave sums."""
    config = SimpleNamespace(attention_arch=AttentionArch.MHA, head_dim=128)
    config.get_max_num_attention_heads, config.get_num_kv_heads = lambda: 32, lambda ranks: 8 // ranks
    kernel = SimpleNamespace(prefill_attention_backend="fa3", decode_attention_backend=None)

    def kept(attention: str, ranks: int = 1) -> int:
        kernel.attention_backend = attention
        monkeypatch.setattr(triton_backend, "get_exec", lambda: SimpleNamespace(kernel=kernel))
        monkeypatch.setattr(triton_backend, "get_parallel", lambda: SimpleNamespace(attn_tp_size=ranks))
        return triton_backend.kept_bytes(SimpleNamespace(model_config=config, device="cpu"), 94, 17)

    assert kept("triton") == 64 * 17 * 32 * (128 + 2) * 4
    assert kept("triton", 2) == 130 * 17 * 16 * (128 + 2) * 4
    assert kept("fa3") == 0
    config.attention_arch = AttentionArch.MLA
    assert kept("triton") == 0


def test_where_passes_are_captured_their_memory_is_reckoned_with(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The inputs that they read, and the largest pass."""
    with engine(models.target, whiflash=models.whiflash("none")) as e:
        worker, arms = e.worker, e.worker.kv_arms.values()

        def promised() -> int:
            return reserve(worker.drafters, worker.sync, worker.target, 5).fixed

        eager = promised()
        monkeypatch.setattr(graphs, "captures_passes", lambda _: True)
        captured, largest = promised(), max(arm.captured_bytes(5) for arm in arms)
        monkeypatch.undo()
        promised()
        worker.stages.drafting.capture(SimpleNamespace(record=lambda body: (body, body())), 5)
        places = [worker.sync._claims, *(arm.place(5) for arm in arms)]
        held = {tensor.data_ptr(): tensor.nbytes for place in places for tensor in place if tensor.numel()}
        assert largest > 0
        vocabulary = worker.target.shape.vocab_size
        widest = worker.stages.ends._widest
        kept = GraphEnds.second_bytes(graphs.most_rows(5, widest), widest, vocabulary)
        kept += sum(part.nbytes for part in PenaltyRows(0, vocabulary, 5, "cpu").few)
        assert captured - eager == largest + sum(held.values()) + kept


def test_who_turns_graphs_off_captures_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    config = default_cuda_graph_config()
    monkeypatch.setattr(graphs, "get_exec", lambda: SimpleNamespace(graph=SimpleNamespace(cuda_graph_config=config)))
    ranks = SimpleNamespace(attn_tp_size=1)
    monkeypatch.setattr(graphs, "get_parallel", lambda: ranks)
    assert graphs.recorder(SimpleNamespace(device="cpu")) is None
    assert isinstance(graphs.recorder(SimpleNamespace(device="cuda")), graphs.CudaRecorder)
    ranks.attn_tp_size = 2
    assert graphs.recorder(SimpleNamespace(device="cuda")) is None
    ranks.attn_tp_size = 1
    config.decode.backend = Backend.DISABLED
    assert graphs.recorder(SimpleNamespace(device="cuda")) is None
