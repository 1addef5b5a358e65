"""Hooks of mkdocs: pages from elsewhere in the repository are on the site too, and links work in both places.

A link is written as it works in the repository, relative to its own file. On the site `docs/` is the
root and everything else keeps its path, so links from the one to the other are rewritten.
"""

import posixpath
import re
from collections import Counter
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
DOCS = "docs/"
ELSEWHERE = (
    *("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "examples/agents/README.md"),
    "results/**/*",
    "kernels/bench/results/*.md",
    "training_data/*/README.md",
    "whiflash_sglang/bundles/*/README.md",
)
"""Files outside `docs/` that the site shows, pages and what they link to."""

SCHEMED = re.compile(r"!\[([^\]]*)\]\(([^)\s]+)-light\.png\)")
"""A picture with a twin for the dark scheme; the site shows the one that fits."""
LINK = re.compile(r"\]\(([^)\s#]+)(#[^)\s]*)?\)")
TEXT = re.compile(r"(?<!!)\[([^\[\]]*)\]\(([^)\s#]+)(?:#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add files from outside `docs/` to the site."""
    for pattern in ELSEWHERE:
        for path in sorted(ROOT.glob(pattern)):
            if path.is_file():
                uri = path.relative_to(ROOT).as_posix()
                files.append(File.generated(config, uri, abs_src_path=str(path)))
    places = Counter(file.dest_uri for file in files)
    if twice := [place for place, count in places.items() if count > 1]:
        raise PluginError(f"two files of the repository have one place on the site: {', '.join(twice)}")
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Rewrite a page's links to the paths that files have on the site."""
    if page.file.src_uri.startswith("results/"):
        page.meta["search"] = {"exclude": True}  # notes and reports would bury the pages for readers
    markdown = TEXT.sub(
        lambda link: link[1] if only_in_repository(link[2], page.file.src_uri, files) else link[0], markdown
    )
    markdown = SCHEMED.sub(r"![\1](\2-light.png#only-light) ![\1](\2-dark.png#only-dark)", markdown)
    return LINK.sub(lambda link: f"]({site_link(link[1], page.file.src_uri, files)}{link[2] or ''})", markdown)


def only_in_repository(target: str, page: str, files: Files) -> bool:
    """Whether `target` is a file of the repository that the site does not have, so that its link becomes plain text."""
    if "://" in target or target.startswith(("mailto:", "/")):
        return False
    file = posixpath.normpath(posixpath.join(posixpath.dirname(repository_path(page)), target))
    found = files.get_file_from_path(file.removeprefix(DOCS))
    return (ROOT / file).is_file() and (found is None or found.inclusion.is_excluded())


def site_link(target: str, page: str, files: Files) -> str:
    """Return the link `target`, relative to a page's file in the repository, as a link of that page on the site.

    page: its path on the site. A target that is no file of the site stays, and mkdocs warns.
    """
    if "://" in target or target.startswith(("mailto:", "/")):
        return target
    file = posixpath.normpath(posixpath.join(posixpath.dirname(repository_path(page)), target))
    uri = file.removeprefix(DOCS)
    if files.get_file_from_path(uri) is None or repository_path(uri) != file:
        return target
    return posixpath.relpath(uri, posixpath.dirname(page) or ".")


def repository_path(uri: str) -> str:
    """Return the path in the repository of the file that has this path on the site."""
    return f"{DOCS}{uri}" if (ROOT / DOCS / uri).exists() else uri
