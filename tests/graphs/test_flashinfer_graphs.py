"""Verifications replayed with FlashInfer's attention, which is planned on the host before each of them.

The plan, the buffers and the graphs are those of a card; the kernel is torch, on a tape (`flashinfer_on_tape.py`).
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import msgspec
import pytest
from emulated import emulated_graphs
from engine import engine
from flashinfer_on_tape import FlashInferOnTape
from matrix import sampled
from model_set import Models
from overlap import overlapped
from plain import compare, plain_texts
from test_replayed_text import SMALL
from test_verify_graphs import REQUESTS, WIDEST, Stopped, bench, decoding, layouts
from traffic import mixed, play

from whiflash_sglang.compat.forward.graphs import row_buckets
from whiflash_sglang.routing.costs import FULL_LENGTH, MeasuredCosts

ARRIVALS = mixed(23, 5, shared=12, longest=30, stops=0.3)


@pytest.mark.parametrize("lag", sampled([0, 1], 0))
def test_text_is_plain_decodings_in_whole_rounds(
    models: Models, monkeypatch: pytest.MonkeyPatch, lag: int
) -> None:
    """All arms, routed at random; with a lag in SGLang's overlap loop, where the host knows no width beforehand."""
    monkeypatch.setattr(MeasuredCosts, "worth", lambda self, arm: FULL_LENGTH)
    plain = plain_texts(models.target, ARRIVALS, **SMALL)
    options: dict[str, Any] = {"whiflash": models.whiflash("random"), **SMALL}
    if lag:
        monkeypatch.setenv("WHIFLASH_DEVICE_RESIDENT", "1")
        started = overlapped(models.target, host_lengths=True, **options)
    else:
        started = engine(models.target, **options)
    with started as e, emulated_graphs(e, FlashInferOnTape) as graphs:
        compare(models.reference.target, ARRIVALS, plain, play(e, ARRIVALS))
        replayed, rounds = graphs.backend.replayed, e.worker.clock.rounds
        assert len(replayed) == rounds > 0
        assert len(set(replayed)) > 5
        if lag:
            assert not e.streams.races


@pytest.fixture(scope="module")
def stopped_here(models: Models) -> Iterator[Stopped]:
    """For the tests below, since no other engine may run beside it."""
    with decoding(models.target, models.whiflash("none")) as found:
        yield found


def test_every_graph_gives_what_an_eager_verification_gives(stopped_here: Stopped) -> None:
    """Every size, full and with rows that are nobody's, of equal and of different widths: logits, features and KV."""
    with bench(stopped_here, FlashInferOnTape) as b:
        for widths in layouts(row_buckets(REQUESTS * WIDEST)):
            b.compare(widths)
        assert set(b.graphs.backend.replayed) == set(b.graphs.capture_num_tokens)
        planned = b.graphs.attn_backend.planned
    assert any(len(set(widths_of(rows))) > 2 for rows, _ in planned)
    assert any(0 in widths_of(rows) for rows, _ in planned)


def widths_of(offsets: list[int]) -> list[int]:
    return [b - a for a, b in pairwise(offsets)]


class PlannedOnce(FlashInferOnTape):
    """Leaves a graph the plan that it was captured with."""

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        if in_capture:
            super().init_forward_metadata_out_graph(forward_batch, in_capture)


class WidthsOfTheCapture(FlashInferOnTape):
    """Plans every replay anew, for the rows that its graph was captured with."""

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        layout = forward_batch.spec_info.ragged_verify_layout
        if in_capture:
            lens, offsets = layout.verify_lens.clone(), layout.qo_indptr_device.clone()
            self.__dict__.setdefault("_first", {})[layout.graph_num_tokens] = msgspec.structs.replace(
                layout, verify_lens=lens, qo_indptr_device=offsets
            )
        else:
            layout = self._first[layout.graph_num_tokens]
            forward_batch.spec_info = replace(forward_batch.spec_info, ragged_verify_layout=layout)
        super().init_forward_metadata_out_graph(forward_batch, in_capture)


class PlansForAnother(FlashInferOnTape):
    """Plans for a graph of as many requests, whose replay it is not."""

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        layout = forward_batch.spec_info.ragged_verify_layout
        if not in_capture:
            more = layout.padded_to_bucket(padded_bs=forward_batch.batch_size)
            more = msgspec.structs.replace(more, graph_num_tokens=self._next(layout.graph_num_tokens))
            forward_batch.spec_info = replace(forward_batch.spec_info, ragged_verify_layout=more)
        super().init_forward_metadata_out_graph(forward_batch, in_capture)

    def _next(self, rows: int) -> int:
        return min(size for size in self._captured if size > rows)


@pytest.mark.parametrize(
    "attention", sampled([PlannedOnce, WidthsOfTheCapture, PlansForAnother], PlannedOnce)
)
def test_a_plan_of_other_rows_is_found(stopped_here: Stopped, attention: type) -> None:
    with bench(stopped_here, attention) as b, pytest.raises(AssertionError, match="not close"):
        b.compare([3, 1, 5])


def test_rows_that_are_nobodys_are_found_where_they_write_to_a_live_slot(stopped_here: Stopped) -> None:
    with bench(stopped_here, FlashInferOnTape) as b, pytest.raises(AssertionError, match="not close"):
        b.compare([3, 1, 3], pad_slot=b.live_slot)
