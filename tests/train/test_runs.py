"""The whole path on a tiny random target: data, both drafters, evaluation; resumed runs equal uninterrupted ones."""

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny_models import tiny_target
from typer.testing import CliRunner

from whiflash_sglang.errors import ConfigError
from whiflash_sglang.train import cli, store
from whiflash_sglang.train.cli import train_app
from whiflash_sglang.train.config import TrainConfig, load_config
from whiflash_sglang.train.data import generate_data
from whiflash_sglang.train.evaluation import EvaluationSettings, Hardware, evaluate_bundle, write_picture
from whiflash_sglang.train.provenance import digest_of
from whiflash_sglang.train.router_run import choose_answers
from whiflash_sglang.train.runner import open_stores, train_dflash, train_eagle3

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def settings(root: Path) -> dict[str, Any]:
    """The shipped tiny configuration with its files under `root`."""
    tiny = yaml.safe_load((Path(cli.__file__).parent / "configs/tiny.yaml").read_text())
    data = tiny["data"] | {"prompts": [str(root / "prompts.jsonl")]}
    return tiny | {"target": str(root / "target"), "work": str(root / "work"), "data": data}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("train")
    tiny_target(directory / "target")
    rows = [
        {
            "id": f"r{i}",
            "category": ("chat", "code")[i % 2],
            "messages": [{"role": "user", "content": f"say {i}"}],
        }
        for i in range(24)
    ]
    (directory / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "tiny.yaml").write_text(yaml.safe_dump(settings(directory)))
    return directory


@pytest.fixture(scope="module")
def config(root: Path) -> TrainConfig:
    result = CliRunner().invoke(train_app, ["data", "--config", str(root / "tiny.yaml"), "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["sequences"] == 24
    return load_config(root / "tiny.yaml")


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def test_data_goes_on_where_it_stopped(root: Path, config: TrainConfig, tmp_path: Path) -> None:
    part = config.model_copy(update={"work": tmp_path, "data": config.data.model_copy(update={"limit": 10})})
    assert generate_data(part).sequences == 10
    whole = generate_data(part.model_copy(update={"data": config.data}))
    assert whole.sequences == 24
    index = [json.loads(line) for line in (tmp_path / "data/shard0of1/index.jsonl").read_text().splitlines()]
    assert len({row["id"] for row in index}) == 24


@pytest.mark.parametrize("train", [train_eagle3, train_dflash])
def test_a_killed_run_resumes_to_the_same_weights(
    train: object, root: Path, config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import Trainer

    def run(work: Path) -> Path:
        work.mkdir(exist_ok=True)
        if not (work / "data").exists():
            (work / "data").symlink_to(config.work / "data")
        return train(config.model_copy(update={"work": work}), root / "target")

    expected = weights(run(tmp_path / "whole"))
    original = Trainer.training_step

    def dies(self: Trainer, *args: object, **kwargs: object) -> torch.Tensor:
        if self.state.global_step == 6:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "training_step", dies)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "killed")
    found = weights(run(tmp_path / "killed"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    changed = [name for name in found if name.endswith("mlp.down_proj.weight")]
    assert changed


def test_a_bundle_is_evaluated(root: Path, config: TrainConfig, tmp_path: Path) -> None:
    eagle3 = train_eagle3(config, root / "target")
    dflash = train_dflash(config, root / "target")
    assert json.loads((eagle3 / "provenance.json").read_text())["config"]["eagle3"]["steps"] == 3
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    manifest = {
        "schema_version": 1,
        "name": "tiny",
        "target": str(root / "target"),
        "eagle3": str(eagle3),
        "dflash": str(dflash),
    }
    (bundle / "whiflash.json").write_text(json.dumps(manifest))
    options = EvaluationSettings(
        max_new_tokens=24, work=tmp_path / "work", hardware=Hardware(dtype="float32")
    )
    result = evaluate_bundle(bundle, root / "prompts.jsonl", options)
    assert set(result["categories"]) <= {"chat", "code"}
    lengths = result["overall"]["acceptance_length"]
    assert 1 <= max(lengths["eagle3"], lengths["dflash"]) <= lengths["oracle"] + 1e-9
    write_picture(result, tmp_path / "lengths.png")
    assert (tmp_path / "lengths.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colour": 1}, "colour: Extra inputs"),
        ({"capture": [1, 0]}, "ascending"),
        ({"capture": [0, 1, 2]}, "not in capture"),
        ({"hardware": {"device": "abacus"}}, "hardware.device"),
    ],
)
def test_a_wrong_configuration_names_the_key(root: Path, tmp_path: Path, change: dict, message: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(settings(root) | change))
    with pytest.raises(ConfigError, match=message):
        load_config(file)


