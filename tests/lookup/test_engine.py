"""The copying arm in the real scheduler: whose text it proposes, and what the other drafters do meanwhile.

Predicted outputs are right, malformed, beside others, and gone with their request.
"""

import json
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import pytest
import torch
from engine import Engine, engine
from model_set import Models
from priced import priced
from whiflash_kernels import Drafts

from whiflash_sglang.cache import backlog
from whiflash_sglang.round.learning import Learner

TOKENS = 160
LONG = 240
"""Less than a ring of 256 holds: nothing has to be flushed on the way."""
PROMPT = random.Random(5).choices(range(256), k=24)
WIDEST = 16
"""Drafts of a copy, at most."""


@pytest.fixture(scope="module")
def running(models: Models) -> Iterator[Engine]:
    options = {"whiflash": models.whiflash("lookup"), "page_size": 1, "enable_streaming_session": True}
    options["enable_priority_scheduling"] = True
    with patch.object(backlog, "TOKENS", 256), engine(models.target, **options) as started:
        yield started


@pytest.fixture(autouse=True)
def fresh(running: Engine) -> None:
    running.start_over("lookup")


@dataclass
class Answer:
    """Output tokens, and the rounds that they took."""

    tokens: list[int]
    rounds: int


def submit(
    running: Engine,
    predicted: Sequence[Any] | None = None,
    prompt: Sequence[int] = PROMPT,
    hints: dict[str, Any] | None = None,
    **params: Any,
) -> str:
    """predicted: what the caller says that the answer will be, which is copied from. Returns the request's name."""
    name = f"q{len(running.requests):05d}"
    custom: dict[str, Any] = {"whiflash": json.dumps(hints)} if hints else {}
    if predicted is not None:
        custom["whiflash_prediction"] = predicted
    running.submit(name, prompt, **{"max_new_tokens": TOKENS, "custom_params": custom or None, **params})
    return name


def answer(running: Engine, name: str) -> Answer:
    return Answer(running.output(name), running.rounds(name)[0])


def ask(running: Engine, salt: str | None, predicted: Sequence[Any] | None = None, **hints: Any) -> Answer:
    name = submit(running, predicted, hints=hints, cache_salt=salt)
    running.run()
    return answer(running, name)


@pytest.fixture(scope="module")
def cold(running: Engine) -> Answer:
    """The same request where nothing is known."""
    running.start_over("lookup")
    return ask(running, None)


def test_a_request_may_opt_out(running: Engine, cold: Answer) -> None:
    """Neither its own text nor its prediction is copied then."""
    for hints in ({"lookup": "off"}, {"off": True}):
        assert ask(running, "a", cold.tokens, **hints) == Answer(cold.tokens, TOKENS - 1)
    assert ask(running, "a", lookup="context") == cold, "it means `on`, and that no sample is kept"


def test_a_right_prediction_is_copied_from_its_beginning(running: Engine, cold: Answer) -> None:
    predicted = ask(running, None, cold.tokens)
    assert predicted.tokens == cold.tokens
    # The first token comes from the prefill; a round has 16 copied tokens and one more, fewer while nothing is known.
    fewest = math.ceil((TOKENS - 1) / (WIDEST + 1))
    assert fewest <= predicted.rounds <= fewest + 3
    assert predicted.rounds < cold.rounds / 3


def test_another_request_beside_is_drafted_for_as_alone(running: Engine, cold: Answer) -> None:
    ours, theirs = submit(running, cold.tokens), submit(running)
    running.run()
    assert answer(running, theirs) == cold
    assert answer(running, ours).tokens == cold.tokens
    assert answer(running, ours).rounds < cold.rounds / 3


def test_a_prediction_is_known_to_no_later_request_of_its_tenant(running: Engine, cold: Answer) -> None:
    submit(running, cold.tokens, prompt=[1, 2, 3], max_new_tokens=5, cache_salt="a")
    running.run()
    assert ask(running, "a") == cold


