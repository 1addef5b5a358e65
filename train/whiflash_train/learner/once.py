"""Run one pass of `whiflash learn`: train a bundle's drafters on samples, judge them, and write a better bundle.

Drafters are judged by their acceptance lengths on the same answers before and after (`_gain`). A pass's files are in
`learner` in the directory of `--whiflash-learn`, readable by the owner only, and removed when it ends.
"""

import os
import random
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel

from whiflash_sglang.checkpoints.bundle import Bundle, verify
from whiflash_sglang.checkpoints.fit import block_size_of
from whiflash_sglang.checkpoints.manifest import PARTS
from whiflash_sglang.drafts import arms
from whiflash_sglang.drafts.rounds import RoundTally, acceptance_length
from whiflash_sglang.errors import ConfigError
from whiflash_sglang.files.disk import check_own
from whiflash_sglang.files.jsonl import read_json_file
from whiflash_sglang.files.progress import tracked
from whiflash_sglang.files.provenance import environment
from whiflash_sglang.formats.checkpoint import integer
from whiflash_sglang.formats.config_json import read_json_config
from whiflash_sglang.formats.dflash.dflash import DFlashDrafter
from whiflash_sglang.formats.dflash.dspark import DSparkDrafter
from whiflash_sglang.formats.eagle3 import Eagle3Drafter
from whiflash_sglang.formats.table import read_draft
from whiflash_sglang.telemetry.samples import samples_of
from whiflash_sglang.telemetry.statistics import Interval, paired_ratio
from whiflash_train.answers.data import is_embedded, target_path
from whiflash_train.answers.store import FeatureStore, SequenceRecord, alone
from whiflash_train.answers.tokens import Exported
from whiflash_train.bundle import with_drafters
from whiflash_train.config import TrainConfig
from whiflash_train.drafters.initialisation import check_start
from whiflash_train.drafters.runner import train_drafter
from whiflash_train.learner.texts import LONGEST, ChosenTexts, Text, answer_tokens, choose, texts_of
from whiflash_train.replay import Pair, PairParts, replay_drafters
from whiflash_train.target import TargetModel, unknown

EPOCHS = 3.0
"""Training epochs over the samples."""
STEP_TOKENS = 1024
"""Answer tokens in a training step. With 256, EAGLE-3 lost 1 % of its acceptance length at the same rate: samples are
few, and small steps of a fresh optimiser are mostly noise."""
LOCK = ".learner"
WORK = "learner"
LEARNED = "learned.json"
"""File of a bundle that a pass wrote: its outcome, the bundle it began with, machine and packages."""
SECTIONS: Mapping[type, str] = {Eagle3Drafter: "eagle3", DFlashDrafter: "dflash", DSparkDrafter: "dspark"}
"""Class of a drafter → its section of a training configuration."""


class Gain(Interval, frozen=True):
    """A drafter's gain. before, after: its acceptance lengths over all answers, alone. ratio: after / before."""

    before: float
    after: float

    @property
    def better(self) -> bool:
        """Whether the ratio's whole interval is above 1."""
        return self.low > 1


Walked = Mapping[str, Sequence[RoundTally]]
"""Arm → tally of each answer."""


def walk_answers(pair: Pair, store: FeatureStore) -> Walked:
    """Walk every stored answer with each drafter alone, round by round as in a server; return the tallies."""
    tallies: dict[str, list[RoundTally]] = {arm: [] for arm in pair.drafters}
    for record in tracked(store.records, "judging"):
        for arm, accepted in replay_drafters(pair, store.read(record), store.layers).items():
            tallies[arm].append(RoundTally.of(accepted.tolist()))
    return tallies


def _gain(before: Sequence[RoundTally], after: Sequence[RoundTally]) -> Gain:
    """Return an arm's gain from its tallies before and after. The bootstrap draws the same answers for both."""

    def column(tallies: Sequence[RoundTally], of: str) -> NDArray[np.float64]:
        return np.array([[getattr(tally, of)] for tally in tallies], dtype=np.float64)

    mine, theirs = ((column(tallies, "tokens"), column(tallies, "rounds")) for tallies in (after, before))
    ratio = paired_ratio(*mine, *theirs, [""] * len(after))
    return Gain(before=acceptance_length(before), after=acceptance_length(after), **dict(ratio))