def test_capturing_the_last_layer_is_refused(root: Path, config: TrainConfig) -> None:
    with pytest.raises(ConfigError, match="can be captured are 0 to 4"):
        generate_data(config.model_copy(update={"capture": [0, 5]}))


def test_the_disk_bound_stops_the_run_and_keeps_the_data(config: TrainConfig, tmp_path: Path) -> None:
    bounded = config.data.model_copy(update={"max_disk_gb": 2e-5})
    summary = generate_data(config.model_copy(update={"work": tmp_path, "data": bounded}))
    assert summary.stopped is not None
    assert "max_disk_gb" in summary.stopped
    assert 0 < summary.sequences < 24


def test_training_without_data_says_what_to_run(root: Path, config: TrainConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="run `whiflash train data` first"):
        train_eagle3(config.model_copy(update={"work": tmp_path}), root / "target")


def test_recomputed_features_equal_the_kept_ones(root: Path, config: TrainConfig, tmp_path: Path) -> None:
    arguments = ["--config", str(root / "tiny.yaml"), "--json"]
    exported = CliRunner().invoke(train_app, ["export", str(tmp_path / "tokens.npz"), *arguments])
    assert exported.exit_code == 0, exported.output
    elsewhere = settings(root) | {"work": str(tmp_path / "work")}
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(elsewhere))
    command = ["features", str(tmp_path / "tokens.npz"), "--config", str(tmp_path / "other.yaml"), "--json"]
    for recomputed in (24, 0):
        result = CliRunner().invoke(train_app, command)
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["recomputed"] == recomputed
    kept, again = (
        open_stores(load_config(file))[0] for file in (root / "tiny.yaml", tmp_path / "other.yaml")
    )
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

    command = ["eagle3", "--config", str(tmp_path / "full.yaml"), "--json"]
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_save_rng_state", full)
        result = CliRunner().invoke(train_app, command)
    assert result.exit_code == 1
    assert "No space left on device" in result.output
    left = sorted(path.name for path in (tmp_path / "eagle3/trainer").iterdir())
    assert left == ["checkpoint-4", "checkpoint-8"]
    result = CliRunner().invoke(train_app, command)
    assert result.exit_code == 0, result.output
    whole = weights(train_eagle3(config, root / "target"))
    found = weights(Path(json.loads(result.stdout)["checkpoint"]))
    assert all(torch.equal(found[name], whole[name]) for name in whole)


def test_a_full_disk_loses_no_answer(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    row = {"id": "long", "messages": [{"role": "user", "content": "word " * 200}]}
    (tmp_path / "long.jsonl").write_text(json.dumps(row) + "\n")
    data = settings(root)["data"] | {"prompts": [str(tmp_path / "long.jsonl")]}
    (tmp_path / "long.yaml").write_text(
        yaml.safe_dump(settings(root) | {"work": str(tmp_path / "work"), "data": data})
    )
    result = CliRunner().invoke(train_app, ["data", "--config", str(tmp_path / "long.yaml")])
    assert result.exit_code == 1
    assert "leave no room for 24 new ones" in result.output
    assert "data.slots of a larger capacity" in result.output


def test_no_prompts_at_all(root: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    data = settings(root)["data"] | {"prompts": [str(tmp_path / "empty.jsonl")]}
    (tmp_path / "empty.yaml").write_text(yaml.safe_dump(settings(root) | {"data": data}))
    result = CliRunner().invoke(train_app, ["data", "--config", str(tmp_path / "empty.yaml")])
    assert result.exit_code == 1
    assert "empty.jsonl holds no prompts" in result.output


def test_answers_that_no_drafter_saw_come_first(root: Path, config: TrainConfig, tmp_path: Path) -> None:
    store = open_stores(config)[0]
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    assert len(choose_answers([store], [checkpoint], 99)) == 24  # no record: it may have seen all of them
    seen = {"sequences": 20, "index_sha256": digest_of(store.records[:20])}
    (checkpoint / "provenance.json").write_text(json.dumps({"data": [seen]}))
    chosen = [source.record.id for source in choose_answers([store], [checkpoint], 99)]
    assert chosen[:4] == [record.id for record in store.records[20:]]
    assert len(chosen) == 24
    # Another shard with the same prompts brings nothing new.
    assert [one.record.id for one in choose_answers([store, store], [checkpoint], 99)] == chosen
    assert [one.record.id for one in choose_answers([store], [checkpoint], 2)] == chosen[:2]
