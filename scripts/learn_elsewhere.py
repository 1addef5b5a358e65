"""Measure what learning brings on prompts of kinds that the embedded pair's training never had, by tokens learned.

The prompts are Spec-Bench's, apart from mathematics and code. Four of five are answered to learn from, the fifth to
judge. Answers to other suites (`--also`) are learned after them. Home is judged on answers of training's own kinds that
no drafter has learned from. Every amount starts from the shipped checkpoints. Everything is kept in WORK, so a killed
run goes on.

    python scripts/learn_elsewhere.py SUITES WORK --tokens 10000 30000 --also arena-hard-v2 --replay
"""

import argparse
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from whiflash_sglang.checkpoints.hub import member
from whiflash_sglang.checkpoints.manifest import PARTS, embedded_bundle, load_manifest
from whiflash_sglang.cli.train import resolve_config
from whiflash_sglang.jsonl import write_whole
from whiflash_sglang.lab.bench.prompts import Prompt, read_suites
from whiflash_sglang.learner.judge import Gain, Walked, gains, walk_answers
from whiflash_sglang.learner.once import EPOCHS, STEP_TOKENS, config_of, parts_of, train_arm
from whiflash_sglang.learner.pace import Pace
from whiflash_sglang.train.answers.data import LoadedTarget, answer_rows, load_target
from whiflash_sglang.train.answers.store import FeatureStore
from whiflash_sglang.train.answers.tokens import Exported, rebuild_features
from whiflash_sglang.train.config import Slots, TrainConfig
from whiflash_sglang.train.replay import Pair, ReplayLog

DATA = Path(__file__).parents[1] / "training_data" / "smollm2-135m-instruct"
KINDS = ("qa", "rag", "translation", "summarization", "multi-turn")
JUDGED = 5
"""Every so many prompts one judges."""
NEW_TOKENS = 160
SLOTS = [Slots(rows=32, capacity=512), Slots(rows=12, capacity=1280)]
HOME = 56
"""Answers of training's own kinds that judge, as many of each category."""


