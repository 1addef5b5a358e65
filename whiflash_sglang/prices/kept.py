"""Stores price tables measured at a server's start in a file, for later starts of the same server.

The factor by which rounds correct the tables is not stored: a few rounds find it, and it shows how busy the machine is.
Tables of a server without graphs are not stored, because they show how busy the host was.
"""

import json
import logging
from collections.abc import Mapping
from datetime import UTC, datetime
from hashlib import blake2b
from pathlib import Path

from pydantic import TypeAdapter

from whiflash_sglang.files.jsonl import read_json_file, staged
from whiflash_sglang.prices.tables import CostTables

logger = logging.getLogger("whiflash_sglang")
_TABLES = TypeAdapter(CostTables)


def file_of(directory: Path, key: Mapping[str, str]) -> Path:
    """Return the file of a server's prices. key: all that they depend on; each key has a file of its own."""
    digest = blake2b(json.dumps(sorted(key.items())).encode(), digest_size=8).hexdigest()
    return directory / f"{digest}.json"


def read(path: Path, key: Mapping[str, str]) -> CostTables | None:
    """Return the prices that an earlier start measured, or None; a file that cannot be used is logged."""
    try:
        known = read_json_file(path)
        if known["key"] != key:
            raise ValueError("it is another server's")
        tables = _TABLES.validate_python(known["tables"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        logger.warning(
            "WHIFLASH: prices in %s cannot be used (%s: %.200s) and are measured again",
            path,
            type(error).__name__,
            " ".join(str(error).split()),
        )
        return None
    logger.info("WHIFLASH: prices are those of %s, measured at %s", path, known.get("measured"))
    return tables


def write(path: Path, key: Mapping[str, str], tables: CostTables) -> None:
    """Write tables for later starts, with their key and time. An error is logged as a warning."""
    measured = datetime.now(UTC).isoformat(timespec="seconds")  # noqa: TID251 (a date)
    known = {"measured": measured, "key": dict(key), "tables": _TABLES.dump_python(tables, mode="json")}
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with staged(path) as file:
            file.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        logger.warning("WHIFLASH: the next start measures prices again: %s: %s", path, error.strerror)
        return
    logger.info("WHIFLASH: prices were measured, and are kept in %s", path)
