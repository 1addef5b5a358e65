"""Replay every arm at every position of an answer, without a server: how many of its drafts would be accepted.

The text is the target's own whichever arm drafts, so the replay counts how many of an arm's draft tokens agree with
the text that followed. All arms start from the same committed prefix (same-round counterfactuals, arXiv 2606.07710).
Routers learn from these counts, and oracles are computed from them.
"""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from whiflash_kernels.packed import quantise

from whiflash_sglang.checkpoints.bundle import Bundle
from whiflash_sglang.checkpoints.manifest import PARTS, Lookup, lookup_of
from whiflash_sglang.copying.calibration import EVEN_ODDS, MatchCalibration
from whiflash_sglang.copying.copier import Copier
from whiflash_sglang.drafts import arms
from whiflash_sglang.drafts.candidates import NOTHING
from whiflash_sglang.errors import ConfigError
from whiflash_sglang.files.progress import tracked
from whiflash_sglang.formats.choice import Choice, DraftHead, choose
from whiflash_sglang.formats.dflash.dflash import DFlashDrafter
from whiflash_sglang.formats.eagle3 import Eagle3Drafter
from whiflash_sglang.formats.packed import quantise_modules
from whiflash_sglang.formats.table import read_draft
from whiflash_sglang.prices.costs import LEAST_CHANCE
from whiflash_train.answers.store import FeatureStore
from whiflash_train.answers.store import Sequence as Stored
from whiflash_train.drafters.batches import Batch, unpack
from whiflash_train.drafters.dflash import choose_anchors, run_blocks
from whiflash_train.drafters.eagle3 import plan_chains, unroll
from whiflash_train.origin import Origin, VocabularyMatrices
from whiflash_train.rounds import agreed, loop_start
from whiflash_train.seed import search


class PairParts(NamedTuple):
    """A server's drafting setup. checkpoints: arm → directory, in the order of `arms.PAIR`. eagle_steps: drafts of a
    chain. dflash_vocabulary: as in a manifest. lookup: the copying arm. quantised: arms with fp8 products.
    """

    checkpoints: Mapping[str, Path]
    eagle_steps: int = 5
    dflash_vocabulary: str = "full"
    lookup: Lookup = Lookup()
    quantised: Collection[str] = ()

    @classmethod
    def of_bundle(cls, directory: Path, eagle_steps: int = 5) -> "PairParts":
        """Read the setup from the bundle's manifest."""
        bundle = Bundle.load(directory)
        manifest = bundle.manifest
        checkpoints = {arm: bundle.fetch(PARTS[arm]) for arm in manifest.drafters}
        vocabulary, lookup = manifest.dflash_vocabulary, lookup_of(manifest)
        return cls(checkpoints, eagle_steps, vocabulary, lookup, manifest.quantised)

    @property
    def captured(self) -> list[int]:
        """Target layers that the drafters read, ascending. Raises ConfigError if a drafter cannot be replayed."""
        drafts = [*map(read_draft, self.checkpoints.values())]
        for path, _, config in drafts:
            if getattr(config, "anchored", False) or getattr(config, "mask_token", None) is not None:
                raise ConfigError(f"{path}: FlashMap and P-EAGLE cannot be replayed; ask a server that drafts with it")
        return sorted({layer for draft in drafts for layer in draft.config.target_layer_ids})


