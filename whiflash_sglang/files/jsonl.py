"""Reading JSON of others, whole or in lines (values divided by line feeds, and by nothing else), and writing files.

`str.splitlines`, and what HTTP clients call lines, also ends at U+2028, U+0085 and others, which a JSON string may hold
as they are.
"""

import codecs
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NoReturn

from whiflash_sdk.reading import DEEPEST, is_deep

from whiflash_sglang.errors import ConfigError
from whiflash_sglang.files.disk import MOST_BYTES, open_regular

NOT_AS_WRITTEN: Final = (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, OSError)
"""Errors of code that reads a value which is JSON, and has another shape than its writer gives it."""
LARGEST: Final = 2**64
"""An integer's magnitude is below it."""

_MANY_DIGITS: Final = re.compile(r"\d{19}")


def read_json(text: str | bytes | bytearray, *, finite: bool = True) -> Any:
    """The value of a JSON text that anybody may have written; bytes: UTF-8.

    finite: whether NaN and infinities are refused, which JSON does not have, but configurations of models do.

    Raises:
        ValueError: it is no JSON, is nested deeper than `DEEPEST`, or has a number that is too large or none.
    """
    if not isinstance(text, str):
        text = text.decode("utf-8")
    numbers: dict[str, Any] = {"parse_float": _finite, "parse_constant": _no_number} if finite else {}
    if _MANY_DIGITS.search(text):
        numbers["parse_int"] = _integer
    try:
        value = json.loads(text, **numbers)  # noqa: TID251  (the one place)
    except RecursionError:
        raise ValueError(f"nested deeper than {DEEPEST}") from None
    if text.count("[") + text.count("{") > DEEPEST and is_deep(value):
        raise ValueError(f"nested deeper than {DEEPEST}")
    return value


def read_json_file(path: Path, *, finite: bool = True) -> Any:
    """`read_json` of a file of at most `MOST_BYTES`. Raises OSError where it cannot be opened, ValueError."""
    with open_regular(path, MOST_BYTES) as file:
        return read_json(file.read(MOST_BYTES).removeprefix(codecs.BOM_UTF8), finite=finite)


def _integer(digits: str) -> int:
    if len(digits) > 21 or abs(value := int(digits)) >= LARGEST:
        raise ValueError(f"an integer of {len(digits)} characters is too large: below 2^64 is expected")
    return value


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits[:32]} is too large for a number")
    return value


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number that JSON allows")


def write_whole(path: Path, text: str) -> None:
    """Write a UTF-8 file so that a killed process leaves it whole, or as it was. Raises OSError, which names it."""
    try:
        with staged(path) as place:
            place.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def write_output(file: Path, text: str) -> None:
    """Write what a user names: a link's file, whole or not at all, or into a device or a pipe. Raises OSError."""
    if file.exists() and not file.is_file():
        file.write_text(text, encoding="utf-8")
    else:
        write_whole(Path(os.path.realpath(file)), text)


@contextmanager
def staged(place: Path) -> Iterator[Path]:
    """A path for a file or a directory that takes its place when the block ends: whole and on the disk, or not at all.

    It replaces a file, but no directory. A killed process leaves `.writing-*` beside it.
    """
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=place.parent) as scratch:
        path = Path(scratch) / place.name
        yield path
        for entry in [*path.rglob("*"), path]:
            descriptor = os.open(entry, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        path.replace(place)


def drop_staged(directory: Path) -> None:
    """Remove what killed processes left of `staged` in a directory, where nobody else writes now."""
    for left in directory.glob(".writing-*"):
        shutil.rmtree(left, ignore_errors=True)


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
    rows: list[tuple[int, Any]] = []
    lines = list(lines_of(text))
    for number, line in lines:
        try:
            rows.append((number, read_json(line)))
        except ValueError as error:
            if may_be_torn and rows and number == lines[-1][0] and text.endswith(line):
                break
            raise ConfigError(f"{source}, line {number}: not JSON ({error})") from None
    return rows
