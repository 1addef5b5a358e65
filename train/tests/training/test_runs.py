"""The whole path on a tiny random target: data, both drafters, evaluation; resumed runs equal uninterrupted ones."""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from matrix import sampled
from safetensors.torch import load_file
from tiny_models import tiny_target
from typer.testing import CliRunner

import whiflash_train as train
from whiflash_lab.evaluation import EvaluationSettings, Hardware, evaluate_bundle, figures_table
from whiflash_sglang.cli.app import app
from whiflash_sglang.errors import ConfigError
from whiflash_train.answers import store
from whiflash_train.answers.data import SHARD, generate_data, shard_of
from whiflash_train.answers.store import open_stores
from whiflash_train.answers.tokens import Exported, export_tokens, rebuild_features
from whiflash_train.config import TrainConfig, load_config
from whiflash_train.drafters.batches import SequenceBatches, token_frequencies
from whiflash_train.drafters.runner import train_drafter

train_eagle3, train_dflash, train_dspark = (partial(train_drafter, name) for name in ("eagle3", "dflash", "dspark"))
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def settings(root: Path) -> dict[str, Any]:
    """The shipped tiny configuration with its files under `root`."""
    tiny = yaml.safe_load((Path(train.__path__[0]) / "configs/tiny.yaml").read_text())
    data = tiny["data"] | {"prompts": [str(root / "prompts.jsonl")]}
    return tiny | {"target": str(root / "target"), "work": str(root / "work"), "data": data}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("train")
    tiny_target(directory / "target")
    rows = [
        {"id": f"r{i}", "category": ("chat", "code")[i % 2], "messages": [{"role": "user", "content": f"say {i}"}]}
        | ({"category": "tool_call", "tools": [TOOL]} if i % 8 == 0 else {})
        for i in range(24)
    ]
    (directory / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "tiny.yaml").write_text(yaml.safe_dump(settings(directory)))
    return directory


def ran(*words: object) -> str:
    """Output of a command that succeeds."""
    result = CliRunner().invoke(app, [*map(str, words), "--json"])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def config(root: Path) -> TrainConfig:
    assert json.loads(ran("train", "--step", "data", "--config", root / "tiny.yaml"))["sequences"] == 24
    return load_config(root / "tiny.yaml")


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


@contextmanager
def dying() -> Iterator[None]:
    """A run that is killed in its seventh step, which is behind its first checkpoint."""
    from transformers import Trainer

    original = Trainer.training_step

    def dies(self: Trainer, *args: object, **kwargs: object) -> torch.Tensor:
        if self.state.global_step == 6:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "training_step", dies)
        with pytest.raises(KeyboardInterrupt):
            yield


def test_data_goes_on_where_it_stopped(root: Path, config: TrainConfig, tmp_path: Path) -> None:
    part = config.model_copy(update={"work": tmp_path, "data": config.data.model_copy(update={"limit": 10})})
    assert generate_data(part).sequences == 10
    assert generate_data(part.model_copy(update={"data": config.data})).sequences == 24
    index = [json.loads(line) for line in (tmp_path / "data/shard0of1/index.jsonl").read_text().splitlines()]
    assert len({row["id"] for row in index}) == 24


