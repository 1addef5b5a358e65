"""Train DFlash (arXiv 2602.06036): random anchors, whole blocks, position-weighted loss, soft labels.

A block at anchor n holds token n and masks; it sees the context features of tokens 0…n-1 and itself, in both
directions, and predicts tokens n+1…n+B-1. The head is the target's; over a large vocabulary the loss uses the
frequent tokens and a random sample of the others, whose logits are corrected by the log of the sampling rate.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from whiflash_sglang.formats.dflash.dflash import DFlashDrafter
from whiflash_sglang.formats.dflash.dflash_config import DFlashConfig, LayerSpan
from whiflash_sglang.formats.layers import Attend
from whiflash_train.config import DFlash, DSpark
from whiflash_train.drafters import batches
from whiflash_train.drafters.batches import Batch, Labels
from whiflash_train.drafters.initialisation import blank, source_layer
from whiflash_train.origin import Origin


class Blocks(NamedTuple):
    """The A blocks of a batch. anchor: [A] position in the sequence. token, feature: [A] index in the batch of the
    sequence's first token and feature row. length: [A] of the sequence. counts: number of anchors by sequence."""

    anchor: Tensor
    token: Tensor
    feature: Tensor
    length: Tensor
    counts: list[int]


class Examples(NamedTuple):
    """Training examples of the A blocks of a batch, D drafts each.

    rows: [A, D, H] the states that draft. before: [A, D] the text's token before each draft. valid: [A, D] bool,
    whether the text has a token at the draft's position. labels: of the A·D rows over the loss's vocabulary `ids` [K].
    head: [K, H] rows of the target's head, bfloat16. bias: [K] added to logits to correct for tokens left out.
    """

    rows: Tensor
    before: Tensor
    valid: Tensor
    labels: Labels
    ids: Tensor
    head: Tensor
    bias: Tensor

    @property
    def counted(self) -> Tensor:
        """[A, D] bool: whether a draft has a label."""
        return self.valid & self.labels.counted.view(self.valid.shape)

    def logits(self) -> Tensor:
        """Compute the drafts' logits [A·D, K] over the loss's vocabulary, by the target's head."""
        rows = self.rows.flatten(0, 1)
        return F.linear(rows, self.head.to(rows.dtype)) + self.bias.to(rows.dtype)

    def acceptance_length(self, logits: Tensor) -> float:
        """Return the blocks' mean acceptance length, bonus token included, for the argmax of `logits` [A·D, K]."""
        hits = self.valid & batches.first_choice(logits.detach(), self.labels.ids).view(self.valid.shape)
        return 1 + hits.cumprod(1).sum(1).float().mean().item()


class BlockTraining(nn.Module):
    """Base of block drafters' training, which makes the examples. `forward` takes a batch of `SequenceBatches`."""

    def __init__(
        self,
        drafter: DFlashDrafter,
        *,
        columns: Sequence[int],
        frequent: Tensor,
        sampled: int,
        anchors_per_token: float,
        gamma: float,
    ) -> None:
        """Set up the loss. columns: indices of the captured layers that the drafter reads. frequent: [K] token ids that
        are always in the loss; sampled: number of random others. anchors_per_token: share of the answer tokens that
        start a block, whose position k weighs exp(-(k-1)/`gamma`)."""
        super().__init__()
        self.drafter, self.columns = drafter, list(columns)
        self.frequent: Tensor
        self.rest: Tensor
        self.position_weights: Tensor
        self.sampled, self.anchors_per_token = sampled, anchors_per_token
        vocab = len(drafter.target_lm_head)
        rest = torch.ones(vocab, dtype=torch.bool)
        rest[frequent] = False
        self.register_buffer("frequent", frequent, persistent=False)
        self.register_buffer("rest", rest.nonzero()[:, 0], persistent=False)
        weights = torch.exp(-torch.arange(drafter.config.max_drafts) / gamma)
        self.register_buffer("position_weights", weights, persistent=False)
        self.metrics: dict[str, float] = {}

    def forward(
        self, tokens: Tensor, features: Tensor, final: Tensor, lengths: Tensor, prompts: Tensor
    ) -> dict[str, Tensor]:
        """Compute {"loss": scalar} of a batch of `SequenceBatches`."""
        batch = batches.unpack(tokens, features, final, lengths, prompts)
        return {"loss": self.loss(self.examples(batch))}

    def loss(self, examples: Examples) -> Tensor:
        """Compute the scalar loss, and set `metrics`."""
        raise NotImplementedError

    def examples(self, batch: Batch) -> Examples:
        """Draft blocks at random anchors, and make their labels."""
        blocks = choose_anchors(batch, self.anchors_per_token)
        drafts = self.drafter.config.max_drafts
        offsets = torch.arange(1, drafts + 1, device=batch.tokens.device)
        states = run_blocks(self.drafter, batch, blocks, self.columns)
        positions = blocks.anchor[:, None] + offsets
        valid = positions < blocks.length[:, None]
        positions = torch.minimum(positions, blocks.length[:, None] - 1)
        ids, bias = self._vocabulary()
        head = self.drafter.target_lm_head[ids].to(torch.bfloat16)
        labels = batches.make_labels(
            batch.final[(blocks.feature[:, None] + positions - 1).flatten()],
            batch.tokens[(blocks.token[:, None] + positions).flatten()],
            head,
            batches.index_map(ids, len(self.drafter.target_lm_head)),
            bias,
        )
        before = batch.tokens[blocks.token[:, None] + positions - 1]
        return Examples(self.drafter.draft_rows(states, drafts), before, valid, labels, ids, head, bias)

    def _vocabulary(self) -> tuple[Tensor, Tensor]:
        """Return the token ids of this batch's loss [K], and the correction of their logits for sampling [K]."""
        count = min(self.sampled, len(self.rest))
        chosen = self.rest[torch.randperm(len(self.rest), device=self.rest.device)[:count]]
        bias = torch.zeros(len(self.frequent) + count, device=chosen.device)
        if count:
            bias[len(self.frequent) :] = math.log(len(self.rest) / count)
        return torch.cat([self.frequent, chosen]), bias


