"""Train EAGLE-3: training-time test (arXiv 2503.01840, section 3.2) with the target's soft labels.

Row r is a chain rooted at entry r. Step 0 predicts token r+2 from the target's feature r; step j feeds back
the state of step j-1, sees the target-fed entries up to r and its own chain, and predicts token r+j+2.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from whiflash_sglang.errors import ConfigError
from whiflash_sglang.formats.eagle3 import Eagle3Config, Eagle3Drafter
from whiflash_sglang.formats.layers import Attend
from whiflash_train.config import Eagle3
from whiflash_train.drafters import batches
from whiflash_train.drafters.batches import Batch
from whiflash_train.drafters.initialisation import blank, enlarged, source_layer
from whiflash_train.origin import Origin


class Chains(NamedTuple):
    """All chains of a batch, one for every answer position at which a round can start.

    `feature`, `token`, `position` [R]: the root's feature row, the index of the token after it, its position.
    `label` [R]: row of step 0's label among all labels; step j's label is j rows further. `steps_left` [R]: number
    of steps with a label. `label_features`, `label_tokens`: feature row and token index of each label.
    """

    feature: Tensor
    token: Tensor
    position: Tensor
    label: Tensor
    steps_left: Tensor
    label_features: Tensor
    label_tokens: Tensor


class Eagle3Training(nn.Module):
    """Trains an EAGLE-3 drafter with its loss; `forward` takes a batch of `SequenceBatches`."""

    def __init__(
        self, drafter: Eagle3Drafter, target_head: Tensor, *, columns: Sequence[int], steps: int, decay: float
    ) -> None:
        """Set up the loss. columns: indices of the captured layers that are read. Step j has weight `decay ** j`."""
        super().__init__()
        self.drafter, self.columns, self.steps, self.decay = drafter, list(columns), steps, decay
        self.teacher_head: Tensor
        self.index_of: Tensor
        ids = drafter.target_ids(torch.arange(drafter.draft_vocab_size))
        self.register_buffer("teacher_head", target_head[ids].to(torch.bfloat16), persistent=False)
        self.register_buffer("index_of", batches.index_map(ids, len(target_head)), persistent=False)
        self.metrics: dict[str, float] = {}

    def forward(
        self, tokens: Tensor, features: Tensor, final: Tensor, lengths: Tensor, prompts: Tensor
    ) -> dict[str, Tensor]:
        """Compute {"loss": scalar} of a batch of `SequenceBatches`."""
        batch = batches.unpack(tokens, features, final, lengths, prompts)
        plan = plan_chains(batch)
        labels = batches.make_labels(
            final[plan.label_features], tokens[plan.label_tokens], self.teacher_head, self.index_of, None
        )
        loss = final.new_zeros((), dtype=torch.float32)
        hits = []
        for step, logits in enumerate(unroll(self.drafter, batch, plan, self.columns, self.steps)):
            valid = plan.steps_left > step
            label = torch.where(valid, plan.label + step, 0)
            counted = valid & labels.counted[label]
            losses = batches.cross_entropy(logits, labels.weights[label])
            loss = loss + self.decay**step * (losses * counted).sum() / counted.sum().clamp(min=1)
            hits.append(valid & batches.first_choice(logits.detach(), labels.ids[label]))
        self.metrics = {"acceptance_length": 1 + torch.stack(hits, 1).cumprod(1).sum(1).float().mean().item()}
        return {"loss": loss / sum(self.decay**step for step in range(self.steps))}


def unroll(
    drafter: Eagle3Drafter, batch: Batch, plan: Chains, columns: Sequence[int], steps: int, own_drafts: bool = False
) -> Iterator[Tensor]:
    """Yield each step's draft logits [chains, draft vocabulary] of all chains of `plan`. A step reads the sequence's
    tokens, or with `own_drafts` the chain's own drafts, as in a server.

    Rows whose sequence ends before a step (`steps_left`) have logits that must be ignored.
    """
    fused = drafter.fuse(batch.features[:, columns].flatten(1).to(drafter.fc.weight.dtype))
    following = torch.cat([batch.tokens[span.token + 1 : span.token + span.length] for span in batch.spans])
    positions = torch.cat([torch.arange(span.length - 1, device=fused.device) for span in batch.spans])
    attend = _chain_attention(batch, plan, drafter.keys_values(following, fused, positions))
    hidden = fused[plan.feature]
    tokens = batch.tokens[plan.token]
    for step in range(steps):
        if step and not own_drafts:
            tokens = batch.tokens[torch.where(plan.steps_left > step, plan.token + step, 0)]
        hidden, logits_hidden = drafter(tokens, hidden, plan.position + step, attend)
        logits = drafter.logits(logits_hidden)
        if own_drafts:
            tokens = drafter.target_ids(logits.argmax(-1))
        yield logits


def plan_chains(batch: Batch) -> Chains:
    """Plan the chains, rooted at the last prompt token and at every answer token with two more tokens after it."""
    device = batch.tokens.device
    parts = []
    labels = 0
    for span in batch.spans:
        roots = torch.arange(span.prompt - 1, span.length - 2, device=device)
        order = torch.arange(len(roots), device=device)
        features, tokens = span.feature + roots, span.token + roots + 1
        parts.append((features, tokens, roots, labels + order, len(roots) - order, features + 1, tokens + 1))
        labels += len(roots)
    return Chains(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _chain_attention(batch: Batch, plan: Chains, context: tuple[Tensor, Tensor]) -> Attend:
    """Return the attention of the chains' steps, in order: to the entries before the root and to those of the chain."""
    counts = [max(span.length - 1 - span.prompt, 0) for span in batch.spans]
    chain: list[tuple[Tensor, Tensor]] = []

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        chain.append((k, v))
        keys, values = (torch.stack(steps, 1) for steps in zip(*chain, strict=True))
        return batches.attend_before(plan.position, batch.spans, counts, q[:, None], (keys, values), context)

    return attend


