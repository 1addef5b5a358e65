"""Stores price tables measured at a server's start in a file, for later starts of the same server.

The factor by which rounds correct the tables is not stored: a few rounds find it, and it shows how busy the machine is.
Tables of a server without graphs are not stored, because they show how busy the host was.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import blake2b
from pathlib import Path

from pydantic import BaseModel

from whiflash_sglang.files.jsonl import read_json_file, staged
from whiflash_sglang.prices.tables import CostTables

logger = logging.getLogger("whiflash_sglang")


class File(BaseModel):
    """Schema of a file of prices. measured: time in ISO 8601. key: all that the prices depend on."""

    measured: str
    key: dict[str, str]
    tables: CostTables


@dataclass(frozen=True, slots=True)
class KeptPrices:
    """Reads and writes the file of a server's prices. key: all that they depend on; each key has a file of its own."""

    directory: Path
    key: Mapping[str, str]

    @property
    def path(self) -> Path:
        digest = blake2b(json.dumps(sorted(self.key.items())).encode(), digest_size=8).hexdigest()
        return self.directory / f"{digest}.json"

    def read(self) -> CostTables | None:
        """Return the prices that an earlier start measured, or None; a file that cannot be used is logged."""
        try:
            known = File.model_validate(read_json_file(self.path))
            if known.key != self.key:
                raise ValueError("it is another server's")
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            logger.warning(
                "WHIFLASH: prices in %s cannot be used (%s: %.200s) and are measured again",
                self.path,
                type(error).__name__,
                " ".join(str(error).split()),
            )
            return None
        logger.info("WHIFLASH: prices are those of %s, measured at %s", self.path, known.measured)
        return known.tables

    def write(self, tables: CostTables) -> None:
        """Write tables for later starts. An error is logged as a warning."""
        measured = datetime.now(UTC).isoformat(timespec="seconds")
        known = File(measured=measured, key=dict(self.key), tables=tables).model_dump(mode="json")
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            with staged(self.path) as file:
                file.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            logger.warning("WHIFLASH: the next start measures prices again: %s: %s", self.path, error.strerror)
            return
        logger.info("WHIFLASH: prices were measured, and are kept in %s", self.path)
