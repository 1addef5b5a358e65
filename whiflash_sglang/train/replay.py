"""What every arm would have accepted at every position of an answer, without a server.

The text is the target's own whoever drafts, so an arm is replayed at every answer position: how many of its draft
tokens agree with the text that followed. All arms start from the same committed prefix (same-round counterfactuals,
arXiv 2606.07710), which is what routers learn from and what oracles are made of.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from whiflash_sglang.bundle_members import member
from whiflash_sglang.config import Lookup, load_manifest, lookup_of
from whiflash_sglang.drafter_set import PARTS
from whiflash_sglang.jsonl import lines_of
from whiflash_sglang.lookup.calibration import EVEN_ODDS, MatchCalibration
from whiflash_sglang.models.dflash import DFlashDrafter
from whiflash_sglang.models.eagle3 import Eagle3Drafter
from whiflash_sglang.models.formats import read_draft
from whiflash_sglang.models.target import TargetModel
from whiflash_sglang.progress import tracked
from whiflash_sglang.train.batches import Batch, unpack
from whiflash_sglang.train.copying import replay_lookup
from whiflash_sglang.train.dflash import choose_anchors, run_blocks
from whiflash_sglang.train.eagle3 import plan_chains, unroll
from whiflash_sglang.train.loops import loop_start
from whiflash_sglang.train.store import FeatureStore, SequenceRecord
from whiflash_sglang.train.store import Sequence as Stored

ARMS = ("eagle3", "dflash")
"""The trained drafters, between which the paper's routers choose; a bundle may have one of them alone."""

LOOKUP = "lookup"
JOINED = {arm: f"{arm}+{LOOKUP}" for arm in ARMS}
"""A trained drafter whose full-length drafts are prolonged by the copy that they lead into, as `auto` serves it."""

ALL_ARMS = (*ARMS, LOOKUP)

_HEAD_ROWS = 512  # rows multiplied with the whole vocabulary at once

Lengths = NDArray[np.int64]


class Replay(NamedTuple):
    """One answer with what each arm would have accepted.

    `accepted` arm (of `ALL_ARMS` and `JOINED`, those that are there) → [P] draft tokens accepted by a round starting at
    answer position i (its bonus token is answer token i, P = answer tokens - 1). `final` [P, H] the target's state at
    the last committed token of that round. `loop_from`: answer position from which the text repeats itself, P where
    it never does.
    `copies` [P] fp64: how many copied tokens the lookup arm expected to be accepted, of those likely enough to copy.
    `matched` [P] bool: whether the last two tokens occurred before, so that the plain rule copies.
    """

    id: str
    category: str
    accepted: dict[str, Lengths]
    final: Tensor
    loop_from: int
    copies: NDArray[np.float64]
    matched: NDArray[np.bool_]

    @property
    def positions(self) -> int:
        """P: places where a round can start."""
        return len(self.accepted[LOOKUP])

    @property
    def trained(self) -> tuple[str, ...]:
        """The trained drafters that were replayed, of `ARMS`."""
        return tuple(arm for arm in ARMS if arm in self.accepted)

    def drafts_accepted(self, arm: str, position: int) -> int:
        """Of a round of `arm` at `position`; an arm that was not replayed drafts nothing."""
        return int(self.accepted[arm][position]) if arm in self.accepted else 0


class Parts(NamedTuple):
    """What a server drafts with: one or both checkpoints, drafts of a chain, what DFlash chooses from, copying."""

    eagle3: Path | None
    dflash: Path | None
    eagle_steps: int = 5
    dflash_vocabulary: str = "full"
    lookup: Lookup = Lookup()

    @classmethod
    def of_bundle(cls, bundle: Path, eagle_steps: int = 5) -> "Parts":
        """As the bundle's manifest says."""
        manifest = load_manifest(bundle)
        eagle3, dflash = (
            member(bundle, manifest, part) if getattr(manifest, part) else None for part in ARMS
        )
        return cls(
            eagle3,
            dflash,
            eagle_steps,
            manifest.dflash_vocabulary,
            lookup_of(manifest),
        )

    @property
    def checkpoints(self) -> tuple[Path, ...]:
        """Directories of those that are there."""
        return tuple(path for path in (self.eagle3, self.dflash) if path is not None)

    @property
    def arms(self) -> tuple[str, ...]:
        """Names that a server has for them."""
        return tuple(arm for arm, part in PARTS.items() if getattr(self, part))

    @property
    def captured(self) -> list[int]:
        """Target layers that they read, ascending."""
        return sorted(
            {layer for path in self.checkpoints for layer in read_draft(path).config.target_layer_ids}
        )


