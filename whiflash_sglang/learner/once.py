"""One pass: samples are read, the drafters that serve train on them and are judged, and a version is published, or not.

What it works with is in `learner` of the directory of `--whiflash-learn`, for the owner alone, and is gone when it
ends; what a killed pass left goes when the next one begins.
"""

import fcntl
import json
import os
import random
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from whiflash_sglang import arms
from whiflash_sglang.checkpoints.hub import member
from whiflash_sglang.checkpoints.manifest import MANIFEST, PARTS, Manifest, load_manifest, lookup_of
from whiflash_sglang.errors import ConfigError
from whiflash_sglang.jsonl import write_whole
from whiflash_sglang.learn.samples import samples_of
from whiflash_sglang.learn.swap import check_fits
from whiflash_sglang.learn.versions import notes_of, publish, read_version, served, versions_of
from whiflash_sglang.learner.judge import Gain, gains, walk_answers
from whiflash_sglang.learner.texts import Text, answer_tokens, choose, texts_of
from whiflash_sglang.models.dspark import DSparkDrafter
from whiflash_sglang.models.formats import read_draft
from whiflash_sglang.progress import tracked
from whiflash_sglang.train.answers.data import LoadedTarget, load_target, target_path
from whiflash_sglang.train.answers.store import FeatureStore, SequenceRecord
from whiflash_sglang.train.answers.tokens import Exported, rebuild_features
from whiflash_sglang.train.config import TrainConfig
from whiflash_sglang.train.drafters.runner import train_dflash, train_dspark, train_eagle3
from whiflash_sglang.train.replay import Pair, Parts

STATUS = "learner.json"
WORK = "learner"
UNTIL = "until"
"""Note of a version: when the newest sample was written that it was learned from or judged by."""


class Learning(NamedTuple):
    """What a pass does.

    directory: of `--whiflash-learn`. bundle: that the server was started with. config: how its drafters are trained.
    tokens: answer tokens to learn from. judged: requests that judge. rate: of learning, at its peak. replay: an
    exported file of the original training's answers, of which as many tokens are learned; None: nothing is.
    """

    directory: Path
    bundle: Path
    config: TrainConfig
    tokens: int
    judged: int
    rate: float
    replay: Path | None


class Outcome(NamedTuple):
    """present: version that was learned from. version: that was published, or None. learned, judged: requests.
    tokens: answer tokens that were learned from, replayed ones included. drafters: what each gained.
    """

    present: int
    version: int | None
    learned: int
    judged: int
    tokens: int
    seconds: float
    drafters: dict[str, Gain]

    def facts(self) -> dict[str, Any]:
        """For JSON."""
        gained = {
            name: {"before": gain.before, "after": gain.after, **gain.ratio.model_dump()}
            for name, gain in self.drafters.items()
        }
        return {**self._asdict(), "drafters": gained}


def learn_once(learning: Learning) -> Outcome:
    """Learn from the samples that are there, and publish the drafters that became better beyond their interval.

    Raises:
        ConfigError: another learner is at work, there are too few new samples, or training ended in what cannot serve.
    """
    with _alone(learning.directory) as work:
        began = time.monotonic()
        manifest = load_manifest(learning.bundle)
        versions = versions_of(learning.directory)
        present = served(versions).version
        checkpoints = _present(learning, manifest, versions, present)
        texts = texts_of(samples_of(learning.directory), manifest.target)
        since = float(notes_of(versions, present).get(UNTIL, 0)) if present else 0.0
        chosen = choose(texts, since, learning.tokens, learning.judged)
        config = _config(learning, checkpoints, work)
        if config.hardware.threads:
            torch.set_num_threads(config.hardware.threads)
        target = load_target(config.target, None, config.capture, config.hardware)
        data, judges = work / "data" / "shard0", work / "judges"
        _store(data, target, chosen.learned)
        replayed = 0 if learning.replay is None else _replay(learning.replay, data, target, config.seed)
        store = _store(judges, target, chosen.judged)
        trained = {arm: _train(config, arm, path) for arm, path in checkpoints.items()}

        pairs = [Pair.load(_parts(manifest, paths, config), target.model) for paths in (checkpoints, trained)]
        for arm in checkpoints:
            before, after = (_model(pair, arm) for pair in pairs)
            check_fits(f"what was learned for {PARTS[arm]}", before, after)
        found = gains(*(walk_answers(pair, store) for pair in pairs))
        better = {arm for arm in checkpoints if found[PARTS[arm]].better}
        tokens = answer_tokens(chosen.learned) + replayed
        number = None
        if better:
            best = {arm: (trained if arm in better else checkpoints)[arm] for arm in checkpoints}
            notes = {UNTIL: chosen.until, "tokens": tokens, "from": present}
            notes |= {name: round(gain.ratio.ratio, 3) for name, gain in found.items()}
            number = publish(versions, _bundle(manifest, best, work), notes)
        outcome = Outcome(
            present, number, len(chosen.learned), len(chosen.judged), tokens, time.monotonic() - began, found
        )
        write_whole(learning.directory / STATUS, json.dumps(outcome.facts(), indent=1) + "\n")
        return outcome


