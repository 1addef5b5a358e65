import json
from collections import Counter
from pathlib import Path

import httpx
import pytest

from whiflash_sglang.lab.bench.cells import RoundMs, round_ms_of, switch_share_of
from whiflash_sglang.lab.bench.load import (
    BATCHES,
    CONTEXTS,
    NEW_TOKENS,
    ScalePoint,
    Setting,
    measure_scale,
    scale_settings,
)
from whiflash_sglang.lab.bench.pages import draw
from whiflash_sglang.lab.bench.report import Report

CLOCK = {
    "rounds": 4.0,
    "round_seconds": 0.4,
    "route_seconds": 0.004,
    "catch_up_seconds": 0.04,
    "draft_seconds": 0.1,
    "verify_seconds": 0.2,
    "commit_seconds": 0.02,
    "park_seconds": 0.008,
    "extra_catch_up_seconds": 0.012,
}


def test_stages_and_the_rest_are_the_round() -> None:
    found = round_ms_of(CLOCK)
    assert found.total == pytest.approx(100)
    assert found.other == pytest.approx(7)
    assert found.overhead == pytest.approx(25)
    assert switch_share_of(CLOCK) == pytest.approx((0.004 + 0.008 + 0.012) / 0.4)


def test_only_what_the_server_holds_is_asked() -> None:
    everything = scale_settings(kv_tokens=100_000, context_length=100_000)
    assert [s.batch for s in everything[: len(BATCHES)]] == list(BATCHES)
    assert [s.context for s in everything[len(BATCHES) :]] == list(CONTEXTS)
    assert max(s.context for s in scale_settings(100_000, 2048)) < 2048 - NEW_TOKENS
    assert all(s.batch * (s.context + NEW_TOKENS) <= 1000 for s in scale_settings(1000, 100_000))


def test_a_batch_is_asked_at_once_and_the_clock_is_read_around_it() -> None:
    asked: list[dict[str, object]] = []
    clock = Counter(dict.fromkeys(CLOCK, 0.0))

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(json.loads(request.content))
        clock.update({key: value / 3 for key, value in CLOCK.items()})
        return httpx.Response(200, json={})

    with httpx.Client(transport=httpx.MockTransport(answer), base_url="http://server") as client:
        point = measure_scale(client, Setting(3, 50), 320, lambda: dict(clock))
    assert point.round_ms.model_dump() == pytest.approx(round_ms_of(CLOCK).model_dump())
    prompts = [tuple(body["input_ids"]) for body in asked]  # type: ignore[arg-type]
    assert [len(prompt) for prompt in prompts] == [50, 50, 50]
    assert len(set(prompts)) == 3, "no prompt finds another's prefix"
    assert all(0 <= token < 320 for prompt in prompts for token in prompt)


def test_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    ms = RoundMs(route=1, catch_up=2, draft=3, verify=4, commit=5, park=6, other=7)
    points = [
        ScalePoint(batch=s.batch, context=s.context, round_ms=ms) for s in scale_settings(100_000, 100_000)
    ]
    empty = Report(
        provenance={},
        arms={},
        ratios={},
        loads=[],
        unavailable={},
        differences=[],
        categories={},
        scaling=points,
    )
    assert [path.name for path in draw(empty, tmp_path)] == ["scaling.svg"]
