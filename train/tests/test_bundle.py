"""`whiflash bundle create` and `whiflash check --draft`, from directories and from a hub."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from in_process import whiflash
from tiny_models import edit, tiny_dflash, tiny_eagle3, tiny_target

from whiflash_sglang.checkpoints.bundle import verify
from whiflash_sglang.checkpoints.fit import judge, read_target
from whiflash_sglang.checkpoints.manifest import embedded_bundle, load_manifest
from whiflash_sglang.errors import ConfigError, WhiflashError
from whiflash_sglang.files.disk import sha256
from whiflash_sglang.settings.config import Flags, resolve
from whiflash_train.answers.data import target_path
from whiflash_train.bundle import BundleParts, assemble, create, with_drafters
from whiflash_train.cli.train import resolve_config


@pytest.fixture
def models(tmp_path: Path) -> dict[str, Path]:
    target = tiny_target(tmp_path / "target")
    drafters = {"eagle3": tiny_eagle3(tmp_path / "e3", target), "dflash": tiny_dflash(tmp_path / "df", target)}
    return {"target": target, **drafters}


def parts(models: dict[str, Path]) -> BundleParts:
    return BundleParts(*(str(models[name]) for name in ("target", "eagle3", "dflash")))


def test_directories_become_a_bundle_that_is_served_from_itself(models: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    said = [f"--{part}={models[part]}" for part in ("eagle3", "dflash")]
    done = whiflash("bundle", "create", f"--target={models['target']}", *said, f"--out={out}", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == json.loads((out / "whiflash.json").read_text())
    manifest = load_manifest(out)
    weights = models["dflash"] / "model.safetensors"
    assert manifest.sources["dflash"].files[weights.name] == sha256(weights)
    assert resolve(Flags(), out).drafters == {"ar": out / "eagle3", "diffusion": out / "dflash"}
    checked = whiflash("check", "--model-path", str(models["target"]), "--draft", str(out))
    assert checked.returncode == 0, checked.stderr
    lines = checked.stdout.splitlines()
    assert "EAGLE-3, the ar arm; reads the outputs of layers 0, 2, 4; 256 bytes of KV a token, 16.7%" in lines[0]
    assert "DFlash, the diffusion arm; 7 drafts a block; reads the outputs of layers 1, 3, 4; 512 bytes" in lines[1]
    (out / "dflash" / "model.safetensors").write_bytes(b"other")
    spoilt = whiflash("check", "--draft", str(out))
    assert spoilt.returncode == 1
    assert "dflash/model.safetensors is not the file that" in spoilt.stdout


SPOILT: dict[str, Callable[[Path], object]] = {
    "dflash/model.safetensors": lambda file: file.write_bytes(file.read_bytes()[:-1] + b"\0"),  # can be loaded
    "eagle3/config.json": lambda file: file.write_bytes(file.read_bytes() + b" "),
    "eagle3/model.safetensors": Path.unlink,
}


@pytest.mark.parametrize("name", SPOILT)
def test_files_are_those_that_the_bundle_was_made_with(models: dict[str, Path], tmp_path: Path, name: str) -> None:
    out = tmp_path / "bundle"
    create(parts(models), out)
    verify(resolve(Flags(), out).checksums)
    SPOILT[name](out / name)
    with pytest.raises(WhiflashError, match=f"{out / name} is (not the file|missing, though).* its bundle"):
        verify(resolve(Flags(), out).checksums)
    # A checkpoint that is served from elsewhere is not the bundle's.
    other = resolve(Flags(eagle_draft=str(models["eagle3"])), out).checksums
    assert {Path(file).parent.name for file in other} == {"dflash"}


def test_the_shipped_bundles_files_are_those_that_it_tells_of() -> None:
    told = resolve(Flags(), embedded_bundle()).checksums
    verify(told)
    lying = {str(file) for file in embedded_bundle().glob("*/*")}
    assert {name for name in lying if name.endswith((".safetensors", "config.json"))} == set(told)


def test_draft_kv_beside_latent_attention(models: dict[str, Path]) -> None:
    """A token of a target with latent attention takes its latent and rotated parts once, not keys and values."""
    edit(models["target"], lambda config: config.update(kv_lora_rank=40, qk_rope_head_dim=8))
    target = read_target(str(models["target"]))
    assert target[1] == 6 * (40 + 8) * 4
    ((_, _, detail),) = judge(str(models["eagle3"]), target)
    assert "256 bytes of KV a token, 22.2% of the target's" in detail  # 2 * 2 * 16 * 4 of 1,152


def test_every_layer_of_a_drafter_has_kv(models: dict[str, Path]) -> None:
    edit(models["eagle3"], lambda config: config.update(num_hidden_layers=3))
    ((_, served, detail),) = judge(str(models["eagle3"]), read_target(str(models["target"])))
    assert served
    assert "768 bytes of KV a token, 50.0% of the target's" in detail  # 3 of 6 layers of the same shape


def test_a_checkpoint_without_weights_is_named(models: dict[str, Path], tmp_path: Path) -> None:
    for weights in models["eagle3"].glob("*.safetensors"):
        weights.unlink()
    with pytest.raises(ConfigError, match="e3 has no weights"):
        create(parts(models), tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_what_does_not_fit_is_one_line_and_leaves_nothing(models: dict[str, Path], tmp_path: Path) -> None:
    edit(models["dflash"], lambda config: config.update(vocab_size=1000))
    out = tmp_path / "bundle"
    said = [f"--{part}={models[part]}" for part in ("eagle3", "dflash")]
    done = whiflash("bundle", "create", f"--target={models['target']}", *said, f"--out={out}")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"whiflash: error: the DFlash checkpoint {models['dflash']} is for a vocabulary of 1000, this target has 320\n"
    )
    assert not list(tmp_path.glob("*bundle*"))


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        (
            "eagle3",
            {"architectures": ["Qwen3Eagle3Model"], "target_layer_ids": [0, 2], "num_hidden_layers": 2},
            "num_hidden_layers 2: DeepSpec's EAGLE-3 has one layer",
        ),
        ("eagle3", {"architectures": ["LlamaForCausalLMEagle"]}, r"\['LlamaForCausalLMEagle'\] is no draft"),
        ("dflash", {"architectures": ["LlamaForCausalLMEagle3"]}, "is no draft architecture"),
        ("dflash", {"dflash_config": {"projector_type": "unheard"}}, "projector_type 'unheard' is no draft"),
        ("eagle3", {"architectures": 5}, "e3/config.json has a value of another kind"),
        ("eagle3", {"rope_theta": [1]}, "e3/config.json: no angles follow from"),
        ("dflash", {"rope_theta": "x"}, "df/config.json: no angles follow from"),
        ("target", {"hidden_size": None}, "target/config.json: hidden_size must be an integer"),
    ],
)
def test_a_misfit_names_the_file_and_the_key(
    part: str, change: dict[str, Any], message: str, models: dict[str, Path], tmp_path: Path
) -> None:
    edit(models[part], lambda config: config.update(change))
    for weights in models[part].glob("*.safetensors"):
        weights.unlink()  # not needed to say so
    with pytest.raises(WhiflashError, match=message):
        create(parts(models), tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("part", ["eagle3", "dflash"])
def test_one_drafter_alone(models: dict[str, Path], tmp_path: Path, part: str) -> None:
    """And the same checkpoint without a bundle around it: its format says which arm it is for."""
    given = {"eagle3": None, "diffusion": None}
    given["eagle3" if part == "eagle3" else "diffusion"] = str(models[part])
    out = tmp_path / "bundle"
    create(BundleParts(str(models["target"]), **given), out)
    assert set(load_manifest(out).sources) == {"target", part}
    assert list(resolve(Flags(), out).drafters.values()) == [out / part]
    assert list(resolve(Flags(), models[part]).drafters.values()) == [models[part]]
    with pytest.raises(WhiflashError, match="--router needs EAGLE-3 and DFlash; the drafters here are: "):
        create(BundleParts(str(models["target"]), **given, router="owner/router"), tmp_path / "other")
    with pytest.raises(WhiflashError, match="give --eagle3, --dflash or both"):
        create(BundleParts(str(models["target"]), None, None), tmp_path / "other")


LEADING_OUT: dict[str, Callable[[Path, Path], object]] = {
    "a secret": lambda file, secret: file.symlink_to(secret),
    "a device": lambda file, _: file.symlink_to("/dev/zero"),
    "itself": lambda file, _: file.symlink_to(file.name),
    "a pipe": lambda file, _: os.mkfifo(file),
    "no tensors": lambda file, secret: file.write_bytes(secret.read_bytes()),
    "a directory": lambda file, _: file.mkdir(),
}


@pytest.mark.parametrize("how", LEADING_OUT)
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_checkpoints_file_that_is_none_of_its_own_is_not_copied(
    models: dict[str, Path], tmp_path: Path, how: str, name: str
) -> None:
    (tmp_path / "secret").write_text("root:*:1:0:99999:7:::\n")
    file = models["dflash"] / name
    file.unlink(missing_ok=True)
    LEADING_OUT[how](file, tmp_path / "secret")
    if (how, name) == ("no tensors", "pytorch_model.bin"):
        return  # it is unpickled as tensors alone, by whoever loads it
    with pytest.raises(WhiflashError, match=str(file)):
        create(parts(models), tmp_path / "bundle")
    assert not list(tmp_path.glob("*bundle*"))
    if how == "a directory":
        return  # as a hub's client keeps beside what it has fetched
    with pytest.raises(WhiflashError, match=str(file)):
        with_drafters(embedded_bundle(), {"diffusion": models["dflash"]}, tmp_path / "bundle", {})
    assert not list(tmp_path.glob("*bundle*"))


def test_a_hubs_snapshot_is_copied_with_the_modes_of_its_files(models: dict[str, Path], tmp_path: Path) -> None:
    """Its files are links into the `blobs` beside the snapshots."""
    snapshot = tmp_path / "models--a--b" / "snapshots" / ("0" * 40)
    (tmp_path / "models--a--b" / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (models["dflash"] / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    for file in models["dflash"].iterdir():
        blob = file.rename(tmp_path / "models--a--b" / "blobs" / file.name)
        blob.chmod(0o400 if file.suffix == ".json" else 0o644)
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    create(parts({**models, "dflash": snapshot}), tmp_path / "bundle")
    copies = {file.name: file for file in (tmp_path / "bundle" / "dflash").iterdir()}
    assert copies.keys() == {file.name for file in snapshot.iterdir()}
    assert not any(file.is_symlink() for file in copies.values())
    assert copies["config.json"].stat().st_mode & 0o777 == 0o600
    assert copies["model.safetensors"].stat().st_mode & 0o777 == 0o644


def test_a_bundle_is_not_written_over_another(models: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(WhiflashError, match="exists already; give --out a new directory"):
        create(parts(models), tmp_path)


def test_ids_stay_ids_at_the_commit_they_were_at(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only configurations are fetched to make the bundle; serving it fetches what was pinned, not what is newest."""
    commits = {part: str(number) * 40 for number, part in enumerate(models, 1)}
    for part, directory in models.items():
        cached = tmp_path / "hub" / part
        cached.mkdir(parents=True)
        (cached / commits[part]).symlink_to(directory)
    asked: list[tuple[str, str | None]] = []

    def config(name: str, file: str, revision: str | None) -> str:
        assert file == "config.json"
        asked.append((name, revision))
        part = name.removeprefix("owner/")
        if part not in models:
            raise OSError("404: no such repository")
        return str(tmp_path / "hub" / part / (revision or commits[part]) / file)

    def snapshot(name: str, revision: str | None, cache_dir: str | None, **_: object) -> str:
        asked.append((name, revision))
        return str(tmp_path / "hub" / name.removeprefix("owner/") / str(revision))

    monkeypatch.setattr("huggingface_hub.hf_hub_download", config)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    out, pinned = tmp_path / "bundle", f"owner/eagle3@{commits['eagle3']}"
    create(BundleParts("owner/target", pinned, "owner/dflash"), out)
    assert asked == [("owner/target", None), ("owner/eagle3", commits["eagle3"]), ("owner/dflash", None)]
    manifest = load_manifest(out)
    named = (manifest.target, manifest.eagle3, manifest.dflash)
    assert named == ("owner/target", "hub:owner/eagle3", "hub:owner/dflash")
    assert {part: source.revision for part, source in manifest.sources.items()} == commits
    assert target_path(manifest.target, manifest).name == commits["target"]
    asked.clear()
    assert {path.name for path in resolve(Flags(), out).drafters.values()} == {commits["eagle3"], commits["dflash"]}
    assert asked == [(f"owner/{part}", commits[part]) for part in ("eagle3", "dflash")]
    with pytest.raises(WhiflashError, match=r"^owner/none: not a directory here, and the hub gave nothing"):
        create(BundleParts("owner/target", pinned, "owner/none"), tmp_path / "second")


