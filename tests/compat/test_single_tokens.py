"""Every parser of SGLang reads a stream as if each token came alone, however many tokens a step brought."""

import json
import re
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import pytest
from evidence import Result, cell
from parsed_texts import TOOL_FORMATS, reasoning_texts, tool_texts
from sglang.srt.entrypoints.openai.protocol import Tool
from sglang.srt.entrypoints.openai.serving_chat import OpenAIServingChat
from sglang.srt.function_call.function_call_parser import FunctionCallParser
from sglang.srt.function_call.json_array_parser import JsonArrayParser
from sglang.srt.parser.beam import BEAM_RESPONSE_TEMPLATE
from sglang.srt.parser.reasoning_parser import ReasoningParser
from tiny_models import save_tokenizer
from transformers import PreTrainedTokenizerFast

from whiflash_sglang.compat.http.pieces import Cutter, Detokenizer

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}
TOOLS = [Tool(type="function", function={"name": "get_weather", "parameters": PARAMETERS})]
TEMPLATED = SimpleNamespace(response_template=BEAM_RESPONSE_TEMPLATE)
PARSERS = [
    *(f"tool {name}" for name in FunctionCallParser.ToolCallParserEnum),
    "tool choice required",
    *(f"reasoning {name}" for name in ReasoningParser.DetectorMap),
]
SOME = ("hermes", "qwen25", "llama3", "glm45", "mistral", "deepseekv3", "choice required", "qwen3")


def texts_of(parser: str) -> list[str]:
    kind, _, name = parser.partition(" ")
    if name == "choice required":
        calls = [{"name": "get_weather", "parameters": {"city": c, "days": 3}} for c in ("Köln 東京", "Rom")]
        return [json.dumps(calls[:1], ensure_ascii=False), json.dumps(calls, ensure_ascii=False)]
    return tool_texts(name) if kind == "tool" else reasoning_texts(name)


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
    known = {piece for parser in PARSERS for text in texts_of(parser) for piece in pieces_of(text)}
    with TemporaryDirectory() as directory:
        save_tokenizer(Path(directory), sorted(piece for piece in known if len(piece) > 1))
        return PreTrainedTokenizerFast.from_pretrained(directory)


def tokens_of(text: str) -> list[int]:
    vocabulary = tokenizer().get_vocab()
    return [vocabulary[written(piece)] for piece in pieces_of(text)]


@cache
def written(piece: bytes) -> str:
    """A piece as the vocabulary spells it."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return "".join(bytes_to_unicode()[byte] for byte in piece)


def decoder(**parameters: Any) -> Detokenizer:
    manager = SimpleNamespace(
        tokenizer=tokenizer(), server_args=SimpleNamespace(disable_tokenizer_batch_decode=False)
    )
    return Detokenizer(manager, [], {"skip_special_tokens": False, "stream_interval": 1, **parameters})


def outputs(tokens: Sequence[int], sizes: Iterator[int], *, increments: bool) -> Iterator[dict[str, Any]]:
    """What SGLang's detokenizer makes of steps that bring so many tokens each."""
    detokenizer, sent, text = decoder(), 0, ""
    while sent < len(tokens):
        step = list(tokens[sent : sent + next(sizes)])
        sent += len(step)
        ends = {"type": "stop", "matched": None} if sent == len(tokens) else None
        detokenizer._output.decode_ids = [step]
        detokenizer._output.finished_reasons = [ends]
        (delta,) = detokenizer._decode_batch_token_id_output(detokenizer._output)
        text += delta
        yield {
            "text": delta if increments else text,
            "output_ids": step if increments else list(tokens[:sent]),
            "meta_info": {"id": "0", "finish_reason": ends, "completion_tokens": sent},
        }


def parsed(parser: str, stream: Iterator[dict[str, Any]], *, increments: bool) -> Any:
    """Sums of the deltas of a stream, as chat completions send them: text, calls, reasoning."""
    kind, _, name = parser.partition(" ")
    tokens = TEMPLATED if name == "response_template" else None
    reader: Any = JsonArrayParser()
    if kind == "reasoning":
        reader = ReasoningParser(name, tokenizer=tokens)
    elif name != "choice required":
        reader = FunctionCallParser(TOOLS, name, tokenizer=tokens)
    content, thought, shown = "", "", 0
    calls: dict[int, list[str]] = {}
    for output in stream:
        delta = output["text"][0 if increments else shown :]
        shown = len(output["text"])
        ends = output["meta_info"]["finish_reason"] is not None
        for text, found in (step(reader, delta), *((end(reader),) if ends else ())):
            if kind == "reasoning":
                thought, content = thought + (text or ""), content + (found or "")
                continue
            content += text or ""
            for call in found:
                parts = calls.setdefault(call.tool_index, ["", ""])
                parts[0] += call.name or ""
                parts[1] += call.parameters or ""
    if kind == "tool":
        content += unsent(reader)
    return content, calls, thought


def step(reader: Any, delta: str) -> Any:
    if isinstance(reader, JsonArrayParser):
        result = reader.parse_streaming_increment(delta, TOOLS)
        return result.normal_text, result.calls
    return reader.parse_stream_chunk(delta)


def end(reader: Any) -> Any:
    if isinstance(reader, JsonArrayParser):
        result = reader.finish(TOOLS)
        return result.normal_text, result.calls
    return reader.parse_stream_end()


