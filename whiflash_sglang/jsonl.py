"""Reading JSON lines (values divided by line feeds, and by nothing else), and writing files.

`str.splitlines`, and what HTTP clients call lines, also ends at U+2028, U+0085 and others, which a JSON string may hold
as they are.
"""

import codecs
import json
from collections.abc import AsyncIterable, AsyncIterator, Iterator
from pathlib import Path
from typing import Any

from whiflash_sglang.errors import ConfigError


def write_whole(path: Path, text: str) -> None:
    """Write a UTF-8 file so that a killed process leaves it whole, or as it was."""
    staged = path.with_name(path.name + ".part")
    staged.write_text(text, encoding="utf-8")
    staged.replace(path)


def lines_of(text: str) -> Iterator[tuple[int, str]]:
    """Lines that are not blank, with their numbers from 1."""
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, line.removesuffix("\r")


def parse_json_lines(text: str, source: object, *, may_be_torn: bool = False) -> list[tuple[int, Any]]:
    """The value of every line that is not blank, with its number.

    may_be_torn: whoever wrote the text may have been ended in its last line, which then counts for nothing.

    Raises:
        ConfigError: naming `source` and the line that is not JSON.
    """
    found: list[tuple[int, Any]] = []
    for number, line in lines_of(text):
        try:
            found.append((number, json.loads(line)))
        except json.JSONDecodeError as error:
            if may_be_torn and found and text.endswith(line):
                break
            raise ConfigError(f"{source}, line {number}: not JSON ({error})") from None
    return found


def read_json_lines(path: Path) -> list[tuple[int, Any]]:
    """`parse_json_lines` of a UTF-8 file. Raises ConfigError where it cannot be read, too."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    return parse_json_lines(text, path)


async def stream_lines(parts: AsyncIterable[bytes]) -> AsyncIterator[str]:
    """Lines of a UTF-8 stream, each as soon as it is whole; the last one when the stream ends."""
    decode, rest = codecs.getincrementaldecoder("utf-8")(), ""
    async for part in parts:
        *whole, rest = (rest + decode.decode(part)).split("\n")
        for line in whole:
            yield line.removesuffix("\r")
    if rest:
        yield rest.removesuffix("\r")
