"""Transfers, tables and rings on the phantom card: one upload without a wait, one download, nothing of the host's."""

import pytest
import torch
from streams import Streams

from whiflash_sglang.cache.tokens import StopTable, TokenTable
from whiflash_sglang.compat.forward.penalties import PenalisedBatch, PenaltyRequest
from whiflash_sglang.device.transfers import Download, HostView, Upload, sent

CUDA = torch.device("cuda", 0)


def test_an_upload_waits_for_nothing(world: Streams) -> None:
    text, stops, upload = TokenTable(4, 16, 4, CUDA), StopTable(4, CUDA), Upload()
    text.begin(upload, 2, [5, 6, 7], [8])
    stops.begin(upload, 2, [1, 2])
    ints, floats = upload.ints([3, 4]), upload.floats([0.5])
    found = upload.send(CUDA)
    rows = sent([2], CUDA)
    text.put_block(rows, sent([4], CUDA), torch.full((1, 3), 9, device=CUDA))
    assert not world.stalls
    assert not world.pageable
    assert not world.races
    assert text.data[2, :8].tolist() == [5, 6, 7, 8, 9, 9, 9, 0]
    assert stops.few[2].tolist() == [1, 2] + [-1] * 6
    assert found[0][ints].tolist() == [3, 4]
    assert found[1][floats].tolist() == [0.5]


def test_a_tensor_of_a_list_is_seen(world: Streams) -> None:
    """As releases made them once, which drained the pipeline at every finished request."""
    torch.tensor([3], device=CUDA)
    assert sum(world.pageable.values()) == 1


def test_a_download_is_late_and_whole(world: Streams) -> None:
    fields = {"lens": torch.arange(3, device=CUDA), "scores": torch.ones(2, 2, device=CUDA)}
    down = Download(**fields)
    down.copy_to_host(lambda packed: packed.to("cpu", non_blocking=True))
    done = torch.cuda.Event()
    done.record()
    assert not world.stalls
    done.synchronize()
    assert down.read() == {"lens": [0, 1, 2], "scores": [[1.0, 1.0], [1.0, 1.0]]}
    assert not world.stalls
    assert not world.races


def test_a_download_that_nobody_waited_for_is_seen(world: Streams) -> None:
    down = Download(lens=torch.arange(3, device=CUDA))
    found = down.copy_to_host(lambda packed: packed.to("cpu", non_blocking=True)).read()
    assert found["lens"] != [0, 1, 2]
    assert world.races


def test_the_host_may_not_read_the_card() -> None:
    assert not HostView.of(CUDA).exact


def test_penalties_are_one_upload(world: Streams) -> None:
    requests = [PenaltyRequest(i, 2, 4 + i, 0.5, 0.25, 1.5, 9, (1, 2)) for i in (0, 2)]
    table = torch.arange(32, device=CUDA).view(4, 8) % 5
    rows, starts, owner = (sent(values, CUDA) for values in ([3, 0, 1], [4, 4, 6], [0, 0, 1, 2, 2, -1]))
    offsets = sent([0, 1, 0, 0, 1, 0], CUDA)
    batch = PenalisedBatch(requests, rows, starts, table, 3, 5)
    additive, scaling = batch.at(owner, starts[owner] + offsets)
    assert not world.stalls
    assert not world.pageable
    assert not world.races
    assert scaling is not None
    # Row 3 of the table has 1, 2 and 3 at positions 2 to 4: 26, 27 and 28, modulo 5.
    assert additive[0].tolist() == [0, -torch.inf, -torch.inf, -0.75, 0]
    assert scaling[0].tolist() == [1, 1.5, 1.5, 1.5, 1]
    assert scaling[2].tolist() == [1] * 5


def test_a_plan_of_the_hosts_is_refused(world: Streams) -> None:
    table = TokenTable(4, 16, 4, CUDA)
    with pytest.raises(RuntimeError, match="same device"):
        table.put_block(torch.tensor([2]), torch.tensor([4]), torch.ones(1, 3, dtype=torch.int64))
