"""Several rounds in one step of the scheduler: what ends a step, and what the records of a step say.

That the text stays what it was, `test_plain_text.py` shows, whose steps have several rounds too.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import zmq
from engine import Engine, engine
from model_set import Models
from plain import plain_texts
from sglang.srt.managers.utils import GenerationBatchResult
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.state_capturer.base import TopkCaptureOutput
from traffic import Arrival

from whiflash_sglang.arms.base import widest_of
from whiflash_sglang.device.transfers import Download
from whiflash_sglang.engine.scheduler import step
from whiflash_sglang.engine.scheduler.spec_worker import round_result, step_result
from whiflash_sglang.records.core import Results, Verified
from whiflash_sglang.serve import worker

PROMPT, TOKENS = [1, 2, 3], 30
ROUTER = "none"


@pytest.fixture(scope="module")
def text(models: Models) -> list[int]:
    return plain_texts(models.target, [Arrival("a", 0, tuple(PROMPT), {"max_new_tokens": TOKENS})])["a"]


@pytest.fixture(scope="module")
def shared(models: Models, text: list[int]) -> Iterator[Engine]:
    with engine(models.target, whiflash=models.whiflash(ROUTER)) as e:
        yield e


def test_rounds_without_drafts_share_steps(running: Engine, text: list[int], steps: list[int]) -> None:
    reporter = running.scheduler.metrics_reporter
    before = reporter.spec_num_accept_tokens, reporter.spec_num_forward_ct
    assert running.ask("a", PROMPT, max_new_tokens=TOKENS) == text
    assert running.rounds("a") == (TOKENS - 1, 0) == (sum(steps), 0)
    assert max(steps) == worker.STEP_ROUNDS
    after = reporter.spec_num_accept_tokens, reporter.spec_num_forward_ct
    assert [now - then for now, then in zip(after, before, strict=True)] == [TOKENS - 1] * 2
    assert running.requests["a"].spec_correct_drafts_histogram == [TOKENS - 1]
    running.check_leaks()


def test_drafts_end_a_step(
    running: Engine, text: list[int], steps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A drafted round is the last of its step, behind a full step of plain ones too: its slots are there."""
    running.start_over("random")
    plain_rounds, before = widest_of(running.worker.drafters), running.worker.clock.rounds
    monkeypatch.setattr(worker, "STEP_ROUNDS", plain_rounds + 1)

    def route(rows: Any, forecasts: Sequence[Any]) -> list[str]:
        drafts = (running.worker.clock.rounds - before) % (plain_rounds + 1) == plain_rounds
        return ["diffusion" if drafts and forecast else "none" for forecast in forecasts]

    monkeypatch.setattr(running.worker.controller, "route", route)
    monkeypatch.setattr(running.worker.controller, "may_use", lambda *_: False)
    assert running.ask("a", PROMPT, max_new_tokens=TOKENS) == text
    assert steps[0] == plain_rounds + 1
    assert running.rounds("a")[0] == sum(steps)


def test_penalties_take_a_round_a_step(running: Engine, steps: list[int]) -> None:
    running.generate([PROMPT], max_new_tokens=TOKENS, repetition_penalty=1.2)
    assert set(steps) == {1}


@pytest.mark.parametrize("record", ["return_logprob", "return_hidden_states", None])
def test_what_the_scheduler_follows_needs_it(record: str | None) -> None:
    names = ("return_logprob", "return_hidden_states")
    sampling = SimpleNamespace(has_custom_logit_processor=False)
    batch = SimpleNamespace(reqs=[], sampling_info=sampling, **{name: name == record for name in names})
    assert step.needs_scheduler(batch) == (record is not None)
    sampling.has_custom_logit_processor = True
    assert step.needs_scheduler(batch)


@pytest.mark.parametrize("stops", [{}, {"stop": ["\n\n"]}, {"stop_regex": "[0-9]{9}"}], ids=str)
def test_stops_in_the_text_need_it(stops: dict[str, Any]) -> None:
    """Only the scheduler decodes the text, so nothing else knows whether the request has ended."""
    params = SamplingParams(**stops)
    req = SimpleNamespace(sampling_params=params, to_finish=None)
    sampling = SimpleNamespace(has_custom_logit_processor=False)
    batch = SimpleNamespace(
        reqs=[req], sampling_info=sampling, return_logprob=False, return_hidden_states=False
    )
    assert step.needs_scheduler(batch) == bool(stops)
    req.to_finish = object()  # it was aborted: SGLang ends it after its next forward
    assert step.needs_scheduler(batch)