class Pair(NamedTuple):
    """The drafters, loaded, one of which may be missing, and the settings of the copying arm.

    `vocabulary` [K] target ids that DFlash chooses from, `head` [K, H] their rows of the target's head. `digest`: of
    everything that decides what they draft; replays are kept under it.
    """

    eagle3: Eagle3Drafter | None
    dflash: DFlashDrafter | None
    eagle_steps: int
    vocabulary: Tensor
    head: Tensor
    digest: str
    lookup: Lookup

    @classmethod
    def load(cls, parts: Parts, target: TargetModel) -> "Pair":
        """Read the checkpoints. Raises `CheckpointError` where one does not fit the target."""
        digest = hashlib.sha256(json.dumps([parts.eagle_steps, parts.dflash_vocabulary]).encode())
        for path in parts.checkpoints:
            for file in sorted(path.glob("*.safetensors")):
                digest.update(file.read_bytes())
        options: dict[str, Any] = {
            "device": target.device,
            "dtype": target.dtype,
            "target_embedding": target.embedding,
            "target_lm_head": target.head,
        }
        eagle3 = None if parts.eagle3 is None else Eagle3Drafter.load(parts.eagle3, **options)
        dflash = None if parts.dflash is None else DFlashDrafter.load(parts.dflash, **options)
        vocabulary = torch.arange(len(target.head), device=target.device)
        if eagle3 is not None and parts.dflash_vocabulary == "eagle3":
            vocabulary = eagle3.target_ids(torch.arange(eagle3.draft_vocab_size, device=target.device))
        head = target.head if parts.dflash_vocabulary == "full" else target.head[vocabulary]
        return cls(eagle3, dflash, parts.eagle_steps, vocabulary, head, digest.hexdigest()[:16], parts.lookup)

    @property
    def longest(self) -> dict[str, int]:
        """Drafts of a round of each drafter that is there, at most."""
        drafts = {} if self.eagle3 is None else {"eagle3": self.eagle_steps}
        return drafts if self.dflash is None else {**drafts, "dflash": self.dflash.block_size - 1}


class ReplayLog:
    """Accepted lengths of the trained drafters on disk, one line an answer, so that a killed replay goes on."""

    def __init__(self, directory: Path, pair: Pair) -> None:
        """Open or create `<directory>/replay-<digest>.jsonl`; a half-written last line is dropped."""
        directory.mkdir(parents=True, exist_ok=True)
        self._path = directory / f"replay-{pair.digest}.jsonl"
        self._arms = tuple(pair.longest)
        self.known: dict[str, dict[str, Lengths]] = {}
        text = self._path.read_text(encoding="utf-8") if self._path.exists() else ""
        lines = [line for _, line in lines_of(text)]
        for line in lines:
            try:
                row = json.loads(line)
                self.known[row["id"]] = {arm: np.array(row[arm], dtype=np.int64) for arm in self._arms}
            except (json.JSONDecodeError, KeyError):
                break
        if len(self.known) < len(lines):
            staged = self._path.with_suffix(".partial")
            staged.write_text("".join(_line(name, lengths) for name, lengths in self.known.items()))
            staged.replace(self._path)

    def add(self, name: str, lengths: Mapping[str, Lengths]) -> None:
        """Append one answer."""
        self.known[name] = dict(lengths)
        with self._path.open("a") as file:
            file.write(_line(name, lengths))


def _line(name: str, lengths: Mapping[str, Lengths]) -> str:
    return json.dumps({"id": name, **{arm: found.tolist() for arm, found in lengths.items()}}) + "\n"


def replay_name(store: FeatureStore, record: SequenceRecord) -> str:
    """What a replay is kept under: two shards may have answered the same prompt, a rounding apart."""
    return f"{store.path.name}/{record.id}"


class Source(NamedTuple):
    """Where an answer is stored."""

    store: FeatureStore
    record: SequenceRecord


def replay_answers(pair: Pair, sources: Iterable[Source], log: ReplayLog | None = None) -> list[Replay]:
    """Replay all arms over stored answers, in this order; answers too short to hold a round are left out.

    The lookup arm's calibration learns from answer to answer, as in one server.

    Raises:
        ValueError: no answer is long enough.
    """
    calibration = MatchCalibration(pair.lookup.seed or EVEN_ODDS)
    answers = []
    for store, record in tracked(list(sources), "replaying drafters"):
        if record.length - record.prompt_length < 2:
            continue
        sequence = store.read(record)
        name = replay_name(store, record)
        lengths = log.known.get(name) if log is not None else None
        if lengths is None:
            lengths = replay_drafters(pair, sequence, store.layers)
            if log is not None:
                log.add(name, lengths)
        answers.append(_assemble(sequence, lengths, pair, calibration))
    if not answers:
        raise ValueError("no answer is long enough to replay: raise max_new_tokens or use other prompts")
    return answers


