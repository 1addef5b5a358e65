"""Reading JSON of others, whole or in lines (values separated by line feeds only), and writing files whole.

`str.splitlines` and the lines of HTTP clients also end at U+2028, U+0085 and others, which a JSON string may hold
unescaped, so they are not used.
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
"""Errors of code that reads a JSON value whose shape is not the expected one."""
LARGEST: Final = 2**64
"""Bound on the magnitude of an integer in JSON, exclusive."""

_MANY_DIGITS: Final = re.compile(r"\d{19}")


def read_json(text: str | bytes | bytearray, *, finite: bool = True) -> Any:
    """Read the value of an untrusted JSON text; bytes are UTF-8.

    finite: whether NaN and infinities are refused: JSON does not have them, but configurations of models do.

    Raises:
        ValueError: not JSON, nested deeper than `DEEPEST`, or a number that is too large or not finite.
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
    """Read a JSON file of at most `MOST_BYTES` (see `read_json`). Raises OSError if it cannot be opened, ValueError."""
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
    """Write a UTF-8 file atomically: a killed process leaves the new or the old text. Raises OSError with its path."""
    try:
        with staged(path) as place:
            place.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def write_output(file: Path, text: str) -> None:
    """Write to a path that a user gave: a file, or a link's target, atomically; a pipe directly. Raises OSError."""
    if file.exists() and not file.is_file():
        file.write_text(text, encoding="utf-8")
    else:
        write_whole(Path(os.path.realpath(file)), text)


@contextmanager
def staged(place: Path) -> Iterator[Path]:
    """Yield a temporary path. At the end of the block it is synced to disk and moved to `place`, whole or not at all.

    The move replaces a file, but no directory. A killed process leaves `.writing-*` beside `place`.
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
    """Remove the temporary paths that killed processes left of `staged`; nobody else may write in the directory."""
    for left in directory.glob(".writing-*"):
        shutil.rmtree(left, ignore_errors=True)


def lines_of(text: str) -> Iterator[tuple[int, str]]:
    """Yield the lines that are not blank, with their numbers from 1."""
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, line.removesuffix("\r")


def parse_json_lines(text: str, source: object, *, may_be_torn: bool = False) -> list[tuple[int, Any]]:
    """Return the JSON value of every line that is not blank, with its number.

    may_be_torn: the writer may have been killed in the last line, so that line is skipped if it is not JSON.

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
