"""The DSpark drafter (arXiv 2607.05147): DFlash's trunk, a Markov head that corrects token by token, a confidence head.

    logits_k = head · h_k + W2 · latent(W1[token_k-1], h_k)       confidence_k = sigmoid(w · [h_k | W1[token_k-1]] + b)

Every row of a block drafts, the bonus token's too, unless `sample_from_anchor` is false. A Markov rank of 0 means
DeepSpec's DFlash. Numerics follow `sglang/srt/models/dspark.py` of SGLang 0.5.23, which refuses rank 0.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from whiflash_sglang.formats.checkpoint import MOST_ROWS, integer
from whiflash_sglang.formats.choice import Choice, DraftHead
from whiflash_sglang.formats.config_json import misfit
from whiflash_sglang.formats.dflash.dflash import DFlashDrafter, block_format
from whiflash_sglang.formats.dflash.dflash_config import DFlashConfig, parse
from whiflash_sglang.formats.draft_format import merged
from whiflash_sglang.formats.packed import Linear

ARCHITECTURES = ("Qwen3DSparkModel", "DSparkDraftModel", "LingDSparkModel")
HEAD_TYPES = ("vanilla", "gated", "rnn")
DEFAULT_ROWS = 7
"""Drafts of a block if the checkpoint does not say."""


@dataclass(frozen=True, slots=True)
class DSparkConfig(DFlashConfig):
    """Settings of a DFlash trunk, a Markov head and a confidence head.

    Attributes:
        markov_rank: 0 for no Markov head. markov_head: one of `HEAD_TYPES`.
        confidence: whether there is a confidence head; confidence_with_markov: it reads the previous token's W1 too.
    """

    markov_rank: int = 0
    markov_head: str = "vanilla"
    confidence: bool = False
    confidence_with_markov: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return DeepSpec's `config.json`, which SGLang reads too. Raises ValueError for variants of the trunk."""
        if self.variant:
            raise ValueError("only plain DSpark drafters are written")
        return {
            **self.trunk_json(),
            "architectures": [ARCHITECTURES[0]],
            "block_size": self.max_drafts,
            "mask_token_id": self.mask_token_id,
            "target_layer_ids": list(self.target_layer_ids) or None,
            "sample_from_anchor": self.from_anchor,
            "markov_rank": self.markov_rank,
            "markov_head_type": self.markov_head,
            "enable_confidence_head": self.confidence,
            "confidence_head_with_markov": self.confidence_with_markov,
        }


def read_dspark(path: Path, config: Mapping[str, Any]) -> DSparkConfig:
    """Read DeepSpec's or SpecForge's `config.json`, whose `block_size` counts drafts. Raises CheckpointError naming the
    field that does not fit.
    """
    settings = merged(path, config, "dflash_config", "dspark_config")
    from_anchor = bool(settings.get("sample_from_anchor", True))
    drafts = integer(settings, "block_size", path, maximum=MOST_ROWS, default=DEFAULT_ROWS)
    heads = read_heads(path, settings)
    return parse(path, settings, DSparkConfig, from_anchor=from_anchor, block_size=drafts + (not from_anchor), **heads)


