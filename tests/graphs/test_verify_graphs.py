"""Replayed verifications give what eager ones give, whatever their graph was captured with."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from captured_attention import CapturedAttention
from emulated import emulated_graphs
from engine import Engine, engine
from families import FAMILIES, tiny_family
from model_set import Models
from tiny_models import tiny_dflash
from whiflash_kernels import prepare_mixed_block

from whiflash_sglang.device.capture import MOST_DRAFTS, graded
from whiflash_sglang.engine.forward import graphs
from whiflash_sglang.engine.forward.graphs import VerifyGraphs, bytes_for, most_rows, spare_slots

REQUESTS, WIDEST = 5, 17
Stopped = tuple[Engine, Any]
PROMPTS = [[7] * 3, [1, 2, 3, 4, 5, 6], [9] * 17, [3, 1, 4, 1, 5], [2, 7, 1, 8, 2, 8, 1, 8]]
SMALL = {"max_running_requests": REQUESTS, "context_length": 96, "max_total_tokens": 1024}


class Bench:
    """A decode batch of a running engine, to be verified with any widths."""

    def __init__(self, engine: Engine, graphs: VerifyGraphs, batch: Any) -> None:
        self.target, self.graphs, self._batch = engine.worker.target, graphs, batch
        pool = self.target.runner.token_to_kv_pool
        self._pools = [*pool.k_buffer, *pool.v_buffer]

    def _first(self, count: int) -> Any:
        """The first requests of the batch; a verification changes what it is given."""
        batch = copy.copy(self._batch)
        batch.reqs = batch.reqs[:count]
        for name in ("req_pool_indices", "seq_lens", "seq_lens_cpu", "orig_seq_lens"):
            setattr(batch, name, getattr(batch, name)[:count])
        batch.seq_lens_sum = int(batch.seq_lens.sum())
        return batch

    def verify(self, widths: Sequence[int], rows: int, pad_slot: int = 0) -> list[torch.Tensor]:
        """Logits and features, and the K and V of every slot but the first, as they are afterwards."""
        batch, count = self._first(len(widths)), len(widths)
        drafts = torch.randint(
            256, (count, max(widths) - 1), generator=torch.Generator().manual_seed(sum(widths))
        )
        verify_lens = torch.tensor(widths, dtype=torch.int32)
        block = prepare_mixed_block(
            torch.arange(60, 60 + count),
            drafts,
            verify_lens,
            batch.seq_lens,
            batch.req_pool_indices.long(),
            self.target.slot_table,
            rows=rows,
            pad_slot=pad_slot,
        )
        before = [pool.clone() for pool in self._pools]
        verified = self.target.verify(batch, block, verify_lens, widths, max(widths))
        found = [
            verified.logits.clone(),
            verified.features.clone(),
            *(pool[1:].clone() for pool in self._pools),
        ]
        for pool, old in zip(self._pools, before, strict=True):
            pool.copy_(old)
        return found

    def compare(self, widths: Sequence[int], pad_slot: int = 0) -> None:
        """Replayed against eager."""
        rows, before = self.target.rows_for(sum(widths), len(widths)), len(self.graphs.backend.replayed)
        replayed = self.verify(widths, rows, pad_slot)
        assert self.graphs.backend.replayed[before:] == [rows]
        with _without(self.target.runner):
            eager = self.verify(widths, sum(widths))
        for a, b in zip(replayed, eager, strict=True):
            torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)

    @property
    def live_slot(self) -> int:
        """The slot of a committed token."""
        return int(self.target.slot_table[self._batch.req_pool_indices[0], 1])


@contextmanager
def _without(runner: Any) -> Iterator[None]:
    graphs, runner.decode_cuda_graph_runner = runner.decode_cuda_graph_runner, None
    try:
        yield
    finally:
        runner.decode_cuda_graph_runner = graphs


@pytest.fixture(scope="module")
def stopped(
    request: pytest.FixtureRequest, models: Models, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stopped]:
    """An engine of the target of all tests, or of the family that a test names; one engine at a time."""
    target, flags = models.target, models.whiflash("none")
    if family := getattr(request, "param", None):
        root = tmp_path_factory.mktemp(family)
        target = root / "target"
        tiny_family(target, FAMILIES[family])
        flags = {"draft": tiny_dflash(root / "dflash", target), "whiflash_router": "none"}
    with decoding(target, flags) as found:
        yield found


@contextmanager
def decoding(target: Path, whiflash: dict[str, Any]) -> Iterator[Stopped]:
    """An engine that decodes five requests of different lengths, stopped before a verification of all five."""
    with engine(target, whiflash=whiflash, **SMALL) as e:
        for i, prompt in enumerate(PROMPTS):
            e.submit(f"request-{i}", prompt, max_new_tokens=40)
        batches: list[Any] = []
        verify = e.worker.target.verify

        def watched(batch: Any, *args: Any) -> Any:
            batches.append(copy.copy(batch))
            return verify(batch, *args)

        e.worker.target.verify = watched
        while not batches or len(batches[-1].reqs) < REQUESTS:
            e.step()
        del e.worker.target.verify
        yield e, batches[-1]
        e.run()


@contextmanager
def bench(stopped: Stopped, attention: Callable[[Any], Any] = CapturedAttention) -> Iterator[Bench]:
    """Every graph captured."""
    with emulated_graphs(stopped[0], attention) as captured:
        yield Bench(stopped[0], captured, stopped[1])


def layouts(buckets: Sequence[int]) -> list[list[int]]:
    """Batches for every bucket: one that fills it, one that leaves rows, and batches of one width."""
    found = [[w] * n for w in (1, 2, 5, WIDEST) for n in (1, 2, REQUESTS)]
    generator = torch.Generator().manual_seed(0)
    for lower, upper in zip([0, *buckets], buckets, strict=False):
        for total in {lower + 1, upper}:
            count = max(
                -(-total // WIDEST), min(total, int(torch.randint(1, REQUESTS + 1, (), generator=generator)))
            )
            widths = [1] * count
            while sum(widths) < total:
                i = int(torch.randint(count, (), generator=generator))
                widths[i] += widths[i] < WIDEST
            found.append(widths)
    return found


def test_every_graph_gives_what_an_eager_verification_gives(stopped: Stopped) -> None:
    with bench(stopped) as b:
        buckets = b.graphs.capture_num_tokens
        assert buckets == graded(REQUESTS * WIDEST)
        for widths in layouts(buckets):
            b.compare(widths)
        assert set(b.graphs.backend.replayed) == set(buckets)


def test_a_tail_is_captured_and_sees_the_widths_of_its_replay(stopped: Stopped) -> None:
    tokens, widths = torch.zeros(REQUESTS * WIDEST, dtype=torch.int64), torch.zeros(64, dtype=torch.int32)

    def tail(runner: Any, output: Any, forward_batch: Any, rows: int) -> None:
        layout = forward_batch.spec_info.ragged_verify_layout
        tokens[:rows].copy_(output.next_token_logits.argmax(-1))
        widths[: layout.bs].copy_(layout.verify_lens)

    hooks = stopped[0].worker.target.runner.capture_tail_hooks
    hooks.append(tail)
    try:
        with bench(stopped) as b:
            for case in ([3, 1, 5], [2, 2, 2, 4]):
                tokens.fill_(-1)
                logits = b.verify(case, b.target.rows_for(sum(case), len(case)))[0]
                assert tokens[: sum(case)].tolist() == logits.argmax(-1).tolist()
                assert widths[: len(case)].tolist() == case
    finally:
        hooks.remove(tail)


@pytest.mark.parametrize("most_drafts", [MOST_DRAFTS, 30])
def test_what_is_reserved_for_graphs_is_what_they_keep(
    stopped: Stopped, monkeypatch: pytest.MonkeyPatch, most_drafts: int
) -> None:
    """Also if there are fewer rows than all requests at their widest would have."""
    monkeypatch.setattr(graphs, "MOST_DRAFTS", most_drafts)
    with bench(stopped) as b:
        outputs = b.graphs.backend.outputs.values()
        vocabulary, features = b.target.shape.vocab_size, next(iter(outputs)).hidden_states
        row_bytes = features.shape[1] * features.itemsize
        kept = sum(output.hidden_states.untyped_storage().nbytes() for output in outputs)
        logits = {
            output.next_token_logits.untyped_storage()._cdata: output.next_token_logits for output in outputs
        }
        kept += sum(shared.untyped_storage().nbytes() for shared in logits.values())
        assert kept == bytes_for(REQUESTS, WIDEST, vocabulary=vocabulary, row_bytes=row_bytes)


def test_a_batch_without_a_graph_is_verified_eagerly(stopped: Stopped) -> None:
    with bench(stopped) as b:
        b.graphs.requests = REQUESTS - 1
        assert b.target.rows_for(7, 5) == 7
        assert b.target.rows_for(7, 4) == 8
        b.verify([2, 1, 1, 1, 3], 8)  # as many rows as a graph, by chance
        assert b.graphs.backend.replayed == []


class KeepsItsLengths(CapturedAttention):
    """Copies no lengths before a replay."""

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        before = self.starts.clone()
        super().init_forward_metadata_out_graph(forward_batch, in_capture)
        self.starts.copy_(before)


def test_attention_that_keeps_what_it_was_captured_with_is_found(stopped: Stopped) -> None:
    with bench(stopped, KeepsItsLengths) as b, pytest.raises(AssertionError, match="not close"):
        b.compare([3, 1, 5])


@pytest.mark.parametrize(("requests", "widest"), [(1, 1), (1, 17), (8, 5), (48, 17), (48, 9), (256, 17)])
def test_sizes(requests: int, widest: int) -> None:
    """No batch is longer than its graph, none has a slot of more than `widest` rows, and few rows are padding."""
    buckets = graded(most_rows(requests, widest))
    spare = spare_slots(requests, widest)
    assert buckets == sorted(set(buckets))
    assert requests <= buckets[-1] <= min(requests * widest, requests + MOST_DRAFTS)
    for lower, upper in zip([0, *buckets], buckets, strict=False):
        assert upper - lower - 1 <= max(lower / 2, 1)
        slots = min(upper, requests + spare)
        for batch in range(1, min(requests, upper) + 1):
            leftover = upper - batch  # nothing was drafted
            assert slots > batch or leftover == 0
            assert leftover <= (slots - batch) * widest


@pytest.mark.parametrize("stopped", ["Qwen3VLForConditionalGeneration"], indirect=True)
def test_positions_in_three_dimensions_are_refreshed(stopped: Stopped) -> None:
    """The target has M-RoPE, and its layers read no other positions."""
    with bench(stopped) as b:
        for widths in ([3, 1, 5], [2, 2, 2, 4], [WIDEST] * 2):
            b.compare(widths)
        b.graphs.buffer_registry.get_slot("mrope_positions").copy_from_fb = False
        with pytest.raises(AssertionError, match="not close"):
            b.compare([3, 2, 4])
