"""Requests that run to the end of the context: how far a round may lead. Their texts: `test_plain_text.py`."""

from types import SimpleNamespace

import pytest
import torch

from whiflash_sglang.engine.forward import sampling
from whiflash_sglang.engine.scheduler.spec_worker import round_batch

CONTEXT = 96


@pytest.mark.parametrize("under_way", range(9))
def test_rows_under_way_count_as_committed(under_way: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A round that is planned before the last one is known: all of its rows may be right, and the request's list of
    output is that of before.
    """
    monkeypatch.setattr(sampling, "takes_single_tokens", lambda _: False)
    committed = CONTEXT - 8
    req = SimpleNamespace(
        rid="r",
        sampling_params=SimpleNamespace(max_new_tokens=CONTEXT),
        output_ids=[0],
        kv=SimpleNamespace(kv_committed_len=committed),
    )
    batch = SimpleNamespace(
        reqs=[req],
        seq_lens_cpu=None,
        seq_lens=torch.tensor([committed]),
        req_pool_indices=torch.tensor([1]),
        req_pool_indices_cpu=None,
        spec_info=SimpleNamespace(bonus_tokens=torch.tensor([7])),
    )
    found = round_batch(batch, CONTEXT, lambda _: under_way)
    assert found.most == [committed + under_way]
    assert found.budgets == [max(CONTEXT - 1 - committed - under_way, 1)]
