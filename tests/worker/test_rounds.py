"""Rounds, whose host reads nothing from the device: what the device decides by itself."""

import dataclasses
import random
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from engine import Engine, engine
from model_set import Models
from oracle_arm import OracleArm
from overlap import overlapped
from records import assert_same_logprobs, logprobs
from sglang.srt.managers.utils import GenerationBatchResult

from whiflash_sglang.device.transfers import Download
from whiflash_sglang.drafts.rates import Mean
from whiflash_sglang.engine.scheduler.spec_worker import round_result
from whiflash_sglang.engine.scheduler.streamer import recording_of
from whiflash_sglang.records.core import Results, Verified
from whiflash_sglang.round import signals
from whiflash_sglang.telemetry.trace import build_trace

PROMPTS = [[*random.Random(seed).choices(range(256), k=10), *[7, 8, 9, 10] * 6] for seed in range(4)]
TOKENS = 60


@pytest.fixture(scope="module")
def plain(models: Models) -> list[list[int]]:
    with engine(models.target) as e:
        return e.generate(PROMPTS, max_new_tokens=TOKENS)


def test_what_is_said_a_round_late_is_drafted(models: Models) -> None:
    """A prediction, of which the host knows how far the text is only when the next round has begun."""
    prompt, tokens = [random.Random(3).randrange(256) for _ in range(20)], 60
    with overlapped(models.target, whiflash=models.whiflash("lookup"), host_lengths=False) as e:
        e.submit("first", prompt, max_new_tokens=tokens)
        e.run()
        custom = {"whiflash_prediction": e.output("first")}
        e.submit("again", prompt, max_new_tokens=tokens, custom_params=custom)
        e.run()
        assert e.output("again") == e.output("first")
        verified, accepted = e.rounds("again")
    assert accepted > 0.8 * tokens
    assert verified < tokens / 4


@pytest.fixture(scope="module")
def running(models: Models, plain: list[list[int]]) -> Iterator[Engine]:
    oracle = OracleArm(0.9, seed=1)
    for prompt, text in zip(PROMPTS, plain, strict=True):
        oracle.learn(prompt, text)
    with engine(models.target, whiflash=models.whiflash("random"), arms=[oracle]) as e:
        verify = e.worker.target.verify

        def covered(batch: Any, block: Any, *args: Any) -> Any:
            assert len(block.input_ids) == int(block.qo_indptr[-1]), "attention leaves the others unwritten"
            return verify(batch, block, *args)

        e.worker.target.verify = covered
        yield e


def test_a_prediction_is_drafted(running: Engine, plain: list[list[int]]) -> None:
    """As where the host reads the device: the whole answer in as few rounds as its blocks."""
    running.worker.reconfigure({"router": "lookup"})
    for prompt, text in zip(PROMPTS, plain, strict=True):
        name = f"right-{len(running.requests)}"
        custom = {"whiflash_prediction": text, "whiflash": '{"trace":"full"}'}
        running.submit(name, prompt, max_new_tokens=TOKENS, custom_params=custom)
        running.run()
        assert running.output(name) == text
        verified, accepted = running.rounds(name)
        assert verified < TOKENS / 4
        assert accepted > TOKENS / 2
        assert sources_of(running, name).get("prediction", 0) > TOKENS / 4


def sources_of(running: Engine, name: str) -> dict[str, int]:
    """Accepted drafts of a traced request by their source: each draft has one."""
    recording = recording_of(running.requests[name], None)
    assert recording is not None
    trace = build_trace(recording, "random", len(running.output(name)))
    sources = trace["sources"]
    for count in ("proposed", "accepted"):
        assert sum(one[count] for one in sources.values()) == sum(one[count] for one in trace["arms"].values())
    return {source: one["accepted"] for source, one in sources.items()}


def test_traces_name_the_sources_of_drafts(running: Engine) -> None:
    """Drafts of passes, and copies that the device makes in their place or behind them."""
    running.worker.reconfigure({"router": "random"})
    found = Counter[str]()
    for i, prompt in enumerate(PROMPTS):
        name = f"traced-{i}"
        traced = {"whiflash": '{"trace":"full"}'}
        running.submit(name, prompt, max_new_tokens=TOKENS, custom_params=traced)
        running.run()
        found.update(sources_of(running, name))
    assert found["context"] > 0
    assert found["oracle"] > 0
    assert set(found) <= {"context", "ar", "diffusion", "oracle"}