class Learning(NamedTuple):
    """Inputs of a learning pass (`learn_once`).

    directory: the server's `--whiflash-learn`. bundle: the one in use. out: directory of the new bundle. config: the
    drafters' training configuration. tokens: most answer tokens to learn from. judged: most requests that judge. rate:
    peak learning rate. replay: answers of the original training, exported, to add equally many tokens from.
    """

    directory: Path
    bundle: Path
    out: Path
    config: TrainConfig
    tokens: int
    judged: int
    rate: float
    replay: Path | None


class Outcome(BaseModel, frozen=True):
    """A pass's result. bundle: the new bundle; None: no drafter became better. learned, judged: numbers of requests.
    tokens: answer tokens learned from, replayed ones included. seconds: of the pass. until:
    when its newest request was written, in seconds since the epoch. drafters: each one's gain.
    """

    bundle: Path | None
    learned: int
    judged: int
    tokens: int
    seconds: float
    until: float
    drafters: dict[str, Gain]


def learn_once(learning: Learning) -> Outcome:
    """Train on the samples, and write a bundle with the drafters whose gain's interval is above 1.

    Raises:
        TooFewError: there are too few samples. ConfigError: another learner is running, the bundle's drafters cannot
            be trained further, or `out` exists.
    """
    original = None if learning.replay is None else Exported(learning.replay)
    if learning.out.exists():
        raise ConfigError(f"{learning.out} exists already; give --out a new directory")
    learning.out.parent.mkdir(parents=True, exist_ok=True)
    with _alone(learning.directory) as work:
        began = time.monotonic()
        bundle = Bundle.load(learning.bundle)
        manifest = bundle.manifest
        check_target(learning.config.target, manifest.target)
        verify(bundle.checksums(bundle.parts))
        path = target_path(learning.config.target, manifest)
        if reason := unknown(path):
            raise ConfigError(f"{path}: drafters cannot go on training here, since {reason}")
        parts = PairParts.of_bundle(learning.bundle)
        sections = {arm: section_of(arm, checkpoint) for arm, checkpoint in parts.checkpoints.items()}
        config = config_of(learning.config, parts.checkpoints, work, learning.rate)
        for arm, name in sections.items():
            check_start(parts.checkpoints[arm], name, config.section(name), parts.num_layers)
        chosen = _chosen(learning, manifest.target, path)
        if config.hardware.threads:
            torch.set_num_threads(config.hardware.threads)
        target = TargetModel(path, **config.hardware.place)
        tokens = answer_tokens(chosen.learned)
        more = [] if original is None else replayed(original, tokens, config.seed)
        _store(work / "data" / "shard0", target, config.capture, [*chosen.learned, *more])
        store = _store(work / "judges", target, config.capture, chosen.judged)
        trained = {
            arm: train_drafter(sections[arm], config, path, checkpoint) for arm, checkpoint in parts.checkpoints.items()
        }
        pairs = [Pair.load(each, target) for each in (parts, parts._replace(checkpoints=trained))]
        walks = [walk_answers(pair, store) for pair in pairs]
        gained = {arm: _gain(*(walk[arm] for walk in walks)) for arm in trained}
        better = {arm: trained[arm] for arm, gain in gained.items() if gain.better}
        outcome = Outcome(
            bundle=learning.out if better else None,
            learned=len(chosen.learned),
            judged=len(chosen.judged),
            tokens=tokens + answer_tokens(more),
            seconds=time.monotonic() - began,
            until=chosen.until,
            drafters={PARTS[arm]: gain for arm, gain in gained.items()},
        )
        if better:
            record = outcome.model_dump(mode="json", exclude={"bundle"}) | {"from": manifest.name}
            with_drafters(learning.bundle, better, learning.out, {LEARNED: record | environment(learning.bundle)})
        return outcome


def section_of(arm: str, checkpoint: Path) -> str:
    """Return the name of the configuration's section that trains this drafter.

    Raises:
        ConfigError: no section trains drafters of this kind.
    """
    kind = read_draft(checkpoint, arm).format.model
    if kind not in SECTIONS:
        known = ", ".join(known.__name__ for known in SECTIONS)
        raise ConfigError(
            f"{checkpoint} is a {kind.__name__}, and training continues only drafters of the kinds {known}: name a "
            "--bundle of such drafters"
        )
    return SECTIONS[kind]


def check_target(configured: str, served: str) -> None:
    """Raise ConfigError if a training configuration and a server's bundle are for different targets.

    Equal names, and names of the same directory, mean the same target.
    """
    if configured == served or (is_embedded(configured) and is_embedded(served)):
        return
    ours, theirs = (Path(os.path.expanduser(name)) for name in (configured, served))
    if not (ours.is_dir() and theirs.is_dir() and ours.samefile(theirs)):
        raise ConfigError(
            f"--config is for the target {configured}, the server's bundle for {served}: drafters would learn from "
            "another model; name the configuration and the bundle of the same one"
        )