@pytest.mark.parametrize("train", sampled([train_eagle3, train_dflash, train_dspark], train_eagle3, train_dspark))
def test_a_killed_run_resumes_to_the_same_weights(
    train: object, root: Path, config: TrainConfig, tmp_path: Path
) -> None:
    def run(work: Path) -> Path:
        work.mkdir(exist_ok=True)
        if not (work / "data").exists():
            (work / "data").symlink_to(config.work / "data")
        return train(config.model_copy(update={"work": work}), root / "target")

    expected = weights(run(tmp_path / "whole"))
    with dying():
        run(tmp_path / "killed")
    found = weights(run(tmp_path / "killed"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert any(name.endswith("mlp.down_proj.weight") for name in found)


@pytest.fixture(scope="module")
def killed(root: Path, config: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """A run that ended after its first checkpoint."""
    work = tmp_path_factory.mktemp("killed")
    shutil.copytree(config.work / "data", work / "data")
    begun = config.model_copy(update={"work": work})
    with dying():
        train_eagle3(begun, root / "target")
    return begun


def copied(begun: TrainConfig, work: Path) -> TrainConfig:
    shutil.copytree(begun.work, work)
    return begun.model_copy(update={"work": work})


def _other_data(other: TrainConfig) -> TrainConfig:
    [shard] = open_stores(other)
    record = shard.records[0]
    sequence = shard.read(record)
    states = torch.cat([sequence.features, sequence.final[:, None]], 1)
    shard.append(record._replace(id="new"), sequence.tokens.tolist(), states)
    return other


def _another_configuration(other: TrainConfig) -> TrainConfig:
    loop = other.eagle3.loop.model_copy(update={"epochs": 9.0})
    return other.model_copy(update={"eagle3": other.eagle3.model_copy(update={"loop": loop})})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_other_data, r"eagle3/trainer holds a run with other arguments: data\.shard0of1 was"),
        (_another_configuration, r"configuration\.eagle3\.loop\.epochs was .* and is 9\.0\. .* remove"),
        (None, "--start-from was None and is '"),
    ],
)
def test_a_run_does_not_go_on_as_another(
    root: Path, killed: TrainConfig, config: TrainConfig, tmp_path: Path, change: Any, message: str
) -> None:
    other = copied(killed, tmp_path / "work")
    start = None if change else train_eagle3(config, root / "target")
    if change:
        other = change(other)
    with pytest.raises(ConfigError, match=message):
        train_eagle3(other, root / "target", start)


def test_what_decides_no_weight_may_change(root: Path, killed: TrainConfig, tmp_path: Path) -> None:
    """The other drafter's section, the prompts, where the files lie."""
    loss, data = killed.dflash.model_copy(update={"gamma": 7.0}), killed.data.model_copy(update={"limit": 3})
    other = copied(killed, tmp_path / "moved").model_copy(update={"dflash": loss, "data": data})
    assert (train_eagle3(other, root / "target") / "model.safetensors").exists()


def test_answers_do_not_go_on_under_another_configuration(config: TrainConfig, tmp_path: Path) -> None:
    part = config.model_copy(update={"work": tmp_path, "data": config.data.model_copy(update={"limit": 2})})
    generate_data(part)
    hotter = part.model_copy(update={"data": part.data.model_copy(update={"temperature": 0.5})})
    with pytest.raises(ConfigError, match=r"configuration\.data\.temperature was 1\.0 and is 0\.5"):
        generate_data(hotter)


def test_what_another_shard_has_answered_is_not_answered_again(config: TrainConfig, tmp_path: Path) -> None:
    """As one that `whiflash lab features` has written."""
    shutil.copytree(config.work / "data" / SHARD, tmp_path / "data" / "shard-kept")
    kept = tmp_path / "data" / "shard-kept" / "index.jsonl"
    kept.write_text("".join(kept.read_text().splitlines(keepends=True)[:12]))
    for _ in range(2):
        rest = generate_data(config.model_copy(update={"work": tmp_path}))
        assert (rest.sequences, rest.elsewhere) == (12, 12)
    stores = open_stores(config.model_copy(update={"work": tmp_path}))
    names = [record.id for shard in stores for record in shard.records]
    assert len(names) == len(set(names)) == 24


@pytest.mark.parametrize("step", ["data", "eagle3"])
def test_two_runs_do_not_write_in_one_directory(root: Path, config: TrainConfig, step: str) -> None:
    with store.alone(config.work / step):
        result = CliRunner().invoke(app, ["train", "--step", step, "--config", str(root / "tiny.yaml")])
    assert f"another run works in {config.work / step}" in str(result.exception)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda file: os.truncate(file, 300),
        lambda file: os.truncate(file, 0),
        lambda file: file.write_bytes(file.read_bytes().replace(b"\x01", b"\x02")),
        lambda file: np.save(file.open("wb"), np.arange(4)),
        lambda file: np.savez(file.open("wb"), ids=np.array(["a"])),
    ],
)
def test_a_damaged_file_of_tokens_is_named(config: TrainConfig, tmp_path: Path, spoil: Any) -> None:
    export_tokens(open_stores(config), tmp_path / "tokens.npz")
    spoil(tmp_path / "tokens.npz")
    with pytest.raises(ConfigError, match=r"tokens\.npz holds no answers' token ids"):
        Exported(tmp_path / "tokens.npz")


