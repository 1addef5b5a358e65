"""Agreements of ranks with requests of their own, with answers of the others made up."""

from typing import Any
from unittest.mock import Mock

import pytest
import torch

from whiflash_sglang.engine.forward import peers
from whiflash_sglang.engine.forward.peers import Peers


def test_weights_are_copied_when_all_ranks_have_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shared head is gathered of them all, once for each time."""
    others: list[list[int]] = []
    parallel = Mock(attn_dp_size=3, attn_tp_size=1, tp_size=3, attn_dp_rank=0)

    def gather(every: torch.Tensor, mine: torch.Tensor, **_: Any) -> None:
        every.copy_(torch.cat([mine, torch.tensor(others).flatten()]))

    monkeypatch.setattr(peers, "get_parallel", lambda: parallel)
    monkeypatch.setattr(torch.distributed, "all_gather_into_tensor", gather)
    agreed, copied, found = Peers(), list[int](), list[int]()
    agreed.on_written = lambda: copied.append(agreed.written)
    for mine, theirs in ((1, (0, 0)), (1, (1, 0)), (1, (1, 1)), (1, (1, 1)), (2, (1, 2)), (2, (2, 2))):
        agreed.written, others = mine, [[4, -1, written] for written in theirs]
        assert agreed.agree(5, None) == 5
        found.append(len(copied))
    assert found == [0, 0, 1, 1, 1, 2]
