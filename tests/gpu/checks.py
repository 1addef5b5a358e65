"""Figures of a part's checks, on disk as soon as each has ended: what a crash leaves behind is kept."""

import json
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LEFT_OUT = 77
"""Exit status of a part that found out by itself that it cannot run here; why stands in its figures."""


class Checks:
    """Findings of a part.

    Args:
        out: JSON file, rewritten after each check. facts: what holds for all of them.
    """

    def __init__(self, out: Path, **facts: Any) -> None:
        self._out = out
        self._found: dict[str, Any] = {**facts, "checks": {}}
        self.failed: list[str] = []
        self.save()

    @contextmanager
    def check(self, name: str) -> Iterator[dict[str, Any]]:
        """Figures for the caller to fill in. An exception is the check's failure, and goes no further."""
        figures: dict[str, Any] = {"status": "cut short"}
        self._found["checks"][name] = figures
        began, status = time.monotonic(), "passed"
        try:
            yield figures
        except Exception as error:
            traceback.print_exc()
            status, figures["why"] = "failed", f"{type(error).__name__}: {error}"[:2000]
            self.failed.append(name)
        self._found["checks"][name] = {**figures, "status": status, "seconds": round(time.monotonic() - began, 1)}
        print(f"{name}: {status} {figures}", flush=True)
        self.save()

    def leave_out(self, why: str) -> int:
        """Say why the part cannot run here. Returns its exit status."""
        self._found["why"] = why
        self.save()
        return LEFT_OUT

    @property
    def exit_status(self) -> int:
        return 1 if self.failed else 0

    def save(self) -> None:
        """Write all figures, those of a check that is under way, too."""
        self._out.write_text(json.dumps(self._found, indent=1) + "\n")