class Pair(NamedTuple):
    """The loaded drafters by arm, one or two, and the settings of the copying arm.

    block_head: the head that chooses the block drafter's tokens, or None.
    """

    drafters: Mapping[str, Any]
    eagle_steps: int
    block_head: DraftHead | None
    lookup: Lookup

    @classmethod
    def load(cls, parts: PairParts, target: VocabularyMatrices | Origin) -> "Pair":
        """Load the checkpoints. Raises `CheckpointError` if one does not fit the target."""
        options: dict[str, Any] = {
            "device": target.head.device,
            "dtype": target.head.dtype,
            "target_embedding": target.embedding,
            "target_lm_head": target.head,
        }
        drafters = {arm: read_draft(path, arm).load(**options) for arm, path in parts.checkpoints.items()}
        for arm in sorted(parts.quantised):
            quantise_modules(drafters[arm])
        chain, block = (drafters.get(arm) for arm in arms.PAIR)
        head = None
        if block is not None:
            block.embedding_scale, head = target.embedding_scale, block.head
        if head is not None and chain is not None and parts.dflash_vocabulary == "eagle3":
            rows = torch.arange(chain.draft_vocab_size, device=target.head.device)
            head = head.within(chain.target_ids(rows))
        heads: Any = {arms.AR: chain and chain.head, arms.DIFFUSION: head}
        quantise(part for arm in parts.quantised for part in (heads[arm].weight, heads[arm].matrix))
        return cls(drafters, parts.eagle_steps, head, parts.lookup)


class Chain(NamedTuple):
    """Drafts of one round. tokens: the target's ids. alive: chances that each and all before it are right."""

    tokens: Sequence[int]
    alive: Sequence[float]

    def followed_by(self, more: "Chain") -> "Chain":
        """Append the chain `more`, whose chances already include those of this chain."""
        return Chain([*self.tokens, *more.tokens], [*self.alive, *more.alive])


class Copied(NamedTuple):
    """Replay of the copying arm. accepted [P]: copied tokens that were right in a round at answer position i.
    expected [P] fp64: how many the arm expected to be right. proposed [P]: how many it copied.
    behind: arm → [P] chains, the copies after that arm's drafts.
    """

    accepted: NDArray[np.int64]
    expected: NDArray[np.float64]
    proposed: NDArray[np.int64]
    behind: dict[str, list[Chain]]


def replay_lookup(
    tokens: Sequence[int],
    prompt_length: int,
    settings: Lookup,
    calibration: MatchCalibration,
    drafted: Mapping[str, Sequence[Chain]] = {},
) -> Copied:
    """Replay the copying arm at every position of an answer, on its text only. A disabled arm copies nothing.

    `calibration` and the request's own calibration learn after each token, from the first token of every proposal.

    Args:
        tokens: prompt and answer. prompt_length: tokens of the prompt. drafted: arm → [P] drafts of a trained drafter;
            a copy continues them, up to the larger of both arms' widths in all.
    """
    positions = len(tokens) - prompt_length - 1
    accepted, proposed = (np.zeros(positions, dtype=np.int64) for _ in range(2))
    expected = np.zeros(positions)
    copied = Copied(accepted, expected, proposed, {arm: [] for arm in drafted})
    if not settings.enabled:
        nothing = [Chain((), ())] * positions
        return copied._replace(behind=dict.fromkeys(drafted, nothing))
    widest = max([settings.max_width, *(len(chains[0].tokens) for chains in drafted.values() if chains)])
    copier = Copier(search(), calibration, settings.min_match)
    copier.extend(tokens[:prompt_length])
    for position in range(positions):
        begin = prompt_length + position + 1  # the bonus token is known, its KV is not
        copier.extend(tokens[begin - 1 : begin])
        limit = min(settings.max_width, positions - position)
        proposal = copier.look(limit, LEAST_CHANCE)
        drafts, expected[position] = proposal.tokens, sum(proposal.alive)
        for arm, chains in drafted.items():
            own, sure = chains[position]
            room = min(widest, positions - position) - len(own)
            beyond = copier.look_beyond(own, sure[-1], room, LEAST_CHANCE) if own and room > 0 else NOTHING
            copied.behind[arm].append(Chain(list(beyond.tokens), list(beyond.alive)))
        proposed[position] = len(drafts)
        accepted[position] = agreed(drafts, tokens[begin : begin + len(drafts)])
    return copied


