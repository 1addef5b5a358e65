"""Launches of a server's start, whose inputs are contrived: none may leave the memory of its arguments."""

import pytest
import torch
from kernel_backends import DEVICE, running
from whiflash_kernels import BacklogRings, SamplingTable
from whiflash_kernels.warm import Served, launch_all


def served(requests: int, widths: set[int], candidates: int) -> Served:
    """A server of a few tokens, by requests of its largest batch, lengths of drafts and candidates of each request."""
    rows, context = requests + 1, max(widths) + 2

    def zeros(*size: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.zeros(size, dtype=dtype, device=DEVICE)

    return Served(
        zeros(rows, context),
        zeros(rows, context, dtype=torch.int32),
        zeros(rows, 1) - 1,
        BacklogRings(zeros(rows, 4, 3 * 8, dtype=torch.float32), zeros(rows, 4)),
        zeros(2, rows),
        SamplingTable(zeros(rows, 4, dtype=torch.float32), zeros(rows)),
        requests,
        widths,
        candidates=(candidates, 2 * candidates),
        vocabulary=40,
        bins=3,
        columns=[((0, 2), 8, True), (None, 0, False)],
        copied=(3, 2),
    )


@pytest.mark.parametrize(
    ("requests", "widths", "candidates"),
    [(2, {1, 33}, 2), (48, {1}, 1), (96, {1}, 0)],
    ids=["1 and 2", "1 and 48", "1, 64 and 96"],
)
def test_launches_before_the_first_request(backend: str, requests: int, widths: set[int], candidates: int) -> None:
    """Batches of the sizes in its name. Only zeros are written to rows that are nobody's."""
    server = served(requests, widths, candidates)
    with running(backend):
        launch_all(server)
    written = server.text, server.watermarks, server.rings.features, server.rings.next_tokens
    assert not any(tensor.any() for tensor in written)
