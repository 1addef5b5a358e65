"""Prices that outlive a server: tables measured at a start, in a file of their own for all that they depend on.

The factor by which rounds correct them is not kept: it is a few rounds' work, and shows how busy this machine was. A
CPU keeps nothing: there prices are fitted to the rounds themselves.
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
    """The text of a file. measured: when."""

    measured: str
    key: dict[str, str]
    tables: CostTables


@dataclass(frozen=True, slots=True)
class KeptPrices:
    """The file of a server's prices. key: all that they depend on; another server, in any of it, has another file."""

    directory: Path
    key: Mapping[str, str]

    @property
    def path(self) -> Path:
        digest = blake2b(json.dumps(sorted(self.key.items())).encode(), digest_size=8).hexdigest()
        return self.directory / f"{digest}.json"

    def read(self) -> CostTables | None:
        """The prices that an earlier start measured; None, with a warning if there is a file that cannot be used."""
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
        """Write tables for later starts. If they cannot be written, the log says so."""
        measured = datetime.now(UTC).isoformat(timespec="seconds")
        known = File(measured=measured, key=dict(self.key), tables=tables).model_dump(mode="json")
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            with staged(self.path) as file:
                file.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            logger.warning(
                "WHIFLASH: the next start measures prices again: %s: %s", self.path, error.strerror
            )
            return
        logger.info("WHIFLASH: prices were measured, and are kept in %s", self.path)
