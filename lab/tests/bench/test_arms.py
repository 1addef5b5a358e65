import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from whiflash_lab.bench.arms import KNOWN, QUICK, VARIANTS, Subject, build_arms, those_with_drafters
from whiflash_lab.bench.command import scale_of
from whiflash_lab.bench.fleet import environment, launcher, reason_of
from whiflash_lab.bench.subject import build_subject, write_variant
from whiflash_sglang.checkpoints.hub import checksums, verify
from whiflash_sglang.checkpoints.manifest import embedded_bundle, load_manifest
from whiflash_sglang.errors import ConfigError
from whiflash_sglang.formats.table import FORMATS

BY_NAME = {one.name: one for one in FORMATS}
SUBJECT = Subject(
    target=Path("/models/t"),
    bundle=Path("/models/b"),
    eagle3=Path("/models/b/eagle3"),
    dflash=Path("/models/b/dflash"),
    dtype="bfloat16",
    common=("--device", "cpu"),
    variants={arm: Path("/scratch") / arm for arm in VARIANTS},
    block_format=BY_NAME["DFlash"],
)


def test_every_arm_gets_the_same_target_dtype_and_common_arguments() -> None:
    shared = ("--model-path", "/models/t", "--dtype", "bfloat16", "--device", "cpu")
    names = those_with_drafters(KNOWN, SUBJECT)
    arms = build_arms(names, SUBJECT)
    assert [arm.name for arm in arms] == names == [name for name in KNOWN if name != "DSPARK"]
    assert all(arm.arguments[: len(shared)] == shared for arm in arms)
    by_name = {arm.name: arm for arm in arms}
    assert by_name["none"].arguments == shared
    assert "--speculative-eagle-topk 1" in " ".join(by_name["EAGLE3"].arguments)
    adaptive = " ".join(by_name["EAGLE3-adaptive"].arguments)
    assert "--speculative-algorithm EAGLE3 " in adaptive
    assert adaptive.endswith("--speculative-draft-model-path /models/b/eagle3 --speculative-adaptive")
    assert {arm: by_name[arm].arguments[-1] for arm in VARIANTS} == {
        arm: f"/scratch/{arm}" for arm in VARIANTS
    }


def test_routers_that_learn_nothing_share_a_server_and_auto_has_its_own() -> None:
    servers = {arm.name: arm.server for arm in build_arms(those_with_drafters(KNOWN, SUBJECT), SUBJECT)}
    shared = {"neural", "entropy", "ar", "diffusion", "lookup", "pinned-none"}
    assert {name for name, server in servers.items() if server == servers["ar"]} == shared
    assert len(set(servers.values())) == len(servers) - len(shared) + 1


