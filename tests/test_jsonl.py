"""JSON lines end at line feeds alone: what readers of text call a line end may stand inside a JSON string."""

import asyncio
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from whiflash_sdk.reading import DEEPEST

from whiflash_lab.bench.load import stream_lines
from whiflash_sglang.errors import ConfigError
from whiflash_sglang.files.jsonl import parse_json_lines, read_json, read_json_file, write_output
from whiflash_train.answers.prompts import read_rows


def dumps(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


@given(st.lists(st.text()), st.sampled_from(["\n", "\r\n", "\n\n"]))
def test_any_text_comes_back(texts: list[str], end: str) -> None:
    whole = "".join(dumps({"text": text}) + end for text in texts)
    assert [row["text"] for _, row in parse_json_lines(whole, "here")] == texts


def test_the_line_that_is_wrong_is_named(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(dumps({"a": "one\u2028two\u2029three\x85four"}) + "\n\n{oops\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"rows\.jsonl, line 3: not JSON"):
        read_rows(file)
    with pytest.raises(ConfigError, match="line 2: not JSON"):  # though the text ends as it does
        parse_json_lines('{"a": 1}\n}\n{"b": 2}', "here", may_be_torn=True)
    with pytest.raises(ConfigError, match=r"none\.jsonl cannot be read"):
        read_rows(tmp_path / "none.jsonl")


@given(st.text(alphabet="ab\n\r\u2028é", max_size=30), st.integers(1, 5))
def test_a_stream_is_divided_like_a_file(text: str, size: int) -> None:
    raw = text.encode()

    async def parts() -> AsyncIterator[bytes]:
        for start in range(0, len(raw), size):
            yield raw[start : start + size]

    async def collected() -> list[str]:
        return [line async for line in stream_lines(parts())]

    wanted = [line.removesuffix("\r") for line in text.split("\n")]
    assert asyncio.run(collected()) == (wanted[:-1] if text.endswith("\n") or not text else wanted)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[" * 3000, "nested deeper"),
        ("[" * 100_000 + "]" * 100_000, "nested deeper"),
        ("[" * (DEEPEST + 1) + "]" * (DEEPEST + 1), "nested deeper"),
        ('{"a":' * (DEEPEST + 1) + "1" + "}" * (DEEPEST + 1), "nested deeper"),
        ('{"a": NaN}', "NaN"),
        ("[-Infinity]", "Infinity"),
        ("[1e999]", "too large"),
        (f"[{2**64}]", "too large"),
        (f"[-1{'0' * 10_000}]", "too large"),
        (b"\xff", "utf-8"),
        ("", "Expecting value"),
        ("{", "Expecting"),
    ],
)
def test_text_that_is_no_json_is_a_value_error(text: str | bytes, why: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=why):
        read_json(text)
    file = tmp_path / "value.json"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=why):
        read_json_file(file)


def test_a_link_and_a_pipe_are_written_and_stay(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "file")
    write_output(tmp_path / "link", "through")
    assert ((tmp_path / "file").read_text(), (tmp_path / "link").is_symlink()) == ("through", True)
    reader, writer = os.pipe()
    write_output(Path(f"/dev/fd/{writer}"), "into it")  # as a shell's >(…)
    assert os.read(reader, 9) == b"into it"
    os.close(reader), os.close(writer)


def test_other_values_are_what_they_are(tmp_path: Path) -> None:
    deep = "[" * DEEPEST + "]" * DEEPEST
    assert json.dumps(read_json(deep)) == deep
    long = "[" + "[]," * 1000 + f'"[[[{{", {2**64 - 1}, -1e300, "1e999"]'
    assert read_json(long)[-3:] == [2**64 - 1, -1e300, "1e999"]
    assert read_json("[Infinity, 1e999]", finite=False) == [float("inf")] * 2
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ValueError, match="no regular file"):
        read_json_file(tmp_path / "fifo")