class DFlashTraining(BlockTraining):
    """Trains DFlash by the cross-entropy with the target's distribution."""

    def loss(self, examples: Examples) -> Tensor:
        """Compute the mean of the drafts' cross-entropies, weighted by position; see `BlockTraining.loss`."""
        logits = examples.logits()
        losses = batches.cross_entropy(logits, examples.labels.weights).view(examples.valid.shape)
        weights = self.position_weights * examples.counted
        self.metrics = {"acceptance_length": examples.acceptance_length(logits)}
        return weighted_mean(losses, weights)


def weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted mean of `values`, a scalar; weights: the same shape."""
    return (values * weights).sum() / weights.sum().clamp(min=1e-6)


def run_blocks(drafter: DFlashDrafter, batch: Batch, blocks: Blocks, columns: Sequence[int]) -> Tensor:
    """Draft all blocks; returns the final states of their rows, [A, rows, H], the bonus token's row first."""
    width = drafter.config.block_size
    device = batch.tokens.device
    fused = drafter.fuse(batch.features[:, columns].flatten(1).to(drafter.fc.weight.dtype))
    places = torch.cat([torch.arange(span.length - 1, device=device) for span in batch.spans])
    keys, values = drafter.keys_values(fused, places)
    inputs = torch.full((len(blocks.anchor), width), drafter.config.mask_token_id, device=device)
    inputs[:, 0] = batch.tokens[blocks.token + blocks.anchor]
    positions = blocks.anchor[:, None] + torch.arange(width, device=device)
    attend = _block_attention(batch, blocks, width, keys, values, drafter.config.spans)
    states: Tensor = drafter(inputs, positions, attend)
    return states


def choose_anchors(batch: Batch, per_token: float) -> Blocks:
    """Choose random anchors: a share `per_token` of the answer tokens that have a next token; 1 takes all."""
    device = batch.tokens.device
    parts, counts = [], []
    for span in batch.spans:
        candidates = span.length - 1 - span.prompt
        count = max(1, round(candidates * per_token)) if candidates > 0 else 0
        anchors = span.prompt + torch.randperm(candidates, device=device)[:count].sort().values
        full = [torch.full_like(anchors, value) for value in (span.token, span.feature, span.length)]
        parts.append((anchors, *full))
        counts.append(len(anchors))
    anchor, token, feature, length = (torch.cat(column) for column in zip(*parts, strict=True))
    return Blocks(anchor, token, feature, length, counts)


def _block_attention(
    batch: Batch, blocks: Blocks, width: int, keys: Tensor, values: Tensor, seen: Sequence[LayerSpan]
) -> Attend:
    """Return the attention of blocks to the context entries before their anchor and to themselves.

    keys, values: [layers, features, Hkv, D] of the context. seen: the span of each layer; empty: all.
    """
    rows = torch.arange(width, device=keys.device)
    behind = rows[None] - rows[:, None]  # [row, other row]: the other row's position minus the row's

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        span = seen[layer] if seen else LayerSpan()
        q, k, v = (x.view(-1, width, *x.shape[1:]) for x in (q, k, v))
        context, hidden = (keys[layer], values[layer]), _hidden(behind, span)
        return batches.attend_before(
            blocks.anchor, batch.spans, blocks.counts, q, (k, v), context, hidden=hidden, window=span.window
        )

    return attend


def _hidden(behind: Tensor, seen: LayerSpan) -> Tensor:
    """Return [row, other row]: whether a row does not see the other. behind: the other's position minus its own."""
    hidden = behind > 0 if seen.causal else torch.zeros_like(behind, dtype=torch.bool)
    return hidden if seen.window is None else hidden | (behind < -seen.window)


def initialise(target: Origin, settings: DFlash | DSpark, *, block_size: int, section: str) -> DFlashDrafter:
    """Make a drafter with copies of the target's `source_layers` as first layers; further layers add nothing at first.
    Its fusion passes on the last captured feature unchanged.

    Raises:
        ConfigError: naming the key of the configuration's `section`, where the target has no such layer.
    """
    sources = [source_layer(target, index, f"{section}.source_layers") for index in settings.source_layers]
    config = DFlashConfig(
        hidden_size=target.hidden_size,
        intermediate_size=target.intermediate_size,
        attention=target.attention_shape,
        num_layers=settings.depth,
        vocab_size=target.vocab_size,
        block_size=block_size,
        mask_token_id=settings.mask_token_id,
        target_layer_ids=tuple(settings.target_layers),
        num_target_layers=target.num_layers,
        rope=target.rope,
        max_position_embeddings=target.max_positions,
        rms_norm_eps=target.eps,
    )
    drafter = DFlashDrafter(config, target.embedding.float(), target.head.float())
    size = target.hidden_size
    layers: list[Any] = list(drafter.layers)
    with torch.no_grad():
        drafter.fc.weight.zero_()
        drafter.fc.weight[:, -size:] = torch.eye(size)
        drafter.norm.weight.copy_(target.final_norm)
        if sources:
            drafter.hidden_norm.weight.copy_(sources[0]["input_norm.weight"])
        for layer, source in zip(layers, sources, strict=False):
            layer.load_state_dict(source, strict=False)  # Llama has no head norms, and a drafter no biases
        for layer in layers[len(sources) :]:
            blank(layer)
    return drafter
