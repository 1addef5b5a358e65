"""The attention backend of Mamba 2's layers (Nemotron-H) on the CPU."""

from typing import Any

import torch
import torch.nn.functional as F

from whiflash_sglang.models.recurrent import convolution_of, mixer_forward, selective_scan, split_mixed
from whiflash_sglang.platform.recurrent_backend import CpuRecurrentBackend


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
        """As of `mixer_forward`."""

        def scan(x: torch.Tensor, dt: torch.Tensor) -> torch.Tensor:
            time = F.softplus(dt.float() + mixer.dt_bias.float())

            def rule(mixed: torch.Tensor, states: torch.Tensor, **rows: Any) -> Any:
                h, b, c = split_mixed(mixer, mixed)
                return selective_scan(h, time, mixer.A.float(), b, c, mixer.D, states, **rows)

            return self.go_on(layer_id, forward_batch, x, convolution_of(mixer), rule)

        return mixer_forward(scan, mixer, hidden_states, output, mup_vector)
