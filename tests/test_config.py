"""Flags and manifests: every wrong value is named, together with what to do."""

import json
from itertools import accumulate
from operator import mul
from pathlib import Path
from typing import Any

import pytest

from whiflash_sglang.checkpoints.bundle import Bundle
from whiflash_sglang.checkpoints.manifest import embedded_bundle, load_manifest
from whiflash_sglang.errors import CheckpointError, ConfigError
from whiflash_sglang.settings.config import changed, parse_flags, resolve

MANIFEST = {"schema_version": 1, "name": "tiny", "target": "tiny/target", "eagle3": "e", "dflash": "d"}


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A bundle whose checkpoints are configs alone; resolving reads no weights."""
    for part in ("e", "d"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text("{}")
    return write(tmp_path, MANIFEST)


def write(bundle: Path, manifest: Any) -> Path:
    (bundle / "whiflash.json").write_text(json.dumps(manifest))
    return bundle


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"router": "fastest"}, r"--whiflash-router: 'fastest' .*'ar'"),
        ({"neural_router_threshold": "warm"}, r"--whiflash-neural-router-threshold: .*number.*'warm'"),
        ({"neural_router_threshold": "nan"}, r"--whiflash-neural-router-threshold: .*finite"),
        ({"neural_router_threshold": "inf"}, r"--whiflash-neural-router-threshold: .*finite"),
        ({"block_size": "0"}, r"--whiflash-block-size: .*greater than or equal to 2.*'0'"),
        ({"block_size": "1"}, r"--whiflash-block-size: .*greater than or equal to 2.*'1'"),
        ({"block_size": "many"}, r"--whiflash-block-size: .*integer.*'many'"),
        ({"eagle_steps": "0"}, r"--whiflash-eagle-steps: .*greater than 0"),
        ({"learn_mib": "-2"}, r"--whiflash-learn-mib: .*greater than 0"),
        ({"drafters": "e3"}, r"--whiflash-drafters: .*'df-e3'"),
    ],
)
def test_wrong_flags_are_named(given: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_flags(given)


def test_flags_as_text_are_read() -> None:
    flags = parse_flags({"router": "entropy", "neural_router_threshold": "0.5", "block_size": "4", "eagle_draft": None})
    assert (flags.router, flags.neural_router_threshold, flags.block_size) == ("entropy", 0.5, 4)
    assert flags.eagle_draft is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 1}, r"whiflash\.json: key 'temperature' is unknown; known: .*dflash.*eagle3"),
        ({"entropy": {"tau": "warm"}}, r"whiflash\.json: key 'entropy'\.tau: .*number.*'warm'"),
        ({"entropy": {"taus": 1}}, r"whiflash\.json: key 'entropy'\.taus is unknown; known: min_dwell, tau$"),
        ({"schema_version": 2}, r"whiflash\.json: key 'schema_version': 2 is not one of 1"),
        ({"sources": {"eagle3": {"files": {"/proc/self/pagemap": "00"}}}}, "pagemap.*should match pattern"),
        ({"sources": {"eagle3": {"files": {"..": "00"}}}}, "should match pattern"),
        ({"eagle3": "e\0"}, "is outside the bundle"),
        ({"dflash": 3}, r"whiflash\.json: key 'dflash': "),
        ({"quantization": {"dflash": "int4"}}, r"key 'quantization'\.dflash: 'int4' is not one of 'fp8'"),
        ({"lookup": {"max_width": 0}}, r"whiflash\.json: key 'lookup'\.max_width: .*greater than 0"),
    ],
)
def test_wrong_manifest_keys_are_named(bundle: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_manifest(write(bundle, {**MANIFEST, **change}))


@pytest.mark.parametrize("key", ["eagle3", "dflash", "chat_template", "router.path"])
@pytest.mark.parametrize("path", ["/etc/passwd", "../neighbour", "d/../../neighbour", "out", "linked"])
def test_paths_of_a_bundle_stay_inside_it(bundle: Path, tmp_path: Path, key: str, path: str) -> None:
    """Absolute, climbing, a link out of it, and a directory in which a link leads out of it."""
    outside = tmp_path.parent / "neighbour"
    outside.mkdir(exist_ok=True)
    (bundle / "out").symlink_to(outside)
    (bundle / "linked").mkdir()
    (bundle / "linked" / "config.json").symlink_to("/etc/passwd")
    change: dict[str, Any] = {"router": {"path": path}} if key == "router.path" else {key: path}
    with pytest.raises(ConfigError, match=rf"whiflash\.json: key '{key}': '{path}'.* outside the bundle"):
        load_manifest(write(bundle, {**MANIFEST, **change}))


def test_a_snapshot_of_the_hub_links_into_its_own_blobs(tmp_path: Path) -> None:
    """And into no other repository's."""
    mine, other = tmp_path / "models--o--mine", tmp_path / "models--o--other"
    snapshot = mine / "snapshots" / "0123abc"
    for repository in (mine, other):
        (repository / "blobs").mkdir(parents=True)
        (repository / "blobs" / "f00").write_text("{}")
    for part in ("e", "d"):
        (snapshot / part).mkdir(parents=True)
        (snapshot / part / "config.json").symlink_to(Path("../../../blobs/f00"))
    (snapshot / "e" / "itself").symlink_to("itself")
    manifest = load_manifest(write(snapshot, MANIFEST))
    assert (manifest.eagle3, manifest.dflash) == ("e", "d")
    (snapshot / "e" / "weights").symlink_to(other / "blobs" / "f00")
    with pytest.raises(ConfigError, match=r"key 'eagle3': 'e', a link to .*models--o--other"):
        load_manifest(snapshot)


