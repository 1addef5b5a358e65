"""Replay drafters at every position of an answer, without a server: how many of their drafts would be accepted.

The text is the target's own whichever drafter drafts, so the replay counts how many of its draft tokens agree with the
text that followed. All drafters start from the same committed prefix (same-round counterfactuals, arXiv 2606.07710).
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
from whiflash_sglang.checkpoints.fit import TargetShape, target_layers
from whiflash_sglang.checkpoints.manifest import PARTS
from whiflash_sglang.drafts import arms
from whiflash_sglang.errors import ConfigError
from whiflash_sglang.formats.choice import DraftHead, choose
from whiflash_sglang.formats.dflash.dflash import DFlashDrafter
from whiflash_sglang.formats.eagle3 import Eagle3Drafter
from whiflash_sglang.formats.packed import quantise_modules
from whiflash_sglang.formats.table import read_draft
from whiflash_train.answers.data import target_path
from whiflash_train.answers.store import Sequence as Stored
from whiflash_train.drafters.batches import Batch, unpack
from whiflash_train.drafters.dflash import choose_anchors, run_blocks
from whiflash_train.drafters.eagle3 import plan_chains, unroll
from whiflash_train.origin import Origin, VocabularyMatrices


class PairParts(NamedTuple):
    """A server's drafting setup. checkpoints: arm → directory, in the order of `arms.PAIR`. num_layers: the target's.
    eagle_steps: drafts of a chain. dflash_vocabulary: as in a manifest. quantised: arms with fp8 products.
    """

    checkpoints: Mapping[str, Path]
    num_layers: int
    eagle_steps: int = 5
    dflash_vocabulary: str = "full"
    quantised: Collection[str] = ()

    @classmethod
    def of_bundle(cls, directory: Path, eagle_steps: int = 5) -> "PairParts":
        """Read the setup from the manifest of a bundle, whose target is fetched."""
        bundle = Bundle.load(directory)
        manifest = bundle.manifest
        shape = TargetShape.read(target_path(manifest.target, manifest) / "config.json")
        checkpoints = {arm: bundle.fetch(PARTS[arm]) for arm in manifest.drafters}
        return cls(checkpoints, shape.num_layers, eagle_steps, manifest.dflash_vocabulary, manifest.quantised)

    @property
    def layers(self) -> dict[str, tuple[int, ...]]:
        """Arm → target layers that its drafter reads. Raises CheckpointError if the target has no such layer."""
        return {arm: target_layers(read_draft(path), self.num_layers) for arm, path in self.checkpoints.items()}

    @property
    def captured(self) -> list[int]:
        """Target layers that the drafters read, ascending. Raises ConfigError if a drafter cannot be replayed."""
        for path, _, config in map(read_draft, self.checkpoints.values()):
            if getattr(config, "anchored", False) or getattr(config, "mask_token", None) is not None:
                raise ConfigError(f"{path}: FlashMap and P-EAGLE cannot be replayed; ask a server that drafts with it")
        return sorted({layer for layers in self.layers.values() for layer in layers})


class Pair(NamedTuple):
    """The loaded drafters by arm, one or two. layers: the target's, that each reads. block_head: the head that chooses
    the block drafter's tokens, or None."""

    drafters: Mapping[str, Any]
    layers: Mapping[str, tuple[int, ...]]
    eagle_steps: int
    block_head: DraftHead | None

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
        return cls(drafters, parts.layers, parts.eagle_steps, head)


_BLOCKS = 64  # Blocks per product with the head, to bound the memory of logits.


@torch.inference_mode()
def replay_drafters(pair: Pair, sequence: Stored, capture: Sequence[int]) -> dict[str, NDArray[np.int64]]:
    """Return, by drafter, the accepted drafts of a round that begins at each of the P positions of an answer, [P].

    A position's bonus token is that answer token; P is the number of answer tokens less one. capture: layers of the
    stored features.
    """
    record = sequence.record
    batch = unpack(
        sequence.tokens,
        sequence.features,
        sequence.final,
        torch.tensor([record.length]),
        torch.tensor([record.prompt_length]),
    )
    columns = {arm: [list(capture).index(layer) for layer in pair.layers[arm]] for arm in pair.drafters}
    right = {}
    if arms.AR in pair.drafters:
        right[arms.AR] = _unrolled(pair.drafters[arms.AR], batch, columns[arms.AR], pair.eagle_steps)
    if pair.block_head is not None:
        right[arms.DIFFUSION] = _blocks(pair.drafters[arms.DIFFUSION], pair.block_head, batch, columns[arms.DIFFUSION])
    return {arm: drafts.cumprod(1).sum(1).cpu().numpy() for arm, drafts in right.items()}


def _unrolled(drafter: Eagle3Drafter, batch: Batch, columns: Sequence[int], steps: int) -> Tensor:
    """Return whether each draft of the chain after each of P positions equals the text, [P, steps] bool."""
    plan = plan_chains(batch)
    labels = batch.tokens[plan.label_tokens]
    right = []
    for step, logits in enumerate(unroll(drafter, batch, plan, columns, steps, own_drafts=True)):
        valid = plan.steps_left > step
        label = torch.where(valid, plan.label + step, 0)
        right.append(valid & (drafter.target_ids(choose(logits).token) == labels[label]))
    return torch.stack(right, 1)


def _blocks(drafter: DFlashDrafter, head: DraftHead, batch: Batch, columns: Sequence[int]) -> Tensor:
    """Return whether each draft of the block after each of P positions equals the text, [P, drafts] bool."""
    blocks = choose_anchors(batch, per_token=1.0)
    states = run_blocks(drafter, batch, blocks, columns)
    bonus, drafts = batch.tokens[blocks.token + blocks.anchor], drafter.config.max_drafts
    parts = [
        drafter.propose(rows, token, drafts, head).token
        for rows, token in zip(torch.split(states, _BLOCKS), torch.split(bonus, _BLOCKS), strict=True)
    ]
    chosen = torch.cat(parts)
    places = blocks.anchor[:, None] + torch.arange(1, drafts + 1, device=chosen.device)
    valid = places < blocks.length[:, None]
    text = batch.tokens[blocks.token[:, None] + torch.minimum(places, blocks.length[:, None] - 1)]
    return valid & (chosen == text)
