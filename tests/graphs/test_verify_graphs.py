"""Replayed verifications give what eager ones give, whatever their graph was captured with; and the end of a graph
commits what the same functions commit behind an eager one, or nothing where it may not.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from emulated import emulated_graphs
from engine import Engine, engine
from families import FAMILIES, tiny_family
from model_set import Models
from op_tape import NotCapturableError
from tiny_models import tiny_dflash
from whiflash_kernels import prepare_mixed_block

from whiflash_sglang.cache.penalties import Penalties
from whiflash_sglang.cache.tokens import FEW, NO_TOKEN
from whiflash_sglang.device.capture import MOST_DRAFTS, graded
from whiflash_sglang.device.transfers import Upload, mask_places, masks_of_places
from whiflash_sglang.engine.forward import graphs
from whiflash_sglang.engine.forward.graphs import PLAIN, VerifyGraphs, bytes_for, most_rows, spare_slots
from whiflash_sglang.engine.scheduler.spec_worker import put_rates
from whiflash_sglang.formats.router import Layers
from whiflash_sglang.records.core import Asked, Rated, Verified
from whiflash_sglang.round.epilogue import Epilogue

REQUESTS, WIDEST = 5, 17
Stopped = tuple[Engine, Any]
PROMPTS = [[7] * 3, [1, 2, 3, 4, 5, 6], [9] * 17, [3, 1, 4, 1, 5], [2, 7, 1, 8, 2, 8, 1, 8]]
CASES = [[3, 1, 5], [2, 2, 2, 4], [WIDEST] * 2, [1] * REQUESTS, [9, 1, WIDEST, 4, 7]]
SMALL = {"max_running_requests": REQUESTS, "context_length": 96, "max_total_tokens": 1024}


class Bench:
    """A decode batch of a running engine, to be verified and committed with any widths; everything is put back.

    right: the target's own tokens of every request, from which drafts part at a random place.
    """

    def __init__(self, engine: Engine, graphs: VerifyGraphs, batch: Any) -> None:
        worker = engine.worker
        self.target, self.graphs, self.batch = worker.target, graphs, batch
        self.epilogue: Epilogue = worker.stages.epilogue
        pool, rings = self.target.runner.token_to_kv_pool, worker.sync.rings.rings
        self.pools = [*pool.k_buffer, *pool.v_buffer]
        self.kept = [worker.tokens.data, rings.features, rings.next_tokens]
        self.right = torch.zeros((REQUESTS, WIDEST), dtype=torch.int64)

    def answer(self) -> None:
        """Find `right`."""
        for column in range(WIDEST):
            rows, _ = self.verify([WIDEST] * REQUESTS, self.right[:, :-1], REQUESTS * WIDEST)
            self.right[:, column] = rows.logits.argmax(-1).view(REQUESTS, WIDEST)[:, column]

    def stop(self, row: int, stops: Sequence[int]) -> None:
        """A request with these stops begins in `row`."""
        upload = Upload()
        self.epilogue._stops.begin(upload, row, stops)
        upload.send(torch.device("cpu"))

    def drafts(self, widths: Sequence[int]) -> torch.Tensor:
        generator = torch.Generator().manual_seed(sum(widths))
        drafts = self.right[: len(widths), : max(widths) - 1].clone()
        for own, width in zip(drafts, widths, strict=True):
            wrong = int(torch.randint(width, (), generator=generator))
            if wrong < width - 1:
                own[wrong] = (own[wrong] + 1) % 256
        return drafts

    def first(self, count: int) -> Any:
        """The first requests of the batch; a verification changes what it is given."""
        batch = copy.copy(self.batch)
        batch.reqs = batch.reqs[:count]
        for name in ("req_pool_indices", "seq_lens", "seq_lens_cpu", "orig_seq_lens"):
            setattr(batch, name, getattr(batch, name)[:count])
        batch.seq_lens_sum = int(batch.seq_lens.sum())
        return batch

    def verify(
        self,
        widths: Sequence[int],
        drafts: torch.Tensor,
        rows: int,
        *,
        greedy: bool = False,
        masked: bool = False,
        penalised: bool = False,
        rated: int = 0,
    ) -> tuple[Verified, list[int]]:
        """A verification of so many rows, and the requests' rows. greedy: a graph may commit. masked: under `masks`,
        and the second row of each request is rejected. rated: requests with log-probabilities.
        """
        batch, count = self.first(len(widths)), len(widths)
        verify_lens = torch.tensor(widths, dtype=torch.int32)
        request_rows = batch.req_pool_indices.long()
        block = prepare_mixed_block(
            torch.arange(60, 60 + count),
            drafts,
            verify_lens,
            batch.seq_lens,
            request_rows,
            self.target.slot_table,
            rows=rows,
        )
        row_ids = request_rows.tolist()
        asked = [Asked(i, 3, range(i)) for i in range(min(rated, count))]
        rates = self.epilogue.rated(asked) if asked else None
        unchanged = not (masked or penalised or (rates and rates.captured))
        self.epilogue.let_graphs_commit(greedy and unchanged, row_ids)
        verified = self.target.verify(batch, block, verify_lens, None, most_of(widths))._replace(rated=rates)
        begins = zip(accumulate(widths, initial=0), widths, strict=False)
        rejected = [begin + 1 for begin, width in begins if masked and width > 1]
        masks = self.masks(rows, rejected)
        of_rows = (masks, mask_places(masks, rows).clamp(min=0)) if masked else None
        if greedy:
            verified = self.epilogue.finish(verified, count, masks if masked else None, penalised)
        if verified.committed is None:
            verified = verified._replace(request_rows=request_rows)
            if penalised:
                verified = self.epilogue.penalise(verified)
            tokens = self.epilogue.sample(verified, of_rows)
            ids = verified.input_ids.index_fill(0, torch.tensor(rejected, dtype=torch.int64), NO_TOKEN)
            verified = verified._replace(predictions=tokens, input_ids=ids)
        if rates and "rates" not in verified.signals:
            verified = verified._replace(rated=rates._replace(masks=of_rows))
        return verified._replace(request_rows=request_rows), row_ids

    def masks(self, rows: int, rejected: Sequence[int]) -> torch.Tensor:
        """Any, of so many rows."""
        generator, words = torch.Generator().manual_seed(0), -(-self.target.shape.vocab_size // 32)
        bits = torch.randint(-(1 << 31), 1 << 31, (5, words), generator=generator).to(torch.int32)
        free = masks_of_places(rows, words)
        packed = torch.cat([bits.new_zeros((free, words)), bits])
        mask_places(packed, rows)[:] = (
            free + torch.randint(5, (REQUESTS * WIDEST,), generator=generator)[:rows]
        )
        mask_places(packed, rows)[list(rejected)] = -1
        return packed

    def committed(self, widths: Sequence[int], *, replayed: bool = True, **how: Any) -> list[torch.Tensor]:
        """Results and signals of a round of greedy tokens, logits and features; then every request's text and rings,
        and the K and V of every slot but the first, as they are afterwards.
        """
        before = [*self.pools, *self.kept]
        copies = [tensor.clone() for tensor in before]
        rows = self.target.rows_for(sum(widths), len(widths)) if replayed else sum(widths)
        verified, row_ids = self.verify(widths, self.drafts(widths), rows, greedy=replayed, **how)
        assert (verified.committed is not None) == replayed
        committed = self.epilogue.commit(verified, most_of(widths))
        self.epilogue.park(verified, committed)
        signals = self.epilogue.signals(verified, committed, {"entropy", "delta"})
        if verified.rated:
            signals["rates"] = read_rates(verified.rated, signals["rates"], committed.accept_lens)
        # Behind a rejected draft penalties count other tokens.
        other = bool(how.get("masked") and how.get("penalised"))
        given = [t[: sum(widths)] for t in (verified.logits, verified.features)[other:]]
        kept = [*(kept[row_ids] for kept in self.kept), *(pool[1:] for pool in self.pools)]
        found = [t.clone() for t in (*committed, *signals.values(), *given, *kept)]
        for tensor, held in zip(before, copies, strict=True):
            tensor.copy_(held)
        return found

    def compare(self, widths: Sequence[int], **how: Any) -> list[torch.Tensor]:
        """Replayed against eager."""
        rows, before = self.target.rows_for(sum(widths), len(widths)), len(self.graphs.backend.replayed)
        replayed = self.committed(widths, **how)
        assert self.graphs.backend.replayed[before:] == [rows]
        assert self.graphs.plain == (max(widths) == 1)
        with patch.object(self.target.runner, "decode_cuda_graph_runner", None):
            eager = self.committed(widths, replayed=False, **how)
        for a, b in zip(replayed, eager, strict=True):
            torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)
        return replayed


def most_of(widths: Sequence[int]) -> int:
    """Most rows of a request, as far as a round knows: one if nothing was drafted."""
    return WIDEST if max(widths) > 1 else 1


def read_rates(rated: Rated, rates: torch.Tensor, accepted: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of committed tokens, and those that requests asked for beside them, as SGLang reads them."""
    output, found = SimpleNamespace(), list[float]()
    put_rates(output, rates, rated, len(accepted))
    for index, *_ in rated.requests:
        for column in range(int(accepted[index])):
            at = index * rates.shape[1] + column
            beside = output.next_token_top_logprobs_val[at], output.next_token_token_ids_logprobs_val[at]
            found += [output.next_token_logprobs.tolist()[index][column], *torch.cat(beside).tolist()]
    return torch.tensor(found)


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
        epilogue, target = found[0].worker.stages.epilogue, found[0].worker.target
        hidden, generator = target.shape.hidden_size, torch.Generator().manual_seed(0)
        target._text.logits_processor.keep_last_hidden_states = True
        epilogue._needs = lambda: {"entropy", "delta"}
        epilogue._router = Layers(
            *(torch.randn(shape, generator=generator) for shape in ((8, hidden), (8,), (3, 8), (3,)))
        )
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
def benched(stopped: Stopped) -> Iterator[Bench]:
    """Every graph captured."""
    with emulated_graphs(stopped[0]) as captured:
        yield Bench(stopped[0], captured, stopped[1])


