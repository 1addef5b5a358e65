"""Prices measured at the start are those of the graphs that rounds replay, as the device's own events time them.

The device here is a stand-in: its time moves when a graph is replayed, by what the test chose for that graph, and a
hundred times that for the first replay of it. An event says nothing before somebody has waited for it.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from device_clock import DeviceClock
from emulated import TapeBackend, emulated_graphs
from engine import Engine, engine
from model_set import Models

from whiflash_sglang.device.capture import CapturedPass, doubling, graded
from whiflash_sglang.engine.forward.graphs import PLAIN, VerifyGraphs
from whiflash_sglang.engine.scheduler import pricing
from whiflash_sglang.prices.tables import CostTables

REQUESTS, WIDEST, CONTEXT = 3, 17, 256
SMALL: dict[str, Any] = {"max_running_requests": REQUESTS, "context_length": CONTEXT, "max_total_tokens": 1024}
LONG = CONTEXT - WIDEST
TILE = 8
"""Rows of a request in the smaller tile: two query heads share a KV head."""
SPARED = 1.0
"""Seconds that a graph of rounds without drafts takes less."""
FIRST = 100.0
"""How many times longer the first replay takes."""

DRAFT = {"the pass of 'ar'": 3.0, "the pass of 'diffusion'": 2.0}
DRAFT |= {"the pass of 'ar' for 2 drafts": 1.0, "the pass of 'ar' for 3 drafts": 2.0}
CATCH_UP = {"the catch-up of 'ar'": 0.5, "the catch-up of 'diffusion'": 0.7}


def verify_seconds(rows: int, tokens: int, requests: int) -> float:
    """A context is read twice for requests of more rows than one tile has."""
    return 4.0 + 0.1 * rows + 0.01 * tokens * (1 + (rows > TILE * requests))


def pass_seconds(name: str, size: int) -> float:
    return DRAFT[name] + 0.2 * size if name in DRAFT else CATCH_UP[name] + 0.05 * size


class Device(DeviceClock):
    """Its clock, which work moves."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[Any] = set()

    def works(self, what: Any, seconds: float) -> None:
        self.now += seconds * (1.0 if what in self._seen else FIRST)
        self._seen.add(what)


class Bench:
    """An engine whose replays move the time of `device`."""

    def __init__(self, engine: Engine, graphs: VerifyGraphs) -> None:
        self.engine, self.device, self._graphs = engine, Device(), graphs

    def verified(self, key: Any) -> None:
        slots = self._graphs._ragged_capture_slots(key.size)
        starts = self._graphs.attn_backend.starts[:slots]
        starts = starts[starts > 1]  # slots without a request have one
        seconds = verify_seconds(key.size, int(starts.sum()), len(starts))
        self.device.works(key, seconds - SPARED * (key.attention_variant == PLAIN))

    def passed(self, captured: CapturedPass[Any], size: int) -> None:
        chosen = next(n for n in captured.sizes if n >= size)
        self.device.works((captured.name, chosen), pass_seconds(captured.name, chosen))

    def measure(self) -> CostTables:
        """On a device that has not run anything."""
        self.device, worker = Device(), self.engine.worker
        with torch.no_grad():
            start = worker.target, worker.drafters, worker.sync, self.device, REQUESTS
            return pricing.Start(*start).tables()


@pytest.fixture(scope="module")
def bench(models: Models) -> Iterator[Bench]:
    with (
        engine(models.target, whiflash=models.whiflash("auto"), **SMALL) as e,
        emulated_graphs(e) as graphs,
        pytest.MonkeyPatch.context() as patch,
    ):
        made, verify, replay = Bench(e, graphs), TapeBackend.replay, CapturedPass.replay

        def verified(self: TapeBackend, key: Any, *args: Any, **named: Any) -> Any:
            made.verified(key)
            return verify(self, key, *args, **named)

        def passed(self: CapturedPass[Any], size: int) -> Any:
            made.passed(self, size)
            return replay(self, size)

        patch.setattr(TapeBackend, "replay", verified)
        patch.setattr(CapturedPass, "replay", passed)
        yield made


def check(tables: CostTables) -> None:
    """The tables are what was chosen, size by size."""
    buckets = graded(REQUESTS * WIDEST)
    verifications = tables.verifications
    assert (verifications.short, verifications.long) == (LONG // pricing.SHORTER, LONG)
    for context, found in ((LONG // pricing.SHORTER, verifications.at_short), (LONG, verifications.at_long)):
        assert list(found.sizes) == buckets
        spread = [(rows, min(rows, REQUESTS)) for rows in buckets]
        chosen = [verify_seconds(rows, context // count * count, count) for rows, count in spread]
        assert list(found.seconds) == pytest.approx(chosen)
    plain = tables.plain
    assert plain is not None
    for context, found in ((LONG // pricing.SHORTER, plain.at_short), (LONG, plain.at_long)):
        chosen = [verify_seconds(n, context // n * n, n) - SPARED for n in range(1, REQUESTS + 1)]
        assert list(found.seconds) == pytest.approx(chosen)
    assert tables.verify(2, 2, LONG) < tables.verify(2, 1, LONG), "one request's draft is no round without drafts"
    (wider,) = [tables.wider[TILE]]
    wide = [(rows, min(rows // (TILE + 1), REQUESTS)) for rows in buckets if rows > TILE]
    chosen = [verify_seconds(rows, LONG // count * count, count) for rows, count in wide]
    assert list(wider.at_long.seconds) == pytest.approx(chosen)
    added = [tables.verify(rows, count, wider.short) - verifications.at(rows, wider.short) for rows, count in wide]
    assert added == pytest.approx([0.01 * wider.short * (rows <= TILE * REQUESTS) for rows, _ in wide], rel=0.02)
    groups, tokens = graded(REQUESTS), doubling(4, REQUESTS * WIDEST)
    for table, sizes, kind in ((tables.drafts, groups, "pass"), (tables.catch_up, tokens, "catch-up")):
        assert set(table) == {"ar", "diffusion"}
        for arm, found in table.items():
            assert list(found.sizes) == sizes
            assert list(found.seconds) == pytest.approx([pass_seconds(f"the {kind} of {arm!r}", n) for n in sizes])
    assert {arm: list(shorter) for arm, shorter in tables.shorter.items()} == {"ar": [2, 3], "diffusion": []}
    for length, found in tables.shorter["ar"].items():
        assert list(found.sizes) == groups
        assert list(found.seconds) == pytest.approx(
            [pass_seconds(f"the pass of 'ar' for {length} drafts", n) for n in groups]
        )


def test_the_tables_are_what_the_device_takes(bench: Bench) -> None:
    worker = bench.engine.worker
    check(bench.measure())
    assert not worker.target.slot_table.any(), "rows of the table are left as requests find them"
    assert not any(worker.sync.caught_up.values())
    found = bench.engine.generate([[1, 2, 3, 4] * 4, [7, 7, 7]], max_new_tokens=20)
    assert [len(output) for output in found] == [20, 20]
    bench.engine.check_leaks()
