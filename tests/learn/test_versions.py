"""A directory of versions: whole ones only, and a record of the one that is served."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import patch

import pytest
from model_set import Models
from typer.testing import CliRunner
from versioned import bundle_of, trained, version

from whiflash_sglang.checkpoints.manifest import embedded_bundle
from whiflash_sglang.cli.app import app
from whiflash_sglang.errors import ConfigError
from whiflash_sglang.settings.config import parse_flags, resolve
from whiflash_sglang.updates.versions import (
    CURRENT,
    VersionInUse,
    Wanted,
    check_wanted,
    claims_of,
    gain_of,
    notes_of,
    numbers,
    path_of,
    publish,
    read_version,
    record,
    served,
)


@pytest.fixture
def directory(models: Models, tmp_path: Path) -> Path:
    """With two versions."""
    for seed in (1, 2):
        version(models, tmp_path / "versions", tmp_path / f"made-{seed}", trained(0.1, seed))
    return tmp_path / "versions"


def refused(directory: Path, number: int, why: str, target: str = "") -> None:
    with pytest.raises(ConfigError, match=why):
        read_version(directory, number, target)


def test_versions_are_numbered_and_name_their_checkpoints(models: Models, directory: Path) -> None:
    assert numbers(directory) == [1, 2]
    found = read_version(directory, 2, str(models.target))
    assert found == {"ar": directory / "000002" / "eagle3", "diffusion": directory / "000002" / "dflash"}
    assert read_version(directory, 2, "") == found


def test_who_publishes_at_once_gets_numbers_of_their_own(
    models: Models, directory: Path, tmp_path: Path
) -> None:
    bundle = bundle_of(models, tmp_path / "more", dflash=models.dflash)
    with ThreadPoolExecutor(4) as pool:
        assert sorted(pool.map(lambda _: publish(directory, bundle), range(4))) == [3, 4, 5, 6]
    assert numbers(directory) == [1, 2, 3, 4, 5, 6]


def test_one_drafter_is_enough(models: Models, directory: Path, tmp_path: Path) -> None:
    number = publish(directory, bundle_of(models, tmp_path / "one", dflash=models.dflash))
    assert list(read_version(directory, number, "")) == ["diffusion"]


def test_what_was_torn_is_refused(directory: Path) -> None:
    weights = path_of(directory, 2) / "dflash" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    refused(directory, 2, r"dflash/model.safetensors is not the file")
    weights.unlink()
    refused(directory, 2, r"dflash/model.safetensors is missing")
    read_version(directory, 1, "")


def test_what_is_not_there_or_for_another_target_is_refused(directory: Path) -> None:
    refused(directory, 3, "has no version 3; it has 0, 1, 2")
    refused(directory, 1, "the server's is embedded:smollm2", target="embedded:smollm2-135m-instruct")


def test_a_version_without_sums_is_refused(directory: Path) -> None:
    manifest = path_of(directory, 1) / "whiflash.json"
    said = json.loads(manifest.read_text())
    del said["sources"]["eagle3"]
    manifest.write_text(json.dumps(said))
    refused(directory, 1, "no SHA-256 of files of eagle3")


@pytest.mark.parametrize(
    "kept", [["config.json"], ["model.safetensors"], ["config.json", "model.safetensors", "x"]]
)
def test_a_file_without_a_sum_is_refused(directory: Path, kept: list[str]) -> None:
    """A file beside one with a sum would be served as if it were the one that was made."""
    bundle = path_of(directory, 1)
    (bundle / "eagle3" / "added.safetensors").touch()
    manifest = bundle / "whiflash.json"
    said = json.loads(manifest.read_text())
    sums = said["sources"]["eagle3"]["files"]
    said["sources"]["eagle3"]["files"] = {name: sums[name] for name in kept if name in sums}
    manifest.write_text(json.dumps(said))
    refused(directory, 1, r"has no SHA-256 of .*/000001/eagle3/")


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"schema_version": NaN}', '{"schema_version": 1e999}', "\x00"]
)
def test_a_manifest_of_anything_is_refused_by_name(directory: Path, text: str) -> None:
    (path_of(directory, 1) / "whiflash.json").write_text(text)
    refused(directory, 1, r"000001/whiflash.json is not valid JSON")


def test_a_version_is_what_its_asker_has(models: Models, directory: Path) -> None:
    said = claims_of(directory, 1)
    assert said["target"] == str(models.target)
    assert sorted(said["files"]) == [
        f"{part}/{name}" for part in ("dflash", "eagle3") for name in ("config.json", "model.safetensors")
    ]
    check_wanted(directory, Wanted(version=1, **said))
    check_wanted(directory, Wanted(version=1))
    check_wanted(directory, Wanted(version=0, **claims_of(directory, 0)))
    for change, why in (
        ({"version": 2}, "another than the one that is asked for: dflash/model.safetensors differs"),
        ({"version": 0}, "is for the target None"),
        ({"target": "b"}, "the one that is asked for is for 'b'"),
        ({"files": {**said["files"], "eagle3/more": "0"}}, "eagle3/more differs"),
        ({"files": {}}, "dflash/config.json differs"),
        ({"version": 7}, "has no version 7"),
    ):
        with pytest.raises(ConfigError, match=why):
            check_wanted(directory, Wanted(**{"version": 1, **said, **change}))


@pytest.mark.parametrize("notes", ['{"eagle3": NaN}', "[]", '{"eagle3": true}'])
def test_notes_of_anything_are_no_gain(directory: Path, notes: str) -> None:
    (path_of(directory, 1) / "notes.json").write_text(notes)
    assert gain_of(directory, 1) == {"eagle3": 1.0, "dflash": 1.0}
    json.dumps(notes_of(directory, 1), allow_nan=False)


def test_a_killed_publisher_leaves_no_version(models: Models, directory: Path, tmp_path: Path) -> None:
    bundle = bundle_of(models, tmp_path / "more", dflash=models.dflash)
    (directory / ".writing-killed").mkdir()
    with patch("os.fsync", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        publish(directory, bundle)
    assert numbers(directory) == [1, 2]
    assert publish(directory, bundle) == 3
    assert not list(directory.glob(".writing-*"))


def test_the_record_of_what_is_served(tmp_path: Path) -> None:
    assert served(tmp_path) == VersionInUse(0, 0)
    record(tmp_path, VersionInUse(4, 2))
    assert served(tmp_path) == VersionInUse(4, 2)
    for damaged in ("[", '{"version": -1, "before": 0}', '{"version": 1.5, "before": 0}', '{"other": 1}'):
        (tmp_path / CURRENT).write_text(damaged)
        with pytest.raises(ConfigError, match="is damaged"):
            served(tmp_path)


def test_flags(tmp_path: Path) -> None:
    bundle = embedded_bundle()
    assert resolve(parse_flags({}), bundle).versions is None
    assert resolve(parse_flags({"learn": str(tmp_path)}), bundle).versions == tmp_path / "versions"
    both = {"learn": str(tmp_path), "versions": str(tmp_path / "v")}
    assert resolve(parse_flags(both), bundle).versions == tmp_path / "v"


def test_the_command_line_adds_and_lists(models: Models, directory: Path, tmp_path: Path) -> None:
    bundle = bundle_of(models, tmp_path / "more", dflash=models.dflash)
    run = CliRunner().invoke(app, ["lab", "add-version", str(bundle), str(directory)])
    assert run.stdout.strip() == "version: 3"
    record(directory, VersionInUse(2, 1))
    run = CliRunner().invoke(app, ["drafter", "--directory", str(directory), "--json"])
    found = json.loads(run.stdout)
    assert (found["served"], found["before"], list(found["versions"])) == (2, 1, ["1", "2", "3"])
    run = CliRunner().invoke(app, ["drafter", "--directory", str(directory)])
    assert run.stdout.splitlines() == ["  0", "  1", "* 2", "  3"]
