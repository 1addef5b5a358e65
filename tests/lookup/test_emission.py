"""Forms by the open span, in a tokenizer's own tokens: when there are any, and that a model would write just these."""

from collections.abc import Sequence
from itertools import accumulate

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from whiflash_sglang.checkpoints.manifest import Lookup
from whiflash_sglang.core import SILENCE
from whiflash_sglang.device.transfers import HostView
from whiflash_sglang.drafters.lookup import LookupArm
from whiflash_sglang.lookup.calibration import MatchCalibration
from whiflash_sglang.lookup.copier import Copier
from whiflash_sglang.lookup.emission import OPENING, Emission
from whiflash_sglang.lookup.forms import NEEDLE, Forms, escaped
from whiflash_sglang.routing.costs import FULL_LENGTH
from whiflash_sglang.spans.hints import RequestHints, SpanHint
from whiflash_sglang.spans.vocabulary import Vocabulary, bytes_of, vocabulary_of

SOURCE = 'def total(rows):\n    """Sum of "rows"."""\n    return sum(row.amount for row in rows)\n' * 3
CALL = SpanHint("tool_call", "<tool_call>", "</tool_call>")
FENCES = (SpanHint("json", "```json", "```"), SpanHint("code", "```", "```"))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE that merges quotes, backslashes and blanks with what stands beside them."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, special_tokens=["<|end|>"])
    texts = [SOURCE, escaped(SOURCE), "total rows\n\n    of \\n    of \\nof amounts, naïve"]
    backend.train_from_iterator(texts * 9, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")


@pytest.fixture(scope="module")
def vocabulary(tokenizer: PreTrainedTokenizerFast) -> Vocabulary:
    return vocabulary_of(tokenizer)


class Writer:
    """A request that writes a text, with what it would copy at its end."""

    def __init__(self, vocabulary: Vocabulary, prompt: str, spans: Sequence[SpanHint], budget: int = 1 << 15):
        tokens = vocabulary.encode(prompt)
        self._encode, self._prompt = vocabulary.encode, tokens
        self.emission = Emission(vocabulary, spans, len(tokens), budget)
        self.copier = Copier(MatchCalibration(), forms=self.emission.texts)
        self.copier.extend(tokens)
        self.written: list[int] = []

    def write(self, text: str) -> None:
        """Go on so that `text` is what was written, a token a round."""
        tokens = self._encode(text)
        assert tokens[: len(self.written)] == self.written
        for token in tokens[len(self.written) :]:
            self.commit([token])

    def commit(self, tokens: Sequence[int]) -> None:
        self.written += tokens
        self.copier.extend(tokens)
        self.emission.follow(self.copier.text)

    def ahead(self, count: int = 24) -> list[int]:
        return list(self.copier.look(count, worth=0.0).tokens)


def test_a_call_copies_what_it_quotes_as_it_is_quoted(vocabulary: Vocabulary) -> None:
    whole = '<tool_call>{"text": "' + escaped(SOURCE)
    for spans, forms in (((CALL,), True), ((FENCES[1],), False), ((), False)):
        writer = Writer(vocabulary, SOURCE, spans)
        tokens = vocabulary.encode(whole)
        begin = len(vocabulary.encode('<tool_call>{"text": "def total(rows):\\n    \\"\\"\\"Sum'))
        for token in tokens[:begin]:
            writer.commit([token])
        assert (writer.ahead(16) == tokens[begin : begin + 16]) == forms
        assert (writer.emission.tokens > 0) == forms


def test_no_form_is_made_before_a_span_opens_and_none_is_copied_from_behind_it(
    vocabulary: Vocabulary,
) -> None:
    writer = Writer(vocabulary, escaped(SOURCE), FENCES)
    writer.write("It sums up: def total(rows):")
    assert writer.emission._forms is None, "the prompt was not even read"
    writer.write("It sums up: def total(rows): so\n```\ndef total(rows):")
    assert writer.emission.tokens > 0
    assert writer.emission.texts()
    writer.write("It sums up: def total(rows): so\n```\ndef total(rows):\n```\n")
    assert not writer.emission.texts()


def test_forms_are_of_the_prompt_and_not_of_what_the_answer_said_before(vocabulary: Vocabulary) -> None:
    writer = Writer(vocabulary, "Write it down.", (CALL,))
    writer.write(SOURCE + '<tool_call>{"text": "' + escaped(SOURCE)[:40])
    assert writer.emission.texts()
    assert writer.emission.tokens == 0


def test_what_the_prompt_ends_with_is_not_being_quoted(vocabulary: Vocabulary) -> None:
    writer = Writer(vocabulary, SOURCE + "Write: def tot", (SpanHint("json", open=True),))
    writer.write("al(")
    assert writer.emission.texts()
    assert writer.emission.tokens == 0


def test_what_tells_nothing_of_a_call_is_asked_for_no_longer(
    vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = Writer(vocabulary, SOURCE, (CALL,))
    begun = "<tool_call>" + "x" * 2 * OPENING
    writer.write(begun)
    asked: list[int] = []
    text_of = writer.emission._text_of
    monkeypatch.setattr(
        writer.emission, "_text_of", lambda tokens: asked.append(len(tokens)) or text_of(tokens)
    )
    before = len(writer.written)
    writer.write(begun + "yy")
    assert len(asked) == len(writer.written) - before, "once a round, for what is being quoted"


def test_a_marker_at_the_very_beginning_opens_its_span(vocabulary: Vocabulary) -> None:
    """The first token is the prefill's, which no round commits."""
    writer = Writer(vocabulary, SOURCE, (CALL,))
    writer.write("<tool_call>")
    assert writer.emission.texts()


def test_a_fence_inside_a_call_is_quoted_like_the_rest_of_it(vocabulary: Vocabulary) -> None:
    writer = Writer(vocabulary, SOURCE, (CALL, *FENCES))
    writer.write('<tool_call>{"text": "```\\ndef total(rows):\\n    \\"\\"\\"Sum')
    assert bytes_of(vocabulary, writer.ahead()).startswith(b' of \\"rows\\".\\"\\"\\"\\n    return')


BEGUN = 'def total(rows):\n    """Sum'
CALLS = {
    "hermes": ("<tool_call>", '\n{"name": "write", "arguments": {"text": "', True),
    "llama3": ('{"name":', ' "write", "parameters": {"text": "', True),
    "deepseek": ("<｜tools｜>", 'function<｜sep｜>write\n```json\n{"text": "', True),
    "pythonic": ("<call>", '[write(text="', True),
    "nothing to tell by": ("<tool_call>", "\n", True),
    "qwen3_coder": ("<tool_call>", "\n<function=write>\n<parameter=text>\n", False),
    "glm": ("<tool_call>", "write\n<arg_key>text</arg_key>\n<arg_value>", False),
    "dsml": ("<｜DSML｜calls>", '\n<｜DSML｜invoke name="write">\n<｜DSML｜parameter name="text">', False),
}


@pytest.mark.parametrize("marked", [False, True], ids=["opened", "open"])
@pytest.mark.parametrize("name", CALLS)
def test_arguments_between_tags_are_quoted_as_they_are(
    vocabulary: Vocabulary, name: str, marked: bool
) -> None:
    """What begins a call tells how its arguments are written, also where the request says that one is open already."""
    marker, lead, in_json = CALLS[name]
    writer = Writer(vocabulary, escaped(SOURCE) + SOURCE, (SpanHint("tool_call", marker, "</end>", marked),))
    asked: list[bool] = []
    writer.write(marker)
    assert writer.emission._forms is not None
    text_of = writer.emission._forms.text

    def noting(written: str, *, inside_json: bool) -> object:
        asked.append(inside_json)
        return text_of(written, inside_json=inside_json)

    writer.emission._forms.text = noting  # type: ignore[assignment, method-assign]
    writer.write(marker + lead + "x" * 300)
    assert len(asked) > 100
    assert set(asked[-100:]) == {in_json}


def test_a_call_with_tags_copies_what_stands_escaped_in_the_prompt(vocabulary: Vocabulary) -> None:
    writer = Writer(vocabulary, f'{{"output": "{escaped(SOURCE)}"}}', (CALL, *FENCES))
    tags = "<tool_call>\n<function=write>\n<parameter=text>\n"
    writer.write(tags + BEGUN)
    assert bytes_of(vocabulary, writer.ahead()).startswith(b' of "rows"."""\n    return')
    fenced = f"{tags}{BEGUN}\n```json\n" + '{"text": "' + escaped(BEGUN)
    writer = Writer(vocabulary, SOURCE, (CALL, *FENCES))
    writer.write(fenced)
    assert bytes_of(vocabulary, writer.ahead()).startswith(b' of \\"rows\\".'), "JSON between tags is JSON"


def test_every_call_of_an_answer_tells_for_itself(vocabulary: Vocabulary) -> None:
    writer = Writer(vocabulary, SOURCE, (CALL,))
    first = "<tool_call>\n<function=write>\n<parameter=text>\nx</parameter></tool_call>\n"
    writer.write(first + '<tool_call>{"text": "' + escaped(BEGUN))
    assert bytes_of(vocabulary, writer.ahead()).startswith(b' of \\"rows')


@pytest.mark.parametrize("lead", ['{"text": "', "\n<function=f>\n<parameter=text>\n"])
def test_an_answer_that_begins_again_has_the_forms_that_it_had(vocabulary: Vocabulary, lead: str) -> None:
    text = f"<tool_call>{lead}" + (escaped(BEGUN) if lead.startswith("{") else BEGUN)
    by_token, at_once = (Writer(vocabulary, f"{SOURCE}\n{escaped(SOURCE)}", (CALL,)) for _ in range(2))
    by_token.write(text)
    at_once.commit(vocabulary.encode(text))
    assert at_once.ahead() == by_token.ahead()
    assert at_once.emission._has_tags is by_token.emission._has_tags is (not lead.startswith("{"))


def test_no_more_tokens_are_made_than_a_request_may_have(vocabulary: Vocabulary) -> None:
    text = '<tool_call>{"text": "def total(rows):'
    free, bound = (Writer(vocabulary, SOURCE, (CALL,), budget) for budget in (1 << 15, 5))
    for writer in (free, bound):
        writer.write(text)
    assert bound.emission.tokens == 5 < free.emission.tokens
    assert bound.emission.nbytes <= free.emission.nbytes


LINE = st.lists(
    st.sampled_from(["total", " rows", "naïve", " ", "    ", '"', '\\"', "\\", "(", "):", "x1", "\t", "of"]),
    max_size=7,
).map("".join)


@settings(deadline=None, max_examples=150)
@given(st.lists(LINE, min_size=1, max_size=12).map("\n".join), st.data())
def test_a_form_is_cut_as_the_model_cuts_it_from_its_second_word_on(
    tokenizer: PreTrainedTokenizerFast, vocabulary: Vocabulary, text: str, data: st.DataObject
) -> None:
    """Wherever a window begins: behind its first piece and before its last one it has the tokens of the whole call."""
    quoted = escaped(text)
    if len(quoted) < NEEDLE:
        return
    windows: list[str] = []

    def encode(window: str) -> list[int]:
        windows.append(window)
        return vocabulary.encode(window)

    forms = Forms(encode, iter([text]), 1 << 15)
    forms.text(quoted[: data.draw(st.integers(NEEDLE, len(quoted)))], inside_json=True)
    lead = '<tool_call>{"text": "'
    whole = vocabulary.encode(f'{lead}{quoted}"}}</tool_call>')
    ends = list(accumulate((len(vocabulary.token_bytes[token]) for token in whole), initial=0))
    for window in windows:
        at = len((lead + quoted[: quoted.index(window)]).encode())
        pieces = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(window)
        first, last = pieces[0][0], pieces[-1][0]  # in the byte level's stand-ins: a character for each byte
        tokens, place = vocabulary.encode(window), at
        stable: list[int] = []
        for token in tokens:
            if at + len(first) <= place < at + len(window.encode()) - len(last):
                stable.append(token)
            place += len(vocabulary.token_bytes[token])
        if stable:
            begin = ends.index(at + len(first))
            assert whole[begin : begin + len(stable)] == stable


def test_forms_end_with_their_request(vocabulary: Vocabulary) -> None:
    """Also where the device copies, which has only the text itself."""
    hints = RequestHints(spans=(CALL,))
    for exact in (True, False):
        arm = LookupArm(Lookup(), HostView(exact=exact), vocabulary=vocabulary)
        arm.begin(1, hints, None, prompt=4)
        assert list(arm._emissions())
        arm.release(1)
        assert not list(arm._emissions())
        arm.begin(1, RequestHints(spans=(CALL,), lookup="off"), None, prompt=4)
        arm.begin(2, RequestHints(spans=(SpanHint("reasoning", open=True),)), None, prompt=4)
        assert not list(arm._emissions())


def test_forms_are_of_the_request_s_own_prompt(vocabulary: Vocabulary) -> None:
    """Another one's row beside it, and its own row before: neither leaves anything to copy from."""
    arm = LookupArm(Lookup(), vocabulary=vocabulary)
    answer = vocabulary.encode('<tool_call>{"text": "def total(rows):\\n    \\"\\"\\"Sum')
    prompts = {1: vocabulary.encode(SOURCE), 2: vocabulary.encode("Write the sum of them.")}
    hints = RequestHints(spans=(CALL,), lookup="context")

    def play(row: int, prompt: list[int]) -> float:
        arm.begin(row, hints, None, prompt=len(prompt))
        text, found = list(prompt), 0.0
        for token in answer:
            text.append(token)
            said = arm.speak(row, len(text) - 1, lambda start: text[start:], FULL_LENGTH)
            found = (said or SILENCE).outlook().length
        return found

    alone = play(2, prompts[2])
    arm.release(2)
    assert play(1, prompts[1]) > alone
    assert play(2, prompts[2]) == alone
    for row in (1, 2):
        arm.release(row)
    assert play(1, prompts[2]) == alone
