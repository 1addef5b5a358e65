"""Forced text of schemas that nobody chose: never a token that they forbid, and always what was written."""

import json
from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st
from structure_grammars import KEYS, SCHEMAS, Case, Grammars

from whiflash_sglang.spans.vocabulary import Vocabulary, text_of
from whiflash_sglang.structure.chances import Kind
from whiflash_sglang.structure.layout import Layout
from whiflash_sglang.structure.matchers import Matcher
from whiflash_sglang.structure.sketch import TAIL, LikelyText, Token, cut, open_word, sketch


def proposed(
    matcher: Matcher, vocabulary: Vocabulary, tail: Sequence[int] = (), limit: int = 64, end: int | None = None
) -> list[Token]:
    tail = open_word(vocabulary, tail[-TAIL:])
    return sketch(vocabulary, tail, limit, matcher=matcher, layout=Layout(), end=end)


def ids(tokens: Sequence[Token]) -> list[int]:
    return [token.token for token in tokens]


@settings(deadline=None, max_examples=100)
@given(case=SCHEMAS, limit=st.integers(0, 12), blanks=st.booleans())
def test_what_is_proposed_is_allowed_and_forced_text_is_what_follows(
    grammars: Grammars, vocabulary: Vocabulary, case: Case, limit: int, blanks: bool
) -> None:
    """Along a document that fits the schema, at each of its tokens; the engine's own masks judge every proposal."""
    schema, value = case
    raw, judge = (grammars.raw(schema, blanks=blanks) for _ in range(2))
    matcher = grammars.matcher(raw, vocabulary)
    separators = (", ", ": ") if blanks or grammars.engine == "xgrammar" else (",", ":")
    document = json.dumps(value, ensure_ascii=False, separators=separators)
    tokens = [*vocabulary.encode(document), grammars.end]
    table = vocabulary.token_bytes
    for done, written in enumerate(tokens):
        found = proposed(matcher, vocabulary, tokens[:done], limit, end=grammars.end)
        assert len(found) <= limit + 1
        assert not grammars.forbidden(judge, ids(found)), "a draft that the grammar forbids"
        rest = b"".join(table[token] for token in tokens[done:-1])
        text = b"".join(table[token.token] for token in found if Kind.END not in token.kinds)
        assert rest.startswith(text) or text.startswith(rest), (rest, text)
        assert grammars.allowed(raw)[written], "the matcher was moved"
        for engine in (raw, judge):
            if written != grammars.end:
                grammars.accept(engine, written)


def test_a_whole_skeleton_in_canonical_tokens(grammars: Grammars, vocabulary: Vocabulary) -> None:
    raw = grammars.raw(KEYS, blanks=False)
    matcher = grammars.matcher(raw, vocabulary)
    skeleton = matcher.forced()
    assert skeleton in ('{"city": "Paris", "unit": "', '{"city":"Paris","unit":"')
    found = ids(proposed(matcher, vocabulary))
    assert found == vocabulary.encode(skeleton)
    for token in [*found, *vocabulary.encode("k")]:
        grammars.accept(raw, token)
    last = proposed(matcher, vocabulary, [*found, *vocabulary.encode("k")], end=grammars.end)
    assert text_of(vocabulary, ids(last[:-1])) == 'elvin"}'
    assert last[-1] == Token(grammars.end, (Kind.END,))
    assert not any(Kind.EDGE in token.kinds for token in last), "nothing can follow that a longer token would hold"


def test_nothing_where_there_is_a_choice_or_the_end(grammars: Grammars, vocabulary: Vocabulary) -> None:
    raw = grammars.raw({"enum": ["a", "b"]}, blanks=False)
    matcher = grammars.matcher(raw, vocabulary)
    grammars.accept(raw, vocabulary.encode('"')[0])
    assert proposed(matcher, vocabulary) == []
    assert proposed(matcher, vocabulary, limit=0) == []
    for token in [*vocabulary.encode("a"), *vocabulary.encode('"'), grammars.end]:
        grammars.accept(raw, token)
    assert ids(proposed(grammars.matcher(raw, vocabulary), vocabulary)) == []


def test_a_word_that_is_open_at_the_seam_is_cut_as_a_whole(vocabulary: Vocabulary) -> None:
    """A token that begins at the seam is the one that the whole text has; else the first one is unsure."""
    whole = vocabulary.encode('{"city": "Paris"')
    cuts = [text_of(vocabulary, whole[:count]) for count in range(1, len(whole))]
    for written, count in zip(cuts, range(1, len(whole)), strict=True):
        rest = '{"city": "Paris"'[len(written) :]
        found = cut(vocabulary, open_word(vocabulary, whole[:count]), [LikelyText(rest, Kind.FORCED)])
        assert ids(found) == whole[count:]
        assert {token.kinds for token in found[:-1]} <= {(Kind.FORCED,)}
        assert Kind.EDGE in found[-1].kinds
    found = cut(vocabulary, [vocabulary.encode(char)[0] for char in "Par"], [LikelyText('is", "unit"', Kind.FORCED)])
    assert Kind.SEAM in found[0].kinds, "the whole word is one token, which begins before it"
    assert {token.kinds for token in found[1:-1]} == {(Kind.FORCED,)}
    assert text_of(vocabulary, ids(found)) == 'is", "unit"'


def test_a_tokenizer_that_sets_a_blank_before_texts(grammars: Grammars, vocabulary: Vocabulary) -> None:
    """As SentencePiece's: the blank is none of the text."""
    blank = vocabulary._replace(encode=lambda text: vocabulary.encode(" " + text))
    matcher = grammars.matcher(grammars.raw(KEYS, blanks=False), vocabulary)
    for tail in ([], vocabulary.encode("x ="), vocabulary.encode("x = ")):
        assert ids(proposed(matcher, blank, tail)) == ids(proposed(matcher, vocabulary, tail)) != []


def test_what_was_tried_is_taken_back_whatever_happens(grammars: Grammars, vocabulary: Vocabulary) -> None:
    matcher = grammars.matcher(grammars.raw(KEYS, blanks=False), vocabulary)
    forced = matcher.forced()
    try:
        with matcher.trying():
            assert matcher.accept_text(forced)
            assert not matcher.accept_text("?")
            with matcher.trying():
                assert matcher.accept_token(vocabulary.encode("k")[0])
                assert matcher.forced() == 'elvin"}'
            assert matcher.forced() == ""
            raise RuntimeError
    except RuntimeError:
        pass
    assert matcher.forced() == forced
