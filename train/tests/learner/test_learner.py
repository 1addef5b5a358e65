"""A pass of the learner on a tiny pair: better drafters make a bundle that a server can start with, others none."""

import itertools
import json
import random
import shutil
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_dflash, tiny_eagle3, tiny_target
from typer.testing import CliRunner

import whiflash_train as train
from whiflash_sglang.checkpoints.bundle import verify
from whiflash_sglang.checkpoints.manifest import load_manifest
from whiflash_sglang.cli.app import app
from whiflash_sglang.errors import ConfigError
from whiflash_sglang.files.provenance import weights_of
from whiflash_sglang.formats.eagle3 import Eagle3Drafter
from whiflash_sglang.settings.config import Flags, resolve
from whiflash_sglang.telemetry.samples import Sample, check_spool, samples_of, write_file
from whiflash_train.answers.store import FeatureStore, SequenceRecord, alone
from whiflash_train.answers.tokens import export_tokens
from whiflash_train.bundle import BundleParts, create
from whiflash_train.config import TrainConfig, load_config
from whiflash_train.drafters.dspark import initialise
from whiflash_train.learner import once, texts
from whiflash_train.learner.once import LEARNED, LOCK, WORK, Learning, Outcome, learn_once, newest_learned
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
        BundleParts(str(target), str(tiny_eagle3(root / "eagle3", target)), str(tiny_dflash(root / "dflash", target))),
        root / "bundle",
    )
    return root, root / "bundle"


def tiny_config(pair_root: Path) -> TrainConfig:
    config = load_config(Path(train.__path__[0]) / "configs" / "tiny.yaml")
    return config.model_copy(update={"target": str(pair_root / "target")})


def learning_of(pair: Pair, directory: Path, rate: float = 5e-3) -> Learning:
    out = directory.with_name(f"{directory.name}-bundle")
    return Learning(directory, pair[1], out, tiny_config(pair[0]), 20_000, 64, rate, None)


class Passed(NamedTuple):
    """A pass and its outcome."""

    learning: Learning
    found: Outcome


