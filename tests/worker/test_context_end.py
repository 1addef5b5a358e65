"""Requests that run to the end of the context: the engine reserves slots behind it, and no write leaves its row."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engine import engine
from matrix import sampled
from model_set import Models
from oracle_arm import OracleArm

from whiflash_sglang.engine.forward import sampling
from whiflash_sglang.engine.scheduler.spec_worker import round_batch
from whiflash_sglang.serve.verify import VerifyStage

CONTEXT = 96
PROMPTS = [[1, 2, 3], list(range(40))]


@pytest.mark.parametrize("page_size", sampled([1, 16], 1))
def test_text_up_to_the_contexts_end(models: Models, page_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With drafts that are all right, so that rounds lead as far as they may, and with none."""
    options = {"context_length": CONTEXT, "max_running_requests": 2, "page_size": page_size}
    with engine(models.target, **options) as e:
        expected = e.generate(PROMPTS, max_new_tokens=10 * CONTEXT)
    assert [len(p) + len(out) for p, out in zip(PROMPTS, expected, strict=True)] > [CONTEXT - 4] * 2
    oracle = OracleArm(1.0, ragged=False)
    for prompt, output in zip(PROMPTS, expected, strict=True):
        oracle.learn(prompt, [*output, *range(CONTEXT)])
    ends: list[int] = []
    verify = VerifyStage.verify

    def noted(self: Any, batch: Any, turn: Any, barrier: Any) -> Any:
        ends.append(int((turn.starts + turn.chosen.widths).max()))
        return verify(self, batch, turn, barrier)

    monkeypatch.setattr(VerifyStage, "verify", noted)
    with engine(models.target, whiflash=models.whiflash("random"), arms=[oracle], **options) as e:
        for routed in (oracle.arm, "none"):
            with monkeypatch.context() as m:
                m.setattr(e.worker.controller, "may_name", lambda _, arm, routed=routed: arm == routed)
                assert e.generate(PROMPTS, max_new_tokens=10 * CONTEXT) == expected
            e.check_leaks()
    assert max(oracle.accepted) == oracle.max_drafts
    assert CONTEXT - 3 <= max(ends) <= CONTEXT - 1


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
