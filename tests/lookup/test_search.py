"""The compiled search for copies against the one in Python (`searched`), in any texts, from any sources."""

from array import array
from collections.abc import Sequence
from itertools import chain
from random import Random

import pytest
import searched
from searching import SEARCH

from whiflash_sglang.copying.calibration import MatchCalibration, RequestCalibration
from whiflash_sglang.copying.copier import _AT
from whiflash_sglang.copying.texts import GAP, MAX_MATCH, Prediction, Source, Text


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
def test_any_search(seed: int) -> None:
    random = Random(seed)
    ids = random.choice([2, 3, 8, 50, 1000, 200_000])
    own, *others = texts(random, ids)
    sources = [Source("context", Text(SEARCH, own), judged(random), RequestCalibration())]
    sources[0].fields[-1] = True
    sources += [Source("group", Text(SEARCH, other), judged(random)) for other in others]
    if random.random() < 0.3:
        prediction = Prediction(SEARCH, some(random, ids, 20), judge=judged(random))
        prediction.follow(own[-3:] if min(own[-3:]) >= 0 else [])
        sources.insert(random.choice([0, len(sources)]), prediction)
    for habit in (source.habit for source in sources if source.habit):
        habit.observe(random.random() * 20, True)
    for _ in range(25):
        copying = random.choice([None, *sources])
        at = -1 if copying is None else random.randint(0, len(copying.text) + 1)
        drafts = some(random, ids, random.choice([0, 0, 1, 3, 40]))
        if others and random.random() < 0.5:
            drafts = [token for token in random.choice(others)[: random.randint(0, 5)] if token >= 0]
        known = [described(source, at if source is copying else -1, drafts) for source in sources]
        fields = array("q", chain.from_iterable(source.fields for source in sources))
        for number, source in enumerate(known):
            fields[number * 7 + _AT] = source.at
        stops = some(random, ids, random.choice([0, 0, 2]))
        least, most = random.choice([1, 1, 2]), random.choice([1, 5, 24, 33, 100])
        chances = (random.choice([0.0, 0.1, 0.3, 0.6]), random.choice([1.0, 0.5]), random.choice([0, 0, 1, 7, 40]))
        found = SEARCH.copy(fields, drafts, array("i", stops), least, most, chances)
        expected = searched.searched(known, drafts, stops, least, most, *chances)
        assert (found if found[0] else None) == expected


def described(source: Source, at: int, drafts: Sequence[int]) -> searched.Source:
    """The source as the Python search takes it."""
    factor = 1.0 if source.habit is None else source.habit.factor
    place = None
    if isinstance(source, Prediction):
        place, at = place_behind(source, drafts), -1
    tokens, own = source.text.tokens.tolist(), bool(source.fields[-1])
    return searched.Source(tokens, source.judge.chances, own, at, place, factor)


def place_behind(prediction: Prediction, drafts: Sequence[int]) -> tuple[int, int]:
    """The place at which the answer goes on behind drafts."""
    length, place = prediction.place
    tokens = prediction.text.tokens.tolist()
    if not drafts:
        return length, place
    if length and tokens[place : place + len(drafts)] == list(drafts):
        return min(length + len(drafts), MAX_MATCH), place + len(drafts)
    end = prediction._arrays[1].tolist()[: prediction._followed[3]]
    return nearest(tokens, prediction._followed[6], [*end, *drafts][-MAX_MATCH:])


def nearest(tokens: Sequence[int], left: int, end: Sequence[int]) -> tuple[int, int]:
    """The longest match, of equals one ahead of where the answer left, then the nearest."""
    window = [i + 1 for i in range(left, min(left + 64, len(tokens))) if tokens[i] == end[-1]]
    places = [(searched.matched(tokens, at, end), at) for at in window] + searched.newest(tokens, end, False)
    return max(places, key=lambda one: (one[0], one[1] > left, -abs(one[1] - left)), default=(0, left))


@pytest.mark.parametrize("seed", range(60))
def test_any_answer_is_followed(seed: int) -> None:
    random = Random(seed)
    ids = random.choice([2, 3, 8, 50, 1000])
    predicted = some(random, ids, random.choice([0, 1, 30, 400]))
    answer = [token for token in predicted if random.random() < 0.9] + some(random, ids, 20)
    random.choice([list.reverse, list.copy])(answer)
    prediction = Prediction(SEARCH, predicted)
    length, place, left, appeared = 6, 0, 0, set[int]()
    at = 0
    while at < len(answer):
        step = random.randint(1, 9)
        prediction.follow(answer[at : at + step])
        for i in range(at, min(at + step, len(answer))):
            if length and place < len(predicted) and predicted[place] == answer[i]:
                appeared.add(place)
                left = place + 1 if length >= 3 else left
                length, place = min(length + 1, MAX_MATCH), place + 1
            else:
                length, place = nearest(predicted, left, answer[max(0, i - MAX_MATCH + 1) : i + 1])
        at += step
        assert prediction.place == (length, place)
        assert prediction.accepted == len(appeared)


@pytest.mark.parametrize("text", [[7] * 8000, Random(0).choices(range(3), k=4000), [a << 20 for a in range(60)] * 60])
def test_bytes_of_a_token_are_bounded(text: list[int]) -> None:
    slowly = Text(SEARCH)
    for token in text:
        slowly.extend([token])
    assert max(slowly.nbytes, Text(SEARCH, text).nbytes) / len(text) < 32
