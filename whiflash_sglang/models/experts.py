"""A mixture of experts for the few rows of a draft pass, without reading on the host which experts they go to."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from whiflash_kernels.layers import silu_and_mul

from whiflash_sglang.errors import CheckpointError
from whiflash_sglang.models.checkpoint import WeightReader, integer, number
from whiflash_sglang.models.layers import SwiGLU

GATHERING = 3
"""Memory traffic of a gathered weight: it is read, written and read again."""


class Routed(NamedTuple):
    """experts: how many, in `groups` of which `open_groups` are chosen from; each row goes to `chosen` experts.
    intermediate_size: of an expert; shared_size: of the one that all rows go to, 0 where there is none. normalised:
    whether the weights of a row's experts sum to one before they are multiplied by `scale`.
    """

    experts: int
    chosen: int
    groups: int
    open_groups: int
    intermediate_size: int
    shared_size: int
    normalised: bool
    scale: float


def read_routed(path: Path, config: Mapping[str, Any]) -> Routed:
    """The experts of a GLM-4.5 layer. Raises `CheckpointError` naming the key that does not fit."""
    for key, served in (("scoring_func", "sigmoid"), ("topk_method", "noaux_tc"), ("hidden_act", "silu")):
        if config.get(key, served) != served:
            raise CheckpointError(
                f"{path}/config.json: {key} {config[key]!r} is not supported, only {served}"
            )
    size = integer(config, "moe_intermediate_size", path)
    return Routed(
        experts=integer(config, "n_routed_experts", path),
        chosen=integer(config, "num_experts_per_tok", path),
        groups=integer(config, "n_group", path, default=1),
        open_groups=integer(config, "topk_group", path, default=1),
        intermediate_size=size,
        shared_size=size * integer(config, "n_shared_experts", path, minimum=0, default=0),
        normalised=bool(config.get("norm_topk_prob", True)),
        scale=number(config, "routed_scaling_factor", path, default=1.0),
    )


class Experts(nn.Module):
    """SwiGLU experts and DeepSeek-V3's way to choose among them (arXiv 2412.19437, section 2.1.2): by sigmoids, with a
    bias that decides who is chosen and not what it weighs.

    Attributes:
        gate: [E, H], and bias: [E], in float32 whatever the other weights are in; held outside the parameters, which
            are rounded. gate_up: [E, 2I, H]; down: [E, I, H].
    """

    gate: Tensor
    bias: Tensor

    def __init__(self, hidden: int, routed: Routed) -> None:
        super().__init__()
        self.routed = routed
        self.gate_up = nn.Parameter(torch.empty(routed.experts, 2 * routed.intermediate_size, hidden))
        self.down = nn.Parameter(torch.empty(routed.experts, routed.intermediate_size, hidden))
        self.shared = SwiGLU(hidden, routed.shared_size) if routed.shared_size else None

    def fill(self, reader: WeightReader, prefix: str) -> None:
        """Read the weights below `prefix`, where they were moved to already."""
        device = self.down.device
        self.gate = reader.tensor(f"{prefix}gate.weight").to(device, torch.float32)
        self.bias = reader.tensor(f"{prefix}gate.e_score_correction_bias").to(device, torch.float32)
        gate_up, down = self.gate_up.detach(), self.down.detach()
        for expert in range(self.routed.experts):
            own = f"{prefix}experts.{expert}."
            reader.fill(gate_up[expert], f"{own}gate_proj.weight", f"{own}up_proj.weight")
            reader.fill(down[expert].t(), f"{own}down_proj.weight")
        if self.shared is not None:
            reader.fill_mlp(self.shared, f"{prefix}shared_experts.")

    def forward(self, x: Tensor) -> Tensor:
        """[T, H] → [T, H]."""
        weights, ids = self.route(x)
        mixed = self._gathered(x, weights, ids) if self._few(len(x)) else self._all(x, weights, ids)
        return mixed if self.shared is None else mixed + self.shared(x)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Rows [T, H] → weights [T, chosen] float32 and experts [T, chosen] int64."""
        routed = self.routed
        scores = torch.sigmoid(x.float() @ self.gate.t())
        biased = scores + self.bias
        if routed.groups > 1:
            grouped = biased.view(len(x), routed.groups, -1)
            strongest = grouped.topk(2, dim=-1).values.sum(-1).topk(routed.open_groups, dim=-1).indices
            closed = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter(1, strongest, value=False)
            biased = grouped.masked_fill(closed[..., None], float("-inf")).flatten(1)
        ids = biased.topk(routed.chosen, dim=-1).indices
        weights = scores.gather(1, ids)
        if routed.normalised:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights * routed.scale, ids

    def peak_bytes(self, rows: int) -> int:
        """Bytes that a pass over so many rows holds beside its weights at most."""
        experts, _, hidden = self.down.shape
        size = self.routed.intermediate_size
        of_a_row = (2 * size * hidden) if self._few(rows) else 3 * experts * size
        return rows * of_a_row * self.down.element_size()

    def _few(self, rows: int) -> bool:
        """Whether gathering the weights of each row's experts moves less than reading those of all experts."""
        return GATHERING * rows * self.routed.chosen <= self.routed.experts

    def _gathered(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        mixed = torch.zeros_like(x)
        for place in range(self.routed.chosen):
            own = ids[:, place]
            inner = silu_and_mul(torch.bmm(self.gate_up[own], x[:, :, None])[..., 0])
            inner = inner * weights[:, place, None].to(x.dtype)
            mixed = mixed + torch.bmm(inner[:, None], self.down[own])[:, 0]
        return mixed

    def _all(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        """Two products over all experts; those that were not chosen weigh nothing."""
        dense = torch.zeros(len(x), self.routed.experts, device=x.device).scatter(1, ids, weights)
        inner = silu_and_mul((x @ self.gate_up.flatten(0, 1).t()).view(len(x) * self.routed.experts, -1))
        inner = inner.view(len(x), self.routed.experts, -1) * dense[..., None].to(x.dtype)
        mixed: Tensor = inner.flatten(1) @ self.down.flatten(0, 1)
        return mixed
