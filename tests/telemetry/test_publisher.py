"""Writes to a sink, and their times; and the table of series keeps Prometheus' conventions."""

import re
from types import SimpleNamespace
from typing import Any

import pytest

from whiflash_sglang.serve import metrics
from whiflash_sglang.serve.metrics import INTERVAL, SERIES, Labels, Points, Publisher, Series
from whiflash_sglang.telemetry.tally import MOST_PENDING, ArmCounts, Tally


class Sink:
    def __init__(self) -> None:
        self.written: list[tuple[str, Labels, float]] = []

    def write(self, series: Series, labels: Labels, number: float) -> None:
        self.written.append((series.name, labels, number))

    def take(self) -> list[tuple[str, Labels, float]]:
        found, self.written = self.written, []
        return found


def seen(w: Any) -> Points:
    while w.seen:
        yield (), w.seen.pop(0)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Publisher, Sink, list[float]]:
    """A worker of three figures, its publisher, where this writes, and its clock."""
    series = (
        Series("done_total", "", lambda w: [(("a",), w.done)], ("arm",)),
        Series("level", "", lambda w: [((), w.level)]),
        Series("seen", "", seen, buckets=(1.0,)),
    )
    worker, now = SimpleNamespace(done=2, level=5.0, seen=[0.5, 2.0]), [100.0]
    monkeypatch.setattr(metrics, "SERIES", series)
    monkeypatch.setattr(metrics, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return worker, Publisher(worker), Sink(), now  # type: ignore[arg-type]


def test_counters_grow_by_differences_and_what_has_not_changed_is_not_written(made: Any) -> None:
    worker, published, sink, _ = made
    published.start(sink.write)
    assert sink.take() == [("done_total", ("a",), 2), ("level", (), 5.0), ("seen", (), 0.5), ("seen", (), 2.0)]
    published.flush()
    assert sink.take() == []
    worker.done, worker.level = 7, 4.0
    published.flush()
    assert sink.take() == [("done_total", ("a",), 5), ("level", (), 4.0)]
    worker.level, worker.seen = 0.0, [3.0]
    published.flush()
    assert sink.take() == [("level", (), 0.0), ("seen", (), 3.0)]


def test_rounds_write_once_an_interval(made: Any) -> None:
    worker, published, sink, now = made
    published.start(sink.write)
    sink.take()
    worker.done = 3
    now[0] += INTERVAL * 0.99
    published.tick()
    assert sink.take() == []
    now[0] += INTERVAL * 0.02
    published.tick()
    assert sink.take() == [("done_total", ("a",), 1)]


def test_nothing_is_read_where_nobody_asked_for_metrics(made: Any) -> None:
    worker, published, _, _ = made
    published.tick()
    published.flush()
    assert worker.seen == [0.5, 2.0]


def test_an_arms_counts() -> None:
    """Three drafts of its own and two behind them: the fourth, another's, was the last that was right."""
    counts = ArmCounts()
    counts.add(tokens=5, proposed=5, first=3)
    counts.add(tokens=1, proposed=0, first=0)
    counts.add(tokens=3, proposed=3, first=3)
    assert counts == ArmCounts(3, 9, proposed=8, accepted=6, joined=2, joined_accepted=1)


def test_what_a_request_came_to_is_observed_by_arm() -> None:
    tally, request = Tally.of(["ar"]), {}
    for tokens in (4, 1):
        tally.committed(request, "ar", "score", tokens=tokens, proposed=5, first=5)
    tally.committed(request, "none", "off", tokens=1, proposed=0, first=0)
    tally.ended(request, {})
    assert dict(tally.acceptance) == {"ar": 2.5, "none": 1.0}
    assert (tally.reasons["score"], tally.reasons["off"]) == (2, 1)
    assert tally.by_arm == request


def test_observations_that_nobody_takes_are_bounded() -> None:
    tally = Tally.of([])
    for _ in range(MOST_PENDING + 5):
        tally.round_seconds.append(1.0)
        tally.ended({"none": ArmCounts(1, 1)}, {})
    assert len(tally.round_seconds) == len(tally.acceptance) == MOST_PENDING


@pytest.mark.parametrize("series", SERIES, ids=lambda one: one.name)
def test_names_keep_the_conventions(series: Series) -> None:
    """https://prometheus.io/docs/practices/naming: snake case, base units, `_total` for what only grows."""
    assert re.fullmatch(r"[a-z][a-z_]*[a-z]", series.name)
    assert not (series.buckets and series.name.endswith("_total"))
    assert not re.search(r"_(ms|milliseconds|mib|kb|gb|percent|count|sum|bucket)(_|$)", series.name)
    assert list(series.buckets) == sorted(set(series.buckets))
    assert not {"tenant", "request", "rid", "cache_salt", "le"} & set(series.labels)
    assert len({one.name for one in SERIES}) == len(SERIES)
