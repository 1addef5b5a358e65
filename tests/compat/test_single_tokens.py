"""A step's tokens reach SGLang's consumers as if each came alone. Its parsers may get words together."""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cache, partial
from itertools import repeat
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.entrypoints.openai.protocol import Tool
from sglang.srt.function_call.function_call_parser import FunctionCallParser
from sglang.srt.managers.detokenizer_manager import DetokenizerManager
from sglang.srt.parser.reasoning_parser import ReasoningParser
from tiny_models import save_tokenizer
from transformers import PreTrainedTokenizerFast
from whiflash_sdk.presets import REASONING_PARSERS, TOOL_CALL_PARSERS

from whiflash_sglang.http.cut_streams import Cuts, Cutter, holder_of
from whiflash_sglang.http.token_texts import decoder_of
from whiflash_sglang.spans.vocabulary import token_bytes
from whiflash_sglang.structure.tools import PARSERS

HERMES = (
    '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Köln 東京", "days": 3}}\n</tool_call>\n'
    '<tool_call>\n{"name": "get_weather", "arguments": {"city": "São Paulo", "days": 14}}\n</tool_call>'
)
TEXTS = {
    "hermes": HERMES,
    "characters in parts": "Wetter: 東京 Köln 東京, São Paulo und Kraków 🌦 ☂ 🌧 – Übersicht für 東京 и Москва " * 2,
    "reasoning": "<think>\nThe user asks for the weather; I call no tool.\n</think>\n\nIt rains in 東京.\n\n\n",
}


def pieces_of(text: str) -> list[bytes]:
    """A text as tokens of models are: marks in angles whole, words in parts, some of them inside a character."""
    words = re.findall(r"<[^<>\s]*>|\s?[^\s<>]+|\s|[<>]", text)
    cuts: list[bytes] = []
    for word in words:
        size = len(word.encode()) if word.startswith("<") else 4
        cuts += [word.encode()[i : i + size] for i in range(0, len(word.encode()), size)]
    return cuts


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    known = {piece for text in [*TEXTS.values(), *PARSED.values()] for piece in pieces_of(text)}
    with TemporaryDirectory() as directory:
        save_tokenizer(Path(directory), sorted(piece for piece in known if len(piece) > 1))
        return PreTrainedTokenizerFast.from_pretrained(directory)


def tokens_of(text: str) -> list[int]:
    ids = {piece: token for token, piece in enumerate(token_bytes(tokenizer()))}
    return [ids[piece] for piece in pieces_of(text)]


MANAGER = SimpleNamespace()


def cutter(*, increments: bool, cuts: Cuts = "tokens", **parameters: Any) -> Cutter:
    MANAGER.tokenizer = tokenizer()
    parameters = {"skip_special_tokens": False, "stream_interval": 1, **parameters}
    decoder, holder = decoder_of(MANAGER, parameters), holder_of(tokenizer(), parameters)
    return Cutter(decoder, holder, increments=increments, cuts=cuts)


def outputs(
    tokens: Sequence[int], sizes: Iterator[int], *, increments: bool, ahead: int = 0
) -> Iterator[dict[str, Any]]:
    """Outputs of SGLang's detokenizer for steps that bring so many tokens each. Five tokens are reasoning. ahead:
    tokens by which the list of all so far has grown when one is read.
    """
    detokenizer, sent, text = DetokenizerManager.__new__(DetokenizerManager), 0, ""
    detokenizer.tokenizer, detokenizer.vocab_size, detokenizer.decode_status = tokenizer(), len(tokenizer()), {}
    detokenizer.disable_tokenizer_batch_decode = False
    fields = {"rids": ["0"], "decoded_texts": [""], "read_offsets": [0], "no_stop_trim": [False]}
    flags = {"skip_special_tokens": [False], "spaces_between_special_tokens": [True]}
    while sent < len(tokens):
        step = list(tokens[sent : sent + next(sizes)])
        sent += len(step)
        ends = {"type": "stop", "matched": None} if sent == len(tokens) else None
        output = SimpleNamespace(**fields, **flags, decode_ids=[step], finished_reasons=[ends])
        (delta,) = detokenizer._decode_batch_token_id_output(output)
        text += delta
        ids = step if increments else list(tokens[: sent + (0 if ends else ahead)])
        counts = {"completion_tokens": sent, "reasoning_tokens": min(sent, 5), "output_token_logprobs_length": sent}
        records = {"output_token_logprobs": [(0.5, token) for token in ids[:sent]]}
        meta = {"id": "0", "finish_reason": ends, **counts, **records}
        yield {"text": delta if increments else text, "output_ids": ids, "meta_info": meta}


