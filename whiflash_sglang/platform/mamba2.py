"""Mamba 2's layers (Nemotron-H): what SGLang's mixer does around the state, and their attention backend on the CPU."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from whiflash_sglang.platform.recurrent_backend import CpuRecurrentBackend
from whiflash_sglang.platform.recurrent_ops import selective_scan

Scan = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Of the convolution's inputs [T, D] and the steps of time [T, H], as projected: what is read of states, [T, H, P]."""


def around(
    scan: Scan,
    mixer: Any,
    hidden_states: torch.Tensor,
    output: torch.Tensor | None,
    mup_vector: torch.Tensor | None,
) -> torch.Tensor:
    """The forward of a `MambaMixer2` whose states are `scan`'s.

    hidden_states: [T, H]; mup_vector: multiplies what is projected. Returns [T, H], in `output` too if given.
    """
    ranks = mixer.tp_size
    widths = [mixer.intermediate_size // ranks, mixer.conv_dim // ranks, mixer.num_heads // ranks]
    projected, _ = mixer.in_proj(hidden_states)
    if mup_vector is not None:
        projected = projected * mup_vector
    gate, mixed, dt = projected.split(widths, -1)
    # SGLang's norm looks for a kernel of the platform, and this package's has none.
    norm = mixer.norm.forward_native if projected.device.type == "cpu" else mixer.norm
    found: torch.Tensor = mixer.out_proj(norm(scan(mixed, dt).flatten(1), gate))[0]
    if output is not None:
        output.copy_(found)
    return found


def convolution_of(mixer: Any) -> tuple[torch.Tensor, torch.Tensor | None, str]:
    """Weight [D, K], bias [D] or None, and the activation behind them."""
    return mixer.conv1d.weight.flatten(1), mixer.conv1d.bias, mixer.activation


def taken_apart(mixer: Any, mixed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [..., H, P], b and c [..., G, N] of what was convolved, [..., D]; views of it."""
    inner, grouped = mixer.intermediate_size // mixer.tp_size, mixer.groups_ssm_state_size // mixer.tp_size
    x, b, c = mixed.split([inner, grouped, grouped], -1)
    groups = mixer.n_groups // mixer.tp_size
    return x.unflatten(-1, (-1, mixer.head_dim)), b.unflatten(-1, (groups, -1)), c.unflatten(-1, (groups, -1))


class CpuMamba2Backend(CpuRecurrentBackend):
    """It stands in for `Mamba2AttnBackend`, and for the forward of the `MambaMixer2` that it is handed."""

    def forward(
        self,
        mixer: Any,
        hidden_states: torch.Tensor,
        output: torch.Tensor | None,
        layer_id: int,
        forward_batch: Any,
        mup_vector: torch.Tensor | None = None,
        use_triton_causal_conv: bool = False,
    ) -> torch.Tensor:
        """As of `around`."""

        def scan(x: torch.Tensor, dt: torch.Tensor) -> torch.Tensor:
            time = F.softplus(dt.float() + mixer.dt_bias.float())

            def rule(mixed: torch.Tensor, states: torch.Tensor, **rows: Any) -> Any:
                h, b, c = taken_apart(mixer, mixed)
                return selective_scan(h, time, mixer.A.float(), b, c, mixer.D, states, **rows)

            return self.go_on(layer_id, forward_batch, x, convolution_of(mixer), rule)

        return around(scan, mixer, hidden_states, output, mup_vector)
