"""The six distributions as they are built and installed: what `pip install` would bring to an empty directory."""

import importlib
import json
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from configparser import ConfigParser
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import whiflash_sglang.checkpoints.manifest
from whiflash_sglang.engine.supported import SUPPORTED

ROOT = Path(__file__).parents[1]
PARTS = ("cpu", "kernels", "lab", "sdk", "train")
PACKAGES = {"whiflash_sglang": ROOT, **{f"whiflash_{part}": ROOT / part for part in PARTS}}


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Each wheel is built from its source distribution, as a release is."""
    built = {}
    for name, source in PACKAGES.items():
        folder = tmp_path_factory.mktemp(name)
        run("-m", "hatchling", "build", "-t", "sdist", "-d", str(folder), cwd=source)
        (archive,) = folder.glob("*.tar.gz")
        subprocess.run(["tar", "-xf", archive, "-C", folder], check=True)
        (unpacked,) = (path for path in folder.iterdir() if path.is_dir())
        run("-m", "hatchling", "build", "-t", "wheel", "-d", str(folder), cwd=unpacked)
        (built[name],) = folder.glob("*.whl")
    return built


def run(*arguments: str, cwd: Path, path: str | None = None) -> str:
    """This Python without the project's own folders on its path."""
    environment = {"PATH": "/usr/bin:/bin", **({"PYTHONPATH": path} if path else {})}
    done = subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def files(folder: Path) -> set[Path]:
    return {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}


def metadata(wheel: Path) -> tuple[Mapping[str, str], list[str]]:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (record,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(record).decode()), names


def test_all_carry_one_version_and_ask_for_each_other(wheels: Mapping[str, Path]) -> None:
    versions = {name: metadata(wheel)[0]["Version"] for name, wheel in wheels.items()}
    assert len(set(versions.values())) == 1, versions
    (series,) = {version.rsplit(".", 1)[0] for version in versions.values()}
    wanted = metadata(wheels["whiflash_sglang"])[0].get_all("Requires-Dist")  # type: ignore[attr-defined]
    assert f"whiflash-kernels~={series}.0; extra == 'server'" in wanted
    assert f"whiflash-sdk~={series}.0" in wanted
    for part, needs, brings in (("cpu", "[server]", ""), ("lab", "", "[bench]"), ("train", "[server]", "")):
        assert f"whiflash-{part}{brings}~={series}.0; extra == '{part}'" in wanted
        asked = metadata(wheels[f"whiflash_{part}"])[0].get_all("Requires-Dist")  # type: ignore[attr-defined]
        assert f"whiflash-sglang{needs}~={series}.0" in asked
    assert [str(Requirement(one).specifier) for one in wanted if one.startswith("sglang")] == [f"=={SUPPORTED[-1]}"]


@pytest.mark.parametrize("name", PACKAGES)
def test_a_wheel_says_what_it_is_and_has_nothing_of_the_tests(wheels: Mapping[str, Path], name: str) -> None:
    fields, names = metadata(wheels[name])
    noticed = name in ("whiflash_lab", "whiflash_sglang")  # they hold work of others
    assert fields["License-Expression"] == ("Apache-2.0 AND MIT" if name == "whiflash_lab" else "Apache-2.0")
    assert fields.get_payload().startswith("# "), "it has no README"  # type: ignore[attr-defined]
    assert fields["Summary"]
    assert ">=3." in fields["Requires-Python"]
    assert "Typing :: Typed" in fields.get_all("Classifier")  # type: ignore[attr-defined]
    licences = {"LICENSE", *(("NOTICE", "THIRD_PARTY_NOTICES.md") if noticed else ())}
    assert {entry.partition("/licenses/")[2] for entry in names} == {"", *licences}
    assert f"{name}/py.typed" in names
    assert all(entry.startswith((f"{name}/", f"{name}-")) for entry in names)
    run("-m", "twine", "check", "--strict", str(wheels[name]), cwd=wheels[name].parent)


CALLED = {
    "whiflash_sglang": {"console_scripts", "sglang.srt.plugins"},
    "whiflash_cpu": {"sglang.srt.platforms", "whiflash.checks"},
    "whiflash_lab": {"whiflash.checks", "whiflash.commands", "whiflash.names"},
    "whiflash_train": {"whiflash.commands", "whiflash.names"},
}
"""Groups of entry points."""


@pytest.mark.parametrize("name", CALLED)
def test_a_wheel_names_what_others_call(wheels: Mapping[str, Path], name: str) -> None:
    with zipfile.ZipFile(wheels[name]) as archive:
        (listed,) = (one for one in archive.namelist() if one.endswith(".dist-info/entry_points.txt"))
        groups = ConfigParser()
        groups.read_string(archive.read(listed).decode())
        files = archive.namelist()
    called = {group: dict(groups[group]) for group in groups.sections()}
    assert called.keys() == CALLED[name]
    assert called.get("console_scripts", {"whiflash": ""}).keys() == {"whiflash"}
    for target in (target for names in called.values() for target in names.values()):
        module, _, function = target.partition(":")
        path = module.replace(".", "/")
        assert f"{path}.py" in files or f"{path}/__init__.py" in files, target
        assert not function or callable(getattr(importlib.import_module(module), function)), target


def test_installed_into_an_empty_directory_the_command_finds_its_bundle(
    wheels: Mapping[str, Path], tmp_path: Path
) -> None:
    for wheel in wheels.values():
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(tmp_path)
    look = (
        "import json, whiflash_sglang, whiflash_kernels, whiflash_sdk\n"
        "from whiflash_sglang.checkpoints.manifest import embedded_bundle, load_manifest\n"
        "load_manifest(embedded_bundle())\n"
        "homes = [m.__file__ for m in (whiflash_sglang, whiflash_kernels, whiflash_sdk)]\n"
        "print(json.dumps([*homes, str(embedded_bundle())]))\n"
    )
    found = json.loads(run("-c", look, cwd=tmp_path, path=str(tmp_path)))
    assert all(Path(path).is_relative_to(tmp_path) for path in found), found
    bundle = Path(found[-1])
    shipped = Path(whiflash_sglang.checkpoints.manifest.embedded_bundle())
    assert files(bundle) == files(shipped)
    command = "from whiflash_sglang.cli.app import main; main()"
    said = run("-c", command, "--version", cwd=tmp_path, path=str(tmp_path))
    assert whiflash_sglang.__version__ in said
