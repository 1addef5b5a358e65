"""The tables of features and of claims name tests that exist, cases among them."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
NAMED = re.compile(r"`((?:(?:cpu|kernels|lab|sdk|train)/)?tests/[\w/]+\.py)(?:::(\w+))?(?:\[([\w-]+)\])?`")


def test_every_row_names_tests_that_exist() -> None:
    page = (ROOT / "tests" / "README.md").read_text("utf-8")
    rows = [line for line in page.splitlines() if re.match(r"\| (?!feature |claim )", line)]
    assert len(rows) > 60
    assert [row for row in rows if not NAMED.search(row)] == []
    for path, test, case in NAMED.findall(page):
        source = (ROOT / path).read_text("utf-8")
        assert not test or f"def {test}(" in source, path
        assert not case or f'"{case}"' in source, f"{path}::{test}"