def chunkings() -> Iterator[tuple[str, Iterator[int]]]:
    """Names and sizes of steps."""
    for size in (2, 3, 4, 5, 7, 8, 16, 1000):
        yield f"{size}", iter(lambda size=size: size, None)
    for seed in range(8):
        rng = Random(seed)
        yield f"random {seed}", iter(lambda rng=rng: rng.randint(1, 9), None)


@pytest.mark.parametrize("increments", [False, True])
@pytest.mark.parametrize("every", [1, 3, 8])
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_pieces_are_those_of_their_tokens(text: str, every: int, increments: bool) -> None:
    """As if steps had brought one token, which SGLang sends at its stream interval."""
    tokens = tokens_of(text)
    as_sent = partial(outputs, tokens, increments=increments)
    expected = list(as_sent(iter([1, *[every] * len(tokens)])))
    assert len(expected) > 3
    for name, sizes in chunkings():
        cuts = cutter(increments=increments, stream_interval=every)
        found = [piece for output in as_sent(sizes, ahead=3) for piece in cuts.cut(output)]
        if not increments:  # who reads all records so far reads as many as are counted
            for piece in found:
                meta = piece["meta_info"]
                count = meta["output_token_logprobs_length"]
                meta["output_token_logprobs"] = meta["output_token_logprobs"][:count]
        assert found == expected, name


def test_what_may_become_a_stop_string_waits() -> None:
    """As in SGLang's scheduler: it is sent with the token that decides."""
    tokens = tokens_of(HERMES)
    stop = HERMES[: len(HERMES) // 2][-9:] + "§"
    (whole,) = outputs(tokens, iter([len(tokens)]), increments=True)
    sizes = [len(piece["output_ids"]) for piece in cutter(increments=True, stop=[stop]).cut(whole)]
    assert sum(sizes) == len(tokens) > len(sizes)


ARGUMENTS = {"note": "All of it, to: 'St. John's' and on – 2: a [b] {c}.", "city": "New York", "days": 3}
TAIL = "\nBoth were asked, and I go on. function call of <tool> text {until} the end, [1] and so on"


def call_of(parser: str) -> str:
    """Two calls as the parser's models write them, in markup or JSON, or something like it."""
    span, key = TOOL_CALL_PARSERS[parser][0], "parameters" if parser == "llama3" else "arguments"
    call = json.dumps({"name": "get_weather", key: ARGUMENTS}, ensure_ascii=False)
    if (form := PARSERS.get(parser)) is not None:
        call = form.call.format(name="get_weather", index=1)
        for key, value in ARGUMENTS.items():
            call += (form.argument + form.value).format(key=key, value=value, type="string", string="true")
        call += form.close + form.end
    return f"{span.begin}{call}{span.end or ''}\n" * 2


TOOLS = [Tool(type="function", function={"name": "get_weather", "parameters": {"type": "object", "properties": {}}})]
THOUGHT = "Let me see, is it so?\nI think."
PARSED = {name: f"I look at it. Then I call.{call_of(name)}{TAIL}" for name in TOOL_CALL_PARSERS} | {
    f"reasoning {name}": f"{span.begin}{THOUGHT}{span.end}Yes – the <b> answer.{TAIL}"
    for name, (span, *_) in REASONING_PARSERS.items()
}
"""Texts by parser."""


def read(parser: str, steps: Iterable[dict[str, Any]]) -> list[tuple[Any, str]]:
    """The parts that SGLang's parser makes of a stream, in order, neighbours of one kind together."""
    kind, _, name = parser.rpartition(" ")
    reader = ReasoningParser(name) if kind else FunctionCallParser(TOOLS, name, tokenizer())
    found: list[tuple[Any, str]] = []
    for text in [*(step["text"] for step in steps), None]:
        first, second = reader.parse_stream_end() if text is None else reader.parse_stream_chunk(text)
        others = [("text", None, second)] if kind else [(c.tool_index, c.name, c.parameters) for c in second]
        for part, called, more in [(kind or "text", None, first), *others]:
            if found and found[-1][0] == part and not called:
                found[-1] = (part, found[-1][1] + more)
            elif more or called:
                found.append((part, f"{called or ''} {more}"))
    return found


@pytest.mark.parametrize("parser", PARSED)
def test_a_parser_makes_the_same_of_words_together(parser: str) -> None:
    """Also of an answer that ends inside a call."""
    whole = tokens_of(PARSED[parser])
    for tokens in (whole, whole[: len(whole) // 2], whole[:-30]):
        expected = read(parser, outputs(tokens, repeat(1), increments=True))
        for name, sizes in chunkings():
            cuts = cutter(increments=True, cuts="marks")
            found = [piece for step in outputs(tokens, sizes, increments=True) for piece in cuts.cut(step)]
            assert read(parser, found) == expected, name
        assert len(found) < len(tokens)
