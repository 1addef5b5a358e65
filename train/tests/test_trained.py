"""A target that SGLang alone runs, as a user does it: answered, learned from, and served with what was learned."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from engine import engine
from families import FAMILIES, HuggingFace, tiny_family
from matrix import sampled
from patience import at_start
from reference import Comparison
from tiny_models import save_tokenizer, tiny_target
from typer.testing import CliRunner

import whiflash_train as train
from whiflash_sglang.cli.app import app
from whiflash_train.answers.store import FeatureStore, open_stores
from whiflash_train.config import TrainConfig, load_config
from whiflash_train.drafters.runner import train_drafter

PROMPTS = 24
SIZES = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 128}


def settings(root: Path) -> dict[str, Any]:
    """The tiny configuration for a target of experts: drafters begin as none of its layers."""
    tiny = yaml.safe_load((Path(train.__path__[0]) / "configs/tiny.yaml").read_text())
    loop = {"loop": {"epochs": 8, "answer_tokens": 64, "save_steps": 100, "log_steps": 2}}
    changed = {"prompts": [str(root / "prompts.jsonl")], "temperature": 0.0, "max_disk_gb": 1}
    tiny["data"] |= {**changed, "engine": {"max_running_requests": 8}}
    del tiny["eagle3"]["source_layer"], tiny["dflash"]["source_layers"], tiny["dspark"]["source_layers"]
    tiny["eagle3"] |= loop
    tiny["dflash"] |= {"num_layers": 2, **loop}
    tiny["dspark"] |= {"num_layers": 2, **loop}
    return tiny | {"target": str(root / "target"), "work": str(root / "work"), "draft_layers": SIZES}


COMMANDS = """
import json, signal, sys
from whiflash_sglang.cli.app import app
from whiflash_train.engine import offline

if __name__ == "__main__":
    TAKEN = lambda *_: sys.exit(143)
    signal.signal(signal.SIGTERM, TAKEN)
    started, start = [], offline.OfflineEngine
    offline.OfflineEngine = lambda *given, **named: started[0] if started else started.append(
        start(*given, **named)
    ) or started[0]
    close, start.close = start.close, lambda engine: None
    for command in json.loads(sys.argv[1]):
        app(command, standalone_mode=False)
    assert signal.getsignal(signal.SIGTERM) is not TAKEN, "SGLang takes it once requests have run"
    close(started[0])
    assert signal.getsignal(signal.SIGTERM) is TAKEN
