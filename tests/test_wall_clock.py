"""A jump of the wall clock moves nothing: what is measured or waits goes by clocks that never run backwards."""

import re
from pathlib import Path

PACKAGES = [
    Path(__file__).parents[1] / part
    for part in ("whiflash_sglang", *(f"{part}/whiflash_{part}" for part in ("cpu", "kernels", "lab", "sdk", "train")))
]
WALL = re.compile(r"\btime\.time(_ns)?\(|\bdatetime\.(now|utcnow|today)\(|\bdate\.today\(|\btime\.(localtime|gmtime)\(")

DATES = {
    "lab/whiflash_lab/bench/runner.py",
    "sdk/whiflash_sdk/collecting.py",
    "train/whiflash_train/learner/once.py",
    "whiflash_sglang/prices/kept.py",
    "train/whiflash_train/drafters/runner.py",
}
"""These name when something was. A training's length is computed from such dates, and the learner passes over a
version whose date is ahead of now."""


def test_only_dates_are_read_from_the_wall_clock() -> None:
    root = Path(__file__).parents[1]
    sources = {str(file.relative_to(root)): file for package in PACKAGES for file in package.rglob("*.py")}
    assert len(sources) > 200
    found = {name for name, file in sources.items() if WALL.search(file.read_text("utf-8"))}
    assert found - DATES == set()
    assert found >= DATES, "what is excused is gone"
