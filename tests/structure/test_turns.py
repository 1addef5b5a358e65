"""Drafts that copies and structure put behind each other's: the arm that forbids has the last word."""

from random import Random
from typing import Any

import pytest
from drafting import WIDTH, Asked, candidate_of, propose
from structure_grammars import KEYS, PROMPT, Grammars, Told
from whiflash_kernels.cpu.texts import Batch, Candidates

from whiflash_sglang.arms.structure import StructureArm
from whiflash_sglang.checkpoints.manifest import Structure
from whiflash_sglang.copying.calibration import MatchCalibration, RequestCalibration
from whiflash_sglang.copying.copier import Copier
from whiflash_sglang.drafts.candidates import SOURCES, Candidate, Part, common_prefix
from whiflash_sglang.prices.costs import FULL_LENGTH
from whiflash_sglang.records.request import Request
from whiflash_sglang.spans.hints import RequestHints
from whiflash_sglang.spans.vocabulary import Vocabulary
from whiflash_sglang.structure.spending import Spending

WIDEST, ROOM, PRICE = 9, 24, FULL_LENGTH.least_chance


def in_turns(each: list[Any], drafts: Candidate, first: int, room: int, stops: list[int]) -> Candidate:
    """Nobody goes on behind its own tokens, and nobody is asked twice about the same."""
    last, seen = first, dict[int, list[int]]()
    for arm in (0, 1, 0, 1):
        if arm == last or seen.get(arm) == drafts.tokens:
            continue
        longer = each[arm](drafts, room)
        last = arm if len(longer.tokens) > common_prefix(drafts.tokens, longer.tokens) else last
        drafts = longer
        seen[arm] = list(drafts.tokens)
    return drafts.until(stops)


@pytest.mark.parametrize("seed", range(12))
def test_each_goes_on_behind_the_other(seed: int, grammars: Grammars, vocabulary: Vocabulary) -> None:
    random, arm = Random(seed), StructureArm(Structure(max_width=WIDEST), vocabulary, Spending(float, float))
    told, words = Told(grammars, KEYS), vocabulary.encode('{"city": "Paris", "unit": "kelvin"}')
    request = Request("r", RequestHints(), grammar=told, prompt=len(PROMPT), read=lambda: PROMPT)
    arm.begin(request)
    written = random.randrange(1, len(words) - 2)
    told.tell(words[:written])
    propose(arm, request, told.history, FULL_LENGTH)
    stops = random.sample(words, 1) if random.random() < 0.3 else []
    copier = Copier(arm.library, MatchCalibration(), 1, None, RequestCalibration(), stops, None)  # type: ignore[arg-type]
    others = random.choices(range(len(vocabulary.token_bytes)), k=4)
    copier.read([*words, *others, *words[random.randrange(len(words)) :], *told.text])
    walk = request.kept[arm.arm].walk
    alone = [Asked(arm.library, place, 2, WIDEST, PRICE).continued for place in ((copier.at, 0), (0, walk.at))]
    candidates = Candidates.of(1, 3, WIDTH)
    batch = Batch(arm.library, candidates, [[copier.at], [walk.at]], [0], [0, 1], [WIDEST] * 2, PRICE)  # type: ignore[arg-type]
    expected, forbidden = [], 0
    for column in range(3):
        drafts = words[written:][: random.randint(1, 5)] + random.choices([*words, *others], k=random.randrange(2))
        first = Candidate(drafts, [0.9] * len(drafts), [Part("tools", len(drafts))])
        candidates.enter(0, column, SOURCES.index("tools"), first)
        expected.append(in_turns(alone, first, column, ROOM, stops))
        forbidden += len(drafts) - common_prefix(drafts, expected[-1].tokens)
    batch.extend([[2, 2, 2]], [ROOM])
    found = [candidate_of(candidates, 0, column) for column in range(3)]
    assert [(each.tokens, each.alive) for each in found] == [(each.tokens, each.alive) for each in expected]
    assert not any(grammars.forbidden(told._raw, each.tokens) for each in found)