def read_heads(path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Read the fields that `DSparkConfig` adds. Raises CheckpointError naming the field that does not fit."""
    rank = integer(settings, "markov_rank", path, minimum=0, default=0)
    kind = settings.get("markov_head_type") or ("vanilla" if rank == 0 else None)
    if kind not in HEAD_TYPES:
        raise misfit(path, f"markov_head_type {kind!r} is not one of {', '.join(HEAD_TYPES)}")
    # As in SGLang, a checkpoint that does not say has a confidence head, which reads W1 if there is one.
    with_markov = bool(settings.get("confidence_head_with_markov", rank > 0))
    confidence = bool(settings.get("enable_confidence_head", True))
    if confidence and with_markov and not rank:
        raise misfit(path, "confidence_head_with_markov needs markov_rank above 0")
    return {"markov_rank": rank, "markov_head": kind, "confidence": confidence, "confidence_with_markov": with_markov}


class DSparkDrafter(DFlashDrafter):
    """A block drafter whose tokens depend on the token before them, or with an RNN on all earlier ones."""

    config: DSparkConfig

    def __init__(self, config: DSparkConfig, target_embedding: Tensor, target_lm_head: Tensor) -> None:
        """Make an untrained drafter; see `DFlashDrafter`."""
        super().__init__(config, target_embedding, target_lm_head)
        rank, size = config.markov_rank, config.hidden_size
        self.markov_head = nn.ModuleDict()
        if rank:
            self.markov_head["markov_w1"] = nn.Embedding(config.vocab_size, rank)
            rows = config.draft_vocab_size or config.vocab_size
            self.markov_head["markov_w2"] = Linear(rank, rows, bias=False)
        if config.markov_head == "gated":
            self.markov_head["gate_proj"] = Linear(size + rank, rank)
        elif config.markov_head == "rnn":
            self.markov_head["joint_proj"] = Linear(size + 2 * rank, 3 * rank)
        width = size + (rank if config.confidence_with_markov else 0)
        self.confidence_head = nn.ModuleDict({"proj": Linear(width, 1)} if config.confidence else {})

    @property
    def head(self) -> DraftHead:
        """The checkpoint's own head, else the target's, with W2 as its second matrix."""
        rows = self.get_parameter("markov_head.markov_w2.weight") if self.config.markov_rank else None
        return super().head.beside(rows)

    def heads(self) -> dict[str, nn.Parameter]:
        """Return the parameters that DSpark adds to the trunk, by published names."""
        return {
            name: parameter
            for name, parameter in self.named_parameters()
            if name.startswith(("markov_head.", "confidence_head."))
        }

    def propose(self, states: Tensor, bonus: Tensor, wanted: int, head: DraftHead) -> Choice:
        """Choose drafts token by token, each corrected by the token before it; see `DFlashDrafter.propose`."""
        rows = self.draft_rows(states, wanted)
        plain = not self.config.markov_rank
        token, sure = super().propose(states, bonus, wanted, head) if plain else self._corrected(rows, bonus, head)
        if self.config.confidence:
            before = torch.cat([bonus[:, None], token[:, :-1]], 1)
            sure = torch.sigmoid(self.confidence_logits(rows, before))
        return Choice(token, sure)

    def _corrected(self, rows: Tensor, bonus: Tensor, head: DraftHead) -> Choice:
        logits = head.logits(rows)
        previous, state = bonus, self._begin(rows)
        tokens, sure = [], []
        for step in range(rows.shape[1]):
            latent, state = self._latent(self._embedded(previous), rows[:, step], state)
            choice = head.choose(logits[:, step] + head.second(latent))
            previous = head.target_ids(choice.token)
            tokens.append(previous)
            sure.append(choice.confidence)
        return Choice(torch.stack(tokens, 1), torch.stack(sure, 1))

    def latents(self, rows: Tensor, before: Tensor) -> Tensor:
        """Compute W2's input [B, D, R] from states `rows` [B, D, H] and the tokens `before` them [B, D]."""
        state, latents = self._begin(rows), []
        embedded = self._embedded(before)  # once: each look-up's gradient is as large as the table
        for step in range(rows.shape[1]):
            latent, state = self._latent(embedded[:, step], rows[:, step], state)
            latents.append(latent)
        return torch.stack(latents, 1)

    def _begin(self, rows: Tensor) -> Tensor:
        return rows.new_zeros(len(rows), self.config.markov_rank)

    def _embedded(self, tokens: Tensor) -> Tensor:
        """Look up W1's rows of `tokens` [...] → [..., R]."""
        embedded: Tensor = self.markov_head["markov_w1"](tokens)
        return embedded

    def _latent(self, embedded: Tensor, hidden: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Compute W2's input and the next `state`, [B, R] each. embedded: [B, R] rows of W1 for the previous tokens.
        hidden: [B, H] states of the rows.
        """
        if self.config.markov_head == "vanilla":
            return embedded, state
        if self.config.markov_head == "gated":
            gate = torch.sigmoid(self.markov_head["gate_proj"](torch.cat([hidden, embedded], -1)))
            return gate * embedded, state
        joint = self.markov_head["joint_proj"](torch.cat([state, embedded, hidden], -1))
        gate, candidate, output = joint.chunk(3, -1)
        gate = torch.sigmoid(gate)
        return torch.tanh(output), gate * state + (1 - gate) * torch.tanh(candidate)

    def confidence_logits(self, rows: Tensor, before: Tensor) -> Tensor:
        """Compute the confidence head's logits [B, D] float32 from states `rows` [B, D, H], tokens `before` [B, D]."""
        features = rows
        if self.config.confidence_with_markov:
            features = torch.cat([rows, self._embedded(before)], -1)
        weight, bias = (self.get_parameter(f"confidence_head.proj.{name}") for name in ("weight", "bias"))
        return F.linear(features.float(), weight.float(), bias.float())[..., 0]


FORMAT = block_format(
    name="DSpark",
    keys=ARCHITECTURES,
    read=read_dspark,
    model=DSparkDrafter,
    published="DeepSpec (also its DFlash), SpecForge",
    defined_by="SGLang's `dspark.py`; rank 0: DeepSpec",
    upstream="DSPARK",
)