def test_another_checkout_serves_the_same_arm_from_its_own_sources(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PYTHONPATH", "/of/the/user")
    beside = replace(SUBJECT, beside=tmp_path)
    _, auto, other = build_arms(["auto", "auto@beside"], beside)
    assert (other.arguments, other.router) == (auto.arguments, auto.router)
    assert auto.server != other.server
    assert (auto.checkout, other.checkout) == (None, tmp_path)
    with launcher([], tmp_path / "log", tmp_path)._spawn() as process:
        while "PYTHONPATH" not in (environ := psutil.Process(process.pid).environ()):
            assert process.poll() is None  # Linux shows nothing of it for a moment while a program is loaded.
        process.kill()
    sources = [str(tmp_path / part) for part in ("", "cpu", "kernels", "sdk")]
    assert environ["PYTHONPATH"].split(os.pathsep) == [*sources, "/of/the/user"]


def test_a_checkout_with_an_environment_is_served_in_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Also where this checkout is on the path, or is where the command was given: each has a module of one name."""
    other, here = tmp_path / "other", tmp_path / "here"
    for checkout in (other, here):
        (checkout / "sglang").mkdir(parents=True)
        (checkout / "sglang" / "__init__.py").touch()
        (checkout / "sglang" / "launch_server.py").write_text(f"print('of', {checkout.name!r})\n")
    python = other / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!/bin/sh\necho its own environment\nexec {sys.executable} $*\n")
    python.chmod(0o755)
    monkeypatch.setenv("PYTHONPATH", str(here))
    monkeypatch.chdir(here)
    with launcher([], log := tmp_path / "log", other)._spawn() as process:
        process.wait()
    assert log.read_text() == "its own environment\nof other\n"


def test_ranks_and_replicas_share_the_threads_of_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    _, auto, ranks, replicas = build_arms(["auto", "auto@tp2", "none@dp2"], SUBJECT)
    assert ranks.arguments == (*auto.arguments, "--tp-size", "2")
    assert replicas.arguments[-2:] == ("--dp-size", "2")
    assert len({auto.server, ranks.server, replicas.server}) == 3
    assert environment(auto.arguments) == {"OMP_NUM_THREADS": "4"}
    assert environment(ranks.arguments) == {"OMP_NUM_THREADS": "2"}


def test_another_checkout_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs --beside"):
        build_arms(["auto@beside"], SUBJECT)
    with pytest.raises(ConfigError, match="give the root of another clone"):
        build_subject(str(tmp_path), None, "bfloat16", (), tmp_path, ["auto@beside"], tmp_path)


def test_hints_are_compared_on_servers_alike() -> None:
    _, auto, unhinted = build_arms(["auto", "auto-no-hints"], SUBJECT)
    assert auto.arguments == unhinted.arguments
    assert (auto.router, auto.server != unhinted.server) == ("auto", True)
    assert auto.request == {}
    assert unhinted.request == {"custom_params": {"whiflash": '{"infer":false}'}}


def test_a_bundle_of_one_drafter_is_compared_as_far_as_it_goes() -> None:
    alone = replace(SUBJECT, eagle3=None)
    names = those_with_drafters(KNOWN, alone)
    assert set(KNOWN) - set(names) == {"EAGLE3", "EAGLE3-adaptive", "DSPARK", "neural", "entropy", "ar"}
    arms = build_arms(names, alone)
    hidden = alone.hide_paths(["--api-key", "k", *arms[1].arguments[-1:]])
    assert hidden == ["--api-key", "***", "BUNDLE/dflash"]
    for name in ("EAGLE3", "EAGLE3:3", "entropy"):
        kind = name.split(":")[0]
        with pytest.raises(ConfigError, match=f"--arms {kind} needs EAGLE-3.*the drafters here are: DFlash"):
            build_arms([name], alone)


def test_the_block_drafters_arm_is_the_one_that_upstream_has_for_its_format() -> None:
    dspark = replace(SUBJECT, block_format=BY_NAME["DSpark"])
    card = replace(dspark, common=())
    assert those_with_drafters(QUICK, SUBJECT) == ["none", "EAGLE3", "DFLASH", "auto"]
    assert those_with_drafters(QUICK, dspark) == ["none", "EAGLE3", "diffusion", "auto"]
    assert those_with_drafters(QUICK, card) == ["none", "EAGLE3", "DSPARK", "auto"]
    assert those_with_drafters(("diffusion", "DFLASH", "DSPARK"), dspark) == ["diffusion"]
    served = build_arms(["DSPARK"], card)[1].arguments
    assert served[-4:] == (
        *("--speculative-algorithm", "DSPARK"),
        *("--speculative-draft-model-path", str(card.dflash)),
    )
    speculators = replace(card, block_format=BY_NAME["speculators DSpark"])
    assert those_with_drafters(QUICK, speculators) == ["none", "EAGLE3", "diffusion", "auto"]
    assert those_with_drafters(QUICK, replace(card, common=("--tool-call-parser", "cpu")))[2] == "DSPARK"
    with pytest.raises(ConfigError, match="DSPARK: upstream serves it on GPUs only; the arm `diffusion`"):
        build_arms(["DSPARK"], dspark)
    for subject, arm, has in (
        (dspark, "DFLASH", "DSpark"),
        (SUBJECT, "DSPARK", "DFlash"),
        (speculators, "DSPARK", "speculators DSpark"),
    ):
        with pytest.raises(ConfigError, match=f"--arms {arm}: upstream's does not read {has} checkpoints"):
            build_arms([arm], subject)


def test_a_chain_that_upstream_does_not_read_is_whiflashs(tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(embedded_bundle(), tmp_path / "bundle"))
    for key, is_upstreams in (({}, True), ({"ptd_token_id": 5}, False)):
        config = bundle / "eagle3/config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | key))
        subject = build_subject(str(tmp_path), str(bundle), "bfloat16", (), tmp_path, [])
        assert subject.chain_is_upstreams == is_upstreams
    assert those_with_drafters(QUICK, subject) == ["none", "ar", "diffusion", "auto"]
    with pytest.raises(ConfigError, match="the arm `ar` is WHIFLASH with only this drafter"):
        build_arms(["EAGLE3:3"], subject)


def test_bad_drafters_cost_as_much_and_know_nothing(tmp_path: Path) -> None:
    subject = build_subject(str(tmp_path), None, "bfloat16", (), tmp_path, ["auto", "auto-bad-drafters"])
    bad = subject.variants["auto-bad-drafters"]
    manifest = load_manifest(bad)
    assert manifest.lookup is not None
    assert not manifest.lookup.enabled
    assert manifest.router is None
    verify(checksums(bad, manifest, ("eagle3", "dflash")))  # as a server does at its start
    for good in (subject.eagle3, subject.dflash):
        assert good is not None
        files = sorted(good.glob("*.safetensors"))
        assert files
        for file in files:
            right, wrong = load_file(file), load_file(bad / good.name / file.name)
            assert {k: v.shape for k, v in right.items()} == {k: v.shape for k, v in wrong.items()}
            assert not any(torch.equal(v, wrong[k]) for k, v in right.items() if v.ndim > 1)


def test_an_arm_without_a_part_is_otherwise_the_bundle(tmp_path: Path) -> None:
    arms = ["auto-no-lookup"]
    subject = build_subject(str(tmp_path), None, "bfloat16", (), tmp_path, arms)
    shipped, off = load_manifest(subject.bundle), load_manifest(subject.variants["auto-no-lookup"])
    assert shipped.lookup is not None
    assert off.lookup is not None
    assert not off.lookup.enabled
    assert off.entropy == shipped.entropy
    with pytest.raises(ValueError, match="serves the bundle as it is"):
        write_variant("auto", subject.bundle, tmp_path / "x")


def test_widths_of_static_drafters() -> None:
    _, eagle, dflash = build_arms(["EAGLE3:3", "DFLASH:4"], SUBJECT)
    assert eagle.name == "EAGLE3:3"
    assert "--speculative-num-steps 3" in " ".join(eagle.arguments)
    assert "--speculative-num-draft-tokens 4" in " ".join(eagle.arguments)
    assert dflash.arguments[-2:] == ("--speculative-num-draft-tokens", "4")


@pytest.mark.parametrize(
    "name", ["EAGLE", "auto:3", "EAGLE3:x", "EAGLE3:0", "", "auto@tp1", "auto@tp", "auto@pp2", "auto@"]
)
def test_unknown_arms_are_named(name: str) -> None:
    with pytest.raises(ConfigError, match=r"is not one of none, EAGLE3.*@tpN, @dpN or @beside"):
        build_arms([name], SUBJECT)


def test_published_arguments_name_no_directory() -> None:
    for arm in build_arms(those_with_drafters(KNOWN, SUBJECT), SUBJECT):
        shown = " ".join(SUBJECT.hide_paths(arm.arguments))
        assert "/models" not in shown
        assert "/scratch" not in shown


def test_quick_is_four_arms_and_a_budget() -> None:
    scale = scale_of(True, None, None, None, None)
    assert scale.arms == list(QUICK)
    assert scale.minutes is not None
    assert scale.minutes < 5
    assert scale_of(False, "auto, ar", None, None, None).arms == ["auto", "ar"]


def test_why_a_server_did_not_start() -> None:
    log = "the server stopped with exit code 1:\nTraceback\n  File x\nNotImplementedError: no kernel\nKilled"
    assert reason_of(log) == "NotImplementedError: no kernel"
    assert reason_of("x\n- ImportError: libx") == "ImportError: libx"
    assert reason_of("") == "no output"