def test_an_answer_begun_again_is_found_in_its_prediction(
    running: Engine, cold: Answer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sglang.srt.managers.scheduler.TEST_RETRACT", True)
    names = [submit(running, cold.tokens), submit(running)]
    running.run()
    assert sum(running.requests[name].retraction_count for name in names) > 0
    assert [running.output(name) for name in names] == [cold.tokens] * 2
    assert running.rounds(names[0])[0] < cold.rounds / 3


@pytest.mark.parametrize("streaming", [False, True])
def test_every_turn_of_a_session_has_its_own_prediction(running: Engine, streaming: bool) -> None:
    def converse(name: str, predicted: Sequence[Any]) -> list[Answer]:
        running.open_session(name, streaming=streaming)
        found: list[Answer] = []
        last = None
        for number in range(3):
            session = {"id": name, **({"rid": last} if last and not streaming else {})}
            prompt = [9 + number, *PROMPT[:9]]
            last = submit(running, predicted[number], prompt, session=session, max_new_tokens=120)
            running.run()
            found.append(answer(running, last))
        running.close_session(name)
        return found

    without = converse(f"without{streaming}", [None] * 3)
    with_them = converse(f"with{streaming}", [each.tokens for each in without])
    assert [each.tokens for each in with_them] == [each.tokens for each in without]
    for predicted, before in zip(with_them, without, strict=True):
        assert predicted.rounds < before.rounds / 2


def test_where_no_http_process_looked_a_malformed_prediction_is_dropped_and_told(
    running: Engine, cold: Answer, caplog: pytest.LogCaptureFixture
) -> None:
    assert ask(running, None, [1, 2, 100_000]) == cold
    said = "whiflash_prediction[2]: must be a token id below"
    assert any(said in record.getMessage() for record in caplog.records)


def siblings(running: Engine, count: int, task: str | None) -> list[str]:
    """Requests with one prompt that run together, the first some tokens ahead; their names."""
    custom = None if task is None else {"whiflash": json.dumps({"task": task})}
    names = [f"s{len(running.requests):05d}-{number}" for number in range(count)]
    for number, name in enumerate(names):
        running.submit(name, PROMPT, max_new_tokens=TOKENS, custom_params=custom)
        while number == 0 and len(running.requests[name].output_ids) < TOKENS // 2:
            running.step()
    return names


def test_siblings_copy_from_each_other_and_write_the_same(running: Engine) -> None:
    answers, rounds = [], []
    for task in (None, "t"):
        running.start_over("lookup")
        names = siblings(running, 4, task)
        running.run()
        answers.append([running.output(name) for name in names])
        rounds.append([running.rounds(name)[0] for name in names])
    assert answers[0] == answers[1]
    assert max(rounds[1][1:]) < min(rounds[0][1:]) / 2


def test_a_later_try_copies_from_the_first_until_it_is_forgotten(running: Engine, cold: Answer) -> None:
    assert ask(running, "a", task="t") == cold
    assert running.worker.snapshot()["memory"]["lookup_groups"] > 0
    again = ask(running, "a", task="t")
    assert again.tokens == cold.tokens
    assert again.rounds < cold.rounds / 2
    running.worker.forget(None)
    assert running.worker.snapshot()["memory"]["lookup_groups"] == 0
    assert ask(running, "a", task="t") == cold


def test_a_neighbour_that_is_aborted_or_retracted_changes_no_text(
    running: Engine, cold: Answer, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, *others = siblings(running, 3, "t")
    running.abort(first)
    running.run()
    assert [running.output(name) for name in others] == [cold.tokens] * 2
    monkeypatch.setattr("sglang.srt.managers.scheduler.TEST_RETRACT", True)
    names = siblings(running, 3, "t")
    running.run()
    assert sum(running.requests[name].retraction_count for name in names) > 0
    assert [running.output(name) for name in names] == [cold.tokens] * 3


def test_if_rows_are_short_the_urgent_get_them(running: Engine, cold: Answer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both copy a right prediction. A row costs a fifth of what a round costs without it."""
    dear = priced(lambda _: WIDEST, {"ar": 9.0, "diffusion": 9.0}, base=0.020, row=0.004)
    monkeypatch.setattr(running.worker.controller.costs, "tables", dear.tables)
    rounds = []
    for priorities in ((0, 0), (0, 9)):
        running.start_over("auto")
        names = [submit(running, cold.tokens, priority=priority) for priority in priorities]
        running.run()
        assert [running.output(name) for name in names] == [cold.tokens] * 2
        rounds.append([running.rounds(name)[0] for name in names])
    (first, second), (patient, urgent) = rounds
    assert abs(first - second) <= 1
    assert urgent <= first + 1
    assert patient >= urgent + 3


def drafting_the_truth(running: Engine, truth: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every round is EAGLE-3's, and it drafts the next three tokens of `truth`, as sure as can be."""

    def draft(batch: Any) -> Drafts:
        begins = [n - len(PROMPT) + 1 for n in batch.starts.tolist()]
        counts = [min(limit, 3) for limit in batch.limits]
        rows = [truth[begin : begin + 3] + [0] * 3 for begin in begins]
        sure = torch.ones(len(counts), 3)
        return Drafts(torch.tensor([row[:3] for row in rows]), torch.tensor(counts), alive=sure)

    monkeypatch.setattr(running.worker.drafters["ar"], "draft", draft)
    monkeypatch.setattr(running.worker.controller, "route", lambda rows, *_: ["ar"] * len(rows))


@pytest.mark.parametrize("router", ["lookup", "ar"])
def test_nothing_is_drafted_after_the_end_of_a_turn(
    running: Engine, cold: Answer, monkeypatch: pytest.MonkeyPatch, router: str
) -> None:
    """A copy and a drafter that are right go on after the token that ends the request: no row is verified for that."""
    news = (at for at in range(5, TOKENS, 4) if cold.tokens[at] not in cold.tokens[:at])
    end, verified = next(news), list[int]()  # the first of three drafts
    learn = Learner.learn

    def noting(self: Learner, round_: Any, results: Any, *given: Any) -> Any:
        verified.extend(map(sum, zip(results.starts, results.widths, strict=True)))
        return learn(self, round_, results, *given)

    monkeypatch.setattr(Learner, "learn", noting)
    custom: dict[str, Any] = {"whiflash_prediction": cold.tokens}
    if router == "ar":
        drafting_the_truth(running, cold.tokens, monkeypatch)
        custom = {"whiflash": '{"lookup": "off"}'}
    params = {"ignore_eos": False, "stop_token_ids": [cold.tokens[end]], "max_new_tokens": TOKENS}
    running.ask(f"ends by {router}", PROMPT, custom_params=custom, **params)
    assert running.output(f"ends by {router}") == cold.tokens[: end + 1]
    assert max(verified) == len(PROMPT) + end + 1


def test_drafts_that_lead_into_a_copy_are_extended(
    running: Engine, cold: Answer, monkeypatch: pytest.MonkeyPatch
) -> None:
    drafting_the_truth(running, cold.tokens, monkeypatch)
    running.worker.reconfigure({"router": "ar"})
    pinned = ask(running, "a", cold.tokens)
    running.worker.reconfigure({"router": "random"})
    joined, without = ask(running, "a", cold.tokens), ask(running, "a", cold.tokens, lookup="off")
    assert pinned.tokens == joined.tokens == without.tokens == cold.tokens
    assert pinned.rounds == without.rounds == math.ceil((TOKENS - 1) / 4)
    assert joined.rounds < pinned.rounds * 0.6  # at even odds a copy is three tokens long


@dataclass
class Work:
    """Rows of every pass that a drafter ran, in order."""

    catch_ups: list[int] = field(default_factory=list)
    drafts: list[int] = field(default_factory=list)

    def clear(self) -> None:
        self.catch_ups.clear()
        self.drafts.clear()


def watch(running: Engine, monkeypatch: pytest.MonkeyPatch) -> dict[str, Work]:
    works = {}
    for arm in ("ar", "diffusion"):
        drafter, work = running.worker.drafters[arm], Work()
        catch_up, draft = drafter.catch_up, drafter.draft

        def catching(rows: Any, catch_up: Any = catch_up, work: Work = work) -> None:
            work.catch_ups.append(len(rows.positions))
            catch_up(rows)

        def drafting(batch: Any, draft: Any = draft, work: Work = work) -> Any:
            work.drafts.append(len(batch))
            return draft(batch)

        monkeypatch.setattr(drafter, "catch_up", catching)
        monkeypatch.setattr(drafter, "draft", drafting)
        works[arm] = work
    return works


def test_lazy_catch_up_through_a_long_copied_run(running: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """While three requests copy, the neural drafters run nothing; then each ingests what it missed in one batch."""
    prompts = {f"copy{extra}": [*PROMPT, extra] for extra in (1, 2, 3)}
    names, answers = list(prompts), {}
    for name, prompt in prompts.items():
        answers[name] = {"whiflash_prediction": running.ask(f"first {name}", prompt, max_new_tokens=LONG)}
    works = watch(running, monkeypatch)
    for name, prompt in prompts.items():
        running.submit(name, prompt, max_new_tokens=LONG, custom_params=answers[name])
    while not all(name in running.requests and running.requests[name].output_ids for name in names):
        running.step()
    rows = [running.requests[name].kv.req_pool_idx for name in names]
    marks = running.worker.sync.watermarks
    for work in works.values():
        work.clear()

    copied = [0] * len(names)
    while min(copied) <= 64:
        running.step()
        copied = [len(running.requests[name].output_ids) for name in names]
        assert max(copied) < LONG, "a request ended before all had copied"
    assert all(not work.catch_ups and not work.drafts for work in works.values())

    for arm in ("ar", "diffusion"):
        behind = sum(
            len(req.origin_input_ids) + len(req.output_ids) - 1 - marks.synced(row, arm)
            for row, req in ((row, running.requests[name]) for row, name in zip(rows, names, strict=True))
        )
        assert behind >= sum(copied) - len(names)
        running.worker.reconfigure({"router": arm})
        running.step()
        assert (works[arm].catch_ups, works[arm].drafts) == ([behind], [len(names)])
    running.run()
