"""DSpark training: each term of the loss by a plain formula, what a run begins with, and a trained drafter served."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
import yaml
from engine import engine
from reference import Comparison, ReferenceTarget
from tiny_models import MASK_TOKEN, edit, tiny_dflash, tiny_eagle3
from torch import Tensor
from typer.testing import CliRunner

import whiflash_train as train
from whiflash_sglang.checkpoints.fit import block_size_of
from whiflash_sglang.cli.app import app
from whiflash_sglang.drafts import arms
from whiflash_sglang.errors import ConfigError
from whiflash_sglang.formats.dflash.dflash import DFlashDrafter
from whiflash_sglang.formats.dflash.dspark import DSparkDrafter
from whiflash_sglang.formats.table import read_draft
from whiflash_train.answers.store import Sequence as Stored
from whiflash_train.answers.store import SequenceRecord
from whiflash_train.config import DSpark, TrainConfig, load_config
from whiflash_train.drafters.batches import Batch, unpack
from whiflash_train.drafters.dspark import DSparkTraining, go_on_from, initialise
from whiflash_train.drafters.initialisation import check_start
from whiflash_train.drafters.runner import train_drafter
from whiflash_train.origin import for_training
from whiflash_train.replay import Pair, PairParts, replay_drafters
from whiflash_train.target import TargetModel

SETTINGS = DSpark(
    target_layers=[1, 3, 4],
    source_layers=[4, 5],
    block_size=5,
    mask_token_id=MASK_TOKEN,
    markov_rank=8,
    gamma=2.0,
    anchors_per_token=0.5,
    frequent=96,
    sampled=32,
)


@pytest.fixture(scope="module")
def batch() -> Batch:
    """Two random sequences; tokens that the loss's vocabulary has not are among them."""
    generator = torch.Generator().manual_seed(0)
    lengths, prompts = torch.tensor([23, 12]), torch.tensor([4, 3])
    rows = int(lengths.sum()) - len(lengths)
    tokens = torch.randint(0, 250, (int(lengths.sum()),), generator=generator)
    features = torch.randn(rows, 5, 64, generator=generator)
    return unpack(tokens, features, torch.randn(rows, 64, generator=generator), lengths, prompts)


def training(target: TargetModel, settings: DSpark) -> DSparkTraining:
    """With heads that say something."""
    torch.manual_seed(1)
    drafter = initialise(target, settings)
    with torch.no_grad():
        for parameter in drafter.heads().values():
            parameter.normal_(std=0.4)
    columns = settings.target_layers
    frequent = torch.arange(0, 2 * settings.frequent, 2)
    given = {"columns": columns, "frequent": frequent, "sampled": settings.sampled}
    return DSparkTraining(drafter, settings, anchors_per_token=settings.anchors_per_token, **given).train()