def without(*keys: str) -> dict[str, Any]:
    return {key: value for key, value in MANIFEST.items() if key not in keys}


def test_missing_manifest_keys_are_named(bundle: Path) -> None:
    with pytest.raises(ConfigError, match=r"whiflash\.json: key 'target': Field required"):
        load_manifest(write(bundle, without("target")))
    with pytest.raises(ConfigError, match=r"names no drafter: give key 'eagle3', 'dflash' or 'uno'"):
        load_manifest(write(bundle, without("eagle3", "dflash")))
    write(bundle, {**MANIFEST, "dflash": "", "uno": ""})
    assert Bundle.load(bundle).parts == {"eagle3": "e"}, "an empty place is none"


@pytest.mark.parametrize(("missing", "there"), [("eagle3", "DFlash"), ("dflash", "EAGLE-3")])
def test_one_drafter_is_enough_for_what_needs_no_second(bundle: Path, missing: str, there: str) -> None:
    alone = f"needs EAGLE-3 and DFlash; the drafters here are: {there}$"
    for key, value in {"router": ROUTER, "dflash_vocabulary": "eagle3"}.items():
        with pytest.raises(ConfigError, match=rf"whiflash\.json: key '{key}'.* {alone}"):
            load_manifest(write(bundle, {**without(missing), key: value}))
    quantised = {**without(missing), "quantization": {missing: "fp8"}}
    with pytest.raises(ConfigError, match=rf"key 'quantization' needs .*the drafters here are: {there}$"):
        load_manifest(write(bundle, quantised))
    write(bundle, without(missing))
    settings = resolve(parse_flags({}), bundle)
    assert list(settings.drafters) == ["diffusion" if missing == "eagle3" else "ar"]
    assert settings.router == "auto"
    for router in ("entropy", "neural"):
        with pytest.raises(ConfigError, match=f"router '{router}' {alone}"):
            resolve(parse_flags({"router": router}), bundle)
        with pytest.raises(ConfigError, match=f"router '{router}' {alone}"):
            changed(settings, {"router": router})
    with pytest.raises(ConfigError, match=f"--whiflash-neural-router-path.* {alone}"):
        resolve(parse_flags({"neural_router_path": "r"}), bundle)
    arm = {"eagle3": "ar", "dflash": "diffusion"}[missing]
    with pytest.raises(ConfigError, match=rf"router '{arm}' needs .*the drafters here are: {there}$"):
        resolve(parse_flags({"router": arm}), bundle)


@pytest.mark.parametrize("content", ["{", "[1, 2", "\x00"])
def test_a_damaged_manifest(bundle: Path, content: str) -> None:
    (bundle / "whiflash.json").write_text(content)
    with pytest.raises(ConfigError, match=r"whiflash\.json is not valid JSON: "):
        load_manifest(bundle)
    with pytest.raises(ConfigError, match=r"whiflash\.json: "):
        load_manifest(write(bundle, ["tiny"]))