@pytest.fixture(scope="module")
def bench(stopped: Stopped) -> Iterator[Bench]:
    with benched(stopped) as found:
        found.answer()
        yield found


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


def test_every_graph_gives_and_commits_what_an_eager_verification_does(bench: Bench) -> None:
    accepted, buckets = set(), bench.graphs.capture_num_tokens
    assert buckets == graded(REQUESTS * WIDEST)
    for widths in [*layouts(buckets), *CASES]:
        accepted |= set(bench.compare(widths)[0].tolist())
    assert set(bench.graphs.backend.replayed) >= set(buckets)
    assert {1, 2, WIDEST} <= accepted
    plain = {key.size for key in bench.graphs.backend.tapes if key.attention_variant == PLAIN}
    assert plain == {rows for rows in buckets if rows <= bench.target.rows_for(REQUESTS, REQUESTS)}


KINDS = [
    (True, False, 0),
    (False, True, 0),
    (True, True, 0),
    (False, False, 2),
    (True, True, 4),
    (True, False, 5),
]


@pytest.mark.parametrize(("masked", "penalised", "rated"), KINDS)
def test_every_end_behind_a_graph_commits_what_is_sampled_under_what_it_has(
    bench: Bench, masked: bool, penalised: bool, rated: int
) -> None:
    """Penalised requests stand beside others, and some rows are not masked in time. Five are rated behind their end."""
    plain = bench.compare(CASES[-1])[1]
    penalties = Penalties(0.5, 0.3, 1.2, {int(token): -9.0 for token in bench.right[0, :9]}, 2, 9, (3, 7))
    upload, rows = Upload(), bench.batch.req_pool_indices.tolist()[: 4 * penalised : 2]
    for row in rows:
        bench.epilogue.penalties.begin(upload, row, penalties)
    upload.send(torch.device("cpu"))
    for widths in [*layouts(bench.graphs.capture_num_tokens), *CASES]:
        found = bench.compare(widths, masked=masked, penalised=penalised, rated=rated)[1]
    assert torch.equal(found, plain) == (not masked and not penalised)
    upload = Upload()
    for row in rows:
        bench.epilogue.penalties.begin(upload, row, None)
    upload.send(torch.device("cpu"))