def main() -> None:
    """Answer, learn, judge, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("suites", type=Path, help="folder with Spec-Bench's question.jsonl")
    parser.add_argument("work", type=Path, help="everything is kept here")
    parser.add_argument("--also", nargs="*", default=[], help="suites to learn from after Spec-Bench")
    parser.add_argument("--tokens", type=int, nargs="+", default=[5000, 10000, 20000], help="answer tokens")
    parser.add_argument("--rate", type=float, default=3e-4, help="learning rate at its peak")
    parser.add_argument("--epochs", type=float, default=EPOCHS, help="passes over the answers")
    parser.add_argument("--batch", type=int, default=STEP_TOKENS, help="answer tokens in a step")
    parser.add_argument("--replay", action="store_true", help="learn as many tokens of the original training")
    given = parser.parse_args()
    config = resolve_config(Path("smollm2-135m-instruct")).model_copy(update={"work": given.work})
    torch.set_num_threads(config.hardware.threads)
    target = load_target(config.target, config.chat_template, config.capture, config.hardware)
    stores = answer(given.suites, given.also, given.work, target, config)
    manifest = load_manifest(embedded_bundle())
    shipped = {arm: member(embedded_bundle(), manifest, PARTS[arm]) for arm in manifest.drafters}
    pace = Pace()
    sides = {"away": stores["away"], "home": stores["home"]}

    def walk(checkpoints: Mapping[str, Path]) -> dict[str, Walked]:
        pair = Pair.load(parts_of(manifest, checkpoints, config), target.model)
        return {
            side: walk_answers(pair, store, ReplayLog(given.work / "rounds" / side, pair), pace)
            for side, store in sides.items()
        }

    before = walk(shipped)
    label = f"{given.rate:g}-{given.epochs:g}-{given.batch}{'-replay' if given.replay else ''}"
    for tokens in given.tokens:
        work = given.work / label / str(tokens)
        shown = [subset(stores["learn"], work / "data" / "shard0", tokens, None)]
        if given.replay:
            shown.append(subset(stores["replay"], work / "data" / "shard1", tokens, config.seed))
        settings = with_loop(config_of(config, shipped, work, given.rate), given.epochs, given.batch)
        after = walk({arm: train_arm(settings, arm, path, pace) for arm, path in shipped.items()})
        found = {side: gains(before[side], after[side]) for side in sides}
        report(given.work, label, shown, found)


def with_loop(config: TrainConfig, epochs: float, batch: int) -> TrainConfig:
    """The configuration with other loops."""
    loop = {"epochs": epochs, "answer_tokens": batch}
    sections = {
        name: found.model_copy(update={"loop": found.loop.model_copy(update=loop)})
        for name in ("eagle3", "dflash", "dspark")
        if (found := getattr(config, name)) is not None
    }
    return config.model_copy(update=sections)


def answer(
    suites: Path, also: Sequence[str], work: Path, target: LoadedTarget, config: TrainConfig
) -> dict[str, FeatureStore]:
    """Answers with features: to learn from, to judge by, of home, and of the original training.

    also: suites whose prompts are learned after Spec-Bench's.
    """
    shape: dict[str, Any] = {
        "vectors": len(target.capture) + 1,
        "hidden": target.hidden_size,
        "layers": target.capture,
    }
    stores = {name: FeatureStore(work / name, **shape) for name in ("learn", "away", "home", "replay")}
    for store in stores.values():
        store.truncate_to_index()
    rows = asked(
        [prompt for prompt in read_suites(["spec-bench"], suites) if prompt.category in KINDS], config.seed
    )
    more = asked(read_suites(also, suites), config.seed)
    data = config.data.model_copy(update={"slots": SLOTS, "max_new_tokens": NEW_TOKENS})
    learned = [row for i, row in enumerate(rows) if i % JUDGED]
    for side, share in (("away", rows[::JUDGED]), ("learn", learned), ("learn", more)):
        answer_rows(share, target, data, stores[side], seed=config.seed)
    rebuild_features(DATA / "unseen.npz", target, stores["home"], drawn(DATA / "unseen.npz", config.seed))
    rebuild_features(
        DATA / "tokens.npz", target, stores["replay"], drawn(DATA / "tokens.npz", config.seed, 30)
    )
    return stores


def asked(prompts: list[Prompt], seed: int) -> list[dict[str, Any]]:
    """The first turns of prompts, in random order, as rows to answer."""
    random.Random(seed).shuffle(prompts)
    return [
        {"id": prompt.id, "category": prompt.category, "messages": prompt.messages[:1]} for prompt in prompts
    ]


def drawn(file: Path, seed: int, each: int = 0) -> set[str]:
    """Ids of as many answers of each category."""
    exported = Exported(file)
    categories = exported.columns["categories"].tolist()
    names = sorted(set(categories))
    found: set[str] = set()
    for name in names:
        ids = [i for i, category in zip(exported.ids, categories, strict=True) if category == name]
        found.update(random.Random(seed).sample(ids, min(len(ids), each or HOME // len(names))))
    return found


def subset(store: FeatureStore, path: Path, tokens: int, seed: int | None) -> FeatureStore:
    """A store of the first answers with so many tokens, or of random ones, without a copy of their features."""
    path.mkdir(parents=True, exist_ok=True)
    for name in ("meta.json", "tokens.bin", "features.bin"):
        if not (path / name).exists():
            (path / name).symlink_to((store.path / name).resolve())
    records = list(store.records)
    if seed is not None:
        random.Random(seed).shuffle(records)
    kept, left = [], tokens
    for record in records:
        left -= record.length - record.prompt_length
        if left < 0 and kept:
            break
        kept.append(record)
    write_whole(path / "index.jsonl", "".join(json.dumps(record._asdict()) + "\n" for record in kept))
    return FeatureStore(path, vectors=store.vectors, hidden=store.hidden, layers=store.layers)


def report(
    work: Path, label: str, shown: Sequence[FeatureStore], found: Mapping[str, Mapping[str, Gain]]
) -> None:
    """A line a side and drafter, kept and printed."""
    learned = [sum(r.length - r.prompt_length for r in store.records) for store in shown]
    for side, by_drafter in found.items():
        for name, gain in by_drafter.items():
            interval = f"{gain.ratio.ratio:.3f} [{gain.ratio.low:.3f}, {gain.ratio.high:.3f}]"
            line = (
                f"{label} | {learned} | {side} | {name} | {gain.before:.3f} | {gain.after:.3f} | {interval}"
            )
            print(line, flush=True)
            with (work / "report.md").open("a") as file:
                file.write(line + "\n")


if __name__ == "__main__":
    main()
