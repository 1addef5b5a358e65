"""SGLang's figures of speculation: counts of rounds and of what they proposed, and of no other algorithm."""

import logging
import random
from types import SimpleNamespace
from typing import Any

import pytest
from engine import engine
from model_set import Models

from whiflash_sglang.compat.http import figures

PROMPTS = [random.Random(i).choices(range(256), k=12 + 5 * i) for i in range(4)]


def test_the_logged_rate_is_of_what_was_proposed(models: Models, caplog: pytest.LogCaptureFixture) -> None:
    with engine(models.target, whiflash=models.whiflash("ar"), decode_log_interval=3, log_level="info") as e:
        reporter, rates = e.scheduler.metrics_reporter, []
        taken: list[tuple[int, int, int]] = []
        report = reporter.report_decode_stats

        def noted(*args: Any, **named: Any) -> None:
            counts = (
                reporter.spec_num_correct_drafts,
                reporter.spec_num_cap_tokens,
                reporter.spec_num_forward_ct,
            )
            report(*args, **named)
            if reporter.spec_num_forward_ct:
                assert reporter.spec_num_correct_drafts == counts[0], "counting goes on with what was counted"
            else:
                taken.append(counts)

        reporter.report_decode_stats = noted
        with caplog.at_level(logging.INFO):
            e.generate(PROMPTS, max_new_tokens=17)
        rates = [
            float(r.message.split("accept rate: ")[1].split(",")[0])
            for r in caplog.records
            if "accept rate" in r.message
        ]
    assert len(taken) > 1
    assert rates == [
        pytest.approx(accepted / (rows - forwards), abs=0.0051) for accepted, rows, forwards in taken
    ]


def test_another_algorithms_figures_stay() -> None:
    answer = {"spec_num_proposed_drafts": 7, "spec_accept_rate": 0.5}
    manager = SimpleNamespace(server_args=SimpleNamespace())
    figures._of_an_answer(lambda *_: None, manager, answer, None, 0)
    assert answer == {"spec_num_proposed_drafts": 7, "spec_accept_rate": 0.5}