def test_a_graph_that_may_not_commit_leaves_everything_as_it_was(bench: Bench) -> None:
    """Tokens are sampled, so what the graph would take are others."""
    for widths in CASES:
        rows = bench.target.rows_for(sum(widths), len(widths))
        before, replays = [kept[1:].clone() for kept in bench.kept], len(bench.graphs.backend.replayed)
        verified, _ = bench.verify(widths, bench.drafts(widths), rows)
        assert verified.committed is None
        assert bench.graphs.backend.replayed[replays:] == [rows]
        for kept, held in zip(bench.kept, before, strict=True):
            assert torch.equal(kept[1:], held)


def test_a_block_ends_at_a_stop_in_a_graph_too(bench: Bench) -> None:
    """A batch with a request that has many stops is committed after the graph, and its neighbours' stops stay."""
    widths, rows = [9, 9, 9], bench.batch.req_pool_indices.tolist()
    lengths, tokens = bench.committed(widths)[:2]
    cut = int(lengths.argmax())
    assert lengths[cut] > 1
    bench.stop(rows[cut], [int(tokens[cut, 0])])
    try:
        assert bench.compare(widths)[0][cut] == 1
        bench.stop(rows[cut - 1], range(300, 300 + FEW + 1))
        with pytest.raises(AssertionError):
            bench.committed(widths)
        with patch.object(bench.target.runner, "decode_cuda_graph_runner", None):
            assert bench.committed(widths, replayed=False)[0][cut] == 1
        bench.stop(rows[cut - 1], [])
        assert bench.compare(widths)[0][cut] == 1
        bench.stop(rows[cut], [])
        stops = bench.epilogue._stops
        assert torch.equal(stops.few, stops.data[:, :FEW])
        assert (stops.few[rows] == NO_TOKEN).all()
        assert torch.equal(bench.compare(widths)[0], lengths)
    finally:
        for row in rows:
            bench.stop(row, [])


