"""One version in every place that says it: `python scripts/release.py 0.2.0`; without a version it says which there is.

Writes each package's `__version__`, which their wheels and everything else read, the series that they ask of each
other, `CITATION.cff`, and the changelog's heading. The rest is a look at the diff, `make check test
dist`, a commit, and a tag (`git tag v0.2.0`), which builds and publishes (`.github/workflows/release.yml`).
"""

import argparse
import re
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).parents[1]
VERSION = r"\d+\.\d+\.\d+"
PACKAGES = (
    "whiflash_sglang/__init__.py",
    "sdk/whiflash_sdk/__init__.py",
    "kernels/whiflash_kernels/__init__.py",
    *(f"{part}/whiflash_{part}/__init__.py" for part in ("cpu", "lab", "train")),
)
ASKING = ("pyproject.toml", *(f"{part}/pyproject.toml" for part in ("cpu", "lab", "train")))
"""Files that bound versions of our own packages, together `BOUNDS` times."""
BOUNDS = 10
PLACES: Mapping[str, str] = {
    **dict.fromkeys(PACKAGES, rf'(?m)^(__version__ = "){VERSION}(")$'),
    "CITATION.cff": rf"(?m)^(version: ){VERSION}()$",
}
"""Files, each with the one place of a version in it."""
LINK = re.compile(r"(\]\(|(?:src|srcset)=\")(?![\w.+-]+:|#)([^)\"#\s]+)")  # relative ones


def found(root: Path = ROOT) -> dict[str, str]:
    """Return the version in each file of `PLACES`. Raises ValueError for a file with none or several."""
    said = {}
    for name, pattern in PLACES.items():
        places = list(re.finditer(pattern, (root / name).read_text("utf-8")))
        if len(places) != 1:
            raise ValueError(f"{name}: {len(places)} versions where one is expected")
        said[name] = places[0][0].removeprefix(places[0][1]).removesuffix(places[0][2])
    return said


def write(version: str, root: Path = ROOT, day: str | None = None) -> None:
    """Write `version` into all files of `PLACES`, the changelog and the bounds on our own packages.

    Raises:
        ValueError: it is not MAJOR.MINOR.PATCH, is below the present one, or a file has not the expected text.
    """
    if not re.fullmatch(VERSION, version):
        raise ValueError(f"{version} is no version of the form MAJOR.MINOR.PATCH")
    (before,) = set(found(root).values())
    if [int(part) for part in version.split(".")] < [int(part) for part in before.split(".")]:
        raise ValueError(f"{version} is before {before}")
    texts = {
        name: re.sub(pattern, rf"\g<1>{version}\g<2>", (root / name).read_text("utf-8"))
        for name, pattern in PLACES.items()
    }
    series = ".".join(version.split(".")[:2])
    bounds = 0
    for name in ASKING:
        asked = (root / name).read_text("utf-8")
        texts[name], count = re.subn(rf'("whiflash-[a-z]+(?:\[[a-z]+\])?~=){VERSION}"', rf'\g<1>{series}.0"', asked)
        bounds += count
    if bounds != BOUNDS:
        raise ValueError(f"{bounds} bounds of our own packages where {BOUNDS} are expected")
    changes = (root / "CHANGELOG.md").read_text("utf-8")
    heading = f"## {version} ({day or datetime.now(UTC).date().isoformat()})"
    texts["CHANGELOG.md"], headings = re.subn(rf"(?m)^## {VERSION} \(unreleased\)$", heading, changes)
    if headings != 1:
        raise ValueError("CHANGELOG.md: the heading of what is unreleased is missing")
    for name, text in texts.items():
        (root / name).write_text(text, "utf-8")


def place(address: str, root: Path = ROOT) -> None:
    """Write the repository's address into each package, and turn relative links of READMEs into links to the tag."""
    at = f"blob/v{found(root)[PACKAGES[0]]}"
    for folder in ((root / name).parents[1] for name in PACKAGES):

        def absolute(link: re.Match[str], folder: Path = folder) -> str:
            path = (folder / link[2]).resolve().relative_to(root.resolve())
            shown = at.replace("blob", "raw") if path.suffix in (".png", ".svg") else at
            return f"{link[1]}{address}/{shown}/{path}"

        readme, project = folder / "README.md", folder / "pyproject.toml"
        readme.write_text(LINK.sub(absolute, readme.read_text("utf-8")), "utf-8")
        urls = f'[project.urls]\nSource = "{address}"\nChangelog = "{address}/{at}/CHANGELOG.md"\n\n[build'
        project.write_text(project.read_text("utf-8").replace("[build", urls, 1), "utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("version", nargs="?", help="MAJOR.MINOR.PATCH")
    parser.add_argument("--address", help="the repository's: PyPI follows no relative links")
    said = parser.parse_args()
    try:
        if said.version:
            write(said.version)
        if said.address:
            place(said.address.rstrip("/"))
        for name, version in found().items():
            print(f"{version}  {name}")
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
