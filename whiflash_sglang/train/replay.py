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
from numpy.typing import NDArray
from torch import Tensor

from whiflash_sglang import arms
from whiflash_sglang.checkpoints.hub import member
from whiflash_sglang.checkpoints.manifest import PARTS, Lookup, load_manifest, lookup_of
from whiflash_sglang.drafters.lookup import WORTH
from whiflash_sglang.jsonl import lines_of, write_whole
from whiflash_sglang.lookup.calibration import EVEN_ODDS, MatchCalibration
from whiflash_sglang.lookup.copier import RULE_MATCH, Copier
from whiflash_sglang.models.choice import DraftHead, choose
from whiflash_sglang.models.dflash import DFlashDrafter
from whiflash_sglang.models.eagle3 import Eagle3Drafter
from whiflash_sglang.models.formats import read_draft
from whiflash_sglang.models.origin import Origin
from whiflash_sglang.progress import tracked
from whiflash_sglang.train.answers.store import FeatureStore, SequenceRecord
from whiflash_sglang.train.answers.store import Sequence as Stored
from whiflash_sglang.train.drafters.batches import Batch, unpack
from whiflash_sglang.train.drafters.dflash import choose_anchors, run_blocks
from whiflash_sglang.train.drafters.eagle3 import plan_chains, unroll
from whiflash_sglang.train.rounds import agreed, loop_start

ARMS = ("eagle3", "dflash")
"""The trained drafters, between which the paper's routers choose; a bundle may have one of them alone."""


class Parts(NamedTuple):
    """What a server drafts with: one or both checkpoints, drafts of a chain, what blocks choose from, copying."""

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

    `block_head`: what a block drafter chooses from. `digest`: of everything that decides what they draft; replays are
    kept under it.
    """

    eagle3: Eagle3Drafter | None
    dflash: DFlashDrafter | None
    eagle_steps: int
    block_head: DraftHead | None
    digest: str
    lookup: Lookup

    @classmethod
    def load(cls, parts: Parts, target: Origin) -> "Pair":
        """Read the checkpoints. Raises `CheckpointError` where one does not fit the target."""
        digest = hashlib.sha256(json.dumps([parts.eagle_steps, parts.dflash_vocabulary]).encode())
        for path in parts.checkpoints:
            for file in (path / "config.json", *sorted(path.glob("*.safetensors"))):
                digest.update(file.read_bytes())
        options: dict[str, Any] = {
            "device": target.device,
            "dtype": target.dtype,
            "target_embedding": target.embedding,
            "target_lm_head": target.head,
        }
        eagle3, dflash = (
            None if path is None else read_draft(path, arm).load(**options)
            for arm, path in ((arms.AR, parts.eagle3), (arms.DIFFUSION, parts.dflash))
        )
        if dflash is not None:
            dflash.embedding_scale = target.embedding_scale
        head = None if dflash is None else dflash.head
        if head is not None and eagle3 is not None and parts.dflash_vocabulary == "eagle3":
            rows = torch.arange(eagle3.draft_vocab_size, device=target.device)
            head = head.within(eagle3.target_ids(rows))
        return cls(eagle3, dflash, parts.eagle_steps, head, digest.hexdigest()[:16], parts.lookup)

    @property
    def longest(self) -> dict[str, int]:
        """Drafts of a round of each drafter that is there, at most."""
        drafts = {} if self.eagle3 is None else {"eagle3": self.eagle_steps}
        return drafts if self.dflash is None else {**drafts, "dflash": self.dflash.config.max_drafts}


class Copied(NamedTuple):
    """`accepted` [P] copied tokens that were right in a round at answer position i; `expected` [P] fp64: how many
    the arm expected; `matched` [P] bool: whether the plain rule would copy; `proposed` [P]: tokens that were copied.
    """

    accepted: NDArray[np.int64]
    expected: NDArray[np.float64]
    matched: NDArray[np.bool_]
    proposed: NDArray[np.int64]


def replay_lookup(
    tokens: Sequence[int], prompt_length: int, settings: Lookup, calibration: MatchCalibration
) -> Copied:
    """Replay the arm at every position of an answer, without memory across requests. Switched off it copies nothing.

    `calibration` and the request's own learn as it goes, a token at a time: from the first token of every proposal.

    Args:
        tokens: prompt and answer. prompt_length: tokens of the prompt.
    """
    positions = len(tokens) - prompt_length - 1
    accepted, proposed = (np.zeros(positions, dtype=np.int64) for _ in range(2))
    expected = np.zeros(positions)
    matched = np.zeros(positions, dtype=np.bool_)
    if not settings.enabled:
        return Copied(accepted, expected, matched, proposed)
    copier = Copier(calibration, settings.min_match)
    copier.extend(tokens[:prompt_length])
    for position in range(positions):
        known = prompt_length + position + 1  # the bonus token is known, its KV is not
        copier.extend(tokens[known - 1 : known])
        limit = min(settings.max_width, positions - position)
        proposal = copier.look(limit, WORTH)
        drafts, expected[position] = proposal.tokens, sum(proposal.alive)
        proposed[position] = len(drafts)
        matched[position] = bool(drafts) and proposal.length >= RULE_MATCH
        accepted[position] = agreed(drafts, tokens[known : known + len(drafts)])
    return Copied(accepted, expected, matched, proposed)


LOOKUP = "lookup"
JOINED = {arm: f"{arm}+{LOOKUP}" for arm in ARMS}
"""A trained drafter whose full-length drafts are prolonged by the copy that they lead into, as `auto` serves it."""

ALL_ARMS = (*ARMS, LOOKUP)

_BLOCKS = 64  # whose drafts are multiplied with the whole vocabulary at once

Lengths = NDArray[np.int64]
Expected = NDArray[np.float64]


class Rounds(NamedTuple):
    """Of the trained drafters, at every position where a round can start, [P] each.

    accepted: arm → drafts accepted. expected: arm → what the drafter itself expected of them, from how sure it was of
    each: the sum of the products of its confidences so far.
    """

    accepted: dict[str, Lengths]
    expected: dict[str, Expected]

    def add(self, arm: str, right: Tensor, sure: Tensor) -> None:
        """`right` [P, D] bool: drafts that equal the text. `sure` [P, D]: the drafter's confidence in each."""
        self.accepted[arm] = right.cumprod(1).sum(1).cpu().numpy()
        self.expected[arm] = sure.double().cumprod(1).sum(1).cpu().numpy().round(4)


