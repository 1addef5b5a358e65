"""One pass: samples are read, the drafters that serve train on them and are judged, and a version is published, or not.

Drafters are judged by what they accept of the same answers (`_gain`). A pass may rest, to leave the processor to a
server (`Pace`). Its files are in `learner` of the directory of `--whiflash-learn`, readable by the owner only, and gone
when it ends. The next pass goes on with those of a killed one if it would learn the same.
"""

import json
import os
import random
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel

from whiflash_sglang.checkpoints.manifest import PARTS, Manifest, load_manifest
from whiflash_sglang.drafts import arms
from whiflash_sglang.errors import ConfigError
from whiflash_sglang.files.disk import check_own
from whiflash_sglang.files.jsonl import read_json, read_json_file, write_whole
from whiflash_sglang.files.progress import tracked
from whiflash_sglang.formats.checkpoint import integer
from whiflash_sglang.formats.config_json import read_json_config
from whiflash_sglang.formats.dflash.dspark import DSparkDrafter
from whiflash_sglang.formats.table import read_draft
from whiflash_sglang.updates.samples import samples_of
from whiflash_sglang.updates.swap import check_fits
from whiflash_sglang.updates.versions import (
    is_number,
    notes_of,
    numbers,
    publish,
    read_version,
    served,
    versions_of,
)
from whiflash_train.answers.data import is_embedded, target_path
from whiflash_train.answers.store import FeatureStore, SequenceRecord, alone
from whiflash_train.answers.tokens import Exported
from whiflash_train.config import TrainConfig
from whiflash_train.drafters.runner import train_drafter
from whiflash_train.learner.texts import LONGEST, ChosenTexts, Text, answer_tokens, choose, texts_of
from whiflash_train.replay import Pair, PairParts, ReplayLog, replay_drafters
from whiflash_train.rounds import RoundTally, rounds
from whiflash_train.statistics import Interval, paired_ratio
from whiflash_train.target import TargetModel, unknown

SAVE_STEPS = 25
"""Steps of training that a killed pass loses at most."""
EPOCHS = 3.0
"""Passes over the samples."""
STEP_TOKENS = 1024
"""Answer tokens in a step. With 256, EAGLE-3 lost 1 % of its acceptance length at the same rate: samples are few, and
small steps of a fresh optimiser are mostly noise."""
LOCK = ".learner"
STATUS = "learner.json"
WORK = "learner"
CHOICE = "choice.json"
"""File of the samples that the pass in `WORK` learns from, and its settings."""
UNTIL = "until"
"""Note of a version: when the newest sample was written that it was learned from or judged by."""
OUTCOME = "outcome"
"""Note of a version: all of its pass's outcome, for a pass that is killed after it published."""


T = TypeVar("T")


