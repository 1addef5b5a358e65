"""Flags, keys, fields, commands and figures in the documentation are those of the code and the reports."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import evidence
import pytest
from loaded_scripts import load_script

ROOT = Path(__file__).parents[2]
FIGURE = re.compile(r"(?<![\w.])(?<!Python )\d\.\d\d(?!\d)(?: \[\d\.\d\d, \d+\.\d\d\])?")


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    return load_script("reference")


def test_the_tables_are_those_of_the_code(reference: ModuleType) -> None:
    written = set()
    for page in reference.pages():
        text = page.read_text(encoding="utf-8")
        assert text == reference.written(text), f"{page}: `make docs` writes its tables"
        written |= {found[2] for found in reference.MARKED.finditer(text)}
    assert written == set(reference.TABLES), "every table has its page"


def test_what_was_not_measured_on_a_card_is_said_not_to_have_been(reference: ModuleType, tmp_path: Path) -> None:
    record = {
        "status": "failed",
        "machine": "A card, 580.1",
        "versions": {"torch": "2.14"},
        "figures": {"checks": {"starts": {"status": "passed"}, "waits": {"status": "failed"}}},
    }
    (tmp_path / "serving-fa3.json").write_text(json.dumps(record))
    first, _, *listed = reference.gpu_list(tmp_path).splitlines()
    lines = {line.split("`")[1]: line for line in listed}
    assert "**failed** (starts passed, waits failed); A card, 580.1; torch 2.14" in lines.pop("serving-fa3")
    assert first == f"1 of {len(lines) + 1} parts have run on a card."
    assert lines
    assert all("**" not in line for line in lines.values())


def test_a_field_without_a_meaning_is_an_error(reference: ModuleType) -> None:
    from pydantic import BaseModel

    class Model(BaseModel):
        """first: said. A sentence, second: not a field's."""

        first: int = 1
        second: int | None = None

    with pytest.raises(KeyError, match="second"):
        reference.fields(Model)
    Model.__doc__ = "first, second: of both."
    assert reference.fields(Model) == "- `first` (integer = `1`): of both\n- `second` (integer): of both"


def test_every_route_and_state_is_on_the_page_of_routes() -> None:
    page = (ROOT / "docs" / "reference" / "server.md").read_text(encoding="utf-8")
    code = (ROOT / "whiflash_sglang" / "http" / "routes.py").read_text(encoding="utf-8")
    read, steering = (re.findall(r'app\.get\("/whiflash/(\w+)"\)', code), re.findall(r'\("(\w+)", _\w+\)', code))
    assert len(read) >= 2 <= len(steering)
    for method, names in (("GET", read), ("POST", steering)):
        for name in names:
            assert f"## `{method} /whiflash/{name}`" in page


def test_the_errors_that_the_page_names_are_in_the_code() -> None:
    folders = (ROOT / "whiflash_sglang", *ROOT.glob("*/whiflash_*"))
    code = "".join(file.read_text("utf-8") for folder in folders for file in folder.rglob("*.py"))
    code = re.sub(r'"\s*\n\s*f?"', "", code)  # a sentence on several lines
    page = (ROOT / "docs" / "reference" / "errors.md").read_text("utf-8").partition("## Requests")[0]
    named = re.findall("`([^`]+)`", " ".join(re.findall(r"^\| (`.*?) \| ", page, re.MULTILINE)))
    assert len(named) > 40
    assert [words for words in named if words not in code] == []


def figures(report: Any) -> Iterator[str]:
    """Every ratio, with its interval and without, and every acceptance length, as the documentation writes them."""
    if isinstance(report, dict):
        if report.keys() >= {"ratio", "low", "high"}:
            yield f"{report['ratio']:.2f}"
            yield f"{report['ratio']:.2f} [{report['low']:.2f}, {report['high']:.2f}]"
        if report.get("acceptance_length"):
            yield f"{report['acceptance_length']:.2f}"
        for value in report.values():
            yield from figures(value)
    elif isinstance(report, list):
        for value in report:
            yield from figures(value)


@pytest.mark.parametrize("page", ["README.md", "docs/index.md", "docs/when-to-use.md"])
def test_every_ratio_that_a_writer_gave_is_in_a_report(page: str, reference: ModuleType) -> None:
    """Tables are written, and what commands print is no measurement. Other figures with intervals are of any report,
    those without of the main run.
    """
    benchmark = ROOT / "results" / "benchmark"
    reports = {path.name: set(figures(json.loads(path.read_text("utf-8")))) for path in benchmark.glob("*.json")}
    printed = reports["report.json"].union(f for found in reports.values() for f in found if "[" in f)
    text = reference.MARKED.sub("", (ROOT / page).read_text(encoding="utf-8").replace("1.00", ""))
    text = re.sub(r"```text\n.*?```", "", text, flags=re.DOTALL)  # printed by a command
    shown = set(FIGURE.findall(" ".join(text.replace("**", "").split())))
    assert shown <= printed, shown - printed


def test_the_evidence_is_what_its_records_show() -> None:
    records = [json.loads(path.read_text("utf-8")) for path in evidence.RESULTS.glob("*/*.json")]
    assert {record["area"] for record in records} == set(evidence.AREAS)
    assert evidence.SUMMARY.read_text(encoding="utf-8") == evidence.summary()
    assert len(evidence.code_digest()) == 16, "every part that it names exists"
