"""`scripts/release.py`: one version everywhere, and what it will not write."""

import re
import shutil
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
from loaded_scripts import load_script

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def release() -> ModuleType:
    return load_script("release")


@pytest.fixture
def copy(release: ModuleType, tmp_path: Path) -> Path:
    """The files that hold a version, to write into."""
    packages = [Path(name).parents[1] for name in release.PACKAGES]
    files = [folder / name for folder in packages for name in ("README.md", "pyproject.toml")]
    for name in (*release.PLACES, *files, "CHANGELOG.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def test_a_new_version_is_written_everywhere(release: ModuleType, copy: Path) -> None:
    changes = (copy / "CHANGELOG.md").read_text("utf-8")
    (copy / "CHANGELOG.md").write_text(f"# Changelog\n\n## 0.1.0 (unreleased)\n\n{changes[changes.index('- ') :]}")
    release.write("0.2.3", copy, day="2030-01-02")
    assert set(release.found(copy).values()) == {"0.2.3"}
    project = (copy / "pyproject.toml").read_text("utf-8")
    assert '"whiflash-kernels~=0.2.0"' in project
    assert '"whiflash-sdk~=0.2.0"' in project
    assert '"whiflash-train~=0.2.0"' in (copy / "lab" / "pyproject.toml").read_text("utf-8")
    assert "## 0.2.3 (2030-01-02)" in (copy / "CHANGELOG.md").read_text("utf-8")
    with pytest.raises(ValueError, match="unreleased is missing"):
        release.write("0.2.4", copy)
    assert set(release.found(copy).values()) == {"0.2.3"}, "nothing is written where something is missing"


def test_what_is_no_next_version_is_refused(release: ModuleType, copy: Path) -> None:
    for version, complaint in (("1.0", "no version"), ("0.0.1", "is before"), ("v1.0.0", "no version")):
        with pytest.raises(ValueError, match=complaint):
            release.write(version, copy)
    with (copy / "CITATION.cff").open("a") as file:
        file.write("version: 9.9.9\n")
    with pytest.raises(ValueError, match=r"CITATION\.cff: 2 versions"):
        release.found(copy)


def test_links_work_elsewhere_once_the_address_is_known(release: ModuleType, copy: Path) -> None:
    release.place("https://host/owner/name", copy)
    assert "raw/v0.1.0/docs/pictures/answer-light.png" in (copy / "README.md").read_text("utf-8")
    for readme in copy.rglob("README.md"):
        project, text = readme.with_name("pyproject.toml").read_text("utf-8"), readme.read_text("utf-8")
        assert tomllib.loads(project)["project"]["urls"]["Source"] == "https://host/owner/name"
        assert not release.LINK.search(text)
        paths = re.findall(r"https://host/owner/name/\w+/v[\d.]+/([\w./-]+)", text)
        assert all((ROOT / path).exists() for path in paths)