class Pace:
    """Sleeps after work, so that this process uses a share of one core's time.

    Args:
        share: seconds of a processor for each second that passes; None: as many as there are.
        used, now: seconds of processors that this process has used, and a clock's. sleep: waits so many seconds.
        between: called at every rest, before it.
    """

    def __init__(
        self,
        share: float | None = None,
        *,
        between: Callable[[], object] = lambda: None,
        used: Callable[[], float] = time.process_time,
        now: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self._share, self._between = share, between
        self._used, self._now, self._sleep = used, now, sleep
        self._began = used(), now()

    def rest(self) -> None:
        """Sleep for as long as the work since the last rest was beyond the share."""
        self._between()
        if self._share is not None:
            used, passed = self._used() - self._began[0], self._now() - self._began[1]
            self._sleep(max(0.0, used / self._share - passed))
        self._began = self._used(), self._now()

    def each(self, items: Iterable[T]) -> Iterator[T]:
        """The items, with a rest after each."""
        for item in items:
            yield item
            self.rest()


class Gain(Interval, frozen=True):
    """before, after: tokens a round of a drafter alone, over all answers. ratio: of the two, with its interval."""

    before: float
    after: float

    @property
    def better(self) -> bool:
        """Beyond its interval."""
        return self.low > 1


Walked = Mapping[str, Sequence[RoundTally]]
"""Arm → a tally for each answer."""


def walk_answers(pair: Pair, store: FeatureStore, log: ReplayLog, pace: Pace) -> Walked:
    """Walk every stored answer with each drafter alone, as a server would draft, verify and commit it.

    log: of the pair, for what was replayed before a killed walk.
    """
    tallies: dict[str, list[RoundTally]] = {arm: [] for arm in pair.drafters}
    for record in pace.each(tracked(store.records, "judging")):
        replayed = log.known.get(record.id)
        if replayed is None:
            replayed = replay_drafters(pair, store.read(record), store.layers)
            log.add(record.id, replayed)
        for arm, accepted in replayed.accepted.items():
            walked = rounds(0, len(accepted), lambda at, accepted=accepted: int(accepted[at]))  # type: ignore[misc]
            emitted = [tokens for _, tokens in walked]
            tallies[arm].append(RoundTally(len(emitted), sum(emitted)))
    return tallies


def _gain(before: Sequence[RoundTally], after: Sequence[RoundTally]) -> Gain:
    """Gain of an arm. Answers are drawn together for both, so what is hard for both cancels out."""

    def column(tallies: Sequence[RoundTally], of: str) -> NDArray[np.float64]:
        return np.array([[getattr(tally, of)] for tally in tallies], dtype=np.float64)

    mine, theirs = ((column(tallies, "tokens"), column(tallies, "rounds")) for tallies in (after, before))
    ratio = paired_ratio(*mine, *theirs, [""] * len(after))
    was, now = (float(tokens.sum() / made.sum()) for tokens, made in (theirs, mine))
    return Gain(before=was, after=now, **dict(ratio))


class Learning(NamedTuple):
    """A pass's inputs.

    directory: that of `--whiflash-learn`. bundle: the one that the server was started with. config: how its drafters
    are trained. tokens: answer tokens to learn from. judged: requests that judge. rate: peak learning rate. replay: an
    exported file of the original training's answers, of which as many tokens are learned; None: nothing is.
    """

    directory: Path
    bundle: Path
    config: TrainConfig
    tokens: int
    judged: int
    rate: float
    replay: Path | None


class Outcome(BaseModel, frozen=True):
    """present: version that was learned from. version: that was published, or None. learned, judged: requests.
    tokens: answer tokens that were learned from, replayed ones included. seconds: since the pass began, or went on.
    until: when the newest of its requests was written, in seconds since the epoch. drafters: what each gained.
    """

    present: int
    version: int | None
    learned: int
    judged: int
    tokens: int
    seconds: float
    until: float
    drafters: dict[str, Gain]


def learn_once(learning: Learning, pace: Pace | None = None) -> Outcome:
    """Learn from the samples that are there, and publish the drafters that became better beyond their interval.

    Args:
        pace: rests after every step; None: there are no rests.

    Raises:
        TooFewError: of the samples. ConfigError: another learner is at work, or training ended in what cannot serve.
    """
    pace = pace or Pace()
    original = None if learning.replay is None else Exported(learning.replay)
    with _alone(learning.directory) as work:
        began = time.monotonic()
        manifest = load_manifest(learning.bundle)
        check_target(learning.config.target, manifest.target)
        versions = versions_of(learning.directory)
        present = served(versions).version
        if published := _published(learning.directory, versions, present):
            write_status(learning.directory, published.model_dump())
            return published
        parts = PairParts.of_bundle(learning.bundle)
        newer = read_version(versions, present, manifest.target) if present else {}
        checkpoints = {**parts.checkpoints, **newer}
        chosen = _chosen(learning, manifest, present, work)
        config = config_of(learning.config, checkpoints, work, learning.rate)
        if config.hardware.threads:
            torch.set_num_threads(config.hardware.threads)
        path = target_path(config.target)
        if reason := unknown(path):
            raise ConfigError(f"{path}: drafters cannot go on training here, since {reason}")
        target = TargetModel(path, **config.hardware.place)
        tokens = answer_tokens(chosen.learned)
        more = [] if original is None else replayed(original, tokens, config.seed)
        _store(work / "data" / "shard0", target, config.capture, [*chosen.learned, *more], pace)
        store = _store(work / "judges", target, config.capture, chosen.judged, pace)
        trained = {arm: train_arm(config, arm, path, pace) for arm, path in checkpoints.items()}

        pairs = [Pair.load(parts._replace(checkpoints=paths), target) for paths in (checkpoints, trained)]
        for arm in checkpoints:
            check_fits(f"what was learned for {PARTS[arm]}", *(pair.drafters[arm] for pair in pairs))
        walks = [walk_answers(pair, store, ReplayLog(work / "rounds", pair), pace) for pair in pairs]
        gained = {PARTS[arm]: _gain(*(walk[arm] for walk in walks)) for arm in checkpoints}
        better = {arm for arm in checkpoints if gained[PARTS[arm]].better}
        tokens += answer_tokens(more)
        outcome = Outcome(
            present=present,
            version=None,
            learned=len(chosen.learned),
            judged=len(chosen.judged),
            tokens=tokens,
            seconds=time.monotonic() - began,
            until=chosen.until,
            drafters=gained,
        )
        if better:
            best = {arm: (trained if arm in better else checkpoints)[arm] for arm in checkpoints}
            notes = {UNTIL: chosen.until, "tokens": tokens, "from": present, OUTCOME: outcome.model_dump()}
            notes |= {name: round(gain.ratio, 3) for name, gain in gained.items()}
            outcome = outcome.model_copy(update={"version": publish(versions, learning.bundle, notes, best)})
        write_status(learning.directory, outcome.model_dump())
        return outcome


def check_target(configured: str, served: str) -> None:
    """Raise ConfigError where a training's configuration and a server's bundle are for different targets.

    Equal names, or names of one directory, are one target.
    """
    if configured == served or (is_embedded(configured) and is_embedded(served)):
        return
    ours, theirs = (Path(os.path.expanduser(name)) for name in (configured, served))
    if not (ours.is_dir() and theirs.is_dir() and ours.samefile(theirs)):
        raise ConfigError(
            f"--config is for the target {configured}, the server's bundle for {served}: drafters would learn from "
            "another model; name the configuration and the bundle of the same one"
        )


def _published(directory: Path, versions: Path, present: int) -> Outcome | None:
    """The outcome of a pass that was killed after it published, before its status was written."""
    number = max(numbers(versions), default=0)
    notes, used = notes_of(versions, number), served(versions)
    if notes.get("from") != present or used.before == number:  # somebody went back from it
        return None
    status = status_of(directory)
    try:
        outcome = Outcome.model_validate(notes[OUTCOME]).model_copy(update={"version": number})
    except (KeyError, ValueError):  # another release wrote it, or nobody
        return None
    return outcome if until(outcome.model_dump()) > until(status) else None


def is_past(date: object) -> bool:
    """Whether it is a date, in seconds since the epoch, that is not ahead of now, as of a clock that was."""
    return is_number(date) and cast("float", date) <= time.time()


def until(notes: Mapping[str, Any]) -> float:
    """As of `UNTIL`; 0 if the notes have no such date: no sample would ever be newer than one ahead of now."""
    return float(notes[UNTIL]) if is_past(notes.get(UNTIL)) else 0.0


def write_status(directory: Path, facts: Mapping[str, Any]) -> None:
    """Write the facts that `status_of` returns from now on."""
    write_whole(directory / STATUS, json.dumps(facts, indent=1) + "\n")


def status_of(directory: Path) -> dict[str, Any]:
    """Status of the last pass of a directory; empty before there was one. Raises ConfigError if it is damaged."""
    file = directory / STATUS
    try:
        status = read_json_file(file)
        if not isinstance(status, dict):
            raise ValueError("no object")
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ConfigError(f"{file} is damaged ({error}): remove it; the next pass writes it again") from None
    return status


@contextmanager
def _alone(directory: Path) -> Iterator[Path]:
    """A directory to work in, as the only learner; what a killed one left is in it.

    Raises ConfigError where there is another, or no spool.
    """
    if not samples_of(directory).is_dir():
        raise ConfigError(f"{directory} has no samples: name the directory of the server's --whiflash-learn")
    check_own(samples_of(directory))
    work = directory / WORK
    with alone(directory, LOCK):
        work.mkdir(mode=0o700, exist_ok=True)
        check_own(work)
        try:
            yield work
        except (KeyboardInterrupt, SystemExit):  # as a pass that was killed: the next one goes on
            raise
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise
        shutil.rmtree(work, ignore_errors=True)


def is_at_work(directory: Path) -> bool:
    """Whether a learner works in the directory now."""
    if not (directory / LOCK).exists():
        return False
    try:
        with alone(directory, LOCK):
            return False
    except ConfigError:
        return True
    except OSError:
        return False


def _chosen(learning: Learning, manifest: Manifest, present: int, work: Path) -> ChosenTexts:
    """Choice of a killed pass, if all of it is there still and it began as this one does; or the newest samples.

    `work` holds the files made from the choice, or nothing.
    """
    target = target_path(learning.config.target)
    shape = read_json_config(target)
    longest = min(LONGEST, integer(shape, "max_position_embeddings", target, default=LONGEST))
    vocabulary = integer(shape, "vocab_size", target)
    samples = texts_of(samples_of(learning.directory), manifest.target, vocabulary, longest)
    texts = [text for text in samples if is_past(text.written)]
    settings = learning._replace(config=learning.config.model_dump(mode="json"))._asdict()  # type: ignore[arg-type]
    settings |= {"present": present, "epochs": EPOCHS, "step_tokens": STEP_TOKENS}
    begun = read_json(json.dumps(settings, default=str))
    file, by_name = work / CHOICE, {text.name: text for text in texts}
    try:
        was = read_json_file(file)
        if was["begun"] == begun:
            learned, judged = ([by_name[name] for name in was[side]] for side in ("learned", "judged"))
            return ChosenTexts(learned, judged, was[UNTIL])
    except (OSError, ValueError, KeyError, TypeError):  # there was no pass, or a sample of it was forgotten
        pass
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(mode=0o700)
    versions = versions_of(learning.directory)
    since = max((until(notes_of(versions, number)) for number in numbers(versions)), default=0.0)
    chosen = choose(texts, since, learning.tokens, learning.judged)
    names = {side: [text.name for text in getattr(chosen, side)] for side in ("learned", "judged")}
    write_whole(file, json.dumps({"begun": begun, **names, UNTIL: chosen.until}))
    return chosen


def config_of(config: TrainConfig, checkpoints: Mapping[str, Path], work: Path, rate: float) -> TrainConfig:
    """Configuration of a training on the samples in `work` that goes on from the checkpoints, of their sizes.

    Args:
        checkpoints: by arm. rate: of learning, at its peak.
    """
    loop = {"epochs": EPOCHS, "answer_tokens": STEP_TOKENS, "learning_rate": rate, "save_steps": SAVE_STEPS}

    def section(name: str, **changes: Any) -> Any:
        found = getattr(config, name)
        if found is None:
            return None
        return found.model_copy(update={"loop": found.loop.model_copy(update=loop), **changes})

    sizes = {}
    if arms.AR in checkpoints:
        found = read_draft(checkpoints[arms.AR], arms.AR).config
        sizes = {"draft_vocab_size": found.draft_vocab_size, "intermediate_size": found.intermediate_size}
    blocks = {name: section(name) for name in ("dflash", "dspark")}
    return config.model_copy(update={"work": work, "eagle3": section("eagle3", **sizes), **blocks})


def _store(
    path: Path, target: TargetModel, capture: list[int], texts: Iterable[Text], pace: Pace
) -> FeatureStore:
    """The texts with their features, outputs of the layers `capture`, ascending; the target computes those that are not
    there yet."""
    store = FeatureStore(path, hidden=target.hidden_size, layers=capture)
    store.truncate_to_index()
    stored = {record.id for record in store.records}
    left = [text for text in texts if text.name not in stored]
    eos = target.config["eos_token_id"]
    ends = set(eos) if isinstance(eos, list) else {eos}
    for text in pace.each(tracked(left, "reading samples")):
        tokens = [*text.prompt, *text.answer]
        finished = text.answer[-1] in ends
        record = SequenceRecord(text.name, "served", len(text.prompt), len(tokens), False, finished)
        store.append(record, tokens, target.states(tokens[:-1], capture))
    return store


def replayed(exported: Exported, tokens: int, seed: int) -> list[Text]:
    """Whole answers of the original training, drawn at random, until they have so many tokens together."""
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


def train_arm(config: TrainConfig, arm: str, checkpoint: Path, pace: Pace) -> Path:
    """Train the arm's drafter on from the checkpoint, or go on with that; returns where the result is."""
    name = PARTS[arm]
    if arm == arms.DIFFUSION and read_draft(checkpoint, arm).format.model is DSparkDrafter:
        name = "dspark"
    target = target_path(config.target)
    return train_drafter(name, config, target, checkpoint, held=True, after_step=pace.rest)
