"""Predicted outputs in the real scheduler: right, malformed, beside others, and gone with their request."""

import math
import random
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from engine import Engine, engine
from model_set import Models

TOKENS = 120
PROMPT = random.Random(5).choices(range(256), k=24)
WIDEST = 16
"""Drafts of a copy, at most."""


@pytest.fixture(scope="module")
def running(models: Models) -> Iterator[Engine]:
    flags = models.whiflash("lookup")
    with engine(models.target, whiflash=flags, page_size=1, enable_streaming_session=True) as started:
        yield started


@pytest.fixture(autouse=True)
def fresh(running: Engine) -> None:
    running.start_over("lookup")


def submit(running: Engine, predicted: object = None, prompt: Sequence[int] = PROMPT, **params: Any) -> str:
    name = f"p{len(running.requests):05d}"
    custom = params.pop("custom_params", {})
    if predicted is not None:
        custom = {**custom, "whiflash_prediction": predicted}
    running.submit(name, prompt, **{"max_new_tokens": TOKENS, "custom_params": custom or None, **params})
    return name


def answer(running: Engine, name: str) -> tuple[list[int], int]:
    return running.output(name), running.rounds(name)[0]


def ask(running: Engine, predicted: object = None, **params: Any) -> tuple[list[int], int]:
    """Output, and the rounds that it took."""
    name = submit(running, predicted, **params)
    running.run()
    return answer(running, name)


@pytest.fixture(scope="module")
def cold(running: Engine) -> tuple[list[int], int]:
    """The answer where nothing is predicted."""
    running.start_over("lookup")
    return ask(running, custom_params={"whiflash": '{"lookup": "context"}'})


def test_a_right_prediction_is_copied_from_its_beginning(running: Engine, cold: tuple[list[int], int]) -> None:
    tokens, rounds = ask(running, cold[0])
    assert tokens == cold[0]
    # The first token comes from the prefill; a round has 16 copied tokens and one more, fewer while nothing is known.
    fewest = math.ceil((TOKENS - 1) / (WIDEST + 1))
    assert fewest <= rounds <= fewest + 3
    assert rounds < cold[1] / 3


def test_another_request_beside_is_drafted_for_as_alone(running: Engine, cold: tuple[list[int], int]) -> None:
    ours, theirs = submit(running, cold[0]), submit(running)
    running.run()
    assert answer(running, theirs) == cold
    assert answer(running, ours)[0] == cold[0]
    assert answer(running, ours)[1] < cold[1] / 3


def test_a_prediction_is_known_to_no_later_request_of_its_tenant(running: Engine, cold: tuple[list[int], int]) -> None:
    ask(running, cold[0], prompt=[1, 2, 3], max_new_tokens=5, cache_salt="a")
    assert ask(running, cache_salt="a") == cold


@pytest.mark.parametrize("hints", ['{"lookup": "off"}', '{"off": true}'])
def test_a_request_that_wants_nothing_copied_gets_nothing_copied(
    running: Engine, cold: tuple[list[int], int], hints: str
) -> None:
    assert ask(running, cold[0], custom_params={"whiflash": hints}) == (cold[0], TOKENS - 1)


def test_an_answer_begun_again_is_found_in_its_prediction(
    running: Engine, cold: tuple[list[int], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """SGLang's own switch retracts requests every third step."""
    from sglang.srt.managers import scheduler

    monkeypatch.setattr(scheduler, "TEST_RETRACT", True)
    names = [submit(running, cold[0]), submit(running)]
    running.run()
    assert sum(running.requests[name].retraction_count for name in names) > 0
    assert [running.output(name) for name in names] == [cold[0]] * 2
    assert running.rounds(names[0])[0] < cold[1] / 3


@pytest.mark.parametrize("streaming", [False, True])
def test_every_turn_of_a_session_has_its_own(running: Engine, streaming: bool) -> None:
    def converse(name: str, predicted: Sequence[Any]) -> list[tuple[list[int], int]]:
        running.open_session(name, streaming=streaming)
        found: list[tuple[list[int], int]] = []
        last = None
        for number in range(3):
            session = {"id": name, **({"rid": last} if last and not streaming else {})}
            last = submit(running, predicted[number], [9 + number, *PROMPT[:9]], session=session)
            running.run()
            found.append(answer(running, last))
        running.close_session(name)
        return found

    without = converse(f"without{streaming}", [None] * 3)
    with_them = converse(f"with{streaming}", [tokens for tokens, _ in without])
    assert [tokens for tokens, _ in with_them] == [tokens for tokens, _ in without]
    for (_, rounds), (_, before) in zip(with_them, without, strict=True):
        assert rounds < before / 2


def test_where_no_http_process_looked_a_malformed_one_is_dropped_and_told(
    running: Engine, cold: tuple[list[int], int], caplog: pytest.LogCaptureFixture
) -> None:
    assert ask(running, [1, 2, 100_000]) == cold
    said = "whiflash_prediction[2]: must be a token id below"
    assert any(said in record.getMessage() for record in caplog.records)
