"""State of requests and tenants in the structure arm, and its lessons."""

from array import array
from collections.abc import Sequence
from typing import Any

import pytest
from drafting import continued, propose
from structure_grammars import KEYS, PROMPT, Grammars, Told
from walked import cuts_of
from whiflash_sdk.hints import Span

from whiflash_sglang.arms.structure import StructureArm
from whiflash_sglang.checkpoints.manifest import Structure
from whiflash_sglang.drafts.candidates import NOTHING, Candidate
from whiflash_sglang.prices.costs import FULL_LENGTH
from whiflash_sglang.records.request import Request
from whiflash_sglang.spans.hints import RequestHints
from whiflash_sglang.spans.vocabulary import Vocabulary, text_of
from whiflash_sglang.structure.spending import Spending
from whiflash_sglang.structure.tools import MOST_FUNCTIONS, carried_tools

CALLS = (Span(kind="tool_call", begin="<tool_call>", end="</tool_call>"),)


def outlook(said: Candidate | None) -> float:
    """Expected acceptance length."""
    return (said or NOTHING).outlook().length


@pytest.fixture
def arm(vocabulary: Vocabulary) -> StructureArm:
    return StructureArm(Structure(max_width=8), vocabulary, Spending(float, float))


def begun(
    arm: StructureArm, hints: RequestHints | None = None, grammar: Any = None, prompt: Sequence[int] = PROMPT
) -> Request:
    """A request that has begun."""
    hints = hints or RequestHints()
    request = Request("r", hints, grammar=grammar, prompt=len(prompt), read=lambda: prompt)
    arm.begin(request)
    return request


@pytest.fixture
def play(arm: StructureArm, grammars: Grammars, vocabulary: Vocabulary) -> Any:
    """Requests that are written one token a round by somebody else, the arm looking on; what it expected at first."""

    def write() -> float:
        told = Told(grammars)
        request = begun(arm, grammar=told)
        tokens = vocabulary.encode(told.beginning(vocabulary).forced())
        told.tell(tokens[:1])
        expected = []
        for token in [*tokens[1:], *vocabulary.encode("k")]:
            expected.append(outlook(propose(arm, request, told.history, FULL_LENGTH)))
            told.tell([token])
        arm.end(request)
        return expected[0]

    return write


def test_it_learns_from_what_others_draft(arm: StructureArm, play: Any) -> None:
    first = play()
    assert first > 5
    for _ in range(30):
        last = play()
    assert last > first
    arm.forget()
    assert play() == first


def test_a_request_that_it_does_not_serve_gets_nothing(arm: StructureArm) -> None:
    request = begun(arm)
    assert not arm.serves(request)
    assert propose(arm, request, lambda start: [], FULL_LENGTH) is None
    assert arm.host_bytes([request]) == {}, "metrics add it up"


def test_what_is_said_while_rounds_are_under_way_follows_what_is_known(
    arm: StructureArm, grammars: Grammars, vocabulary: Vocabulary
) -> None:
    """Their tokens are missing in the history: where it ends is told with what is forced there."""
    told = Told(grammars)
    request = begun(arm, grammar=told)
    told.tell(vocabulary.encode(told.beginning(vocabulary).forced())[:1])
    now = propose(arm, request, told.history, FULL_LENGTH) or NOTHING
    late = propose(arm, request, told.history, FULL_LENGTH, 8) or NOTHING
    assert now.at == late.at == len(told.text)
    assert late.tokens[: len(now.tokens)] == now.tokens
    assert len(late.tokens) > len(now.tokens)


