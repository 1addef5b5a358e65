"""Reference for the engine, computed apart from it: one causal pass over whole sequences in fp32.

Nothing here is paged, batched, cached or incremental, and SGLang is not imported.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from whiflash_sglang.checkpoints.fit import target_layers
from whiflash_sglang.formats.dflash.dflash import DFlashDrafter
from whiflash_sglang.formats.eagle3 import Eagle3Drafter
from whiflash_sglang.formats.table import read_draft
from whiflash_train.origin import for_training
from whiflash_train.target import TargetModel, TargetOutput

TIE = 1e-4
"""Largest top-two logit gap at which fp32 decoding may choose either token."""

CPU = torch.device("cpu")


def attend_whole(_: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal attention of one whole sequence: q [T, Hq, D], k, v [T, Hkv, D] → [T, Hq, D]."""
    heads = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)[0].transpose(0, 1)


class ReferenceTarget:
    """The target's logits and layer outputs of a whole sequence."""

    def __init__(self, path: Path) -> None:
        self.model = TargetModel(path, device=CPU, dtype=torch.float32)

    def forward(self, tokens: Sequence[int], capture: Sequence[int] = ()) -> TargetOutput:
        """Outputs at every position of `tokens`, full causal attention."""
        return self.model.forward(tokens, capture)

    def next_logits(self, tokens: Sequence[int]) -> torch.Tensor:
        """[V]: logits of the token after `tokens`."""
        return self.model.next_logits(tokens)

    def lead(self, tokens: Sequence[int], first: int, second: int) -> float:
        """Lead of the logit of `first` over that of `second` after `tokens`.

        If `first` is plain decoding's choice, this is its top-two gap or more, also among the tokens that a grammar
        leaves.
        """
        logits = self.next_logits(tokens)
        return float(logits[first] - logits[second])


@dataclass(frozen=True, slots=True)
class KeysValues:
    """One drafter's KV of a sequence: k, v [layers, T, Hkv, D]."""

    k: torch.Tensor
    v: torch.Tensor


class ReferenceDrafters:
    """Both drafters' KV of a whole sequence, in one pass each, straight from the checkpoints."""

    def __init__(self, target: Path, eagle3: Path, dflash: Path) -> None:
        self.target = ReferenceTarget(target)
        options = for_training(self.target.model)
        self._eagle3 = Eagle3Drafter.load(eagle3, **options)
        self._dflash = DFlashDrafter.load(dflash, **options)
        layers = json.loads((target / "config.json").read_text())["num_hidden_layers"]
        self._eagle3_layers, self._dflash_layers = (
            target_layers(read_draft(eagle3), layers),
            target_layers(read_draft(dflash), layers),
        )

    @torch.inference_mode()
    def keys_values(self, tokens: Sequence[int]) -> dict[str, KeysValues]:
        """KV at positions 0..T-2 of `tokens`, per arm; the last token is only the next token of its predecessor."""
        context = tokens[:-1]
        positions, following = torch.arange(len(context)), torch.tensor(list(tokens[1:]))
        fused = self._eagle3.fuse(self._features(context, self._eagle3_layers))
        ar = self._of_a_whole_pass(following, fused, positions)
        diffusion = self._dflash.keys_values(self._dflash.fuse(self._features(context, self._dflash_layers)), positions)
        return {"ar": ar, "diffusion": KeysValues(*diffusion)}

    def _of_a_whole_pass(self, following: torch.Tensor, fused: torch.Tensor, positions: torch.Tensor) -> KeysValues:
        """K and V that every layer of EAGLE-3 attends to in one step over the whole text."""
        seen: list[tuple[torch.Tensor, torch.Tensor]] = []

        def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            seen.append((k, v))
            return attend_whole(layer, q, k, v)

        self._eagle3(following, fused, positions, attend)
        keys, values = zip(*seen, strict=True)
        return KeysValues(torch.stack(keys), torch.stack(values))

    def _features(self, tokens: Sequence[int], layers: Sequence[int]) -> torch.Tensor:
        unique = sorted(set(layers))
        captured = self.target.forward(tokens, unique).features
        return torch.cat([captured[:, unique.index(layer)] for layer in layers], dim=-1)


@dataclass
class Comparison:
    """Greedy outputs against plain decoding's (design: identical, or a tie at the first difference)."""

    target: ReferenceTarget
    compared: int = 0
    ties: list[float] = field(default_factory=list)

    def check(self, prompt: Sequence[int], expected: Sequence[int], found: Sequence[int], what: str) -> None:
        """Raise AssertionError naming the first difference that is no tie."""
        self.compared += 1
        if list(expected) == list(found):
            return
        first = next((i for i, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b), None)
        assert first is not None, f"{what}: {len(found)} tokens instead of {len(expected)}, equal as far as they go"
        lead = self.target.lead([*prompt, *expected[:first]], expected[first], found[first])
        assert lead <= TIE, (
            f"{what}: token {first} of {len(expected)} is {found[first]}, plain decoding gives {expected[first]}, "
            f"whose logit is {lead:.2e} ahead"
        )
        self.ties.append(lead)

    def check_all(
        self,
        arrivals: Iterable[Any],
        expected: Mapping[str, Sequence[int]],
        found: Mapping[str, Sequence[int]],
        mark: str = "",
    ) -> None:
        """Texts of `traffic.Arrival`s, and print the summary: an aborted one has a prefix of plain decoding's.

        mark: what their names in `found` begin with.
        """
        for a in arrivals:
            text = found[mark + a.rid]
            whole = expected[a.rid] if a.abort_after is None else expected[a.rid][: len(text)]
            self.check(a.prompt, whole, text, mark + a.rid)
        print(self.summary())

    def summary(self) -> str:
        """One line for the test's output."""
        return f"{self.compared} outputs compared, {len(self.ties)} ties {[f'{gap:.1e}' for gap in self.ties]}"
