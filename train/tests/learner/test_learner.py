"""A pass of the learner on a tiny pair: better drafters become a version that a server can switch to, others do not."""

import json
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_dflash, tiny_eagle3, tiny_target
from typer.testing import CliRunner

import whiflash_train as train
from whiflash_sglang.checkpoints.manifest import load_manifest
from whiflash_sglang.cli.app import app
from whiflash_sglang.errors import ConfigError
from whiflash_sglang.updates.samples import Sample, check_spool, files_of, samples_of, write_file
from whiflash_sglang.updates.versions import VersionInUse as Used
from whiflash_sglang.updates.versions import gain_of, notes_of, numbers, path_of, record, served, versions_of
from whiflash_train.answers.store import FeatureStore, SequenceRecord, alone
from whiflash_train.answers.tokens import export_tokens
from whiflash_train.bundle import BundleParts, create
from whiflash_train.config import TrainConfig, load_config
from whiflash_train.drafters.dspark import initialise
from whiflash_train.learner import once
from whiflash_train.learner.once import LOCK, SAVE_STEPS, WORK, Learning, Outcome, Pace, learn_once, status_of
from whiflash_train.learner.texts import LEAST, LONGEST, TENANTS, Text, answer_tokens, choose, texts_of
from whiflash_train.target import TargetModel

FAVOURITE = 71
"""Three quarters of every answer: what a drafter has to learn."""


def request(draw: random.Random) -> Sample:
    answer = [FAVOURITE if draw.random() < 0.75 else draw.randrange(256) for _ in range(24)]
    return Sample(draw.choices(range(256), k=8), answer, [])


def serve(learning: Path, target: str, requests: int, seed: int) -> None:
    """Write a server's samples of so many requests."""
    draw = random.Random(seed)
    check_spool(samples_of(learning))
    for _ in range(0, requests, 16):
        write_file(samples_of(learning), target, [request(draw) for _ in range(16)], time.time())


Pair = tuple[Path, Path]
"""Directory of checkpoints, and their bundle."""


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    root: Path = tmp_path_factory.mktemp("pair")
    target = tiny_target(root / "target")
    create(
        BundleParts(
            str(target), str(tiny_eagle3(root / "eagle3", target)), str(tiny_dflash(root / "dflash", target))
        ),
        root / "bundle",
    )
    return root, root / "bundle"


def tiny_config(pair_root: Path) -> TrainConfig:
    config = load_config(Path(train.__path__[0]) / "configs" / "tiny.yaml")
    return config.model_copy(update={"target": str(pair_root / "target")})


def learning_of(pair: Pair, directory: Path, rate: float = 5e-3) -> Learning:
    return Learning(directory, pair[1], tiny_config(pair[0]), 20_000, 64, rate, None)


class Killed(Pace):
    """A pass that is killed after so many steps; None: it is not."""

    def __init__(self, after: int | None = None) -> None:
        super().__init__()
        self.steps, self._after = 0, after

    def rest(self) -> None:
        self.steps += 1
        if self.steps == self._after:
            raise KeyboardInterrupt


class Passed(NamedTuple):
    """A pass, its steps, and a directory with the samples that it learned from."""

    learning: Learning
    found: Outcome
    steps: int
    samples: Path


