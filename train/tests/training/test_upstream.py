"""Trained checkpoints in upstream's own EAGLE3 and DFLASH: they load, and every round accepts what our replay says."""

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from engine import engine
from matrix import sampled
from reference import ReferenceTarget
from tiny_models import tiny_target
from transformers import AutoTokenizer

from whiflash_lab.bench.arms import block_arm
from whiflash_lab.bench.prompts import load_prompts, shipped
from whiflash_sglang.checkpoints.fit import block_size_of, target_layers
from whiflash_sglang.checkpoints.manifest import embedded_bundle, load_manifest
from whiflash_sglang.drafts import arms
from whiflash_sglang.embedded import ensure_target
from whiflash_sglang.formats.table import read_draft
from whiflash_train.answers.data import generate_data
from whiflash_train.answers.store import Sequence as Stored
from whiflash_train.answers.store import SequenceRecord
from whiflash_train.cli.train import resolve_config
from whiflash_train.config import TrainConfig
from whiflash_train.drafters.runner import train_dflash, train_eagle3
from whiflash_train.replay import Pair, PairParts, Rounds, replay_drafters

STEPS = 5


class Trained(NamedTuple):
    """A target, its two trained drafters, and prompts as token ids."""

    target: Path
    eagle3: Path
    dflash: Path
    prompts: list[list[int]]
    tokens: int


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Trained for one epoch on a random target's answers."""
    root = tmp_path_factory.mktemp("upstream")
    target = tiny_target(root / "target")
    rows = [{"id": f"r{i}", "messages": [{"role": "user", "content": f"say {i}"}]} for i in range(24)]
    (root / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tiny: TrainConfig = resolve_config(Path("tiny"))
    data = tiny.data.model_copy(update={"prompts": [str(root / "prompts.jsonl")], "temperature": 0.0})
    config = tiny.model_copy(update={"target": str(target), "work": root / "work", "data": data})
    generate_data(config)
    prompts = [list(range(30 + 7 * i, 60 + 9 * i)) for i in range(4)]
    return Trained(target, train_eagle3(config, target), train_dflash(config, target), prompts, 60)


@pytest.fixture(scope="module")
def embedded() -> Trained:
    """The shipped bundle, and three prompts of its benchmark's sample."""
    bundle, target = embedded_bundle(), ensure_target()
    manifest = load_manifest(bundle)
    tokenizer = AutoTokenizer.from_pretrained(target)
    template = (bundle / str(manifest.chat_template)).read_text(encoding="utf-8")
    by_category = {prompt.category: prompt for prompt in load_prompts(str(shipped()))}
    prompts = [
        tokenizer.apply_chat_template(
            list(by_category[category].messages),
            chat_template=template,
            add_generation_prompt=True,
            return_dict=True,
        )["input_ids"]
        for category in ("chat", "math", "code")
    ]
    return Trained(target, bundle / manifest.eagle3, bundle / manifest.dflash, prompts, 32)


def upstream(trained: Trained, arm: str) -> dict[str, Any]:
    if arm == arms.DIFFUSION:
        return {
            "speculative_algorithm": "DFLASH",
            "speculative_draft_model_path": str(trained.dflash),
            "disable_overlap_schedule": True,
        }
    return {
        "speculative_algorithm": "EAGLE3",
        "speculative_draft_model_path": str(trained.eagle3),
        "speculative_num_steps": STEPS,
        "speculative_eagle_topk": 1,
        "speculative_num_draft_tokens": STEPS + 1,
    }


class Served(NamedTuple):
    """An answer, and how many of its tokens there were after every step of the scheduler."""

    output: list[int]
    lengths: list[int]


def serve(trained: Trained, arm: str) -> list[Served]:
    names = [f"u{i}" for i in range(len(trained.prompts))]
    steps: dict[str, list[int]] = {name: [] for name in names}
    with engine(trained.target, **upstream(trained, arm)) as e:

        def note() -> None:
            for name in names:
                steps[name].append(len(e.requests[name].output_ids))

        for name, prompt in zip(names, trained.prompts, strict=True):
            e.submit(name, prompt, max_new_tokens=trained.tokens)
        e.run(note)
        return [Served(e.output(name), sorted({n for n in steps[name] if n})) for name in names]


def replayed(target: ReferenceTarget, trained: Trained, prompt: Sequence[int], output: list[int]) -> Rounds:
    """Rounds of both drafters at every position of the answer."""
    layers = target.model.num_layers
    drafts = read_draft(trained.eagle3), read_draft(trained.dflash)
    capture = sorted({layer for draft in drafts for layer in target_layers(draft, layers)})
    tokens = [*prompt, *output]
    forward = target.forward(tokens[:-1], capture)
    record = SequenceRecord("a", "chat", len(prompt), len(tokens), False, False, 0, 0)
    pair = Pair.load(PairParts({"ar": trained.eagle3, "diffusion": trained.dflash}, STEPS), target.model)
    sequence = Stored(record, torch.tensor(tokens), forward.features, forward.final)
    return replay_drafters(pair, sequence, capture)


def upstream_reads(which: str, arm: str) -> bool:
    """SGLang starts DSPARK, which the shipped block drafter needs, on GPUs alone."""
    if (which, arm) != ("embedded", arms.DIFFUSION):
        return True
    bundle = embedded_bundle()
    block_format = read_draft(bundle / str(load_manifest(bundle).dflash)).format
    return block_arm(block_format, on_cpu=True) == "DFLASH"


CASES = [(which, arm) for which in ("tiny", "embedded") for arm in arms.PAIR if upstream_reads(which, arm)]


@pytest.mark.parametrize(("which", "arm"), sampled(CASES, ("tiny", arms.PAIR[0]), ("tiny", arms.PAIR[1])))
def test_upstream_accepts_what_the_replay_says(which: str, arm: str, request: pytest.FixtureRequest) -> None:
    trained: Trained = request.getfixturevalue(which)
    target = ReferenceTarget(trained.target)
    accepted = 0
    for prompt, served in zip(trained.prompts, serve(trained, arm), strict=True):
        lengths = replayed(target, trained, prompt, served.output).accepted[arm]
        assert served.lengths[0] == 1  # the prompt's own forward gives the first token
        for before, after in pairwise(served.lengths):
            if after >= trained.tokens:
                continue  # the replay does not know what would have followed the end
            expected = int(lengths[before - 1]) + 1
            assert after - before == expected, f"{which} {arm}: a round after {before} tokens"
            accepted += after - before - 1
    print(f"{which} {arm}: {accepted} drafts accepted, round by round as replayed")
    assert accepted > 5
    assert block_size_of(trained.dflash, None) >= 2
