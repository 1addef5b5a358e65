"""How often a steady round waits for the device: once, when all of it is done."""

from typing import Any

import pytest
import torch
from engine import engine
from host_reads import HostReads, Launches
from model_set import Models

MOST_BETWEEN = 160
"""Operators between kernels and models, of a round with all four routes: launches, where they are no graph.

A ratchet, to be lowered and never raised.
"""

ROUTES = ["ar", "diffusion", "lookup", "none"]


class Steady:
    """Runs the worker's rounds as they are, and the sixth of them watched."""

    def __init__(self, worker: Any) -> None:
        self.reads, self.launches = HostReads(), Launches()
        self._round, self._seen = worker._round, 0

    def __call__(self, *args: Any) -> Any:
        self._seen += 1
        if self._seen != 6:
            return self._round(*args)
        with self.launches, self.reads:
            return self._round(*args)


def watch(e: Any, monkeypatch: pytest.MonkeyPatch) -> Steady:
    """Serve four requests, one by every route, and watch the sixth round."""
    worker = e.worker
    plan = worker.controller.route

    def route(rows: Any, lengths: Any, outlooks: Any) -> list[str]:
        plan(rows, lengths, outlooks)
        # The last token is never drafted for.
        return [arm if arm in may else "none" for arm, may in zip(ROUTES, outlooks, strict=False)]

    monkeypatch.setattr(worker.controller, "route", route)
    watched = Steady(worker)
    monkeypatch.setattr(worker, "_round", watched)
    for i, _ in enumerate(ROUTES):
        e.submit(f"request-{i}", [1 + i, 2, 3, 1 + i, 2, 3, 1 + i, 2], max_new_tokens=60)
    e.run()
    return watched


def test_a_steady_round_reads_nothing_before_its_end(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """One buffer up, one down when all is done: where reading would wait for the device, nothing else is read."""
    monkeypatch.setenv("WHIFLASH_DEVICE_RESIDENT", "1")
    with engine(models.target, whiflash=models.whiflash("auto")) as e:
        watched = watch(e, monkeypatch)
    reads, uploads = watched.reads.reads, watched.reads.uploads
    for kind, found in (("read", reads), ("upload", uploads), ("kernels", watched.reads.of_kernels)):
        for site, count in sorted(found.items()):
            print(f"{kind} {count} x {site}")
    print(f"launches {watched.launches.count}, between kernels and models {watched.launches.between}")
    assert [site.split(":")[0] for site in reads.elements()] == ["whiflash_sglang/transfers.py"]
    assert [site.split(":")[0] for site in uploads.elements()] == ["whiflash_sglang/transfers.py"]
    assert 0 < watched.launches.between <= MOST_BETWEEN


def test_where_reading_is_free_the_plan_is_one_buffer_too(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    with engine(models.target, whiflash=models.whiflash("auto")) as e:
        watched = watch(e, monkeypatch)
    sites = [site.split(":")[0] for site in watched.reads.uploads.elements()]
    # Copies are the host's own there: they go up as they are found, if any are.
    copies = "whiflash_sglang/drafters/lookup.py"
    assert [site for site in sites if site != copies] == ["whiflash_sglang/transfers.py"]
    assert 0 < watched.launches.between <= MOST_BETWEEN


@pytest.mark.parametrize(
    "read",
    [
        lambda t: t.tolist(),
        lambda t: t[0].item(),
        lambda t: bool(t[0]),
        lambda t: int(t[0]),
        lambda t: float(t[0]),
        lambda t: t.cpu(),
        lambda t: t.numpy(),
        lambda t: range(t[0]),
        lambda t: t[t > 1],
        lambda t: t.nonzero(),
        lambda t: torch.where(t > 1),
        lambda t: torch.masked_select(t, t > 1),
        lambda t: 3 in t,
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
        torch.tensor([1, 2])
    assert (seen.uploads.total(), seen.reads.total()) == (1, 0)