@pytest.fixture(scope="module")
def passed(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Passed:
    learning = learning_of(pair, tmp_path_factory.mktemp("learning"))
    target, spool = str(pair[0] / "target"), samples_of(learning.directory)
    serve(learning.directory, target, 320, 1)
    planted = [[1, 320, 2, 3], [1, 2**31 - 1, 2, 3], random.Random(0).choices(range(256), k=LONGEST)]
    write_file(spool, target, [Sample([at], answer, []) for at, answer in enumerate(planted)], time.time())
    samples, pace = tmp_path_factory.mktemp("samples") / "copied", Killed()
    shutil.copytree(learning.directory, samples)
    return Passed(learning, learn_once(learning, pace), pace.steps, samples)


def test_drafters_that_became_better_are_a_version(passed: Passed) -> None:
    """Samples whose tokens the target does not have, or cannot read at once, end no pass."""
    learning, found, *_ = passed
    print(found)
    assert (found.present, found.version, found.judged) == (0, 1, 64)
    texts = list(texts_of(samples_of(learning.directory), load_manifest(learning.bundle).target, 320))
    assert (found.learned, found.tokens) == (len(texts) - 64, answer_tokens(texts[:-64]))
    for gain in found.drafters.values():
        assert gain.low > 1.2
        assert gain.after > gain.before
    notes = notes_of(versions_of(learning.directory), 1)
    assert (notes["from"], notes["tokens"]) == (0, found.tokens)
    assert status_of(learning.directory) == found.model_dump()
    assert gain_of(versions_of(learning.directory), 1).keys() == {"eagle3", "dflash"}


@pytest.mark.parametrize(
    ("name", "kept", "moved"),
    [
        (
            "eagle3",
            ["fc.weight", "midlayer.hidden_norm.weight", "midlayer.input_layernorm.weight"],
            "lm_head.weight",
        ),
        ("dflash", ["fc.weight", "hidden_norm.weight"], "norm.weight"),
    ],
)
def test_what_draft_kv_is_made_with_stays_bit_by_bit(
    pair: Pair, passed: Passed, name: str, kept: list[str], moved: str
) -> None:
    before = load_file(pair[0] / name / "model.safetensors")
    after = load_file(path_of(versions_of(passed.learning.directory), 1) / name / "model.safetensors")
    assert before.keys() == after.keys()
    layers = [key for key in before if any(part in key for part in ("k_proj", "v_proj", "k_norm", "d2t"))]
    for key in (*kept, *layers):
        assert torch.equal(before[key], after[key]), key
    queries = [key for key in before if "q_proj" in key]
    for key in (moved, *queries):
        assert not torch.equal(before[key], after[key]), key


def test_nothing_of_a_text_is_left_behind(passed: Passed) -> None:
    left = {path.name for path in passed.learning.directory.iterdir()}
    assert left == {".learner", "learner.json", "samples", "versions"}


def test_it_waits_for_requests_that_no_version_has_learned_from(passed: Passed, pair: Pair) -> None:
    learning = passed.learning
    record(versions_of(learning.directory), Used(1, 0))
    with pytest.raises(ConfigError, match="0 samples are newer than the newest version"):
        learn_once(learning)
    serve(learning.directory, str(pair[0] / "target"), 16, 2)
    found = learn_once(learning._replace(tokens=500))
    assert (found.present, found.judged) == (1, 8)
    record(versions_of(learning.directory), Used(0, 0))


def test_what_did_not_become_better_is_no_version(pair: Pair, tmp_path: Path) -> None:
    learning = learning_of(pair, tmp_path, rate=1e-12)
    serve(tmp_path, str(pair[0] / "target"), 32, 3)
    found = learn_once(learning)
    assert found.version is None
    assert numbers(versions_of(tmp_path)) == []
    assert status_of(tmp_path)["version"] is None


def test_the_original_training_is_replayed(pair: Pair, tmp_path: Path) -> None:
    """As many tokens as are learned, in whole answers."""
    draw = random.Random(5)
    texts = [[*draw.choices(range(256), k=6), *draw.choices(range(256), k=20)] for _ in range(50)]
    store = FeatureStore(tmp_path / "original", hidden=4, layers=[0])
    for number, tokens in enumerate(texts):
        entry = SequenceRecord(f"r{number}", "chat", 6, len(tokens), False, False, 0, 0)
        store.append(entry, tokens, torch.zeros(len(tokens) - 1, 2, 4))
    export_tokens([store], tmp_path / "original.npz")
    serve(tmp_path, str(pair[0] / "target"), 32, 6)
    (tmp_path / WORK).mkdir(mode=0o700)
    with pytest.raises(ConfigError, match=r"none\.npz holds no answers' token ids"):
        learn_once(learning_of(pair, tmp_path)._replace(replay=tmp_path / "none.npz"))
    assert (tmp_path / WORK).exists(), "of a pass that can be gone on with"
    found = learn_once(learning_of(pair, tmp_path)._replace(replay=tmp_path / "original.npz"))
    texts = list(texts_of(samples_of(tmp_path), str(pair[0] / "target"), 256))
    learned = answer_tokens(texts[: found.learned])
    assert 2 * learned <= found.tokens < 2 * learned + 20


Change = Callable[[dict[str, torch.Tensor]], None]


def nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors["norm.weight"][0] = float("nan")


def moved(tensors: dict[str, torch.Tensor]) -> None:
    tensors["fc.weight"] += 0.1


@pytest.mark.parametrize(("change", "said"), [(nan, "norm.weight holds NaN"), (moved, "fc.weight differs")])
def test_weights_that_cannot_serve_are_no_version(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Change, said: str
) -> None:
    learning, trains = learning_of(pair, tmp_path), once.train_arm
    serve(tmp_path, str(pair[0] / "target"), 32, 3)

    def spoiled(*given: Any) -> Path:
        out = trains(*given)
        tensors = load_file(out / "model.safetensors")
        change(tensors)
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
        return out

    monkeypatch.setattr(once, "train_arm", spoiled)
    with pytest.raises(ConfigError, match=said):
        learn_once(learning)
    assert numbers(versions_of(tmp_path)) == []
    assert not (tmp_path / WORK).exists()


def test_a_configuration_of_another_target_learns_nothing(pair: Pair, tmp_path: Path) -> None:
    serve(tmp_path, str(pair[0] / "target"), 32, 3)
    learning = learning_of(pair, tmp_path)
    for target in (str(pair[0] / "eagle3"), "owner/name", "embedded"):
        other = learning._replace(config=learning.config.model_copy(update={"target": target}))
        with pytest.raises(ConfigError, match=f"--config is for the target {target}, .* another model"):
            learn_once(other)
    assert not (tmp_path / WORK).exists()
    assert numbers(versions_of(tmp_path)) == []
    (tmp_path / "link").symlink_to(pair[0] / "target")
    once.check_target(str(tmp_path / "link"), str(pair[0] / "target"))
    once.check_target("embedded", "embedded:smollm2-135m-instruct")


def test_there_is_one_learner(pair: Pair, tmp_path: Path) -> None:
    learning = learning_of(pair, tmp_path)
    with pytest.raises(ConfigError, match="has no samples"):
        learn_once(learning)
    check_spool(samples_of(tmp_path))
    with alone(tmp_path, LOCK), pytest.raises(ConfigError, match="another run works in"):
        learn_once(learning)


def test_what_a_killed_pass_left_goes(pair: Pair, tmp_path: Path) -> None:
    check_spool(samples_of(tmp_path))
    (tmp_path / WORK).mkdir(mode=0o750)
    with pytest.raises(ConfigError, match="learner has mode 750"):
        learn_once(learning_of(pair, tmp_path))
    (tmp_path / WORK).chmod(0o700)
    (tmp_path / WORK / "data").mkdir()
    with pytest.raises(ConfigError, match="0 samples are newer"):
        learn_once(learning_of(pair, tmp_path))
    assert not (tmp_path / WORK).exists()


def test_a_dspark_drafter_learns(pair: Pair, tmp_path: Path) -> None:
    """Weights that its draft KV is made with stay; its Markov and confidence heads learn with the rest."""
    target, config = pair[0] / "target", tiny_config(pair[0])
    torch.manual_seed(0)
    origin = TargetModel(target, device=torch.device("cpu"), dtype=torch.float32)
    initialise(origin, config.dspark_section()).save(tmp_path / "dspark")
    create(BundleParts(str(target), None, str(tmp_path / "dspark")), tmp_path / "bundle")
    directory = tmp_path / "learning"
    serve(directory, str(target), 160, 7)
    found = learn_once(Learning(directory, tmp_path / "bundle", config, 20_000, 48, 5e-3, None))
    assert (found.version, list(found.drafters)) == (1, ["dflash"])
    assert found.drafters["dflash"].low > 1.2
    version = path_of(versions_of(directory), 1) / "dflash" / "model.safetensors"
    before, after = (load_file(file) for file in (tmp_path / "dspark" / "model.safetensors", version))
    assert before.keys() == after.keys()
    kept = ("fc.", "hidden_norm.", "k_proj", "v_proj", "k_norm")
    for key, value in before.items():
        stays = key.startswith(kept[:2]) or any(part in key for part in kept[2:])
        assert torch.equal(value, after[key]) == stays, key


def test_a_killed_pass_goes_on_where_it_was(
    passed: Passed, pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of the second drafter: what its last checkpoint has is not done twice, and weights are the same.
    As it publishes and behind that: its version is neither lost nor made again, and waits for newer samples.
    """
    learning, killed, resumed = learning_of(pair, tmp_path / "killed"), Killed(passed.steps - 138), Killed()
    shutil.copytree(passed.samples, learning.directory)
    with pytest.raises(KeyboardInterrupt):
        learn_once(learning, killed)
    serve(learning.directory, str(pair[0] / "target"), 16, 9)  # for the next pass

    def dies(*_: object) -> None:
        raise ending

    for step, pace, ending in (
        ("publish", resumed, SystemExit(143)),
        ("write_status", Killed(), KeyboardInterrupt()),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(once, step, dies)
            with pytest.raises(type(ending)):
                learn_once(learning, pace)
    found = learn_once(learning)
    assert (found.present, found.version, found.judged) == (0, 1, 64)
    assert killed.steps + resumed.steps <= passed.steps + SAVE_STEPS
    assert status_of(learning.directory) == found.model_dump()
    versions = versions_of(learning.directory)
    assert numbers(versions) == [1]
    for name in ("eagle3", "dflash"):
        one, other = (
            load_file(path_of(versions_of(given.directory), 1) / name / "model.safetensors")
            for given in (passed.learning, learning)
        )
        assert all(torch.equal(value, other[key]) for key, value in one.items())
    assert not (learning.directory / WORK).exists()
    notes = path_of(versions, 1) / "notes.json"
    for until in (None, "later", float("nan"), 2 * time.time()):
        notes.write_text(json.dumps({"until": until, "from": 0, "outcome": {"until": until}}))
        shutil.rmtree(learning.directory / WORK, ignore_errors=True)
        with pytest.raises(KeyboardInterrupt):
            learn_once(learning, Killed(1))


@pytest.mark.parametrize("changed", ["forgotten", "rate", "epochs"])
def test_a_killed_pass_begins_again_if_it_would_learn_something_else(
    pair: Pair, tmp_path: Path, changed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing that was made of a sample that is forgotten is left. epochs: of another release of this package."""
    learning = learning_of(pair, tmp_path)
    serve(tmp_path, str(pair[0] / "target"), 64, 3)
    with pytest.raises(KeyboardInterrupt):
        learn_once(learning, Killed(20))
    assert len(store_of(tmp_path)) == 20
    if changed == "forgotten":
        files_of(samples_of(tmp_path))[0].path.unlink()
    if changed == "epochs":
        monkeypatch.setattr(once, "EPOCHS", 2.0)
    rate = 1e-3 if changed == "rate" else learning.rate
    with pytest.raises(KeyboardInterrupt):
        learn_once(learning._replace(rate=rate), Killed(3))
    assert len(store_of(tmp_path)) == 3


def store_of(directory: Path) -> list[str]:
    """Sequences with features of the pass that was killed."""
    return (directory / WORK / "data" / "shard0" / "index.jsonl").read_text().splitlines()


def text(number: int, prompt: int | None = None) -> Text:
    return Text(f"{number:04d}", float(number), (number if prompt is None else prompt,), (1,) * 10)


def test_the_newest_judge_and_no_prompt_is_on_both_sides() -> None:
    texts = [text(number) for number in range(100)]
    found = choose([*texts, text(100, 5)], 49.0, 200, 1000)
    assert [one.written for one in found.judged] == [float(n) for n in range(76, 101) if n > 75]
    assert [one.written for one in found.learned] == [float(n) for n in range(56, 76)]
    assert answer_tokens(found.learned) == 200
    assert found.until == 100.0
    few = choose(texts, -1.0, 10**6, 10)
    assert (len(few.judged), len(few.learned)) == (10, 90)
    with pytest.raises(ConfigError, match=f"{2 * LEAST} are needed"):
        choose(texts, 85.0, 200, 64)


def test_files_that_cannot_be_read_are_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    serve(tmp_path, "a target", 16, 4)
    (samples_of(tmp_path) / "00000000000000000001-1.jsonl").write_text("{")
    assert len(list(texts_of(samples_of(tmp_path), "a target", 256))) == 16
    assert "00001-1.jsonl has mode" in caplog.text
    assert list(texts_of(samples_of(tmp_path), "another", 256)) == []


def test_a_tenant_supplies_its_share_alone() -> None:
    """The last tenant would otherwise supply everything that judges, and everything that is learned."""
    others = [text(number)._replace(tenant=number % 3) for number in range(90)]
    flood = [text(number)._replace(tenant=9) for number in range(100, 400)]
    found = choose([*others, *flood], -1.0, 400, 32)
    for texts, most in ((found.judged, 32 // TENANTS), (found.learned, 400 // 10 // TENANTS)):
        assert Counter(one.tenant for one in texts) == dict.fromkeys((0, 1, 2, 9), most)
    assert not {one.prompt for one in found.judged} & {one.prompt for one in found.learned}
    two = choose(
        [one._replace(tenant=None if one in flood else 1) for one in (*others, *flood)], -1.0, 10_000, 32
    )
    assert Counter(one.tenant for one in two.judged) == {None: 16, 1: 16}
    with pytest.raises(ConfigError, match="6 of them can judge as 2 tenants share that"):
        choose([others[0], *flood], -1.0, 400, 10)


def test_a_tenant_supplies_no_more_than_its_share_of_what_is_there() -> None:
    """Also where there is less than `--judged` and `--tokens` allow; and one tenant alone goes on learning."""
    few = [text(number)._replace(tenant=number % 3) for number in range(18)]
    flood = [text(number)._replace(tenant=9) for number in range(100, 400)]
    found = choose([*few, *flood], -1.0, 100_000, 64)
    assert Counter(one.tenant for one in found.judged) == {0: 3, 1: 3, 2: 3, 9: 16}
    tokens = {
        tenant: answer_tokens([one for one in found.learned if one.tenant == tenant]) for tenant in (0, 9)
    }
    assert tokens[9] <= answer_tokens([*few, *flood]) / 4
    assert tokens[0] == 3 * len(few[0].answer)
    newest = [text(number)._replace(tenant=9) for number in range(18, 27)]
    assert Counter(one.tenant for one in choose([*few[-9:], *newest], -1.0, 1000, 64).judged)[9] == 3
    lonely = choose(flood, -1.0, 100_000, 64)
    assert (len(lonely.judged), len(lonely.learned)) == (64, 236)


def test_another_releases_status_is_shown_as_it_is(tmp_path: Path) -> None:
    """And samples that cannot be counted are none of zero."""
    for drafters in ({}, {"eagle3": {"ratio": 1.0}}, None):
        (tmp_path / "learner.json").write_text(json.dumps({"drafters": drafters}))
        ran = CliRunner().invoke(app, ["learn", str(tmp_path), "--status"])
        assert ran.stdout.startswith(f"drafters: {drafters}")
    samples_of(tmp_path).touch()
    ran = CliRunner().invoke(app, ["learn", str(tmp_path), "--status"])
    assert isinstance(ran.exception, OSError)


def test_the_command_reports_the_last_pass(passed: Passed) -> None:
    learning = passed.learning
    ran = CliRunner().invoke(app, ["learn", str(learning.directory), "--status"])
    assert ran.exit_code == 0
    assert "tokens a round" in ran.stdout
    ran = CliRunner().invoke(app, ["learn", str(learning.directory)])
    assert "--config is missing" in str(ran.exception)
    assert served(versions_of(learning.directory)).version == 0
