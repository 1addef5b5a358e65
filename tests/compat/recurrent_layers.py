"""Layers of targets with a recurrent state, as SGLang's backends see them, and what decoding a row does by the CPU's
formulas."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F

from whiflash_cpu.recurrent_backends import CpuChannelDeltaBackend, CpuDeltaBackend
from whiflash_cpu.recurrent_ops import gated_delta_rule, selective_scan
from whiflash_sglang.engine.forward.recurrences import Rows, split_mixed
from whiflash_sglang.engine.forward.recurrent_untried import (
    RaggedChannelDeltaBackend,
    RaggedDeltaBackend,
    RaggedMamba2Backend,
)

KEY_HEADS, HEADS, KEY, VALUE, GROUPS, TAPS = 2, 4, 16, 32, 2, 4
VERIFICATION = SimpleNamespace(forward_mode=SimpleNamespace(is_target_verify=lambda: True))


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape)


class Delta:
    """A layer with the gated delta rule. Its rows are packed: what is convolved [T, D], and [T, ...] of the rest.

    turned: the convolution's inputs lie the other way round.
    """

    backend: Any = RaggedDeltaBackend
    formula: Any = CpuDeltaBackend
    wide = 2 * KEY_HEADS * KEY + HEADS * VALUE
    gates, turned = HEADS, False

    def __init__(self, lower_bound: float | None = None) -> None:
        self.layer = SimpleNamespace(
            layer_id=0,
            bias=None,
            activation="silu",
            head_q_dim=KEY,
            head_k_dim=KEY,
            head_v_dim=VALUE,
            num_v_heads=HEADS,
            lower_bound=lower_bound,
            conv_weights=draw(self.wide, TAPS),
            A_log=draw(HEADS),
            dt_bias=draw(self.gates),
        )
        self.layer.q_dim = self.layer.k_dim = KEY_HEADS * KEY
        self.layer.v_dim = HEADS * VALUE
        self.convolution = self.layer.conv_weights, None

    def rows(self, total: int) -> Mapping[str, torch.Tensor]:
        return {"mixed_qkv": draw(total, self.wide), "a": draw(total, self.gates), "b": draw(total, HEADS)}

    def convolved(self, rows: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return rows["mixed_qkv"]

    def verify(self, backend: Any, rows: Mapping[str, torch.Tensor]) -> torch.Tensor:
        found: torch.Tensor = backend.forward_extend(self.layer, VERIFICATION, **rows)[0]
        return found

    def decode(
        self, rows: Mapping[str, torch.Tensor], i: int, mixed: torch.Tensor, state: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Output [1, H, V] of row i, which is convolved already, and the state [1, H, V, K] behind it."""
        q, k, v = mixed.split([self.layer.q_dim, self.layer.k_dim, self.layer.v_dim], -1)
        decay = self.formula.decay(object.__new__(self.formula), self.layer, rows["a"][i][None])
        beta, one = rows["b"].reshape(-1, HEADS)[i][None].sigmoid(), torch.tensor([0, 1])
        by_head = (q.unflatten(-1, (-1, KEY)), k.unflatten(-1, (-1, KEY)), v.unflatten(-1, (-1, VALUE)))
        return gated_delta_rule(*by_head, decay, beta, state, one, Rows.of(one, 1), every=False)[:2]


class ChannelDelta(Delta):
    """KDA, whose inputs come as Kimi Linear's layer hands them over."""

    backend, formula = RaggedChannelDeltaBackend, CpuChannelDeltaBackend
    gates, turned = HEADS * KEY, True

    def __init__(self, lower_bound: float | None = None) -> None:
        super().__init__(lower_bound)
        self.layer.A_log = draw(1, 1, HEADS, 1)

    def rows(self, total: int) -> Mapping[str, torch.Tensor]:
        # Parts of wider rows, as they are projected.
        found = super().rows(total)
        return {
            "mixed_qkv": torch.cat([found["mixed_qkv"], draw(total, 3)], -1)[:, : self.wide],
            "a": torch.cat([draw(total, 5), found["a"]], -1)[:, 5:],
            "b": torch.cat([found["b"], draw(total, 2)], -1)[None, :, :HEADS],
        }


class Mamba2:
    """A mixer of Mamba 2 whose projections leave what they are given."""

    backend: Any = RaggedMamba2Backend
    inner, wide, turned = HEADS * VALUE, HEADS * VALUE + 2 * GROUPS * KEY, False

    def __init__(self) -> None:
        self.convolution = draw(self.wide, TAPS), draw(self.wide)
        self.mixer = SimpleNamespace(
            tp_size=1,
            intermediate_size=self.inner,
            num_heads=HEADS,
            head_dim=VALUE,
            n_groups=GROUPS,
            groups_ssm_state_size=GROUPS * KEY,
            conv_dim=self.wide,
            conv1d=SimpleNamespace(weight=self.convolution[0][:, None], bias=self.convolution[1]),
            activation="silu",
            A=-draw(HEADS).abs(),
            D=draw(HEADS),
            dt_bias=draw(HEADS),
            in_proj=lambda x: (x, None),
            norm=SimpleNamespace(forward_native=lambda x, gate: x * gate),
            out_proj=lambda x: (x, None),
        )

    def rows(self, total: int) -> Mapping[str, torch.Tensor]:
        return {"hidden_states": draw(total, self.inner + self.wide + HEADS)}

    def convolved(self, rows: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return rows["hidden_states"][:, self.inner : -HEADS]

    def verify(self, backend: Any, rows: Mapping[str, torch.Tensor]) -> torch.Tensor:
        output = torch.full((len(rows["hidden_states"]), self.inner), torch.nan)
        with patch.object(torch.cpu, "device", lambda _: nullcontext(), create=True):
            found = backend.forward(self.mixer, rows["hidden_states"], output, 0, VERIFICATION)
        assert torch.equal(found, output)
        return output.unflatten(-1, (HEADS, VALUE))

    def decode(
        self, rows: Mapping[str, torch.Tensor], i: int, mixed: torch.Tensor, state: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        projected, one = rows["hidden_states"][i][None], torch.tensor([0, 1])
        time, (x, b, c) = (F.softplus(projected[:, -HEADS:] + self.mixer.dt_bias), split_mixed(self.mixer, mixed))
        out, behind, _ = selective_scan(
            x, time, self.mixer.A, b, c, self.mixer.D, state, one, Rows.of(one, 1), every=False
        )
        return out * projected[:, : self.inner].unflatten(-1, (HEADS, VALUE)), behind


KINDS: Mapping[str, Callable[[], Any]] = {
    "delta rule": Delta,
    "by channel": ChannelDelta,
    "by channel, bounded": partial(ChannelDelta, -5.0),
    "Mamba 2": Mamba2,
}
