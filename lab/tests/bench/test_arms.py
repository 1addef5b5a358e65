import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from whiflash_lab.bench import arms
from whiflash_lab.bench.fleet import environment, reason_of
from whiflash_lab.bench.subject import build_subject, write_variant
from whiflash_sglang.checkpoints.bundle import Bundle, verify
from whiflash_sglang.checkpoints.manifest import embedded_bundle, load_manifest
from whiflash_sglang.errors import ConfigError, UsageError
from whiflash_sglang.formats.table import FORMATS

BY_NAME = {one.name: one for one in FORMATS}
SUBJECT = arms.Subject(
    target=Path("/models/t"),
    bundle=Path("/models/b"),
    eagle3=Path("/models/b/eagle3"),
    dflash=Path("/models/b/dflash"),
    dtype="bfloat16",
    common=("--device", "cpu"),
    variants={arm: Path("/scratch") / arm for arm in arms.VARIANTS},
    block_format=BY_NAME["DFlash"],
)


def test_every_arm_gets_the_same_target_dtype_and_common_arguments() -> None:
    """Routers that learn nothing share a server. Published arguments name no directory."""
    shared = ("--model-path", "/models/t", "--dtype", "bfloat16", "--device", "cpu")
    names = arms.those_with_drafters(arms.KNOWN, SUBJECT)
    built = arms.build_arms(names, SUBJECT)
    assert [arm.name for arm in built] == names == [name for name in arms.KNOWN if name != "DSPARK"]
    assert all(arm.arguments[: len(shared)] == shared for arm in built)
    by_name = {arm.name: arm for arm in built}
    assert by_name["none"].arguments == shared
    assert "--speculative-eagle-topk 1" in " ".join(by_name["EAGLE3"].arguments)
    adaptive = " ".join(by_name["EAGLE3-adaptive"].arguments)
    assert "--speculative-algorithm EAGLE3 " in adaptive
    assert adaptive.endswith("--speculative-draft-model-path /models/b/eagle3 --speculative-adaptive")
    assert {arm: by_name[arm].arguments[-1] for arm in arms.VARIANTS} == {
        arm: f"/scratch/{arm}" for arm in arms.VARIANTS
    }
    servers = {arm.name: arm.server for arm in built}
    alike = {"neural", "entropy", "ar", "diffusion", "lookup", "pinned-none"}
    assert {name for name, server in servers.items() if server == servers["ar"]} == alike
    assert len(set(servers.values())) == len(servers) - len(alike) + 1, "auto has its own"
    shown = " ".join(word for arm in built for word in SUBJECT.hide_paths(arm.arguments))
    assert "/models" not in shown
    assert "/scratch" not in shown


def test_ranks_and_replicas_share_the_threads_of_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert environment(["--dtype", "float32"]) == {"OMP_NUM_THREADS": "4"}
    assert environment(["--tp-size", "2"]) == {"OMP_NUM_THREADS": "2"}
    assert environment(["--tp", "2", "--data-parallel-size", "3", "--dp", "2"]) == {"OMP_NUM_THREADS": "1"}
    for wrong in (["--tp-size", "two"], ["--dp-size", "0"], ["--tensor-parallel-size"]):
        with pytest.raises(UsageError, match=f"--server-args {wrong[0]} .*: give a whole number from 1"):
            environment(wrong)


def test_a_value_after_an_equals_sign_is_seen() -> None:
    words = arms.server_words('--dtype=float32 --tp-size 2 --json-model-override-args=\'{"a": "="}\' --x=-1')
    assert words == [
        "--dtype", "float32", "--tp-size", "2", "--json-model-override-args", '{"a": "="}', "--x=-1"
    ]  # fmt: skip
    assert arms.dtype_of(words) == "float32"


def test_hints_are_compared_on_servers_alike() -> None:
    _, auto, unhinted = arms.build_arms(["auto", "auto-no-hints"], SUBJECT)
    assert auto.arguments == unhinted.arguments
    assert (auto.router, auto.server != unhinted.server) == ("auto", True)
    assert auto.request == {}
    assert unhinted.request == {"custom_params": {"whiflash": '{"infer":false}'}}


def test_a_bundle_of_one_drafter_is_compared_as_far_as_it_goes() -> None:
    alone = replace(SUBJECT, eagle3=None)
    names = arms.those_with_drafters(arms.KNOWN, alone)
    assert set(arms.KNOWN) - set(names) == {"EAGLE3", "EAGLE3-adaptive", "DSPARK", "neural", "entropy", "ar"}
    built = arms.build_arms(names, alone)
    assert alone.hide_paths(["--api-key", "k", *built[1].arguments[-1:]]) == ["--api-key", "***", "BUNDLE/dflash"]
    for name in ("EAGLE3", "EAGLE3:3", "entropy"):
        kind = name.split(":")[0]
        with pytest.raises(ConfigError, match=f"--arms {kind} needs EAGLE-3.*the drafters here are: DFlash"):
            arms.build_arms([name], alone)