def test_a_batch_without_a_graph_is_verified_eagerly(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.graphs, "requests", REQUESTS - 1)
    assert bench.target.rows_for(7, 5) == 7
    assert bench.target.rows_for(7, 4) == 8
    before, widths = len(bench.graphs.backend.replayed), [2, 1, 1, 1, 3]
    bench.verify(widths, bench.drafts(widths), 8)  # as many rows as a graph, by chance
    assert len(bench.graphs.backend.replayed) == before


def test_an_epilogue_that_reads_the_device_is_no_end_of_a_graph(
    stopped: Stopped, monkeypatch: pytest.MonkeyPatch
) -> None:
    capture = Epilogue.capture

    def reading(self: Epilogue, graph: Any, of_graph: Any) -> None:
        assert bool(of_graph().starts.max() > 0)
        capture(self, graph, of_graph)

    monkeypatch.setattr(Epilogue, "capture", reading)
    with pytest.raises(NotCapturableError, match="reads"), benched(stopped):
        pass


@pytest.mark.parametrize("most_drafts", [MOST_DRAFTS, 30])
def test_what_is_reserved_for_graphs_is_what_they_keep(
    stopped: Stopped, monkeypatch: pytest.MonkeyPatch, most_drafts: int
) -> None:
    """Also if there are fewer rows than all requests at their widest would have."""
    monkeypatch.setattr(graphs, "MOST_DRAFTS", most_drafts)
    with benched(stopped) as b:
        outputs = b.graphs.backend.outputs.values()
        vocabulary, features = b.target.shape.vocab_size, next(iter(outputs)).hidden_states
        row_bytes = features.shape[1] * features.itemsize
        kept = sum(output.hidden_states.untyped_storage().nbytes() for output in outputs)
        logits = {
            output.next_token_logits.untyped_storage()._cdata: output.next_token_logits for output in outputs
        }
        kept += sum(shared.untyped_storage().nbytes() for shared in logits.values())
        assert kept == bytes_for(REQUESTS, WIDEST, vocabulary=vocabulary, row_bytes=row_bytes)


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
    with benched(stopped) as b:
        for widths in ([3, 1, 5], [2, 2, 2, 4], [WIDEST] * 2):
            b.compare(widths)
        b.graphs.buffer_registry.get_slot("mrope_positions").copy_from_fb = False
        with pytest.raises(AssertionError, match="not close"):
            b.compare([3, 2, 4])
