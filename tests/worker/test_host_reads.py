"""How often a steady round waits for the device: once, when all of it is done."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from engine import engine
from host_reads import HostReads, Launches
from model_set import Models
from whiflash_kernels import dispatch

MOST_BETWEEN = 3
"""Operators between kernels and models, of a round with all four routes: launches, where they are no graph.

A ratchet, to be lowered and never raised; where reading is free the host asks two more. Nothing is a graph here: what
rounds issue beside their graphs is counted in `tests/graphs/test_launches_beside_graphs.py`.
"""

MOST_KERNELS = 20
"""Kernels of `whiflash_kernels` in such a round, attention apart. The same ratchet."""

ROUTES = ["ar", "diffusion", "lookup", "none"]


class Steady:
    """Runs the worker's rounds as they are, and the sixth of them watched: while `watching` is on."""

    def __init__(self, worker: Any) -> None:
        self.reads, self.launches = HostReads(), Launches()
        self.kernels: Counter[str] = Counter()
        self.watching = False
        self._round, self._seen = worker._round, 0

    def __call__(self, *args: Any) -> Any:
        self._seen += 1
        if self._seen != 6:
            return self._round(*args)
        self.watching = True
        try:
            with self.launches, self.reads, kernels_counted(self.kernels):
                return self._round(*args)
        finally:
            self.watching = False


@contextmanager
def kernels_counted(calls: Counter[str]) -> Iterator[None]:
    """Count calls of our ops by name: each asks once which implementation serves it."""
    implementation = dispatch.implementation

    def asked(reference: Callable[..., Any], arguments: tuple[Any, ...]) -> Callable[..., Any]:
        calls[reference.__name__] += 1
        return implementation(reference, arguments)

    with mock.patch.object(dispatch, "implementation", asked):
        yield


def watch(e: Any, monkeypatch: pytest.MonkeyPatch) -> Steady:
    """Serve four requests, one by every route, and watch the sixth round."""
    watched = steady(e, monkeypatch)
    serve(e)
    return watched


def steady(e: Any, monkeypatch: pytest.MonkeyPatch) -> Steady:
    """Route every request by another arm, and watch the sixth round to come."""
    worker = e.worker
    plan = worker.controller.route

    def route(rows: Any, forecasts: Any) -> list[str]:
        plan(rows, forecasts)
        # The last token is never drafted for.
        passes = [arm if arm in may else "none" for arm, may in zip(ROUTES, forecasts, strict=False)]
        return ["none" if arm == "lookup" else arm for arm in passes]

    monkeypatch.setattr(worker.controller, "route", route)
    watched = Steady(worker)
    monkeypatch.setattr(worker, "_round", watched)
    return watched


def serve(e: Any, **parameters: Any) -> None:
    """Four requests."""
    for i, _ in enumerate(ROUTES):
        e.submit(f"request-{i}", [1 + i, 2, 3, 1 + i, 2, 3, 1 + i, 2], max_new_tokens=60, **parameters)
    e.run()


def test_a_steady_round_reads_nothing_before_its_end(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """One buffer up, one down when all is done: where reading would wait for the device, nothing else is read."""
    monkeypatch.setenv("WHIFLASH_DEVICE_RESIDENT", "1")
    with engine(models.target, whiflash=models.whiflash("auto")) as e:
        watched = watch(e, monkeypatch)
    seen, reads, uploads = watched.reads, watched.reads.reads, watched.reads.uploads
    kinds = {"read": reads, "upload": uploads, "pageable": seen.pageable, "kernels": seen.of_kernels}
    for kind, found in kinds.items():
        for site, count in sorted(found.items()):
            print(f"{kind} {count} x {site}")
    between = watched.launches.between
    for site, count in sorted(between.items()):
        print(f"launch {count} x {site}")
    print(f"launches {watched.launches.count}, between kernels and models {between.total()}")
    kernels = watched.kernels - Counter({"draft_attention": watched.kernels["draft_attention"]})
    print(f"kernels {kernels.total()}: {dict(sorted(watched.kernels.items()))}")
    assert 0 < kernels.total() <= MOST_KERNELS
    assert [site.split(":")[0] for site in reads.elements()] == ["whiflash_sglang/device/transfers.py"]
    assert [site.split(":")[0] for site in uploads.elements()] == ["whiflash_sglang/device/transfers.py"]
    assert not seen.pageable
    assert 0 < between.total() <= MOST_BETWEEN


def test_where_reading_is_free_the_plan_is_one_buffer_too(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    with engine(models.target, whiflash=models.whiflash("auto")) as e:
        watched = watch(e, monkeypatch)
    # Copies are the host's own there: they go up as they are found, if any are.
    assert 1 <= watched.reads.uploads.total() <= 3
    assert not watched.reads.pageable
    for site, count in sorted(watched.launches.between.items()):
        print(f"launch {count} x {site}")
    print(f"launches {watched.launches.count}, between kernels and models {watched.launches.between.total()}")
    assert 0 < watched.launches.between.total() <= MOST_BETWEEN + 2


@pytest.mark.parametrize(
    "read",
    [
        lambda t: t.tolist(),
        lambda t: bool(t[0]),
        lambda t: t[t > 1],
    ],
)
def test_the_detector_sees_a_planted_read(read: Any) -> None:
    tensor = torch.arange(3)
    with HostReads() as seen:
        tensor + tensor[1:2]
        torch.where(tensor > 1, tensor, 0)
        assert seen.reads.total() == 0
        read(tensor)
    assert seen.reads.total() >= 1


def test_the_detector_sees_a_planted_upload() -> None:
    with HostReads() as seen:
        torch.empty(3, pin_memory=False).to("cpu")
        assert (seen.uploads.total(), seen.pageable.total()) == (1, 0)
        torch.tensor([1, 2])
        there = torch.empty(2, 3)
        there[0] = 1
        there[:, 1] = 2
    assert (seen.uploads.total(), seen.pageable.total(), seen.reads.total()) == (1, 1, 0)
    with HostReads() as seen:
        there[0, -1] = 3
        there[1][2] = 4
    assert (seen.uploads.total(), seen.pageable.total(), seen.reads.total()) == (0, 2, 0)