class Replay(NamedTuple):
    """One answer with what each arm would have accepted.

    `accepted` arm (of `ALL_ARMS` and `JOINED`, those that are there) → [P] draft tokens accepted by a round starting at
    answer position i (its bonus token is answer token i, P = answer tokens - 1). `final` [P, H] the target's state at
    the last committed token of that round. `loop_from`: answer position from which the text repeats itself, P where
    it never does.
    `copies` [P] fp64: how many copied tokens the lookup arm expected to be accepted, of those likely enough to copy.
    `matched` [P] bool: whether the last two tokens occurred before, so that the plain rule copies. `proposed` [P]: how
    many tokens the lookup arm would copy.
    `expected`: of `Rounds`, by a trained drafter; empty where nobody was asked.
    """

    id: str
    category: str
    accepted: dict[str, Lengths]
    final: Tensor
    loop_from: int
    copies: NDArray[np.float64]
    matched: NDArray[np.bool_]
    proposed: Lengths
    expected: Mapping[str, Expected] = {}

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


class ReplayLog:
    """Rounds of the trained drafters on disk, one line an answer, so that a killed replay goes on."""

    def __init__(self, directory: Path, pair: Pair) -> None:
        """Open or create `<directory>/rounds-<digest>.jsonl`; a half-written last line is dropped."""
        directory.mkdir(parents=True, exist_ok=True)
        self._path = directory / f"rounds-{pair.digest}.jsonl"
        self.known: dict[str, Rounds] = {}
        text = self._path.read_text(encoding="utf-8") if self._path.exists() else ""
        lines = [line for _, line in lines_of(text)]
        for line in lines:
            try:
                row = json.loads(line)
                accepted = {arm: np.array(row["accepted"][arm], dtype=np.int64) for arm in pair.longest}
                expected = {arm: np.array(row["expected"][arm], dtype=np.float64) for arm in pair.longest}
            except (json.JSONDecodeError, KeyError):
                break
            self.known[row["id"]] = Rounds(accepted, expected)
        if len(self.known) < len(lines):
            write_whole(self._path, "".join(_line(name, rounds) for name, rounds in self.known.items()))

    def add(self, name: str, rounds: Rounds) -> None:
        """Append one answer."""
        self.known[name] = rounds
        with self._path.open("a") as file:
            file.write(_line(name, rounds))