def test_prompts_that_share_an_id_are_refused(config: TrainConfig, tmp_path: Path) -> None:
    twice = config.data.model_copy(update={"prompts": config.data.prompts * 2})
    with pytest.raises(ConfigError, match="two prompts have the id 'r0'"):
        generate_data(config.model_copy(update={"work": tmp_path, "data": twice}))


def test_a_prompt_that_was_answered_twice_is_learned_from_once(config: TrainConfig, tmp_path: Path) -> None:
    """By older shards, or in a file of tokens that holds both: the first answer counts."""
    for name in ("shard0of1", "shard1of2"):
        shutil.copytree(config.work / "data/shard0of1", tmp_path / "data" / name)
    stores = open_stores(config.model_copy(update={"work": tmp_path}))
    assert [len(shard.records) for shard in stores] == [24, 24]
    one, both = (SequenceBatches(part, 1024, 4, 0) for part in (stores[:1], stores))
    assert (len(both), both.answer_tokens) == (len(one), one.answer_tokens)
    assert torch.equal(token_frequencies(stores, 512), token_frequencies(stores[:1], 512))
    export_tokens(stores, tmp_path / "tokens.npz")
    assert len(Exported(tmp_path / "tokens.npz").ids) == 24
    double = {name: np.concatenate([column, column]) for name, column in dict(np.load(tmp_path / "tokens.npz")).items()}
    np.savez_compressed(tmp_path / "double.npz", **double)
    with shard_of(config.model_copy(update={"work": tmp_path / "other"}), "shard") as (target, store):
        assert rebuild_features(tmp_path / "double.npz", target, store) == 24
        assert rebuild_features(tmp_path / "double.npz", target, store) == 0
    assert [record.id for record in store.records] == Exported(tmp_path / "tokens.npz").ids


@pytest.mark.parametrize(
    ("part", "arm", "train"), [("eagle3", "ar", train_eagle3), ("dflash", "diffusion", train_dflash)]
)
def test_a_bundle_of_one_drafter_is_evaluated(
    root: Path, config: TrainConfig, tmp_path: Path, part: str, arm: str, train: Any
) -> None:
    """`test_dspark_training.py` evaluates both drafters."""
    bundle = tmp_path / "bundle"
    shutil.copytree(train(config, root / "target"), bundle / part)
    manifest = {"schema_version": 1, "name": "tiny", "target": str(root / "target"), part: part}
    (bundle / "whiflash.json").write_text(json.dumps(manifest))
    options = EvaluationSettings(max_new_tokens=8, limit=4, hardware=Hardware(dtype="float32"))
    result = evaluate_bundle(bundle, root / "prompts.jsonl", options)
    assert set(result["overall"]["acceptance_length"]) == {arm}
    figures_table(result)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colour": 1, "shape": 2}, "colour: Extra inputs.*; shape: Extra"),
        ({"capture": [1, 0]}, "ascending"),
        ({"capture": [0, 1, 2]}, "not in capture"),
        ({"capture": []}, "capture: List should have at least 1 item"),
        ({"capture": [-1, 8]}, "capture.0: "),
        ({"hardware": {"device": "abacus"}}, "hardware.device"),
    ],
)
def test_a_wrong_configuration_names_the_key(root: Path, tmp_path: Path, change: dict, message: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(settings(root) | change))
    with pytest.raises(ConfigError, match=message):
        load_config(file)


def test_what_a_step_lacks_is_named(config: TrainConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="run `whiflash train --step data` first"):
        train_eagle3(config.model_copy(update={"work": tmp_path}), Path(config.target))