"""
"""Commands in one process, with one engine: each start takes SGLang a minute."""


def whiflash_train(directory: Path, *commands: list[str]) -> list[dict[str, Any]]:
    """In a process of its own: an engine of SGLang's ends its process's children, and leaves its settings behind."""
    script = directory / "commands.py"
    script.write_text(COMMANDS)
    done = subprocess.run(
        [sys.executable, str(script), json.dumps(commands)],
        env=os.environ,
        capture_output=True,
        text=True,
        timeout=600 * at_start(),
        check=False,
    )
    assert done.returncode == 0, done.stderr
    decoder, found, rest = json.JSONDecoder(), [], done.stdout.lstrip()
    while rest:
        one, end = decoder.raw_decode(rest)
        found.append(one)
        rest = rest[end:].lstrip()
    return found


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory: Path = tmp_path_factory.mktemp("served")
    rows = [{"id": f"r{i}", "messages": [{"role": "user", "content": f"say {i}"}]} for i in range(PROMPTS)]
    (directory / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


@pytest.fixture(scope="module")
def model(root: Path) -> HuggingFace:
    found = tiny_family(root / "target", FAMILIES["Qwen3MoeForCausalLM"])
    save_tokenizer(root / "target")
    return found


@pytest.fixture(scope="module")
def config(root: Path, model: HuggingFace) -> TrainConfig:
    (root / "served.yaml").write_text(yaml.safe_dump(settings(root)))
    with_config = ["--config", str(root / "served.yaml"), "--json"]
    tokens = str(root / "again.npz")
    of_tokens = [["lab", name, tokens, *with_config] for name in ("export", "features")]
    answered, _, recomputed = whiflash_train(root, ["train", "--step", "data", *with_config], *of_tokens)
    assert answered["sequences"] == PROMPTS
    assert recomputed == {"recomputed": PROMPTS, "sequences": PROMPTS}
    return load_config(root / "served.yaml")


def check(store: FeatureStore, model: HuggingFace, capture: list[int]) -> None:
    """Tokens are the target's own first choices, features its layers' outputs, rounded as they are stored."""
    for record in store.records:
        found = store.read(record)
        text = found.tokens[:-1].tolist()
        wanted = model.features(text, capture).view(len(text), len(capture), -1)
        torch.testing.assert_close(found.features.float(), wanted, rtol=0.01, atol=0.01)
        with torch.inference_mode():
            logits = model.model(torch.tensor([text])).logits[0, record.prompt_length - 1 :]
        chosen = logits.gather(1, found.tokens[record.prompt_length :, None])[:, 0]
        assert (logits.amax(1) - chosen).max() <= 1e-4
        head = model.model.get_output_embeddings().weight
        theirs = found.final[record.prompt_length - 1 :].float() @ head.T
        torch.testing.assert_close(theirs, logits, rtol=0.02, atol=0.05)


def test_answers_and_features_are_the_targets(model: HuggingFace, config: TrainConfig) -> None:
    """Answers that are there already have their features, too."""
    answered, again = sorted(open_stores(config), key=lambda store: store.path.name != "shard0of1")
    assert (len(answered.records), again.path.name) == (PROMPTS, "shard-again")
    for store in (answered, again):
        check(store, model, config.capture)
    assert list((config.work / "passing" / "shard0of1").iterdir()) == []


@pytest.mark.parametrize("block", sampled(["dflash", "dspark"], "dspark"))
def test_what_was_learned_is_served(
    block: str, root: Path, model: HuggingFace, config: TrainConfig, tmp_path: Path
) -> None:
    """The loss falls, and text with the drafters is plain decoding's."""
    (tmp_path / "data").symlink_to(config.work / "data")
    (tmp_path / "target").symlink_to(config.work / "target")
    mine = config.model_copy(update={"work": tmp_path})
    trained = [train_drafter(name, mine, root / "target") for name in ("eagle3", block)]
    for checkpoint in trained:
        log = json.loads((checkpoint / "provenance.json").read_text())["log"]
        losses = [line["loss"] for line in log if "loss" in line]
        print(checkpoint.parent.name, losses)
        assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    prompts = [list(range(30 + 7 * i, 60 + 9 * i)) for i in range(4)]
    with engine(root / "target") as e:
        expected = e.generate(prompts, max_new_tokens=40)
    eagle3, drafts = trained
    flags = {"draft": drafts, "whiflash_eagle_draft": str(eagle3), "whiflash_router": "random"}
    comparison = Comparison(model)
    with engine(root / "target", whiflash=flags) as e:
        found = e.generate(prompts, max_new_tokens=40)
        accepted = sum(e.rounds(rid)[1] for rid in e.requests)
    for prompt, wanted, text in zip(prompts, expected, found, strict=True):
        comparison.check(prompt, wanted, text, block)
    print(f"{accepted} drafts accepted")
    assert accepted > 10


def refused(root: Path, *, command: str = "data", **changes: Any) -> str:
    """Error of a command for a configuration with these changes, before anything is started."""
    file = root / "changed.yaml"
    file.write_text(yaml.safe_dump(settings(root) | changes))
    result = CliRunner().invoke(app, ["train", "--step", command, "--config", str(file)])
    assert result.exit_code == 1, result.output
    return str(result.exception)


def test_what_cannot_be_is_named(root: Path, model: HuggingFace, tmp_path: Path) -> None:
    data = settings(root)["data"]
    assert "layers that can be captured are 0 to 4" in refused(root, capture=[0, 1, 2, 3, 4, 5])
    engine_of = {"engine": {"speculative_algorithm": "EAGLE3"}}
    assert "data.engine.speculative_algorithm" in refused(root, data=data | engine_of)
    assert "data.engine.pp_size" in refused(root, data=data | {"engine": {"pp_size": 2}})
    missing = refused(root, command="eagle3", work=str(tmp_path / "empty"))
    assert "run `whiflash train --step data` first" in missing
    dense = tiny_target(tmp_path / "dense")
    assert "leave draft_layers out" in refused(root, command="eagle3", target=str(dense))
    no_layers = settings(root)["dflash"] | {"num_layers": None}
    assert "source_layers [] and num_layers None" in refused(root, dflash=no_layers)


def test_a_drafter_begins_as_no_layer_of_such_a_target(root: Path, config: TrainConfig) -> None:
    for section, key in (("eagle3", {"source_layer": 5}), ("dflash", {"source_layers": [4, 5]})):
        changed = {section: settings(root)[section] | key, "work": str(config.work)}
        said = refused(root, command=section, **changed)
        assert f"leave {section}.{next(iter(key))} out" in said