def _line(name: str, rounds: Rounds) -> str:
    accepted = {arm: found.tolist() for arm, found in rounds.accepted.items()}
    expected = {arm: found.tolist() for arm, found in rounds.expected.items()}
    return json.dumps({"id": name, "accepted": accepted, "expected": expected}) + "\n"


def replay_name(store: FeatureStore, record: SequenceRecord) -> str:
    """What a replay is kept under: two shards may have answered the same prompt, a rounding apart."""
    return f"{store.path.name}/{record.id}"


class Source(NamedTuple):
    """Where an answer is stored."""

    store: FeatureStore
    record: SequenceRecord


def replay_answers(pair: Pair, sources: Iterable[Source], log: ReplayLog) -> list[Replay]:
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
        rounds = log.known.get(name)
        if rounds is None:
            rounds = replay_drafters(pair, sequence, store.layers)
            log.add(name, rounds)
        answers.append(_assemble(sequence, rounds, pair, calibration))
    if not answers:
        raise ValueError("no answer is long enough to replay: raise max_new_tokens or use other prompts")
    return answers


def _assemble(sequence: Stored, rounds: Rounds, pair: Pair, calibration: MatchCalibration) -> Replay:
    record, lengths = sequence.record, rounds.accepted
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
        copied.proposed,
        rounds.expected,
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
def replay_drafters(pair: Pair, sequence: Stored, capture: Sequence[int]) -> Rounds:
    """Rounds of the trained drafters at every answer position."""
    record = sequence.record
    batch = unpack(
        sequence.tokens,
        sequence.features,
        sequence.final,
        torch.tensor([record.length]),
        torch.tensor([record.prompt_length]),
    )
    rounds = Rounds({}, {})
    if pair.eagle3 is not None:
        rounds.add("eagle3", *_chains(pair.eagle3, batch, capture, pair.eagle_steps))
    if pair.dflash is not None and pair.block_head is not None:
        rounds.add("dflash", *_blocks(pair.dflash, pair.block_head, batch, capture))
    return rounds


def _chains(
    drafter: Eagle3Drafter, batch: Batch, capture: Sequence[int], steps: int
) -> tuple[Tensor, Tensor]:
    """Whether each draft is right [P, steps], and how sure the drafter is of it."""
    layers = drafter.config.target_layer_ids
    if not layers:
        raise ValueError(
            "config.json of the EAGLE-3 checkpoint lacks eagle_aux_hidden_state_layer_ids, the target's layers that it "
            "reads: add them"
        )
    plan = plan_chains(batch)
    columns = [list(capture).index(layer) for layer in layers]
    wanted = batch.tokens[plan.label_tokens]
    right, sure = [], []
    for step, logits in enumerate(unroll(drafter, batch, plan, columns, steps, own_drafts=True)):
        choice = choose(logits)
        valid = plan.steps_left > step
        label = torch.where(valid, plan.label + step, 0)
        right.append(valid & (drafter.target_ids(choice.token) == wanted[label]))
        sure.append(choice.confidence)
    return torch.stack(right, 1), torch.stack(sure, 1)


def _blocks(
    drafter: DFlashDrafter, head: DraftHead, batch: Batch, capture: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Whether each draft is right [P, drafts], and how sure the drafter is of it."""
    blocks = choose_anchors(batch, per_token=1.0)
    columns = [list(capture).index(layer) for layer in drafter.target_layer_ids]
    states = run_blocks(drafter, batch, blocks, columns)
    bonus, drafts = batch.tokens[blocks.token + blocks.anchor], drafter.config.max_drafts
    before = (
        batch.features[blocks.feature + blocks.anchor - 1][:, columns].flatten(1).to(drafter.fc.weight.dtype)
    )
    parts = [
        drafter.propose(one, token, drafts, head, tail)
        for one, token, tail in zip(
            *(torch.split(rows, _BLOCKS) for rows in (states, bonus, before)), strict=True
        )
    ]
    tokens, sure = (torch.cat(column) for column in zip(*parts, strict=True))
    wanted = blocks.anchor[:, None] + torch.arange(1, drafts + 1, device=tokens.device)
    valid = wanted < blocks.length[:, None]
    text = batch.tokens[blocks.token[:, None] + torch.minimum(wanted, blocks.length[:, None] - 1)]
    return valid & (tokens == text), sure
