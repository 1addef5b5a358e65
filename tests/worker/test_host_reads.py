"""How often a steady round waits for the device: a ratchet, to be lowered and never raised."""

from typing import Any

import pytest
import torch
from engine import engine
from host_reads import HostReads, Launches
from model_set import Models

MOST_READS, MOST_UPLOADS, MOST_LAUNCHES = 22, 16, 700
"""Of a round with all four routes. The design's aim is no read, one upload, and few launches outside of graphs."""

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


def test_reads_uploads_and_launches_of_a_steady_round(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    with engine(models.target, whiflash=models.whiflash("auto")) as e:
        worker = e.worker

        def route(rows: Any, lengths: Any, outlooks: Any) -> list[str]:
            # The last token is never drafted for.
            return [arm if arm in may else "none" for arm, may in zip(ROUTES, outlooks, strict=False)]

        monkeypatch.setattr(worker.controller, "route", route)
        watched = Steady(worker)
        monkeypatch.setattr(worker, "_round", watched)
        for i, _ in enumerate(ROUTES):
            e.submit(f"request-{i}", [1 + i, 2, 3, 1 + i, 2, 3, 1 + i, 2], max_new_tokens=60)
        e.run()
    reads, uploads = watched.reads.reads, watched.reads.uploads
    for kind, found in (("read", reads), ("upload", uploads)):
        for site, count in sorted(found.items()):
            print(f"{kind} {count} x {site}")
    print(f"launches {watched.launches.count}")
    assert 0 < reads.total() <= MOST_READS
    assert 0 < uploads.total() <= MOST_UPLOADS
    assert 0 < watched.launches.count <= MOST_LAUNCHES


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
