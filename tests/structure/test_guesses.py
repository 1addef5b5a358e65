"""Guesses among the choices that a grammar leaves: in the layout of the text so far, never what the grammar forbids."""

import json
from typing import Any

import pytest
import xgrammar
from hypothesis import example, given
from hypothesis import strategies as st
from structure_grammars import Grammars

from whiflash_sglang.spans.vocabulary import Vocabulary, text_of
from whiflash_sglang.structure import schemas
from whiflash_sglang.structure.chances import Kind, LikelyText
from whiflash_sglang.structure.guesses import STEPS, Ahead, Guesses, likely, parted
from whiflash_sglang.structure.layout import NO_FRAMES, Frames, Layout
from whiflash_sglang.structure.matchers import XGrammarMatcher
from whiflash_sglang.structure.schemas import MOST_WORDS, frames_of, words_of
from whiflash_sglang.structure.sketch import sketch

TRIP: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "unit": {"enum": ["celsius", "kelvin"]},
        "stops": {"type": "array", "items": {"type": "string"}},
        "hotel": {
            "type": "object",
            "properties": {"name": {"type": "string"}},
            "required": ["name"],
            "additionalProperties": False,
        },
    },
    "required": ["city", "days", "unit", "stops", "hotel"],
    "additionalProperties": False,
}


def guesses(schema: dict[str, Any], used: dict[str, int] | None = None) -> Guesses:
    return Guesses(words_of(json.dumps(schema)), lambda text: (used or {}).get(text.strip('"'), 0))


def follow(grammars: Grammars, vocabulary: Vocabulary, schema: dict[str, Any], written: str, **options: Any) -> str:
    """Text that is guessed after `written`, if whitespace is free."""
    matcher = grammars.matcher(grammars.raw(schema, blanks=True), vocabulary)
    layout = Layout()
    layout.follow(written)
    with matcher.trying():
        assert not written or matcher.accept_text(written)
        pieces = likely(Ahead(matcher, layout, guesses(schema, **options)), 400)
    return "".join(piece.text for piece in pieces)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("", '{"city": "'),
        ('{"city": "Paris"', ', "days": '),
        ('{"city": "Paris", "days": 3', ""),
        ('{"city": "Paris", "days": 3, "unit": "k', 'elvin", "stops": ["'),
        ('{\n  "city": "Paris"', ',\n  "days": '),
        ('{"city":"Paris","days":3', ""),
        ('{"city":"Paris","days":3,', '"unit":"celsius","stops":["'),
        ('{"city": "a", "days": 3, "unit": "kelvin", "stops": ["b"', ""),  # another one, or the end
        ('{"city": "a", "days": 3, "unit": "kelvin", "stops": ["b"]', ', "hotel": {"name": "'),
        ('{"city": "a", "days": 3, "unit": "kelvin", "stops": [], "hotel": {"name": "c"', "}}"),
    ],
)
def test_a_skeleton_in_the_layout_of_what_was_written(
    grammars: Grammars, vocabulary: Vocabulary, written: str, expected: str
) -> None:
    found = follow(grammars, vocabulary, TRIP, written)
    if expected == "":
        assert len(found) <= 12, found
    else:
        assert found.startswith(expected) or expected.startswith(found), found
        assert len(found) >= min(len(expected), 2), found


def test_of_several_words_the_one_that_was_used_most(grammars: Grammars, vocabulary: Vocabulary) -> None:
    written = '{"city": "Paris", "days": 3, "unit": "'
    assert follow(grammars, vocabulary, TRIP, written).startswith('celsius"')
    assert follow(grammars, vocabulary, TRIP, written, used={"celsius": 1, "kelvin": 2}).startswith('kelvin"')


def test_nothing_is_guessed_inside_free_text(grammars: Grammars, vocabulary: Vocabulary) -> None:
    assert follow(grammars, vocabulary, TRIP, '{"city": "') == ""
    assert follow(grammars, vocabulary, TRIP, '{"city": "unit') == "", "a word of the schema is no guess there"


