"""The compiled search for copies against the one in Python, which is its specification."""

from random import Random

import pytest
from whiflash_kernels.cpu.copies import CompiledCopies, compiled_copies

from whiflash_sglang.copying.calibration import MatchCalibration, RequestCalibration
from whiflash_sglang.copying.copier import Copier
from whiflash_sglang.drafts.candidates import Candidate


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> CompiledCopies:
    try:
        return compiled_copies(tmp_path_factory.mktemp("compiled") / "own")
    except OSError as error:
        pytest.skip(str(error))


def everything(copy: Candidate) -> tuple[object, ...]:
    tokens, alive, parts, at, matched, agreements, under_way = copy
    return [*tokens], [*alive], [*parts], at, matched, [int(each) for each in agreements], under_way


def drafts_of(random: Random, copy: Candidate, ids: int) -> list[int]:
    """Some that go on with a copy, and some that do not."""
    begun = list(copy.tokens)[: random.randint(0, len(copy.tokens))]
    return begun + random.choices(range(ids), k=random.choice([0, 1, 3, 40]))


@pytest.mark.parametrize("seed", range(60))
def test_copies_are_those_of_python(seed: int, compiled: CompiledCopies) -> None:
    random = Random(seed)
    ids = random.choice([2, 3, 8, 50, 1000, 200_000])
    text = random.choices(range(ids), k=random.choice([1, 2, 40, 700]))
    if seed % 5 == 0:  # positions of images
        text[::7] = [-2 - place for place in range(0, len(text), 7)]
    least, request = random.choice([1, 1, 2]), RequestCalibration()
    pair = [
        Copier(MatchCalibration(), least, request=request),
        Copier(MatchCalibration(), least, request=RequestCalibration(), compiled=compiled),
    ]
    for step in range(40):
        for copier in pair:
            copier.extend(text)
        limit, worth = random.choice([1, 5, 24, 33, 100]), random.choice([0.0, 0.1, 0.3, 0.6])
        paid = random.choice([0, 0, 1, 7, 40])
        copy, other = (copier.look(limit, worth, paid) for copier in pair)
        assert everything(copy) == everything(other), step
        drafts, alive = drafts_of(random, copy, ids), random.choice([1.0, 0.5, 0.05])
        behind, other = (copier.look_beyond(drafts, alive, limit, worth, paid) for copier in pair)
        assert everything(behind) == everything(other), (step, drafts)
        text = drafts_of(random, copy, ids)[: random.choice([1, 4, 20])]
    assert pair[0].calibration.chances == pair[1].calibration.chances
    assert [copier.text._one_before for copier in pair[:1]] == [pair[1].text._one_before]
    assert pair[0].text._two_before == pair[1].text._two_before