@contextmanager
def _alone(directory: Path) -> Iterator[Path]:
    """Yield an empty work directory, which is locked and removed afterwards.

    Raises ConfigError if another learner has the lock, the directory has no samples, or what is at the work
    directory's place cannot be removed.
    """
    if not samples_of(directory).is_dir():
        raise ConfigError(f"{directory} has no samples: name the directory of the server's --whiflash-learn")
    check_own(samples_of(directory))
    work = directory / WORK
    with alone(directory, LOCK):
        shutil.rmtree(work, ignore_errors=True)  # a killed pass leaves it
        try:
            work.mkdir(mode=0o700)
        except FileExistsError:
            raise ConfigError(
                f"{work} is where a pass works, and holds a link, a file or another user's directory: remove it, "
                "or use another directory"
            ) from None
        try:
            yield work
        finally:
            shutil.rmtree(work, ignore_errors=True)


def newest_learned(bundle: Path) -> float:
    """Return when the newest sample that trained or judged a bundle was written, in seconds since the epoch.

    0 for a bundle that no pass wrote, and for a date in the future (a wrong clock), since no sample would be newer.
    """
    try:
        until = float(read_json_file(bundle / LEARNED)["until"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0.0
    return until if until <= time.time() else 0.0  # noqa: TID251 (a date)


def _chosen(learning: Learning, served: str, target: Path) -> ChosenTexts:
    """Choose samples (`choose`) of the target `served`, not longer than the one in the directory `target` reads."""
    shape = read_json_config(target)
    longest = min(LONGEST, integer(shape, "max_position_embeddings", target, default=LONGEST))
    vocabulary = integer(shape, "vocab_size", target)
    samples = texts_of(samples_of(learning.directory), served, vocabulary, longest)
    now = time.time()  # noqa: TID251 (a date)
    texts = [text for text in samples if text.written <= now]  # a date in the future means a wrong clock
    return choose(texts, newest_learned(learning.bundle), learning.tokens, learning.judged)


def config_of(config: TrainConfig, checkpoints: Mapping[str, Path], work: Path, rate: float) -> TrainConfig:
    """Return the configuration that continues training the checkpoints, with their sizes, on the data in `work`.

    Args:
        checkpoints: by arm. rate: peak learning rate.
    """
    loop = {"epochs": EPOCHS, "answer_tokens": STEP_TOKENS, "learning_rate": rate}

    def section(name: str, **changes: Any) -> Any:
        found = getattr(config, name)
        return found and found.model_copy(update={"loop": found.loop.model_copy(update=loop), **changes})

    changes: dict[str, Any] = {"work": work}
    if arms.AR in checkpoints:
        found = read_draft(checkpoints[arms.AR], arms.AR).config
        sizes = {"draft_vocab_size": found.draft_vocab_size, "intermediate_size": found.intermediate_size}
        changes["eagle3"] = section("eagle3", **sizes)
    if arms.DIFFUSION in checkpoints:
        size = block_size_of(checkpoints[arms.DIFFUSION], None)
        changes["dflash"] = section("dflash", block_size=size)
        changes["dspark"] = section("dspark", block_size=size, sample_from_anchor=None)
    return config.model_copy(update=changes)


def _store(path: Path, target: TargetModel, capture: list[int], texts: Sequence[Text]) -> FeatureStore:
    """Write a store of the texts with their features: outputs of the target's layers `capture`, ascending."""
    store = FeatureStore(path, hidden=target.hidden_size, layers=capture)
    for text in tracked(texts, "reading samples"):
        tokens = [*text.prompt, *text.answer]
        record = SequenceRecord(text.name, "served", len(text.prompt), len(tokens), False, False)
        store.append(record, tokens, target.states(tokens[:-1], capture))
    return store


def replayed(exported: Exported, tokens: int, seed: int) -> list[Text]:
    """Draw whole answers of the original training at random until they have `tokens` answer tokens together."""
    order = exported.firsts()
    random.Random(seed).shuffle(order)
    answers: list[Text] = []
    left = tokens
    for index in order:
        if left <= 0:
            break
        whole, length = exported.tokens(index).tolist(), int(exported.columns["prompt_lengths"][index])
        answers.append(Text(exported.ids[index], 0.0, tuple(whole[:length]), tuple(whole[length:])))
        left -= len(whole) - length
    return answers
