"""SGLang's attention backend of Mamba 2's layers (Nemotron-H), on the CPU."""

from typing import Any

import torch
import torch.nn.functional as F

from whiflash_sglang.platform.recurrent_backend import CpuRecurrentBackend
from whiflash_sglang.platform.recurrent_ops import selective_scan


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
        """hidden_states: [T, H]; mup_vector: multiplies what is projected. Returns [T, H], in `output` too if given."""
        ranks, groups = mixer.tp_size, mixer.n_groups // mixer.tp_size
        inner, heads = mixer.intermediate_size // ranks, mixer.num_heads // ranks
        projected, _ = mixer.in_proj(hidden_states)
        if mup_vector is not None:
            projected = projected * mup_vector
        gate, mixed, dt = projected.split([inner, mixer.conv_dim // ranks, heads], -1)
        width = mixer.groups_ssm_state_size // ranks

        def rule(mixed: torch.Tensor, states: torch.Tensor, **rows: Any) -> Any:
            x, b, c = mixed.split([inner, width, width], -1)
            return selective_scan(
                x.unflatten(-1, (heads, mixer.head_dim)),
                F.softplus(dt.float() + mixer.dt_bias.float()),
                mixer.A.float(),
                b.unflatten(-1, (groups, -1)),
                c.unflatten(-1, (groups, -1)),
                mixer.D,
                states,
                **rows,
            )

        convolution = (mixer.conv1d.weight.flatten(1), mixer.conv1d.bias, mixer.activation)
        out = self.go_on(layer_id, forward_batch, mixed, convolution, rule)
        found, _ = mixer.out_proj(mixer.norm.forward_native(out.flatten(1), gate))
        if output is not None:
            output.copy_(found)
        return found