def test_an_aborted_request_gets_one_more_round(running: Engine, steps: list[int]) -> None:
    """Upstream ends it after its next forward; a step of several would add to its text."""
    running.submit("a", PROMPT, max_new_tokens=TOKENS)
    running.step()
    running.step()
    steps.clear()
    running.abort("a")
    running.run()
    assert steps == [1]


def test_a_token_that_stops_ends_a_step(running: Engine, text: list[int], steps: list[int]) -> None:
    last = next(i for i, token in enumerate(text) if token not in text[:i] and i > 5)
    stops = {"stop_token_ids": [text[last]], "ignore_eos": False}
    assert running.ask("b", PROMPT, max_new_tokens=TOKENS, **stops) == text[: last + 1]
    assert sum(steps) == last  # the first token is the prefill's


class Mailbox:
    def __init__(self, mail: bool) -> None:
        self.mail = mail

    def poll(self, timeout: int) -> int:
        assert timeout == 0
        return int(self.mail)


@pytest.mark.parametrize(
    ("socket", "rounds"),
    [(Mailbox(True), 1), (object(), 1), (Mailbox(False), None)],
    ids=["mail", "unknown", "none"],
)
def test_mail_ends_a_step(
    running: Engine, steps: list[int], socket: Any, rounds: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    receiver = SimpleNamespace(recv_from_tokenizer=Mailbox(False), recv_from_rpc=socket)
    monkeypatch.setattr(running.scheduler, "request_receiver", receiver)
    running.generate([PROMPT], max_new_tokens=TOKENS)
    assert max(steps) == rounds or (rounds is None and max(steps) > 1)


def test_a_long_step_ends(running: Engine, steps: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "STEP_SECONDS", 0.0)
    running.generate([PROMPT], max_new_tokens=TOKENS)
    assert set(steps) == {1}


def test_the_mailbox_is_the_schedulers(running: Engine) -> None:
    """A message that was sent and not read yet is seen. So is a request whose grammar compiles: only the scheduler's
    next look shows that it is ready.
    """
    receiver, manager = running.scheduler.request_receiver, running.scheduler.grammar_manager
    assert receiver.recv_requests() == []
    assert not step.has_mail(running.scheduler)
    with zmq.Context() as context, context.socket(zmq.PUSH) as sender:
        sender.bind(receiver.recv_from_tokenizer.getsockopt_string(zmq.LAST_ENDPOINT))
        sender.send(b"a request")
        assert receiver.recv_from_tokenizer.poll()
        assert step.has_mail(running.scheduler)
        receiver.recv_from_tokenizer.recv()
        assert not step.has_mail(running.scheduler)
    manager.grammar_queue.append(object())
    assert step.has_mail(running.scheduler)
    manager.grammar_queue.clear()
    assert not step.has_mail(running.scheduler)


def test_every_field_of_a_result_is_handed_on() -> None:
    """A round hands on what the forward says but for `OURS`; a step the last round's but for `JOINED`."""
    ours = {
        *("next_token_ids", "accept_lens", "cap_lens", "next_draft_input", "new_seq_lens"),
        *("num_non_draft_tokens_per_req", "speculative_num_draft_tokens", "speculative_output_stride"),
    }
    joined = {"routed_experts_output", "indexer_topk_output"}
    names = {field.name for field in dataclasses.fields(GenerationBatchResult)}
    assert names >= ours | joined

    def round_of(slots: list[int]) -> GenerationBatchResult:
        chosen = TopkCaptureOutput(torch.tensor(slots), torch.tensor(slots) * 10, host_cache=None)
        said = {name: f"{name} of {slots}" for name in names - joined} | dict.fromkeys(joined, chosen)
        verified = Verified(*[None] * 7, forward=GenerationBatchResult(**said))  # type: ignore[arg-type]
        names_of_results = "tokens", "accept_lens", "widths", "bonus", "seq_lens"
        known = dict.fromkeys(names_of_results, torch.ones((1, 1), dtype=torch.int32))
        results = Download(Results(*[None] * 12)._replace(**known))
        result = round_result(verified, results)
        assert {name for name in names if getattr(result, name) is not said[name]} == ours
        return result

    rounds = [round_of([4, 5]), round_of([6])]
    step_of = step_result(rounds)
    differ = {name for name in names if getattr(step_of, name) is not getattr(rounds[-1], name)}
    assert differ <= ours | joined
    for name in joined:
        found = getattr(step_of, name)
        assert (found.out_cache_loc.tolist(), found.topk.tolist()) == ([4, 5, 6], [40, 50, 60])