def unsent(reader: Any) -> str:
    """Arguments that the route sends beside the parser's when an answer ends."""
    asked = SimpleNamespace(model="m")
    return (
        OpenAIServingChat._check_for_unstreamed_tool_args(
            None, reader, {"meta_info": {"id": "0"}}, asked, 0, 0
        )
        or ""
    )


def chunkings() -> Iterator[tuple[str, Iterator[int]]]:
    """Names and sizes of steps."""
    for size in (2, 3, 4, 5, 7, 8, 16, 1000):
        yield f"{size}", iter(lambda size=size: size, None)
    for seed in range(8):
        rng = Random(seed)
        yield f"random {seed}", iter(lambda rng=rng: rng.randint(1, 9), None)


def one_by_one() -> Iterator[int]:
    return iter(lambda: 1, None)


def compared(parser: str, *, increments: bool) -> Result:
    """Texts and chunkings whose sum is not that of single tokens: by SGLang's steps of each size, and cut."""
    before: dict[str, int] = {}
    after = cases = 0
    for text in texts_of(parser):
        tokens = tokens_of(text)
        expected = parsed(parser, outputs(tokens, one_by_one(), increments=increments), increments=increments)
        for name, sizes in chunkings():
            steps = list(outputs(tokens, sizes, increments=increments))
            cutter = Cutter(decoder(), increments=increments)
            cut = [piece for output in steps for piece in cutter.cut(output)]
            assert len(cut) == len(tokens)
            cases += 1
            differs = parsed(parser, iter(steps), increments=increments) != expected
            size = "random steps" if name.startswith("random") else f"steps of {name}"
            before[size] = before.get(size, 0) + differs
            after += parsed(parser, iter(cut), increments=increments) != expected
    return {"cases": cases, **before, "differ token by token": after}


def with_records(steps: Iterator[dict[str, Any]], *, increments: bool) -> Iterator[dict[str, Any]]:
    """The outputs with a record and a count for every token, reasoning for the first five."""
    sent = 0
    for output in steps:
        meta, ids = output["meta_info"], output["output_ids"]
        sent = sent + len(ids) if increments else len(ids)
        meta |= {"reasoning_tokens": min(sent, 5), "output_token_logprobs_length": sent}
        yield {**output, "meta_info": {**meta, "output_token_logprobs": [(0.5, t) for t in ids]}}


@pytest.mark.parametrize("increments", [False, True])
@pytest.mark.parametrize("every", [1, 3, 8])
def test_pieces_have_the_records_and_counts_of_their_tokens(every: int, increments: bool) -> None:
    """As if steps had brought one token, which SGLang sends at its stream interval."""
    tokens = tokens_of(texts_of("tool hermes")[0])

    def as_sent(sizes: Iterator[int]) -> Iterator[dict[str, Any]]:
        return with_records(outputs(tokens, sizes, increments=increments), increments=increments)

    expected = list(as_sent(iter([1, *[every] * len(tokens)])))
    assert len(expected) > 3
    for name, sizes in chunkings():
        cutter = Cutter(decoder(stream_interval=every), increments=increments)
        found = [piece for output in as_sent(sizes) for piece in cutter.cut(output)]
        if not increments:  # who reads all records so far reads as many as are counted
            for piece in found:
                meta = piece["meta_info"]
                count = meta["output_token_logprobs_length"]
                meta["output_token_logprobs"] = meta["output_token_logprobs"][:count]
        assert found == expected, name


def test_what_may_become_a_stop_string_waits() -> None:
    """As in SGLang's scheduler: it is sent with the token that decides."""
    tokens = tokens_of(text := texts_of("tool hermes")[0])
    stop = text[: len(text) // 2][-9:] + "§"
    cutter = Cutter(decoder(stop=[stop]), increments=True)
    (whole,) = outputs(tokens, iter([len(tokens)]), increments=True)
    sizes = [len(piece["output_ids"]) for piece in cutter.cut(whole)]
    assert sum(sizes) == len(tokens) > len(sizes)
    assert max(sizes) > 1


def test_every_parser_has_its_texts() -> None:
    assert TOOL_FORMATS.keys() == FunctionCallParser.ToolCallParserEnum.keys()


@pytest.mark.parametrize("parser", FunctionCallParser.ToolCallParserEnum)
def test_single_tokens_are_read_as_calls(parser: str) -> None:
    """Else there would be nothing to lose."""
    tokens = tokens_of(tool_texts(parser)[0])
    _, calls, _ = parsed(f"tool {parser}", outputs(tokens, one_by_one(), increments=True), increments=True)
    ((name, arguments),) = calls.values()
    assert (name, json.loads(arguments)) == ("get_weather", {"city": "Köln 東京", "days": 3})


@pytest.mark.parametrize("increments", [False, True])
@pytest.mark.parametrize("parser", [name for name in PARSERS if name.partition(" ")[2] in SOME])
def test_sums_are_those_of_single_tokens(parser: str, increments: bool) -> None:
    assert compared(parser, increments=increments)["differ token by token"] == 0


@pytest.mark.evidence
@pytest.mark.parametrize("parser", PARSERS)
def test_every_parser(parser: str) -> None:
    found = cell("streamed-parsers", parser.replace(" ", "-"), lambda: compared(parser, increments=False))
    assert found["differ token by token"] == 0