def status_of(directory: Path) -> dict[str, Any]:
    """What the last pass of a directory came to; empty before there was one. Raises ConfigError where it is damaged."""
    file = directory / STATUS
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ConfigError(f"{file} is damaged ({error}): remove it; the next pass writes it again") from None
    return found


@contextmanager
def _alone(directory: Path) -> Iterator[Path]:
    """An empty directory to work in, as the only learner. Raises ConfigError where there is another, or no spool."""
    if not samples_of(directory).is_dir():
        raise ConfigError(f"{directory} has no samples: name the directory of the server's --whiflash-learn")
    handle = os.open(directory / ".learner", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    work = directory / WORK
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"another learner works in {directory}: two would learn the same; wait for it, or end it"
            ) from None
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(mode=0o700)
        try:
            yield work
        finally:
            shutil.rmtree(work, ignore_errors=True)
    finally:
        os.close(handle)


def _present(learning: Learning, manifest: Manifest, versions: Path, number: int) -> dict[str, Path]:
    """Arm → checkpoint of the drafters that serve."""
    found = {arm: member(learning.bundle, manifest, PARTS[arm]) for arm in manifest.drafters}
    return found | (read_version(versions, number, manifest.target) if number else {})


def _config(learning: Learning, checkpoints: Mapping[str, Path], work: Path) -> TrainConfig:
    """The configuration for one pass over the samples that goes on from the checkpoints, of their sizes."""
    config = learning.config

    def section(name: str, **changes: Any) -> Any:
        found = getattr(config, name)
        if found is None:
            return None
        loop = {"epochs": 1.0, "learning_rate": learning.rate, "category_weights": {}}
        return found.model_copy(update={"loop": found.loop.model_copy(update=loop), **changes})

    sizes = {}
    if arms.AR in checkpoints:
        found = read_draft(checkpoints[arms.AR], arms.AR).config
        sizes = {"draft_vocab_size": found.draft_vocab_size, "intermediate_size": found.intermediate_size}
    return config.model_copy(
        update={
            "work": work,
            "eagle3": section("eagle3", **sizes),
            "dflash": section("dflash"),
            "dspark": section("dspark"),
        }
    )


def _store(path: Path, target: LoadedTarget, texts: Iterable[Text]) -> FeatureStore:
    """The texts with their features, which the target computes."""
    store = FeatureStore(
        path, vectors=len(target.capture) + 1, hidden=target.hidden_size, layers=target.capture
    )
    whole = list(texts)
    order = tracked(range(len(whole)), "reading samples")
    for at, states in target.states((at, [*whole[at].prompt, *whole[at].answer][:-1]) for at in order):
        text = whole[at]
        tokens = [*text.prompt, *text.answer]
        finished = text.answer[-1] == target.eos_id
        record = SequenceRecord(text.name, "served", len(text.prompt), len(tokens), False, finished, 0, 0)
        store.append(record, tokens, states)
    return store


def _replay(file: Path, data: Path, target: LoadedTarget, seed: int) -> int:
    """Add as many answer tokens of the original training as there are to learn from, drawn at random: their number."""
    store = FeatureStore(
        data, vectors=len(target.capture) + 1, hidden=target.hidden_size, layers=target.capture
    )
    left = wanted = sum(record.length - record.prompt_length for record in store.records)
    exported = Exported(file)
    answers = (exported.columns["lengths"] - exported.columns["prompt_lengths"]).tolist()
    order = list(range(len(answers)))
    random.Random(seed).shuffle(order)
    drawn = set()
    for index in order:
        if left <= 0:
            break
        drawn.add(exported.ids[index])
        left -= answers[index]
    rebuild_features(file, target, store, drawn)
    return wanted - left


def _train(config: TrainConfig, arm: str, checkpoint: Path) -> Path:
    """Where the drafter is that goes on from the checkpoint."""
    if arm == arms.AR:
        train = train_eagle3
    else:
        train = train_dspark if read_draft(checkpoint, arm).format.model is DSparkDrafter else train_dflash
    return train(config, target_path(config.target), checkpoint, held=True)


def _parts(manifest: Manifest, checkpoints: Mapping[str, Path], config: TrainConfig) -> Parts:
    return Parts(
        checkpoints.get(arms.AR),
        checkpoints.get(arms.DIFFUSION),
        config.router.eagle_steps,
        manifest.dflash_vocabulary,
        lookup_of(manifest),
    )


def _model(pair: Pair, arm: str) -> nn.Module:
    model = pair.eagle3 if arm == arms.AR else pair.dflash
    if model is None:
        raise AssertionError("of a pair that has it")
    return model


def _bundle(manifest: Manifest, checkpoints: Mapping[str, Path], work: Path) -> Path:
    """A bundle of these drafters, for the same target."""
    bundle = work / "bundle"
    bundle.mkdir()
    written: dict[str, Any] = {
        "schema_version": 1,
        "name": manifest.name,
        "target": manifest.target,
        "dflash_vocabulary": manifest.dflash_vocabulary,
    }
    for arm, checkpoint in checkpoints.items():
        shutil.copytree(checkpoint, bundle / PARTS[arm])
        written[PARTS[arm]] = PARTS[arm]
    (bundle / MANIFEST).write_text(json.dumps(written), encoding="utf-8")
    return bundle
