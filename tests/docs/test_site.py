"""The site builds without a warning, so its links, anchors and pictures are there (`validation` in mkdocs.yml)."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from blocks import ROOT, pages


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as `make site` builds it."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    said = built.stdout + built.stderr
    assert built.returncode == 0, said
    assert "WARNING" not in said, said
    return folder


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    """Readers behind a firewall see the same pages; nobody else hears of readers."""
    fetched = re.compile(r"""<(?:script|img|link|iframe)[^>]*?(?:src|href)=["']?(https?://[^"' >]+)""")
    in_the_clear = re.compile(r"""<a [^>]*?href=["']?(http://(?!127\.0\.0\.1|localhost)[^"' >]+)""")
    pages = list(site.rglob("*.html"))
    assert len(pages) > 30
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert not fetched.findall(text) + in_the_clear.findall(text), page


def test_the_public_names_of_the_packages_are_on_their_pages(site: Path) -> None:
    import whiflash_sdk

    page = (site / "reference" / "api-sdk" / "index.html").read_text(encoding="utf-8")
    assert {anchor.rpartition(".")[2] for anchor in re.findall(r'\bid="([^"]+)"', page)} >= set(whiflash_sdk.__all__)


@pytest.mark.parametrize("page", [*pages(), ROOT / "SECURITY.md"], ids=lambda page: str(page.relative_to(ROOT)))
def test_links_in_the_repository_lead_to_what_is_there(page: Path) -> None:
    """Pages that the site leaves out, and headings of those that it makes text of, are checked nowhere else."""
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" not in link:
            target, _, anchor = link.partition("#")
            path = page.parent / target if target else page
            assert path.exists(), link
            assert not anchor or anchor in headings(path), link


def headings(page: Path) -> set[str]:
    """Anchors of a Markdown file's headings."""
    found = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in found}
