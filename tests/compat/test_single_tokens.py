"""A step's tokens reach SGLang's parsers as if each came alone, however many tokens a step brought.

So whatever a parser makes of single tokens, it makes of cut steps: none is asked here."""

import re
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_models import save_tokenizer
from transformers import PreTrainedTokenizerFast

from whiflash_sglang.http.cut_streams import Cutter, Detokenizer

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
    known = {piece for text in TEXTS.values() for piece in pieces_of(text)}
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
    manager = SimpleNamespace(tokenizer=tokenizer(), server_args=SimpleNamespace(disable_tokenizer_batch_decode=False))
    return Detokenizer(manager, [], {"skip_special_tokens": False, "stream_interval": 1, **parameters})


def outputs(tokens: Sequence[int], sizes: Iterator[int], *, increments: bool) -> Iterator[dict[str, Any]]:
    """Outputs of SGLang's detokenizer for steps that bring so many tokens each."""
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


def chunkings() -> Iterator[tuple[str, Iterator[int]]]:
    """Names and sizes of steps."""
    for size in (2, 3, 4, 5, 7, 8, 16, 1000):
        yield f"{size}", iter(lambda size=size: size, None)
    for seed in range(8):
        rng = Random(seed)
        yield f"random {seed}", iter(lambda rng=rng: rng.randint(1, 9), None)


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
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_pieces_are_those_of_their_tokens(text: str, every: int, increments: bool) -> None:
    """As if steps had brought one token, which SGLang sends at its stream interval."""
    tokens = tokens_of(text)

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
    tokens = tokens_of(HERMES)
    stop = HERMES[: len(HERMES) // 2][-9:] + "§"
    cutter = Cutter(decoder(stop=[stop]), increments=True)
    (whole,) = outputs(tokens, iter([len(tokens)]), increments=True)
    sizes = [len(piece["output_ids"]) for piece in cutter.cut(whole)]
    assert sum(sizes) == len(tokens) > len(sizes)
    assert max(sizes) > 1