def plain_loss(trained: DSparkTraining, batch: Batch, ids: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of all blocks of the same seed, draft by draft; and what its terms come to, weighted."""
    drafter, settings = trained.drafter, trained.settings
    torch.manual_seed(7)
    examples = trained.examples(batch)
    assert examples.ids.tolist() == ids
    total, weight = {"cross_entropy": 0.0, "distance": 0.0, "confidence": 0.0}, torch.zeros(())
    w1, w2 = drafter.markov_head["markov_w1"].weight, drafter.markov_head["markov_w2"].weight
    confidence = drafter.confidence_head["proj"]
    for block in range(len(examples.rows)):
        for k in range(drafter.config.max_drafts):
            row, before = examples.rows[block, k], int(examples.before[block, k])
            wanted = examples.labels.weights[block * drafter.config.max_drafts + k]
            emitted = int(examples.labels.ids[block * drafter.config.max_drafts + k])
            if not examples.valid[block, k] or emitted < 0:
                continue
            logits = examples.head.float() @ row + examples.bias + w2[ids] @ w1[before]
            own = logits.exp() / logits.exp().sum()
            distance = (own - wanted).abs().sum()
            right = torch.minimum(own, wanted).sum().detach()
            if settings.confidence_of == "choice":
                right = torch.tensor(float(int(own.argmax()) == emitted))
            sure = 1 / (1 + torch.exp(-(confidence(torch.cat([row, w1[before]]))[0])))
            bce = -(right * sure.log() + (1 - right) * (1 - sure).log())
            terms = {"cross_entropy": -(wanted * own.log()).sum(), "distance": distance, "confidence": bce}
            w = torch.exp(torch.tensor(-k / settings.gamma))
            weight = weight + w
            total = {name: value + w * terms[name] for name, value in total.items()}
    parts = {name: value / weight for name, value in total.items()}
    return sum(getattr(settings, name) * value for name, value in parts.items()), parts


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"confidence_of": "choice"},
        {"sample_from_anchor": False, "cross_entropy": 1.0, "distance": 0.0, "confidence": 0.3},
    ],
    ids=["published", "of choices", "cross-entropy"],
)
def test_the_loss_is_its_formula(target: TargetModel, batch: Batch, changes: dict[str, Any]) -> None:
    trained = training(target, SETTINGS.model_copy(update=changes))
    torch.manual_seed(7)
    examples = trained.examples(batch)
    assert (examples.valid & ~examples.counted).any(), "no token without a label"
    assert not examples.valid.all(), "no block beyond its text"
    found = trained.loss(examples)
    expected, parts = plain_loss(trained, batch, examples.ids.tolist())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert trained.metrics["confidence_loss"] == pytest.approx(float(parts["confidence"].detach()), rel=1e-4)
    learned = dict(trained.drafter.named_parameters())
    gradients = torch.autograd.grad(found, list(learned.values()))
    for name, one, other in zip(learned, gradients, torch.autograd.grad(expected, list(learned.values())), strict=True):
        torch.testing.assert_close(one, other, rtol=2e-3, atol=2e-5, msg=lambda said, name=name: f"{name}: {said}")


def test_a_drafts_label_and_predecessor_are_the_texts(target: TargetModel, batch: Batch) -> None:
    trained = training(target, SETTINGS.model_copy(update={"anchors_per_token": 1.0, "sampled": 1000}))
    examples = trained.examples(batch)
    row = 0
    for span in batch.spans:
        text = batch.tokens[span.token : span.token + span.length].tolist()
        for anchor in range(span.prompt, span.length - 1):
            for k in range(4):
                assert bool(examples.valid[row, k]) == (anchor + 1 + k < span.length)
                if examples.valid[row, k]:
                    assert int(examples.before[row, k]) == text[anchor + k]
                    label = int(examples.labels.ids[row * 4 + k])
                    assert int(examples.ids[label]) == text[anchor + k + 1]
            row += 1
    assert row == len(examples.rows)


@torch.no_grad()
def test_it_goes_on_from_a_dflash_checkpoint_proposing_the_same(
    path: Path, target: TargetModel, tmp_path: Path
) -> None:
    start = tiny_dflash(tmp_path / "dflash", path)
    trunk = DFlashDrafter.load(start, **for_training(target))
    settings = SETTINGS.model_copy(update={"target_layers": list(trunk.config.target_layer_ids), "block_size": 8})
    drafter = go_on_from(start, target, settings)
    assert (drafter.config.from_anchor, drafter.config.max_drafts) == (False, 7)
    drafter.save(tmp_path / "saved", torch.float32)
    again = read_draft(tmp_path / "saved").load(**for_training(target))
    assert isinstance(again, DSparkDrafter)
    assert again.config == replace(drafter.config)
    states, bonus = torch.randn(5, 8, 64, generator=torch.Generator().manual_seed(4)), torch.arange(5)
    expected = trunk.propose(states, bonus, 7, trunk.head).token
    for one in (drafter, again):
        assert torch.equal(one.propose(states, bonus, 7, one.head).token, expected)
    own = dict(again.named_parameters())
    assert all(torch.equal(own[name], parameter) for name, parameter in trunk.named_parameters())
    again.markov_head["markov_w2"].weight.normal_()
    again.save(tmp_path / "later", torch.float32)
    later = go_on_from(tmp_path / "later", target, settings.model_copy(update={"block_size": 12}))
    assert later.config.max_drafts == 11
    assert all(torch.equal(one, own[name]) for name, one in later.named_parameters())


class Trained(NamedTuple):
    """A run from the command line, and its configuration."""

    config: TrainConfig
    target: Path
    checkpoint: Path


@pytest.fixture(scope="module")
def trained(path: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Some epochs on a random target's own greedy answers."""
    root = tmp_path_factory.mktemp("trained")
    rows = [{"id": f"r{i}", "messages": [{"role": "user", "content": f"say {i}"}]} for i in range(16)]
    (root / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tiny = yaml.safe_load((Path(train.__path__[0]) / "configs/tiny.yaml").read_text())
    tiny |= {"target": str(path), "work": str(root / "work"), "block_drafter": "dspark"}
    tiny["data"] |= {"prompts": [str(root / "prompts.jsonl")], "temperature": 0.0}
    for part, epochs in (("dspark", 30), ("eagle3", 10)):
        tiny[part]["loop"] |= {"epochs": epochs, "learning_rate": 2e-3}
    file = root / "tiny.yaml"
    file.write_text(yaml.safe_dump(tiny))
    for command in ("data", "dspark"):
        result = CliRunner().invoke(app, ["train", "--step", command, "--config", str(file), "--json"])
        assert result.exit_code == 0, result.output
    return Trained(load_config(file), path, Path(json.loads(result.stdout)["checkpoint"]))


@pytest.mark.parametrize("arm", arms.PAIR)
def test_a_trained_drafter_is_served_and_accepts_what_its_replay_says(trained: Trained, arm: str) -> None:
    """Greedy text is plain decoding's; every round accepts what the replay of the chain or the Markov head does."""
    checkpoint = (
        trained.checkpoint if arm == arms.DIFFUSION else train_drafter("eagle3", trained.config, trained.target)
    )
    prompts = [list(range(30 + 7 * i, 60 + 9 * i)) for i in range(4)]
    with engine(trained.target) as e:
        expected = e.generate(prompts, max_new_tokens=48)
    reference = ReferenceTarget(trained.target)
    comparison, steps = Comparison(reference), {f"p{i}": [] for i in range(len(prompts))}
    flags = {"draft": checkpoint, "whiflash_router": arm, "whiflash_lookup": "off"}
    with engine(trained.target, whiflash=flags) as e:
        for name, prompt in zip(steps, prompts, strict=True):
            e.submit(name, prompt, max_new_tokens=48)
        e.run(lambda: [steps[name].append(len(e.requests[name].output_ids)) for name in steps])
        found = {name: e.output(name) for name in steps}
    accepted = 0
    for (name, prompt), wanted in zip(zip(steps, prompts, strict=True), expected, strict=True):
        comparison.check(prompt, wanted, found[name], name)
        accepts = replayed(reference, {arm: checkpoint}, [*prompt, *found[name]], len(prompt))
        for before, after in pairwise(sorted({n for n in steps[name] if n})):
            if after < 48:
                assert after - before == int(accepts[arm][before - 1]) + 1, f"{name} at {before}"
                accepted += after - before - 1
    print(f"{comparison.summary()}; {accepted} drafts accepted, round by round as replayed")
    assert accepted > 5


def replayed(target: ReferenceTarget, drafter: dict[str, Path], text: list[int], prompt: int) -> Any:
    """Rounds of the drafter at every position of the answer in `text`."""
    parts = PairParts(drafter, num_layers=6)
    forward = target.forward(text[:-1], parts.captured)
    record = SequenceRecord("a", "chat", prompt, len(text), False, False, 0, 0)
    stored = Stored(record, torch.tensor(text), forward.features, forward.final)
    return replay_drafters(Pair.load(parts, target.model), stored, parts.captured)


def run(*arguments: object) -> None:
    result = CliRunner().invoke(app, [str(word) for word in arguments])
    assert result.exit_code == 0, f"{arguments}\n{result.output}\n{result.exception!r}"


def test_a_bundle_with_it_is_evaluated(trained: Trained, tmp_path: Path) -> None:
    """As a user would type it, twice."""
    train_drafter("eagle3", trained.config, trained.target)
    root, bundle = trained.config.work.parent, tmp_path / "bundle"
    run("train", "--step", "bundle", "--out", bundle, "--config", root / "tiny.yaml", "--json")
    manifest = json.loads((bundle / "whiflash.json").read_text())
    assert (manifest["dflash"], manifest["dflash_vocabulary"]) == ("dspark", "eagle3")
    assert block_size_of(bundle / "dspark", None) == 5
    options = ["--bundle", bundle, "--prompts", root / "prompts.jsonl", "--max-new-tokens", 24]
    options += ["--dtype", "float32", "--work", tmp_path / "work", "--out"]
    for name in ("first.json", "again.json"):
        run("lab", "evaluate", *options, tmp_path / name)
    figures, again = (json.loads((tmp_path / name).read_text()) for name in ("first.json", "again.json"))
    assert again["overall"] == figures["overall"], "kept answers"
    lengths = figures["overall"]["acceptance_length"]
    assert lengths.keys() == figures["overall"]["rounds_won"].keys() == {"ar", "diffusion"}
    assert lengths["diffusion"] > 1


def test_a_configuration_without_the_section_says_so(trained: Trained) -> None:
    without = trained.config.model_copy(update={"dspark": None})
    with pytest.raises(ConfigError, match="no section dspark"):
        train_drafter("dspark", without, trained.target)


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("dspark", {"attention_value_scale": 2.0}, "settings of its own"),
        ("dspark", {"target_layer_ids": [1, 4]}, r"has \(1, 4\), dspark\.target_layers asks for \(1, 3, 4\)"),
        ("dspark", {"num_hidden_layers": 1}, r"has 1, dspark\.source_layers asks for 2"),
        ("dspark", {"mask_token_id": 3}, r"has 3, dspark\.mask_token_id asks for 259"),
        ("dspark", {"markov_rank": 16}, r"has 16, dspark\.markov_rank asks for 8"),
        ("dflash", {}, "a mask embedding, cannot be trained on as dflash"),
        ("dflash", {"partial_rotary_factor": 0.5}, "settings of its own"),
        ("dflash", {"layer_types": ["sliding_attention"] * 2, "sliding_window": 8}, "such as windows"),
        ("dflash", {"dflash_config": {"mask_token_id": MASK_TOKEN}}, r"has \(1, 3\), dflash\.target_layers asks for"),
    ],
)
def test_a_start_is_as_configured_and_can_be_written(
    path: Path, target: TargetModel, tmp_path: Path, section: str, change: dict[str, Any], message: str
) -> None:
    """Its `config.json` says so: no tensor is read, and nothing is trained first."""
    start = tiny_dflash(tmp_path / "start", path)
    if section == "dspark":
        initialise(target, SETTINGS).save(start)
    check_start(start, section, SETTINGS, 6)
    edit(start, lambda config: config.update(change))
    if not change:
        (start / "mask_embedding.pt").touch()
    with pytest.raises(ConfigError, match=message):
        check_start(start, section, SETTINGS, 6)