def test_the_disk_bound_stops_the_run_and_keeps_the_data(config: TrainConfig, tmp_path: Path) -> None:
    bounded = config.data.model_copy(update={"max_disk_gb": 2e-5})
    summary = generate_data(config.model_copy(update={"work": tmp_path, "data": bounded}))
    assert summary.stopped is not None
    assert "max_disk_gb" in summary.stopped
    assert 0 < summary.sequences < 24


def test_recomputed_features_equal_the_kept_ones(root: Path, config: TrainConfig, tmp_path: Path) -> None:
    tiny, other, tokens = root / "tiny.yaml", tmp_path / "other.yaml", tmp_path / "tokens.npz"
    ran("lab", "export", tokens, "--config", tiny)
    other.write_text(yaml.safe_dump(settings(root) | {"work": str(tmp_path / "work")}))
    for recomputed in (24, 0):
        assert json.loads(ran("lab", "features", tokens, "--config", other))["recomputed"] == recomputed
    kept, again = (open_stores(load_config(file))[0] for file in (tiny, other))
    for first, second in zip(kept.records, again.records, strict=True):
        one, two = kept.read(first), again.read(second)
        assert torch.equal(one.tokens, two.tokens)
        torch.testing.assert_close(one.features, two.features, rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(one.final, two.final, rtol=2e-2, atol=2e-2)


def test_an_unfinished_checkpoint_is_passed_over(
    root: Path, config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full while the second checkpoint is written: the error says so, and the first one is gone on from."""
    from transformers import Trainer

    (tmp_path / "data").symlink_to(config.work / "data")
    (tmp_path / "full.yaml").write_text(yaml.safe_dump(settings(root) | {"work": str(tmp_path)}))
    original = Trainer._save_rng_state

    def full(self: Trainer, output_dir: str) -> None:
        if self.state.global_step >= 8:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(self, output_dir)

    command = ["train", "--step", "eagle3", "--config", str(tmp_path / "full.yaml")]
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_save_rng_state", full)
        result = CliRunner().invoke(app, command)
    assert result.exit_code == 1
    assert "No space left on device" in str(result.exception)
    left = sorted(path.name for path in (tmp_path / "eagle3/trainer").glob("checkpoint-*"))
    assert left == ["checkpoint-4", "checkpoint-8"]
    step, checkpoint = CliRunner().invoke(app, command).stdout.splitlines()
    assert step == "step: eagle3"
    found = weights(Path(checkpoint.removeprefix("checkpoint: ")))
    whole = weights(train_eagle3(config, root / "target"))
    assert all(torch.equal(found[name], whole[name]) for name in whole)


def test_a_full_disk_loses_no_answer(config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = config.model_copy(update={"work": tmp_path})
    original, writes = store._append, [0]

    def full(path: Path, data: bytes) -> None:
        writes[0] += 1
        if writes[0] == 17:  # the features of the sixth answer
            original(path, data[:100])
            raise OSError(errno.ENOSPC, "No space left on device")
        original(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(store, "_append", full)
        with pytest.raises(OSError, match="No space left"):
            generate_data(elsewhere)
    assert len(open_stores(elsewhere)[0].records) == 5
    assert generate_data(elsewhere).sequences == 24
    kept, again = open_stores(config)[0], open_stores(elsewhere)[0]
    assert {record.id for record in kept.records} == {record.id for record in again.records}
    assert len(again.records) == 24


def test_prompts_longer_than_the_context_say_so(root: Path, config: TrainConfig, tmp_path: Path) -> None:
    row = {"id": "long", "messages": [{"role": "user", "content": "word " * 2000}]}
    (tmp_path / "long.jsonl").write_text(json.dumps(row) + "\n")
    data = settings(root)["data"] | {"prompts": [str(tmp_path / "long.jsonl")]}
    (tmp_path / "long.yaml").write_text(yaml.safe_dump(settings(root) | {"work": str(tmp_path / "work"), "data": data}))
    result = CliRunner().invoke(app, ["train", "--step", "data", "--config", str(tmp_path / "long.yaml")])
    assert result.exit_code == 1
    assert "and 24 tokens exceed the context" in result.output
    assert "none of 1 prompts gave an answer" in str(result.exception)