def test_few_rows_are_rated_at_a_time(running: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under each request's own temperature and penalties, whichever rows are rated with its own."""
    running.worker.reconfigure({"router": "none"})

    def rates() -> list[Any]:
        rids = [f"{len(running.requests)}-{i}" for i in range(len(PROMPTS))]
        drawn: list[dict[str, Any]] = [
            {"temperature": 2.0, "top_p": 1e-6},
            {"temperature": 0.0, "frequency_penalty": 1.5, "token_ids_logprob": [5, 7, 9]},
            {"temperature": 0.5, "min_p": 1.0, "logit_bias": {"5": 4.0}, "top_logprobs_num": 30},
            {"temperature": 0.0},
        ]
        for rid, prompt, own in zip(rids, PROMPTS, drawn, strict=True):
            running.submit(rid, prompt, max_new_tokens=20, return_logprob=True, **own)
        running.run()
        return [logprobs(running, rid) for rid in rids]

    at_once = rates()
    monkeypatch.setattr(signals, "RATED_ROWS", 3)
    for found, expected in zip(rates(), at_once, strict=True):
        assert_same_logprobs(found, expected, "few at a time")


def test_fewer_than_no_likeliest_tokens_are_none(running: Engine) -> None:
    """As SGLang takes a client's -1."""
    running.ask("none", range(40, 60), return_logprob=True, top_logprobs_num=-1)
    assert len(logprobs(running, "none").values) == 32


def test_a_copy_takes_the_place_of_drafts_that_promise_less(
    running: Engine, plain: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host routes all to EAGLE-3; the device finds that the text goes on as before, and takes that."""
    learner, seen, observed, lost = running.worker.stages.learner, [], list[int](), 0
    learn, drafter = type(learner).learn, running.worker.drafters["ar"]

    def noting(self: Any, round_: Any, found: Any) -> Any:
        nonlocal lost
        seen.append(found)
        observed.clear()
        tokens = learn(self, round_, found)
        for i, request in enumerate(round_.requests):
            if found.source[i] and found.drafted[i] and request.running:
                assert request.row in observed, "its drafts lost, and nobody learned how right they were"
                lost += 1
        return tokens

    def observe(row: int, known: int, agreed: int, confidences: Any) -> None:
        assert 0 <= agreed <= known == len(confidences)
        observed.append(row)
        type(drafter).observe(drafter, row, known, agreed, confidences)

    monkeypatch.setattr(type(learner), "learn", noting)
    monkeypatch.setattr(drafter, "observe", observe)
    running.worker.reconfigure({"router": "auto"})
    controller = running.worker.controller
    route = controller.route

    def to_ar(requests: Any, forecasts: Any) -> list[str]:
        route(requests, forecasts)
        return ["ar" if "ar" in may else "none" for may in forecasts]

    monkeypatch.setattr(controller, "route", to_ar)
    assert running.generate(PROMPTS, max_new_tokens=TOKENS) == plain
    copied = [
        accepted - 1
        for found in seen
        for source, accepted in zip(found.source, found.accept_lens, strict=True)
        if source
    ]
    assert sum(copied) > 0, "no copy was ever right"
    assert lost > 0


def test_copies_are_verified_again_after_rounds_that_had_none(
    running: Engine, plain: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host makes room for what there was. If there was nothing, it must still learn of what there is now."""
    running.worker.reconfigure({"router": "lookup"})
    costs = running.worker.controller.costs
    monkeypatch.setattr(costs, "_drafts", defaultdict(costs._drafts.default_factory))
    for route in ("lookup", "promised", "none"):
        for _ in range(5):
            costs.wanted(route, 0, Mean())
    assert running.generate(PROMPTS[:1], max_new_tokens=TOKENS) == plain[:1]
    req = list(running.requests.values())[-1]
    assert req.spec_num_correct_drafts > 0


def test_rows_are_those_of_a_graph(running: Engine, plain: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """However much is drafted, a verification has the rows that the host picked, of those that graphs have."""
    monkeypatch.setattr(running.worker.controller.costs, "packed", lambda requests, drafts, drawn: 2)
    rows, grid = [], (3, 5, 7, 9)
    stages = running.worker.stages
    stage = replace(stages.drafting, rows_for=lambda rows, _: next(n for n in grid if n >= rows))
    monkeypatch.setattr(stages, "drafting", stage)
    draft = type(stage).draft

    def noting(self: Any, round_: Any) -> None:
        draft(self, round_)
        rows.append((round_.packed_rows, int(round_.chosen.widths.sum()), len(round_)))

    monkeypatch.setattr(type(stage), "draft", noting)
    running.worker.reconfigure({"router": "random"})
    assert running.generate(PROMPTS, max_new_tokens=TOKENS) == plain
    assert all(used <= most for most, used, _ in rows)
    assert {most for most, _, size in rows if most > size} <= {*grid}
    assert any(used == most > size for most, used, size in rows)


def test_every_field_of_a_result_is_handed_on() -> None:
    """All that the forward says but for ours."""
    ours = {
        *("next_token_ids", "accept_lens", "cap_lens", "next_draft_input", "new_seq_lens"),
        *("num_non_draft_tokens_per_req", "speculative_num_draft_tokens", "speculative_output_stride"),
    }
    names = {field.name for field in dataclasses.fields(GenerationBatchResult)}
    assert names >= ours

    said = {name: f"the forward's {name}" for name in names}
    verified = Verified(*[None] * 7, forward=GenerationBatchResult(**said))  # type: ignore[arg-type]
    names_of_results = "tokens", "accept_lens", "widths", "bonus", "seq_lens"
    known = dict.fromkeys(names_of_results, torch.ones((1, 1), dtype=torch.int32))
    results = Download(Results(*[None] * 12)._replace(**known))
    result = round_result(verified, results)
    assert {name for name in names if getattr(result, name) is not said[name]} == ours
