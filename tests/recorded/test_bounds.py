"""Bounds in hindsight are what their definition says, and no rule for copying accepts more."""

import json
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whiflash_sglang.checkpoints.manifest import Lookup
from whiflash_sglang.errors import ConfigError
from whiflash_sglang.lab.recorded.benchmark import walk
from whiflash_sglang.lab.recorded.conversation import PROSE, Conversation, Turn
from whiflash_sglang.lab.recorded.drafting import LookupArm, arms_of, bounds_of
from whiflash_sglang.lab.recorded.files import read_tools
from whiflash_sglang.lab.recorded.peers import Bound
from whiflash_sglang.spans.vocabulary import Vocabulary

TEXTS = st.lists(
    st.tuples(
        st.lists(st.integers(0, 3), min_size=1, max_size=20),
        st.lists(st.integers(0, 3), min_size=2, max_size=20),
    ),
    min_size=1,
    max_size=4,
)
"""Prompts and answers of three tokens, which occur everywhere."""


def turns_of(texts: Sequence[tuple[list[int], list[int]]]) -> list[Turn]:
    one = Conversation("one", "told", ())
    return [
        Turn(one, number, prompt, answer, [PROSE] * len(answer))
        for number, (prompt, answer) in enumerate(texts, 1)
    ]


def agreeing(text: Sequence[int], ahead: Sequence[int]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(text, ahead, strict=False)))


def defined(written: list[int], ahead: list[int], others: Sequence[list[int]], width: int, match: int) -> int:
    """Of every place that matches, tried one by one, what follows there; a text's own end goes on as copied."""
    end = written[-match:]
    own = [
        agreeing((written[place:] * (width + 1))[:width], ahead)
        for place in range(match, len(written))
        if written[place - match : place] == end
    ]
    strange = [
        agreeing(other[place:][:width], ahead)
        for other in others
        for place in range(match, len(other))
        if other[place - match : place] == end
    ]
    return max([*own, *strange], default=0)


@settings(deadline=None)
@given(texts=TEXTS, width=st.integers(1, 6), memory=st.booleans(), match=st.integers(1, 3))
def test_the_best_place_and_no_rule_above_it(
    texts: list[tuple[list[int], list[int]]], width: int, memory: bool, match: int
) -> None:
    bound = Bound(width, memory=memory, match=match)
    rule = LookupArm(Lookup(max_width=width, min_match=match), memory=memory)
    earlier: list[list[int]] = []
    for turn in turns_of(texts):
        for arm in (bound, rule):
            arm.begin(turn)
            arm.extend(turn.answer[:1])
        for position in range(1, len(turn.answer)):
            ahead = turn.answer[position:]
            found = list(bound.propose(len(ahead)))
            assert found == ahead[: len(found)]
            written = [*turn.prompt, *turn.answer[:position]]
            assert len(found) == min(
                defined(written, ahead, earlier if memory else [], width, match), len(ahead)
            )
            assert agreeing(rule.propose(len(ahead)), ahead) <= len(found)
            for arm in (bound, rule):
                arm.extend(turn.answer[position : position + 1])
        earlier.append(turn.answer)


LINE = '    return "a b" + self.value'


BYTES = Vocabulary(
    lambda text: list(text.encode()), [*(bytes([i]) for i in range(256)), b"<end>"], frozenset({256})
)


@pytest.mark.parametrize(
    ("listed", "written"),
    [
        (LINE, json.dumps(LINE)[1:-1]),
        ("\n".join(f"{n}:{LINE}" for n in range(7, 13)), "\n".join([LINE] * 6)),
    ],
    ids=["escaped", "listed"],
)
def test_forms_are_places_too(listed: str, written: str) -> None:
    """A line is written JSON-escaped, or lines without their numbers: with forms a place holds more of it."""
    answer = [*written.encode(), 256]
    turn = Turn(Conversation("one", "told", ()), 1, [*listed.encode(), 256], answer, [PROSE] * len(answer))
    arms = {name: make() for name, make in bounds_of(Lookup(max_width=64), BYTES).items()}
    done = walk([turn], arms, {})
    rounds = {name: sum(tally.rounds for tally in tallies.values()) for name, tallies in done.tallies.items()}
    assert rounds["bound+forms+memory"] < rounds["bound"] == rounds["bound+memory"]


def test_bounds_have_no_share_in_the_best_of_arms() -> None:
    assert not bounds_of(Lookup(), BYTES).keys() & arms_of(Lookup(), BYTES).keys()


def test_tools_of_files_that_do_not_say(tmp_path: Path) -> None:
    path = tmp_path / "tools.json"
    tool = {"type": "function", "function": {"name": "find"}}
    path.write_text(json.dumps([tool]))
    assert read_tools(path) == (tool,)
    for text, said in (
        ("{}", "must be a list"),
        ('[{"function": {}}]', r"tools.json\[0\].function.name: is missing"),
        ("[", "not JSON"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=said):
            read_tools(path)