def test_a_late_candidate_is_cut_by_the_chance_after_the_rows_under_way(
    arm: StructureArm, grammars: Grammars, vocabulary: Vocabulary
) -> None:
    """Each token has nine chances in ten, and a row must bring 0.72: three pay after those under way."""
    told, dear = Told(grammars), FULL_LENGTH._replace(row=0.72)
    request = begun(arm, grammar=told)
    rates = arm._rates
    rates._right[:] = array("d", (0.9 * seen for seen in rates._seen))
    told.tell(vocabulary.encode(told.beginning(vocabulary).forced())[:1])
    for under_way in (0, 1, 4):
        said = propose(arm, request, told.history, dear, under_way) or NOTHING
        assert len(said.tokens) == under_way + 3
        first = said.first(max(under_way // 2, 1))
        assert continued(arm, request, first, 12, dear).tokens == said.tokens
        forecast = said.outlook(8, under_way, 0.72)
        assert forecast == (pytest.approx(1 + sum(0.9 ** (under_way + i) for i in (1, 2, 3))), 4)
    assert said.outlook(8, 1, 0.72).rows == 4, "what is expected to be committed sets the price of the rest"


def test_what_drafts_are_taken_from_is_the_grammar_where_there_is_one(
    arm: StructureArm, grammars: Grammars, vocabulary: Vocabulary
) -> None:
    tools = RequestHints(tools=carried_tools([("find", {"description": "x"})], "hermes") or "")
    told, written = Told(grammars), [*PROMPT, *vocabulary.encode("<tool_call>")]
    alone = begun(arm, RequestHints(tools=tools.tools, spans=CALLS))
    propose(arm, alone, lambda start: written[: len(PROMPT) + 1][start:], FULL_LENGTH)
    for request, text, source in ((begun(arm, tools, told), list(PROMPT), "grammar"), (alone, written, "tools")):
        said = propose(arm, request, lambda start, text=text: text[start:], FULL_LENGTH)  # type: ignore[misc]
        assert said is not None
        assert said.parts == [(source, len(said.tokens))]


def test_where_calls_are_rare_none_is_guessed(arm: StructureArm, vocabulary: Vocabulary) -> None:
    """That one begins is believed as often as it was true."""
    tools = carried_tools([("find", {"properties": {"city": {}}, "required": ["city"]})], "hermes") or ""
    hints = RequestHints(tools=tools, spans=(*CALLS, Span(kind="reasoning", begin="<think>", end="</think>")))

    def answer(text: str) -> float:
        request = begun(arm, hints)
        written = [*PROMPT, *vocabulary.encode("<think>So</think>\n\n")]
        propose(arm, request, lambda start: written[: len(PROMPT) + 1][start:], worth)
        expected = outlook(propose(arm, request, lambda start: written[start:], worth))
        written += vocabulary.encode(text)
        propose(arm, request, lambda start: written[start:], worth)
        arm.end(request)
        return expected

    worth = FULL_LENGTH._replace(row=0.05)
    assert answer("No.") > 1
    for _ in range(100):
        answer("No.")
    assert answer("<tool_call>") == 1, "rows are verified that nobody needs"
    for _ in range(60):
        answer("<tool_call>")
    assert answer("<tool_call>") > 2


def test_it_cuts_marks_as_its_target_cut_them_and_keeps_no_word(
    arm: StructureArm, grammars: Grammars, vocabulary: Vocabulary
) -> None:
    """Here a target that writes character by character, whoever drafts."""
    said = []
    for _ in range(2):
        told = Told(grammars)
        request = begun(arm, grammar=told)
        text = told.beginning(vocabulary).forced()
        said.append(propose(arm, request, told.history, FULL_LENGTH) or NOTHING)
        for character in text[:9]:
            told.tell(vocabulary.encode(character))
            propose(arm, request, told.history, FULL_LENGTH)
    assert [text_of(vocabulary, candidate.tokens[:1]) for candidate in said] == ['{"', "{"]
    assert arm._walks is not None
    texts = [text_of(vocabulary, cut) for cut in cuts_of(arm._walks)]
    assert not [text for text in texts if any(map(str.isalnum, text))], texts


@pytest.mark.parametrize("form", ["qwen3_coder", "hermes"])
def test_a_round_reads_as_much_of_a_long_prompt_as_of_a_short_one(
    form: str, arm: StructureArm, vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many tools there are. Counted are tokens that are asked for or decoded, and characters searched."""
    read: list[int] = []

    class Searched(str):
        """A prompt that notes how much of it is searched."""

        def count(self, *args: Any) -> int:
            read.append(len(self))
            return super().count(*args)

    def counting(vocabulary: Vocabulary, tokens: Sequence[int]) -> str:
        read.append(len(tokens))
        return text_of(vocabulary, tokens)

    monkeypatch.setattr("whiflash_sglang.arms.structure.text_of", counting)
    monkeypatch.setattr("whiflash_sglang.arms.structure.PROMPT_CHARS", 100)
    tools = carried_tools([(f"find_{i}", KEYS) for i in range(MOST_FUNCTIONS)], form) or ""
    written, found = vocabulary.encode("<tool_call>"), []
    for repeats in (20, 320):
        arm.forget()
        prompt = vocabulary.encode('find_1 or "find_2"?' * repeats)
        request = begun(arm, RequestHints(tools=tools, spans=CALLS), prompt=prompt)
        kept, text = request.kept[arm.arm], [*prompt, *written]
        kept.uses.prompt = Searched(kept.uses.prompt)
        read.clear()
        for length in range(len(prompt) + 1, len(text) + 1):

            def history(start: int, stop: int = length, text: Sequence[int] = text) -> Sequence[int]:
                read.append(stop - start)
                return text[start:stop]

            said = propose(arm, request, history, FULL_LENGTH)
        assert said is not None
        found.append(read[:])
    assert found[0] == found[1]
