"""The Domino drafter (arXiv 2605.29707): DFlash's trunk, and a recurrent state over a block that corrects drafts.

    s_0 = 0      s_k = GRU(E[token_{k-1}], s_{k-1}), token_0 the bonus token
    logits_1 = head · h_1      logits_k = head · h_k + W2 · silu(W1 · [h_k | s_k])

Numerics follow `domino_greedy_rollout` of SGLang 0.5.23 with every token as a candidate; SGLang's default corrects only
the 2,048 tokens with the largest logits.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from whiflash_sglang.formats.checkpoint import integer
from whiflash_sglang.formats.choice import Choice, DraftHead
from whiflash_sglang.formats.config_json import misfit
from whiflash_sglang.formats.dflash.dflash import DFlashDrafter, block_format
from whiflash_sglang.formats.dflash.dflash_config import DFlashConfig, parse
from whiflash_sglang.formats.draft_format import merged
from whiflash_sglang.formats.packed import Linear


@dataclass(frozen=True, slots=True)
class DominoConfig(DFlashConfig):
    """Domino's settings. state_size: of the recurrent state. rank: of a correction, which W2 maps to the vocabulary."""

    state_size: int = 0
    rank: int = 0

    @property
    def max_drafts(self) -> int:
        """Largest number of tokens that one block drafts: one less than its rows, with and without `from_anchor`."""
        return self.block_size - 1

    def rows(self, drafts: int) -> int:
        """Return the number of rows of a draft pass that gives `drafts` drafts."""
        return drafts + 1


def read_domino(path: Path, config: Mapping[str, Any]) -> DominoConfig:
    """Read SpecForge's `config.json`. Raises CheckpointError naming the field that does not fit."""
    settings = merged(path, config, "dflash_config")
    shifted, uncorrected = settings.get("shift_label"), settings.get("pure_draft_prefix_len")
    if not isinstance(shifted, bool):
        raise misfit(path, f"shift_label must be true or false, got {shifted!r}")
    if uncorrected != 1:
        raise misfit(path, f"pure_draft_prefix_len must be 1, got {uncorrected!r}")
    return parse(
        path,
        config,
        DominoConfig,
        from_anchor=shifted,
        state_size=integer(settings, "gru_hidden_dim", path),
        rank=integer(settings, "emb_dim", path),
    )


class DominoDrafter(DFlashDrafter):
    """A block drafter whose tokens depend on all earlier tokens of the block."""

    config: DominoConfig
    names: ClassVar[Mapping[str, str]] = {
        "prefix_gru.weight_ih": "prefix_gru.weight_ih_l0",
        "prefix_gru.weight_hh": "prefix_gru.weight_hh_l0",
    }

    def __init__(self, config: DominoConfig, target_embedding: Tensor, target_lm_head: Tensor) -> None:
        """Make an untrained drafter; see `DFlashDrafter`."""
        super().__init__(config, target_embedding, target_lm_head)
        size, state = config.hidden_size, config.state_size
        self.prefix_gru = nn.GRUCell(size, state, bias=False)
        self.embed_proj = nn.Sequential(
            Linear(size + state, config.rank, bias=False), nn.SiLU(), Linear(config.rank, config.vocab_size, bias=False)
        )

    @property
    def head(self) -> DraftHead:
        """The target's head, with W2 as its second matrix."""
        return super().head.beside(self.get_parameter("embed_proj.2.weight"))

    def propose(self, states: Tensor, bonus: Tensor, wanted: int, head: DraftHead) -> Choice:
        """Choose drafts token by token; from the second on, the state of earlier tokens corrects the logits."""
        rows = self.draft_rows(states, wanted)
        logits = head.logits(rows)
        previous, state = bonus, rows.new_zeros(len(rows), self.config.state_size)
        tokens, sure = [], []
        for step in range(wanted):
            state = self.prefix_gru(self.embed(previous), state)
            corrected = logits[:, step]
            if step:
                latent = self.embed_proj[:2](torch.cat([rows[:, step], state], -1))
                corrected = corrected + head.second(latent)
            choice = head.choose(corrected)
            previous = head.target_ids(choice.token)
            tokens.append(previous)
            sure.append(choice.confidence)
        return Choice(torch.stack(tokens, 1), torch.stack(sure, 1))


FORMAT = block_format(
    name="Domino",
    keys=("projector/domino", "DominoDraftModel"),
    read=read_domino,
    model=DominoDrafter,
    published="SpecForge",
    defined_by="SGLang's `domino_utils.py`",
    upstream="DFLASH",
)