def test_a_chain_that_lists_no_layers_is_replayed_with_those_of_its_format(path: Path, tmp_path: Path) -> None:
    chain = {"ar": tiny_eagle3(tmp_path / "chain", path)}
    edit(chain["ar"], lambda config: config.pop("eagle_config"))
    assert PairParts(chain, num_layers=6).captured == [1, 2]
    assert len(replayed(ReferenceTarget(path), chain, list(range(40)), 30)["ar"]) == 9


def test_the_markov_head_reads_the_row_in_front(target: TargetModel) -> None:
    """Every head type: latents of a whole block are those of drafting token by token."""
    for kind in ("vanilla", "gated", "rnn"):
        drafter = training(target, SETTINGS.model_copy(update={"markov_head": kind})).drafter.eval()
        states = torch.randn(3, drafter.config.block_size, 64, generator=torch.Generator().manual_seed(6))
        bonus = torch.tensor([5, 70, 80])
        with torch.no_grad():
            drafted = drafter.propose(states, bonus, 4, drafter.head).token
            before = torch.cat([bonus[:, None], drafted[:, :-1]], 1)
            rows = drafter.draft_rows(states, 4)
            matrix = drafter.get_parameter("markov_head.markov_w2.weight")
            logits = rows @ target.head.T + F.linear(drafter.latents(rows, before), matrix)
        assert torch.equal(logits.argmax(-1), drafted), kind