def test_the_block_drafters_arm_is_the_one_that_upstream_has_for_its_format() -> None:
    dspark = replace(SUBJECT, block_format=BY_NAME["DSpark"])
    card = replace(dspark, common=())
    assert arms.those_with_drafters(arms.DEFAULT, SUBJECT) == ["none", "EAGLE3", "DFLASH", "auto"]
    assert arms.those_with_drafters(arms.DEFAULT, dspark) == ["none", "EAGLE3", "diffusion", "auto"]
    assert arms.those_with_drafters(arms.DEFAULT, card) == ["none", "EAGLE3", "DSPARK", "auto"]
    assert arms.those_with_drafters(("diffusion", "DFLASH", "DSPARK"), dspark) == ["diffusion"]
    assert arms.build_arms(["DSPARK"], card)[1].arguments[-4:] == (
        *("--speculative-algorithm", "DSPARK"),
        *("--speculative-draft-model-path", str(card.dflash)),
    )
    speculators = replace(card, block_format=BY_NAME["speculators DSpark"])
    assert arms.those_with_drafters(arms.DEFAULT, speculators) == ["none", "EAGLE3", "diffusion", "auto"]
    assert arms.those_with_drafters(arms.DEFAULT, replace(card, common=("--tool-call-parser", "cpu")))[2] == "DSPARK"
    with pytest.raises(ConfigError, match="DSPARK: upstream serves it on GPUs only; the arm `diffusion`"):
        arms.build_arms(["DSPARK"], dspark)
    for subject, arm, has in (
        (dspark, "DFLASH", "DSpark"),
        (SUBJECT, "DSPARK", "DFlash"),
        (speculators, "DSPARK", "speculators DSpark"),
    ):
        with pytest.raises(ConfigError, match=f"--arms {arm}: upstream's does not read {has} checkpoints"):
            arms.build_arms([arm], subject)


def test_a_chain_that_upstream_does_not_read_is_whiflashs(tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(embedded_bundle(), tmp_path / "bundle"))
    for key, is_upstreams in (({}, True), ({"ptd_token_id": 5}, False)):
        config = bundle / "eagle3/config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | key))
        subject = build_subject(str(tmp_path), str(bundle), (), tmp_path, [])
        assert subject.chain_is_upstreams == is_upstreams
    assert arms.those_with_drafters(arms.DEFAULT, subject) == ["none", "ar", "diffusion", "auto"]
    with pytest.raises(ConfigError, match="the arm `ar` is WHIFLASH with only this drafter"):
        arms.build_arms(["EAGLE3:3"], subject)


def test_bad_drafters_cost_as_much_and_know_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that a hub has."""
    bundle = Path(shutil.copytree(embedded_bundle(), tmp_path / "bundle"))
    (bundle / "eagle3").rename(tmp_path / "hub")
    fields = json.loads((bundle / "whiflash.json").read_text()) | {"eagle3": "hub:OWNER/NAME", "sources": {}}
    (bundle / "whiflash.json").write_text(json.dumps(fields))
    monkeypatch.setattr("whiflash_sglang.checkpoints.bundle.fetch", lambda *_, **more: tmp_path / "hub")
    subject = build_subject(str(tmp_path), str(bundle), (), tmp_path, ["auto", "auto-bad-drafters"])
    bad = subject.variants["auto-bad-drafters"]
    manifest = load_manifest(bad)
    assert manifest.lookup is not None
    assert not manifest.lookup.enabled
    assert manifest.router is None
    verify(Bundle(bad, manifest).checksums(("eagle3", "dflash")))  # as a server does at its start
    for good, shuffled in ((subject.eagle3, manifest.eagle3), (subject.dflash, manifest.dflash)):
        assert good is not None
        files = sorted(good.glob("*.safetensors"))
        assert files
        for file in files:
            right, wrong = load_file(file), load_file(bad / str(shuffled) / file.name)
            assert {k: v.shape for k, v in right.items()} == {k: v.shape for k, v in wrong.items()}
            assert not any(torch.equal(v, wrong[k]) for k, v in right.items() if v.ndim > 1)
            file.unlink()
    with pytest.raises(ConfigError, match=r"auto-bad-drafters: .* has no \*\.safetensors to shuffle"):
        write_variant("auto-bad-drafters", bundle, tmp_path / "again")


def test_an_arm_without_a_part_is_otherwise_the_bundle(tmp_path: Path) -> None:
    subject = build_subject(str(tmp_path), None, (), tmp_path, ["auto-no-lookup"])
    shipped, off = load_manifest(subject.bundle), load_manifest(subject.variants["auto-no-lookup"])
    assert shipped.lookup is not None
    assert off.lookup is not None
    assert not off.lookup.enabled
    assert off.entropy == shipped.entropy


def test_widths_of_static_drafters() -> None:
    _, eagle, dflash = arms.build_arms(["EAGLE3:3", "DFLASH:4"], SUBJECT)
    assert eagle.name == "EAGLE3:3"
    assert "--speculative-num-steps 3" in " ".join(eagle.arguments)
    assert "--speculative-num-draft-tokens 4" in " ".join(eagle.arguments)
    assert dflash.arguments[-2:] == ("--speculative-num-draft-tokens", "4")


@pytest.mark.parametrize("name", ["EAGLE", "auto:3", "EAGLE3:x", "EAGLE3:0", "", "auto@../other"])
def test_unknown_arms_are_named(name: str) -> None:
    with pytest.raises(ConfigError, match=r"is not one of none, EAGLE3.*DFLASH:BLOCK"):
        arms.build_arms([name], SUBJECT)


def test_why_a_server_did_not_start() -> None:
    log = "the server stopped with exit code 1:\nTraceback\n  File x\nNotImplementedError: no kernel\nKilled"
    assert reason_of(log) == "NotImplementedError: no kernel"
    assert reason_of("x\n- ImportError: libx") == "ImportError: libx"
    assert reason_of("") == "no output"
