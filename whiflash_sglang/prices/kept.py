"""Prices that outlive a server: tables measured at a start, in a file of their own for all that they depend on.

The factor by which rounds correct them is not kept: it is a few rounds' work, and shows how busy this machine was. A
CPU keeps nothing: there prices are fitted to the rounds themselves.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from hashlib import blake2b
from pathlib import Path
from typing import Any

from whiflash_sglang.files.jsonl import read_json_file, staged
from whiflash_sglang.prices.tables import CostTables, Sizes, Verifications

logger = logging.getLogger("whiflash_sglang")

LONGEST = 60.0
"""Seconds; no pass takes as long."""


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
            known = read_json_file(self.path)
            if known["key"] != dict(self.key):
                raise ValueError("it is another server's")
            tables, measured = _tables_of(known["tables"]), str(known["measured"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            logger.warning(
                "WHIFLASH: prices in %s cannot be used (%s: %.200s) and are measured again",
                self.path,
                type(error).__name__,
                error,
            )
            return None
        logger.info("WHIFLASH: prices are those of %s, measured at %s", self.path, measured)
        return tables

    def write(self, tables: CostTables) -> None:
        """Write tables for later starts. If they cannot be written, the log says so."""
        measured = datetime.now(UTC).isoformat(timespec="seconds")
        known = {"measured": measured, "key": dict(self.key), "tables": _json_of(tables)}
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


def _json_of(tables: CostTables) -> dict[str, Any]:
    named = {"drafts": tables.drafts, "catch_up": tables.catch_up}
    by_arm = {name: {arm: asdict(sizes) for arm, sizes in each.items()} for name, each in named.items()}
    shorter = {
        arm: {str(length): asdict(sizes) for length, sizes in each.items()}
        for arm, each in tables.shorter.items()
    }
    return {"verifications": asdict(tables.verifications), "shorter": shorter, **by_arm}


def _tables_of(raw: Any) -> CostTables:
    """Raises ValueError, TypeError, KeyError or AttributeError for what `_json_of` did not make."""
    at = raw["verifications"]
    verifications = Verifications(
        at["short"], at["long"], _sizes_of(at["at_short"]), _sizes_of(at["at_long"])
    )
    drafts, catch_up = (
        {arm: _sizes_of(each) for arm, each in raw[name].items()} for name in ("drafts", "catch_up")
    )
    shorter = {
        arm: {int(length): _sizes_of(sizes) for length, sizes in each.items()}
        for arm, each in raw["shorter"].items()
    }
    return CostTables(verifications, drafts, catch_up, shorter=shorter)


def _sizes_of(raw: Any) -> Sizes:
    found = Sizes(tuple(raw["sizes"]), tuple(raw["seconds"]))
    if not all(type(size) is int and size > 0 for size in found.sizes):
        raise ValueError(f"sizes are whole numbers, got {found.sizes}")
    if not all(type(seconds) is float and 0.0 < seconds < LONGEST for seconds in found.seconds):
        raise ValueError(f"prices are seconds, got {found.seconds}")
    return found