def test_a_server_needs_no_drafter(bundle: Path) -> None:
    without = resolve(parse_flags({}), None)
    assert (without.drafters, without.lookup.enabled, without.structure.enabled) == ({}, True, True)
    write(bundle, {**MANIFEST, "router": ROUTER, "dflash_vocabulary": "eagle3"})
    left_out = resolve(parse_flags({"drafters": "none"}), bundle, target_mtp=lambda: bundle / "e")
    assert (left_out.drafters, left_out.neural, left_out.checksums) == ({}, None, {})
    assert resolve(parse_flags({}), None, target_mtp=lambda: bundle / "e").drafters == {"ar": bundle / "e"}
    assert resolve(parse_flags({"eagle_draft": str(bundle / "e")}), None).drafters == {"ar": bundle / "e"}
    for router, needs in {"ar": "EAGLE-3", "diffusion": "DFlash", "entropy": "EAGLE-3 and DFlash"}.items():
        with pytest.raises(ConfigError, match=f"router '{router}' needs {needs}; the drafters here are: none"):
            resolve(parse_flags({"router": router}), None)
    with pytest.raises(ConfigError, match="none leaves nothing for --speculative-draft-model-path; remove one"):
        resolve(parse_flags({"drafters": "none"}), bundle / "d")
    with pytest.raises(ConfigError, match="none leaves nothing for --whiflash-eagle-draft; remove one"):
        resolve(parse_flags({"drafters": "none", "eagle_draft": "e"}), bundle)


def test_what_a_start_needs(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--whiflash-router neural needs --whiflash-neural-router-path"):
        resolve(parse_flags({"router": "neural"}), bundle)
    with pytest.raises(ConfigError, match=r"--speculative-draft-model-path .*nowhere: no such directory"):
        resolve(parse_flags({}), tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"d/config\.json: architectures None is no draft architecture"):
        resolve(parse_flags({}), bundle / "d")
    (bundle / "e" / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"the EAGLE-3 checkpoint .*e has no config\.json"):
        resolve(parse_flags({}), bundle)


def test_flags_win_over_the_manifest(bundle: Path) -> None:
    write(bundle, {**MANIFEST, "entropy": {"tau": 0.7, "min_dwell": 3}, "lookup": {"enabled": True}})
    settings = resolve(parse_flags({"lookup": "off"}), bundle)
    assert (settings.entropy.tau, settings.entropy.min_dwell, settings.lookup.enabled) == (0.7, 3, False)
    assert settings.drafters == {"ar": bundle / "e", "diffusion": bundle / "d"}


def test_the_shipped_bundle_is_valid() -> None:
    settings = resolve(parse_flags({}), embedded_bundle())
    lengths = {arm: 1 + sum(accumulate(chances, mul)) for arm, chances in settings.measured.items()}
    assert lengths == pytest.approx({"ar": 2.22, "diffusion": 2.1}, abs=1e-6), "as its README has them"
    other = resolve(parse_flags({"eagle_draft": str(embedded_bundle() / "eagle3")}), embedded_bundle())
    assert set(other.measured) == {"diffusion"}, "nobody measured the other one"
    assert settings.chat_template is not None
    assert settings.chat_template.is_file()


ROUTER = {"path": "r", "threshold": 0.4, "delta_sign": "ar-minus-diffusion"}


@pytest.mark.parametrize(
    ("given", "path", "threshold", "sign"),
    [
        ({}, "r", 0.4, "ar-minus-diffusion"),
        ({"router": "neural", "neural_router_threshold": "1.5"}, "r", 1.5, "ar-minus-diffusion"),
        ({"neural_router_path": "other.safetensors"}, "other.safetensors", 0.0, None),
    ],
)
def test_flags_change_a_bundles_router(
    bundle: Path, given: dict[str, str], path: str, threshold: float, sign: str | None
) -> None:
    """Another file takes nothing from the bundle's."""
    write(bundle, {**MANIFEST, "router": ROUTER})
    neural = resolve(parse_flags(given), bundle).neural
    assert neural is not None
    place = path if "neural_router_path" in given else str(bundle / path)
    assert (neural.path, neural.threshold, neural.min_dwell, neural.delta_sign) == (place, threshold, 1, sign)


def test_changes_while_serving(bundle: Path) -> None:
    without = resolve(parse_flags({}), bundle)
    for change in ({"router": "neural"}, {"neural_router_threshold": 1.0}):
        with pytest.raises(ConfigError, match="has no neural router"):
            changed(without, change)
    write(bundle, {**MANIFEST, "router": ROUTER})
    settings = changed(resolve(parse_flags({}), bundle), {"router": "neural", "neural_router_threshold": 1.0})
    assert settings.router == "neural"
    assert settings.neural is not None
    assert settings.neural.threshold == 1.0