def initialise(target: Origin, settings: Eagle3, draft_ids: Tensor) -> Eagle3Drafter:
    """Make a drafter whose layer is a copy of the target's `source_layer`, or else adds nothing at first. Its fusion
    passes on the last captured feature unchanged.

    Args:
        draft_ids: [K] the draft vocabulary, ascending target ids.

    Raises:
        ConfigError: the configured MLP is narrower than the target's, or no such layer of the target can be copied.
    """
    config = Eagle3Config(
        hidden_size=target.hidden_size,
        target_hidden_size=target.hidden_size,
        intermediate_size=target.intermediate_size,
        attention=target.attention_shape,
        num_layers=1,
        vocab_size=target.vocab_size,
        draft_vocab_size=len(draft_ids),
        num_features=len(settings.target_layers),
        target_layer_ids=tuple(settings.target_layers),
        rope=target.rope,
        max_position_embeddings=target.max_positions,
        rms_norm_eps=target.eps,
    )
    drafter = Eagle3Drafter(config, target.embedding.float())
    layer: Any = drafter.layers[0]
    head = drafter.get_parameter("lm_head.weight")
    size = target.hidden_size
    with torch.no_grad():
        drafter.fc.weight.zero_()
        drafter.fc.weight[:, -size:] = torch.eye(size)
        if settings.source_layer is None:
            blank(layer)
        else:
            source = source_layer(target, settings.source_layer, "eagle3.source_layer")
            nn.init.normal_(layer.attention.qkv.weight, std=0.02)
            layer.attention.qkv.weight[:, size:] = source.pop("attention.qkv.weight")
            layer.hidden_norm.weight.copy_(source.pop("input_norm.weight"))
            if lost := layer.load_state_dict(source, strict=False).unexpected_keys:
                raise ConfigError(
                    f"eagle3.source_layer {settings.source_layer}: the target's layers have {', '.join(lost)}, which "
                    "an EAGLE-3 drafter lacks, so it cannot begin as one of them; leave eagle3.source_layer out"
                )
        drafter.norm.weight.copy_(target.final_norm)
        head.copy_(target.head[draft_ids])
        drafter.d2t = draft_ids - torch.arange(len(draft_ids))
    return enlarged(drafter, target, draft_ids, settings.intermediate_size or target.intermediate_size)
