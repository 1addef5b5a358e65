"""The compiled search for copies against the one in Python (`searched`), in any texts, from any sources."""

from array import array
from itertools import chain
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import searched
from searching import SEARCH, Looking

from whiflash_sglang.copying.calibration import MatchCalibration, RequestCalibration
from whiflash_sglang.copying.texts import GAP, Prediction, Source, Text


def some(random: Random, ids: int, count: int) -> list[int]:
    return random.choices(range(ids), k=count)


def judged(random: Random) -> MatchCalibration:
    judge = MatchCalibration()
    for _ in range(60):
        judge.observe(random.randint(1, 40), random.randrange(4), random.random() < 0.8)
    return judge


def texts(random: Random, ids: int) -> list[list[int]]:
    """The own text, one of ended answers, and live ones."""
    own = some(random, ids, random.choice([1, 2, 40, 700]))
    if random.random() < 0.2:  # positions of images
        own[::7] = [-2 - place for place in range(0, len(own), 7)]
    parts = [own[: random.randrange(len(own) + 1)] + some(random, ids, random.randrange(9)) for _ in range(3)]
    ended = list(chain.from_iterable([*part, GAP] for part in parts))
    return [own, ended, own[len(own) // 2 :], some(random, ids, 3)][: random.randint(1, 4)]


@pytest.mark.parametrize("seed", range(150))
def test_any_rounds(seed: int) -> None:
    """Rounds of a request: what is copied, also behind drafts, and what is learned of all sources."""
    random = Random(seed)
    ids = random.choice([2, 3, 8, 50, 1000, 200_000])
    own, *others = texts(random, ids)
    predicted = some(random, ids, 20) if random.random() < 0.3 else None
    stops, least = some(random, ids, random.choice([0, 0, 2])), random.choice([1, 1, 2])
    judges = [[judged(Random(seed + i)) for i in range(3)] for _ in range(2)]
    prediction = None if predicted is None else Prediction(SEARCH, predicted, judge=judges[0][2])
    group, habits = [Text(SEARCH, other) for other in others], [RequestCalibration() for _ in range(2)]
    joined: Any = SimpleNamespace(live={}, taken=array("d", [0.0, 0.0]))
    sources = [Source(text, judges[0][1], habits[0]) for text in group]
    member: Any = SimpleNamespace(group=joined, rid="r", prompt=0, looks=array("q", [0]), others=lambda: sources)
    copies = Looking(judges[0][0], least, prediction, None, stops, member)
    expected = None if predicted is None else (searched.Predicted(predicted), judges[1][2])
    twin = searched.Copies(judges[1][0], [(other, judges[1][1], habits[1]) for other in others], expected, stops, least)
    written = [own[: len(own) // 2 + 1]]
    for _ in range(25):
        for each in (copies, twin):
            each.read(written[-1])
        most, paid = random.choice([1, 5, 24, 33]), random.choice([0, 0, 1, 7])
        worth = random.choice([0.0, 0.1, 0.3, 0.6])
        most = max(most, paid)
        said, right = copies.look(most, worth, paid), twin.look(most, worth, paid)
        for name in ("tokens", "alive", "parts", "matched"):
            assert getattr(said, name) == getattr(right, name), name
        assert list(said.agreements) == list(right.agreements)
        drafts = some(random, ids, random.choice([1, 3, 40]))
        if others and random.random() < 0.5:
            drafts = [token for token in random.choice(others)[: random.randint(1, 5)] if token >= 0] or [0]
        behind = drafts, random.choice([1.0, 0.5]), most, worth, random.choice([0, 0, 3])
        longer, found = copies.look_beyond(*behind), twin.look_beyond(*behind)
        assert (longer.tokens, longer.alive) == (found.tokens, found.alive)
        ahead = random.choice([said.tokens, own, *others])[: random.randint(1, 9)]
        written.append([token for token in ahead if token >= 0] + some(random, ids, random.randrange(2)))
    assert [list(judge.chances) for judge in judges[0]] == [list(judge.chances) for judge in judges[1]]
    assert (copies.habit.factor, habits[0].factor) == (twin.habit.factor, habits[1].factor)


@pytest.mark.parametrize("seed", range(60))
def test_any_answer_is_followed(seed: int) -> None:
    random = Random(seed)
    ids = random.choice([2, 3, 8, 50, 1000])
    predicted = some(random, ids, random.choice([0, 1, 30, 400]))
    answer = [token for token in predicted if random.random() < 0.9] + some(random, ids, 20)
    random.choice([list.reverse, list.copy])(answer)
    prediction, twin, at = Prediction(SEARCH, predicted), searched.Predicted(predicted), 0
    while at < len(answer):
        step = random.randint(1, 9)
        for each in (prediction, twin):
            each.follow(answer[at : at + step])
        at += step
        assert prediction.appeared[0] == len(twin.appeared)


@pytest.mark.parametrize("text", [[7] * 8000, Random(0).choices(range(3), k=4000), [a << 20 for a in range(60)] * 60])
def test_bytes_of_a_token_are_bounded(text: list[int]) -> None:
    slowly = Text(SEARCH)
    for token in text:
        slowly.extend([token])
    assert max(slowly.nbytes, Text(SEARCH, text).nbytes) / len(text) < 32