def test_work_is_bounded(grammars: Grammars, vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long a skeleton is, and however many words a schema has."""
    many = {f"key_{i}": {"type": "integer", "const": i} for i in range(900)}
    schema = {"type": "object", "properties": many, "required": list(many), "additionalProperties": False}
    assert len(words_of(json.dumps(schema))) == MOST_WORDS
    matcher = grammars.matcher(grammars.raw(schema, blanks=True), vocabulary)
    asked = []
    own = guesses(schema)
    monkeypatch.setattr(own, "next", lambda *args: asked.append(1) or Guesses.next(own, *args))
    likely(Ahead(matcher, Layout(), own), 10_000)
    assert 0 < len(asked) <= STEPS


def test_words_of_schemas_and_tags() -> None:
    assert words_of(json.dumps(TRIP)) == (*TRIP["required"], "celsius", "kelvin", "name")
    tag = {
        "structures": [
            {"begin": '<tool_call>{"name":"look_up", "arguments":', "schema": {"enum": ['a "b"']}, "end": "}"}
        ],
        "triggers": ["<tool_call>"],
    }
    assert words_of(json.dumps(tag)) == ("look_up", 'a \\"b\\"')
    assert words_of("[a-z]+") == words_of("") == ()


FRAMES = Frames(('ab":', '<{"a":'), ("}1",))


@given(
    st.text(alphabet='{}[]:," \n\\ab1'),
    st.lists(st.sampled_from(["a", 'b":', "}1", '<{"a":', ": 1", "{ "])).map("".join),
    st.sampled_from([NO_FRAMES, FRAMES]),
)
def test_a_layout_is_the_same_however_its_text_comes(first: str, second: str, frames: Frames) -> None:
    whole, parts = Layout(frames=frames), Layout(frames=frames)
    whole.follow(first + second)
    parts.follow(first)
    parts.copy().follow("[1, 2]")
    parts.follow(second)
    assert parts == whole


CALLS = Frames(('<call>{"name":"f", "arguments":', '<call>{"name":"g", "arguments":'), ("}</call>",))


def test_how_a_tag_is_written_says_nothing_of_the_json_in_it() -> None:
    """Nobody chose its blanks. Blanks seen in a call count in the next one, whatever text is between them."""
    call = '<call>{"name":"f", "arguments":'
    layout = Layout(frames=CALLS)
    layout.follow(f'He said "no.\n{call}')
    assert (layout.inside, layout.last, layout.seen) == (False, "", {})
    layout.follow('{"a"')
    assert layout.blank_before(":") == ("", False)
    layout.follow(":")
    assert layout.blank_before('"') == (" ", False)
    layout.follow(' 1,\n"b"')
    seen = dict(layout.seen)
    layout.follow('}}</call>\n<call>{"name":"g", "arguments":')
    assert seen.items() <= layout.seen.items()


@pytest.mark.parametrize("modern", [False, True])
def test_frames_are_those_of_the_tag_and_none_of_its_schemas(modern: bool) -> None:
    inner = {"properties": {"x": {"begin": '"', "end": "y"}}}
    ends = {"end": CALLS.ends[0]}
    tag: dict[str, Any] = {
        "structures": [{"begin": begin, "schema": inner, **ends} for begin in CALLS.begins],
        "triggers": ["<call>"],
    }
    if modern:
        content = {"type": "json_schema", "json_schema": inner}
        tags = [{"type": "tag", "begin": begin, "content": content, **ends} for begin in CALLS.begins]
        form = {"type": "triggered_tags", "triggers": ["<call>"], "tags": tags}
        tag = {"type": "structural_tag", "format": form}
    found = frames_of(json.dumps(tag))
    assert (sorted(found.begins), found.ends) == (sorted(CALLS.begins), CALLS.ends)
    assert frames_of(json.dumps(TRIP)) is frames_of("[a-z]+") is NO_FRAMES


KEYS = sorted(schemas.PLACED | schemas.FRAMED)
SHAPES = st.recursive(
    st.sampled_from([5, True, None, "a", '"', "object", "structural_tag", "string"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=12,
)
"""JSON of a schema's keys whose values are of any kind: SGLang passes on more than it should."""
TAG = {"begin": '<f="a">', "schema": {"type": "object"}, "end": "</f>"}


@given(SHAPES)
@example({"enum": ["a"], "anyOf": 5})
@example({"type": "structural_tag", "structures": [TAG], "triggers": ["<f"], "tags": [{"begin": [], "end": "x"}]})
def test_no_schema_raises(schema: Any) -> None:
    for read in ("words_of_places", "has_alternatives", "is_plain", "words_of", "frames_of"):
        getattr(schemas, read)(json.dumps(schema))


def test_deep_arrays_have_no_places() -> None:
    for depth in (40, 900):
        layout = Layout(words=("x",))
        layout.follow('{"x": [' + ", ".join(["[" * depth + "]" * depth] * 2))
        assert (layout.place is None) == (depth == 900)


def test_only_what_parts_a_word_from_others_is_unsure() -> None:
    assert parted('get_time"', ['get_weather"', 'go"'], Kind.WORD) == [
        LikelyText("g", Kind.FORCED),
        LikelyText("e", Kind.WORD),
        LikelyText("t_", Kind.FORCED),
        LikelyText("t", Kind.WORD),
        LikelyText('ime"', Kind.FORCED),
    ]
    assert parted('get"', ['get_it"'], Kind.USED) == [LikelyText("get", Kind.FORCED), LikelyText('"', Kind.USED)]
    assert parted('a"', [], Kind.WORD) == [LikelyText("a", Kind.WORD), LikelyText('"', Kind.FORCED)]


TAG = {
    "type": "structural_tag",
    "format": {
        "type": "triggered_tags",
        "triggers": ["<call>"],
        "tags": [
            {
                "type": "tag",
                "begin": CALLS.begins[0],
                "content": {"type": "json_schema", "json_schema": TRIP["properties"]["hotel"]},
                "end": CALLS.ends[0],
            }
        ],
    },
}


def test_prose_around_a_tag_is_free(tokenizer: Any, vocabulary: Vocabulary) -> None:
    """Nothing is guessed in it, and that it ends only where a call just has."""
    info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, stop_token_ids=[tokenizer.eos_token_id])
    grammar = xgrammar.GrammarCompiler(info).compile_structural_tag(json.dumps(TAG))
    raw = xgrammar.GrammarMatcher(grammar)

    def proposed(written: str) -> tuple[str, list[Kind]]:
        matcher, layout = XGrammarMatcher(raw), Layout(frames=CALLS)
        layout.follow(written)
        with matcher.trying():
            assert not written or matcher.accept_text(written)
            grammar = {"matcher": matcher, "layout": layout, "guesses": guesses({}), "end": tokenizer.eos_token_id}
            found = sketch(vocabulary, vocabulary.encode(written)[-2:], 32, **grammar)
        text = text_of(vocabulary, [token.token for token in found if Kind.STOPPED not in token.kinds])
        return text, [token.kinds[0] for token in found]

    assert proposed("") == proposed("It is") == proposed('{"a": 1}') == ("", [])
    text, kinds = proposed(f'So: {CALLS.begins[0]}{{"name": "c"')
    assert (text, kinds[-1]) == ("}}</call>", Kind.STOPPED)
    assert Kind.STOPPED not in kinds[:-1]
    assert proposed(f'{CALLS.begins[0]}{{"name": "c"}}}}</call>') == ("", [])