def _assemble(
    sequence: Stored, lengths: dict[str, Lengths], pair: Pair, calibration: MatchCalibration
) -> Replay:
    record = sequence.record
    copied = replay_lookup(sequence.tokens.tolist(), record.prompt_length, pair.lookup, calibration)
    full = pair.longest
    widest = max(pair.lookup.max_width, *full.values())
    joined = {JOINED[arm]: join_copies(lengths[arm], copied.accepted, full[arm], widest) for arm in full}
    positions = record.length - record.prompt_length - 1
    answer = sequence.tokens[record.prompt_length :].tolist()
    start = loop_start(answer[:-1] if record.finished else answer)
    return Replay(
        record.id,
        record.category,
        {**lengths, **joined, LOOKUP: copied.accepted},
        # A copy: a view would keep the features of the whole sequence in memory.
        sequence.final[record.prompt_length - 1 : record.length - 2].clone(),
        positions if start is None else min(start, positions),
        copied.expected,
        copied.matched,
    )


def join_copies(accepted: Lengths, copied: Lengths, full: int, widest: int) -> Lengths:
    """Accepted drafts [P] of an arm with drafts of `full` length, and of the copy behind those that are all right.

    copied: [P] what a copy from every position accepts; behind drafts that are right it begins where they end.
    widest: most tokens of both together.
    """
    joined = accepted.copy()
    ends = np.flatnonzero(accepted >= full)
    ends = ends[ends + full < len(accepted)]
    joined[ends] += np.minimum(copied[ends + full], widest - full)
    return joined


@torch.inference_mode()
def replay_drafters(pair: Pair, sequence: Stored, capture: Sequence[int]) -> dict[str, Lengths]:
    """Accepted drafts of the trained drafters at every answer position."""
    record = sequence.record
    batch = unpack(
        sequence.tokens,
        sequence.features,
        sequence.final,
        torch.tensor([record.length]),
        torch.tensor([record.prompt_length]),
    )
    lengths = {}
    if pair.eagle3 is not None:
        lengths["eagle3"] = _chain_lengths(pair.eagle3, batch, capture, pair.eagle_steps)
    if pair.dflash is not None:
        lengths["dflash"] = _block_lengths(pair.dflash, pair, batch, capture)
    return lengths


def _chain_lengths(drafter: Eagle3Drafter, batch: Batch, capture: Sequence[int], steps: int) -> Lengths:
    layers = drafter.config.target_layer_ids
    if not layers:
        raise ValueError("the EAGLE-3 checkpoint names no eagle_aux_hidden_state_layer_ids")
    plan = plan_chains(batch)
    columns = [list(capture).index(layer) for layer in layers]
    wanted = batch.tokens[plan.label_tokens]
    hits = []
    for step, logits in enumerate(unroll(drafter, batch, plan, columns, steps)):
        valid = plan.steps_left > step
        label = torch.where(valid, plan.label + step, 0)
        hits.append(valid & (drafter.target_ids(logits.argmax(-1)) == wanted[label]))
    lengths: Lengths = torch.stack(hits, 1).cumprod(1).sum(1).cpu().numpy()
    return lengths


def _block_lengths(drafter: DFlashDrafter, pair: Pair, batch: Batch, capture: Sequence[int]) -> Lengths:
    blocks = choose_anchors(batch, per_token=1.0)
    columns = [list(capture).index(layer) for layer in drafter.target_layer_ids]
    hidden = run_blocks(drafter, batch, blocks, columns)
    accepted = torch.zeros(len(blocks.anchor), dtype=torch.int64)
    alive = torch.arange(len(blocks.anchor))
    # The head over a whole vocabulary is most of the work, and a draft after a wrong one does not matter.
    for offset in range(1, drafter.block_size):
        alive = alive[blocks.anchor[alive] + offset < batch.spans[0].length]
        states = hidden[alive, offset - 1]
        if not len(alive):
            break
        choices = [F.linear(part, pair.head).argmax(-1) for part in torch.split(states, _HEAD_ROWS)]
        drafts = pair.vocabulary[torch.cat(choices)]
        alive = alive[drafts == batch.tokens[blocks.anchor[alive] + offset]]
        accepted[alive] += 1
    return accepted.numpy()