def test_the_shipped_configuration_names_files_that_come_with_the_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smollm2-135m-instruct").mkdir()
    template = resolve_config(Path("smollm2-135m-instruct")).chat_template
    assert template is not None
    assert template.is_file()


def test_new_drafters_have_no_acceptance_of_the_old(models: dict[str, Path], tmp_path: Path) -> None:
    config = resolve_config(Path("smollm2-135m-instruct")).model_copy(update={"work": tmp_path / "work"})
    for name, part in (("eagle3", "eagle3"), (config.block_drafter, "dflash")):
        with pytest.raises(ConfigError, match=f"{name} has no checkpoint"):
            assemble(config, tmp_path / "other", "new")
        assert not (tmp_path / "other").exists()
        shutil.copytree(models[part], config.work / name / "checkpoint")
    (tmp_path / "whiflash.json").write_bytes((embedded_bundle() / "whiflash.json").read_bytes())
    assemble(config, tmp_path, "new")
    assert not load_manifest(tmp_path).acceptance


def test_a_bundle_with_other_drafters_keeps_the_rest(models: dict[str, Path], tmp_path: Path) -> None:
    """Also a part on a hub, whose weights are not here."""
    notes = {"learned.json": {"until": 1.0}}
    with_drafters(embedded_bundle(), {"diffusion": models["dflash"]}, tmp_path / "one", notes)
    said, before = (load_manifest(place).model_dump() for place in (tmp_path / "one", embedded_bundle()))
    assert {key for key in said if said[key] != before[key]} == {"name", "dflash", "sources", "acceptance"}
    assert said["acceptance"].keys() == {"eagle3"}, "the other was measured with the drafter that is gone"
    served, shipped = (resolve(Flags(router="neural"), p) for p in (tmp_path / "one", embedded_bundle()))
    assert served.neural is not None
    assert served.chat_template.read_bytes() == shipped.chat_template.read_bytes()
    verify(served.checksums)
    assert json.loads((tmp_path / "one" / "learned.json").read_text()) == notes["learned.json"]
    manifest = tmp_path / "one" / "whiflash.json"
    hub = json.loads(manifest.read_text()) | {"eagle3": "hub:owner/name"}
    hub["sources"]["eagle3"] = {"revision": "abc"}
    manifest.write_text(json.dumps(hub))
    with_drafters(tmp_path / "one", {"diffusion": models["dflash"]}, tmp_path / "two", {})
    found = load_manifest(tmp_path / "two")
    assert (found.eagle3, found.sources["eagle3"].revision) == ("hub:owner/name", "abc")
