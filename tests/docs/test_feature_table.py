"""The tables of features and of claims name tests that exist, cases among them."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
NAMED = re.compile(r"`((?:(?:cpu|kernels|lab|sdk|train)/)?tests/[\w/]+\.py)(?:::(\w+))?(?:\[([\w-]+)\])?`")


def missing(page: str) -> list[str]:
    """Tests that a page names and nobody has."""
    found = []
    for path, test, case in NAMED.findall(page):
        file = ROOT / path
        source = file.read_text("utf-8") if file.is_file() else ""
        if not source or (test and f"def {test}(" not in source) or (case and f'"{case}"' not in source):
            found.append(f"{path}::{test}[{case}]")
    return found


def test_every_row_names_tests_that_exist() -> None:
    page = (ROOT / "tests" / "README.md").read_text("utf-8")
    rows = [line for line in page.splitlines() if re.match(r"\| (?!feature |claim )", line)]
    assert len(rows) > 60
    assert [row for row in rows if not NAMED.search(row)] == []
    assert missing(page) == []