@pytest.fixture(scope="module")
def passed(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Passed:
    learning = learning_of(pair, tmp_path_factory.mktemp("learning"))
    target, spool = str(pair[0] / "target"), samples_of(learning.directory)
    serve(learning.directory, target, 320, 1)
    planted = [[1, 320, 2, 3], [1, 2**31 - 1, 2, 3], random.Random(0).choices(range(256), k=texts.LONGEST)]
    write_file(spool, target, [Sample([at], answer, []) for at, answer in enumerate(planted)], time.time())
    return Passed(learning, learn_once(learning))


def test_drafters_that_became_better_make_a_bundle(passed: Passed) -> None:
    """Samples whose tokens the target does not have, or cannot read at once, end no pass."""
    learning, found = passed
    print(found)
    assert (found.bundle, found.judged) == (learning.out, 64)
    sent = list(texts.texts_of(samples_of(learning.directory), load_manifest(learning.bundle).target, 320))
    assert (found.learned, found.tokens) == (len(sent) - 64, texts.answer_tokens(sent[:-64]))
    for gain in found.drafters.values():
        assert gain.low > 1.2
        assert gain.after > gain.before
    record = json.loads((learning.out / LEARNED).read_text())
    said = {key: record[key] for key in ("from", "tokens", "until")}
    assert said == {"from": "bundle", "tokens": found.tokens, "until": found.until}
    assert record["bundle_sha256"] == weights_of(learning.bundle)
    served = resolve(Flags(), learning.out)
    assert served.drafters == {"ar": learning.out / "eagle3", "diffusion": learning.out / "dflash"}
    verify(served.checksums)
    assert learning.out.stat().st_mode & 0o077 == 0


def test_nothing_of_a_text_is_left_behind(passed: Passed) -> None:
    assert {path.name for path in passed.learning.directory.iterdir()} == {".learner", "samples"}


def test_the_next_pass_waits_for_requests_that_its_bundle_has_not_learned_from(
    passed: Passed, pair: Pair, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=f"{passed.learning.out} exists already; give --out a new directory"):
        learn_once(passed.learning)
    learning = passed.learning._replace(bundle=passed.learning.out, out=tmp_path / "next")
    with pytest.raises(ConfigError, match="0 samples are newer than those that the bundle has learned from"):
        learn_once(learning)
    serve(learning.directory, str(pair[0] / "target"), 16, 2)
    assert learn_once(learning._replace(tokens=500)).judged == 8


@pytest.mark.parametrize("until", [None, "later", float("nan"), 1e10])
def test_a_date_of_anything_hides_no_sample(tmp_path: Path, until: object) -> None:
    """Nor does that of a clock that was ahead."""
    (tmp_path / LEARNED).write_text(json.dumps({"until": until}))
    assert newest_learned(tmp_path) == 0.0


def test_what_did_not_become_better_makes_no_bundle(pair: Pair, tmp_path: Path) -> None:
    learning = learning_of(pair, tmp_path, rate=1e-12)
    serve(tmp_path, str(pair[0] / "target"), 32, 3)
    assert learn_once(learning).bundle is None
    assert not learning.out.exists()


def test_a_damaged_bundle_teaches_nobody(pair: Pair, tmp_path: Path) -> None:
    learning = learning_of(pair, tmp_path)._replace(bundle=tmp_path / "bundle")
    serve(tmp_path, str(pair[0] / "target"), 32, 3)
    shutil.copytree(pair[1], learning.bundle)
    (learning.bundle / "dflash" / "model.safetensors").write_bytes(b"other")
    with pytest.raises(ConfigError, match=r"dflash/model\.safetensors is not the file that"):
        learn_once(learning)


def test_the_original_training_is_replayed(pair: Pair, tmp_path: Path) -> None:
    """As many tokens as are learned, in whole answers."""
    draw = random.Random(5)
    answers = [[*draw.choices(range(256), k=6), *draw.choices(range(256), k=20)] for _ in range(50)]
    store = FeatureStore(tmp_path / "original", hidden=4, layers=[0])
    for number, tokens in enumerate(answers):
        entry = SequenceRecord(f"r{number}", "chat", 6, len(tokens), False, False, 0, 0)
        store.append(entry, tokens, torch.zeros(len(tokens) - 1, 2, 4))
    export_tokens([store], tmp_path / "original.npz")
    serve(tmp_path, str(pair[0] / "target"), 32, 6)
    with pytest.raises(ConfigError, match=r"none\.npz holds no answers' token ids"):
        learn_once(learning_of(pair, tmp_path)._replace(replay=tmp_path / "none.npz"))
    found = learn_once(learning_of(pair, tmp_path)._replace(replay=tmp_path / "original.npz"))
    sent = list(texts.texts_of(samples_of(tmp_path), str(pair[0] / "target"), 256))
    learned = texts.answer_tokens(sent[: found.learned])
    assert 2 * learned <= found.tokens < 2 * learned + 20


def test_a_configuration_of_another_target_learns_nothing(pair: Pair, tmp_path: Path) -> None:
    serve(tmp_path, str(pair[0] / "target"), 32, 3)
    learning = learning_of(pair, tmp_path)
    for target in (str(pair[0] / "eagle3"), "owner/name", "embedded"):
        other = learning._replace(config=learning.config.model_copy(update={"target": target}))
        with pytest.raises(ConfigError, match=f"--config is for the target {target}, .* another model"):
            learn_once(other)
    assert not (tmp_path / WORK).exists()
    assert not learning.out.exists()
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
    (elsewhere := tmp_path / "elsewhere").mkdir()
    (tmp_path / WORK).symlink_to(elsewhere)
    with pytest.raises(ConfigError, match=f"{tmp_path / WORK} is where .*: remove it"):
        learn_once(learning)
    assert elsewhere.is_dir()


def test_what_a_killed_pass_left_goes(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the next one begins, and also if that is interrupted."""
    serve(tmp_path, str(pair[0] / "target"), 32, 3)
    (tmp_path / WORK / "data").mkdir(parents=True)

    def ends(*_: object) -> None:
        assert not list((tmp_path / WORK).iterdir())
        raise KeyboardInterrupt

    monkeypatch.setattr(once, "choose", ends)
    with pytest.raises(KeyboardInterrupt):
        learn_once(learning_of(pair, tmp_path))
    assert not (tmp_path / WORK).exists()


def test_a_dspark_drafter_learns(pair: Pair, tmp_path: Path) -> None:
    target, config = pair[0] / "target", tiny_config(pair[0])
    torch.manual_seed(0)
    origin = TargetModel(target, device=torch.device("cpu"), dtype=torch.float32)
    initialise(origin, config.section("dspark")).save(tmp_path / "dspark")
    create(BundleParts(str(target), None, str(tmp_path / "dspark")), tmp_path / "bundle")
    directory = tmp_path / "learning"
    serve(directory, str(target), 160, 7)
    out = tmp_path / "out"
    found = learn_once(Learning(directory, tmp_path / "bundle", out, config, 20_000, 48, 5e-3, None))
    assert (found.bundle, list(found.drafters)) == (out, ["dflash"])
    assert found.drafters["dflash"].low > 1.2


def test_a_drafter_that_no_configuration_trains_is_refused(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(once, "SECTIONS", {Eagle3Drafter: "eagle3"})
    with pytest.raises(ConfigError, match=r"dflash is a DFlashDrafter, and training continues only .* Eagle3D"):
        once.section_of("diffusion", pair[0] / "dflash")


def test_a_drafter_that_is_not_as_configured_is_refused_before_samples_are_read(pair: Pair, tmp_path: Path) -> None:
    learning = learning_of(pair, tmp_path)
    check_spool(samples_of(tmp_path))
    other = learning.config.dflash.model_copy(update={"mask_token_id": 3})
    with pytest.raises(ConfigError, match=r"dflash has 259, dflash\.mask_token_id asks for 3"):
        learn_once(learning._replace(config=learning.config.model_copy(update={"dflash": other})))


def text(number: int, prompt: int | None = None) -> texts.Text:
    return texts.Text(f"{number:04d}", float(number), (number if prompt is None else prompt,), (1,) * 10)


def test_the_newest_judge_and_no_prompt_is_on_both_sides() -> None:
    sent = [text(number) for number in range(100)]
    found = texts.choose([*sent, text(100, 5)], 49.0, 200, 1000)
    assert [one.written for one in found.judged] == [float(n) for n in range(76, 101) if n > 75]
    assert [one.written for one in found.learned] == [float(n) for n in range(56, 76)]
    assert texts.answer_tokens(found.learned) == 200
    assert found.until == 100.0
    few = texts.choose(sent, -1.0, 10**6, 10)
    assert (len(few.judged), len(few.learned)) == (10, 90)
    with pytest.raises(ConfigError, match=f"{texts.LEAST} must judge"):
        texts.choose(sent, 85.0, 200, 64)


def test_files_that_cannot_be_read_are_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    serve(tmp_path, "a target", 16, 4)
    (samples_of(tmp_path) / "00000000000000000001-1.jsonl").write_text("{")
    assert len(list(texts.texts_of(samples_of(tmp_path), "a target", 256))) == 16
    assert "00001-1.jsonl has mode" in caplog.text
    assert list(texts.texts_of(samples_of(tmp_path), "another", 256)) == []


def of(tenants: dict[int | None, int], tokens: int = 10) -> list[texts.Text]:
    """Texts of tenants, the last one's newest."""
    counts = itertools.count()
    return [
        text(next(counts))._replace(tenant=tenant, answer=(1,) * tokens)
        for tenant, count in tenants.items()
        for _ in range(count)
    ]


def supplied(found: texts.ChosenTexts) -> tuple[Counter[int | None], Counter[int | None]]:
    """Requests of each tenant that judge, and answer tokens that are learned."""
    learned = Counter[int | None]()
    for one in found.learned:
        learned[one.tenant] += len(one.answer)
    return Counter(one.tenant for one in found.judged), learned


@pytest.mark.parametrize("flood", [None, 9], ids=["no salt", "salt"])
@pytest.mark.parametrize("each", [4, 10, 20, 40])
def test_a_flood_supplies_a_quarter_of_what_is_chosen(each: int, flood: int | None) -> None:
    """Seven tenants send few requests, and one sends 600."""
    judges, learned = supplied(texts.choose(of(dict.fromkeys(range(7), each) | {flood: 600}), -1.0, 10**5, 64))
    for part in (judges, learned):
        assert 0 < texts.TENANTS * part[flood] <= part.total()
        assert all(part[tenant] == part[0] for tenant in range(7))
    assert judges.total() == {4: 18, 10: 46}.get(each, 64)
    assert learned[0] == 10 * (each - judges[0])


def test_two_tenants_supply_a_half_and_one_supplies_all() -> None:
    judges, learned = supplied(texts.choose(of({1: 40, 9: 600}), -1.0, 10**5, 64))
    assert judges == {1: 20, 9: 20}
    assert learned == {1: 200, 9: 200}
    judges, learned = supplied(texts.choose(of({9: 600}), -1.0, 10**5, 64))
    assert (judges, learned) == ({9: 64}, {9: 5360})
    with pytest.raises(ConfigError, match=r"2 of them can judge and \d+ teach if no tenant .* one of 2 parts"):
        texts.choose(of({1: 1, 9: 600}), -1.0, 10**5, 64)


@settings(deadline=None, max_examples=300)
@given(
    st.lists(st.tuples(st.integers(0, 6), st.integers(texts.SHORTEST, 80)), max_size=120),
    st.integers(1, 2000),
    st.integers(8, 40),
    st.integers(-1, 60),
)
def test_no_tenant_supplies_more_than_its_part(
    sent: list[tuple[int, int]], tokens: int, judged: int, since: int
) -> None:
    """The last text of a tenant is cut, and left out if it would be too short."""
    given = [text(number)._replace(tenant=tenant, answer=(1,) * length) for number, (tenant, length) in enumerate(sent)]
    try:
        found = texts.choose(given, float(since), tokens, judged)
    except texts.TooFewError:
        return
    tenants = len({tenant for tenant, _ in sent})
    shares = min(texts.TENANTS, tenants)
    judges, learned = supplied(found)
    assert texts.LEAST <= judges.total() <= judged
    assert 0 < learned.total() <= tokens
    assert shares * max(judges.values()) <= judges.total()
    assert shares * max(learned.values()) <= learned.total() + tenants * (texts.SHORTEST - 1)
    assert not {one.name for one in found.judged} & {one.name for one in found.learned}
    assert all(one.written > since for one in found.judged)


def test_the_command(passed: Passed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its stdout holds the outcome and nothing that is printed meanwhile."""
    words = ["learn", str(passed.learning.directory), "--config", "tiny", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(once, "learn_once", lambda *_: print("noise") or passed.found)
    assert json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout) == passed.found.model_dump(mode="json")
    assert "tokens a round" in CliRunner().invoke(app, words).stdout
