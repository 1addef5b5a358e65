"""SGLang's figures of speculation: counts of rounds and of what they proposed, and of no other algorithm."""

import logging
import random
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
from engine import engine
from model_set import Models

from whiflash_sglang.compat.http import figures

PROMPTS = [random.Random(i).choices(range(256), k=12 + 5 * i) for i in range(4)]


@pytest.mark.parametrize("router", ["none", "ar", "diffusion", "random"])
def test_the_engines_counts_are_the_workers(
    models: Models, router: str, steps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of several requests, whose rounds share steps, against rows and tokens as the worker committed them."""
    with engine(models.target, whiflash=models.whiflash(router), log_level="info") as e:
        own: Counter[str] = Counter()
        run = e.worker._round

        def counted(batch: Any, requests: Any, *rest: Any) -> Any:
            done, tokens = run(batch, requests, *rest)
            widths = done.cap_lens.tolist()
            own.update(forwards=len(widths), rows=sum(widths), tokens=int(done.accept_lens.sum()))
            return done, tokens

        monkeypatch.setattr(e.worker, "_round", counted)
        e.generate(PROMPTS, max_new_tokens=17)
        reporter = e.scheduler.metrics_reporter
        counts = (reporter.spec_num_forward_ct, reporter.spec_num_cap_tokens, reporter.spec_num_accept_tokens)
        assert counts == (own["forwards"], own["rows"], own["tokens"])
        requests = e.requests.values()
        assert sum(r.spec_verify_ct for r in requests) == own["forwards"]
        assert sum(r.spec_num_cap_tokens for r in requests) == own["rows"]
        for req in requests:
            by_width = enumerate(req.spec_cap_lens_histogram)
            assert sum(rows * n for rows, n in by_width) == req.spec_num_cap_tokens
            assert sum(req.spec_cap_lens_histogram) == req.spec_verify_ct
        if router == "none":
            assert own["rows"] == own["forwards"]
            assert max(steps) > 1


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