JOINED = {arm: f"{arm}+{arms.LOOKUP}" for arm in arms.PAIR}
"""Arm → name of that arm with copied tokens after its drafts, as the router `auto` serves it."""

ALL_ARMS = (*arms.PAIR, arms.LOOKUP)

_BLOCKS = 64  # Blocks per product with the head, to bound the memory of logits.

Lengths = NDArray[np.int64]


class Rounds(NamedTuple):
    """Rounds of the trained drafters, at each of the P positions where a round can start.

    accepted: arm → [P] accepted drafts. tokens: arm → [P, D] int32, its drafts. alive: arm → [P, D] fp32, for each
    draft the product of confidences up to it.
    """

    accepted: dict[str, Lengths]
    tokens: dict[str, NDArray[np.int32]]
    alive: dict[str, NDArray[np.float32]]

    def add(self, arm: str, right: Tensor, choice: Choice) -> None:
        """Add an arm's rounds. right: [P, D] bool, drafts that equal the text. choice: the drafts, [P, D] each."""
        self.accepted[arm] = right.cumprod(1).sum(1).cpu().numpy()
        self.tokens[arm] = choice.token.int().cpu().numpy()
        self.alive[arm] = choice.confidence.double().cumprod(1).cpu().numpy().round(4).astype(np.float32)

    @property
    def chains(self) -> dict[str, list[Chain]]:
        """Arm → [P] chains, its drafts with their chances."""
        return {arm: list(map(Chain, tokens.tolist(), self.alive[arm].tolist())) for arm, tokens in self.tokens.items()}


class Replay(NamedTuple):
    """An answer with the drafts of each arm that would be accepted.

    `accepted`: arm (the replayed ones of `ALL_ARMS` and `JOINED`) → [P] accepted drafts of a round that starts at
    answer position i (its bonus token is answer token i, P = answer tokens - 1). `final` [P, H]: the target's state at
    the last committed token before that round. `loop_from`: answer position from which the text repeats itself, P if
    it never does.
    `copies` [P] fp64: how many of its copied tokens the lookup arm expected to be accepted.
    `proposed` [P]: how many tokens the lookup arm would copy.
    """

    id: str
    category: str
    accepted: dict[str, Lengths]
    final: Tensor
    loop_from: int
    copies: NDArray[np.float64]
    proposed: Lengths

    @property
    def positions(self) -> int:
        """P, the number of positions where a round can start."""
        return len(self.accepted[arms.LOOKUP])

    def drafts_accepted(self, arm: str, position: int) -> int:
        """Return the accepted drafts of a round of `arm` at `position`; 0 for an arm that was not replayed."""
        return int(self.accepted[arm][position]) if arm in self.accepted else 0


def replay_answers(pair: Pair, store: FeatureStore, names: Collection[str]) -> list[Replay]:
    """Replay all arms over the stored answers with ids in `names`; answers too short for a round are left out.

    The lookup arm's calibration is shared by all answers, as in a server.

    Raises:
        ValueError: no answer is long enough.
    """
    calibration = MatchCalibration(pair.lookup.seed or EVEN_ODDS)
    answers = []
    for record in tracked([record for record in store.records if record.id in names], "replaying drafters"):
        if record.length - record.prompt_length < 2:
            continue
        sequence = store.read(record)
        rounds = replay_drafters(pair, sequence, store.layers)
        answers.append(_assemble(sequence, rounds, pair, calibration))
    if not answers:
        raise ValueError("no answer is long enough to replay: raise max_new_tokens or use other prompts")
    return answers


