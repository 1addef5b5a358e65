"""The site builds without a warning, and everything that its pages name is there."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parents[2]
MARKDOWN_LINK = re.compile(r"\]\(([^)\s]+)\)")


class Page(HTMLParser):
    """Links and anchors of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        self.anchors |= {value for name in ("id", "name") if (value := given.get(name))}
        # A canonical link and the like are for machines.
        names = ("href", "src") if tag in ("a", "img", "script", "link", "source") else ()
        self.links += [value for name in names if (value := given.get(name))]


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


def test_every_link_anchor_and_picture_is_there(site: Path) -> None:
    pages = {path: Page(path) for path in site.rglob("*.html") if path.name != "404.html"}
    assert len(pages) > 30
    broken = [
        f"{path.relative_to(site)}: {link}"
        for path, page in pages.items()
        for link in page.links
        if not leads_somewhere(link, path, pages)
    ]
    assert not broken, "\n".join(broken)


def leads_somewhere(link: str, page: Path, pages: dict[Path, Page]) -> bool:
    address = urlsplit(link)
    if address.scheme:
        return address.scheme in ("https", "mailto") or address.hostname in ("127.0.0.1", "localhost")
    path = (page.parent / unquote(address.path)).resolve() if address.path else page
    if path.is_dir():
        path /= "index.html"
    if path.suffix != ".html":
        return path.is_file()
    known = pages.get(path)
    return known is not None and (not address.fragment or unquote(address.fragment) in known.anchors)


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    """Readers behind a firewall see the same pages; nobody else hears of readers."""
    fetched = re.compile(r"""<(?:script|img|link|iframe)[^>]*?(?:src|href)=["']?(https?://[^"' >]+)""")
    for page in site.rglob("*.html"):
        assert not fetched.findall(page.read_text(encoding="utf-8")), page


def test_the_public_names_of_the_packages_are_on_their_pages(site: Path) -> None:
    import whiflash_sdk

    anchors = Page(site / "reference" / "api-sdk" / "index.html").anchors
    for public in whiflash_sdk.__all__:
        assert any(anchor.endswith(f".{public}") for anchor in anchors), public


@pytest.mark.parametrize(
    "name",
    [
        "README.md",
        "CONTRIBUTING.md",
        "SECURITY.md",
        *(f"{part}/README.md" for part in ("cpu", "kernels", "lab", "train")),
    ],
)
def test_files_outside_the_site_link_to_what_is_there(name: str) -> None:
    page = ROOT / name
    for link in MARKDOWN_LINK.findall(page.read_text(encoding="utf-8")):
        if "://" not in link and not link.startswith("#"):
            target, _, anchor = link.partition("#")
            path = page.parent / target
            assert path.exists(), f"{name}: {link}"
            assert not anchor or anchor in headings(path), f"{name}: {link}"


def headings(page: Path) -> set[str]:
    """Anchors of a Markdown file's headings."""
    found = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in found}