def _assemble(sequence: Stored, rounds: Rounds, pair: Pair, calibration: MatchCalibration) -> Replay:
    record, drafted = sequence.record, rounds.chains
    tokens = sequence.tokens.tolist()
    copied = replay_lookup(tokens, record.prompt_length, pair.lookup, calibration, drafted)
    answer = tokens[record.prompt_length :]
    joined = {
        JOINED[arm]: [chain.followed_by(copy) for chain, copy in zip(chains, copied.behind[arm], strict=True)]
        for arm, chains in drafted.items()
    }
    right = {
        arm: np.array([agreed(chain.tokens, answer[at:]) for at, chain in enumerate(chains, 1)])
        for arm, chains in joined.items()
    }
    positions = record.length - record.prompt_length - 1
    start = loop_start(answer[:-1] if record.finished else answer)
    return Replay(
        record.id,
        record.category,
        {**rounds.accepted, **right, arms.LOOKUP: copied.accepted},
        # Cloned, because a view would keep the features of the whole sequence in memory.
        sequence.final[record.prompt_length - 1 : record.length - 2].clone(),
        positions if start is None else min(start, positions),
        copied.expected,
        copied.proposed,
    )


@torch.inference_mode()
def replay_drafters(pair: Pair, sequence: Stored, capture: Sequence[int]) -> Rounds:
    """Replay the trained drafters at every position of an answer; capture: layers of the stored features."""
    record = sequence.record
    batch = unpack(
        sequence.tokens,
        sequence.features,
        sequence.final,
        torch.tensor([record.length]),
        torch.tensor([record.prompt_length]),
    )
    rounds = Rounds({}, {}, {})
    if arms.AR in pair.drafters:
        rounds.add(arms.AR, *_unrolled(pair.drafters[arms.AR], batch, capture, pair.eagle_steps))
    if pair.block_head is not None:
        rounds.add(arms.DIFFUSION, *_blocks(pair.drafters[arms.DIFFUSION], pair.block_head, batch, capture))
    return rounds


def _unrolled(drafter: Eagle3Drafter, batch: Batch, capture: Sequence[int], steps: int) -> tuple[Tensor, Choice]:
    """Return whether each draft of the chains equals the text, [P, steps] bool, and the drafts."""
    layers = drafter.config.target_layer_ids
    if not layers:
        raise ValueError(
            "config.json of the EAGLE-3 checkpoint lacks eagle_aux_hidden_state_layer_ids, the target's layers that it "
            "reads: add them"
        )
    plan = plan_chains(batch)
    columns = [list(capture).index(layer) for layer in layers]
    labels = batch.tokens[plan.label_tokens]
    right, tokens, sure = [], [], []
    for step, logits in enumerate(unroll(drafter, batch, plan, columns, steps, own_drafts=True)):
        choice = choose(logits)
        valid = plan.steps_left > step
        label = torch.where(valid, plan.label + step, 0)
        tokens.append(drafter.target_ids(choice.token))
        right.append(valid & (tokens[-1] == labels[label]))
        sure.append(choice.confidence)
    return torch.stack(right, 1), Choice(torch.stack(tokens, 1), torch.stack(sure, 1))


def _blocks(drafter: DFlashDrafter, head: DraftHead, batch: Batch, capture: Sequence[int]) -> tuple[Tensor, Choice]:
    """Return whether each draft of the blocks equals the text, [P, drafts] bool, and the drafts."""
    blocks = choose_anchors(batch, per_token=1.0)
    columns = [list(capture).index(layer) for layer in drafter.config.target_layer_ids]
    states = run_blocks(drafter, batch, blocks, columns)
    bonus, drafts = batch.tokens[blocks.token + blocks.anchor], drafter.config.max_drafts
    parts = [
        drafter.propose(rows, token, drafts, head)
        for rows, token in zip(torch.split(states, _BLOCKS), torch.split(bonus, _BLOCKS), strict=True)
    ]
    choice = Choice(*(torch.cat(column) for column in zip(*parts, strict=True)))
    places = blocks.anchor[:, None] + torch.arange(1, drafts + 1, device=choice.token.device)
    valid = places < blocks.length[:, None]
    text = batch.tokens[blocks.token[:, None] + torch.minimum(places, blocks.length[:, None] - 1)]
    return valid & (choice.token == text), choice
