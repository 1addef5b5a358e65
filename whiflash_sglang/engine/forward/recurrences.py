"""Compute packed convolutions of recurrent layers, and what SGLang's layers do around a state. Rows of B requests are
packed, and each request goes on from its state.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

PAD_SLOT = -1
"""The slot of no request, equal to SGLang's ``PAD_SLOT_ID``."""


class Rows(NamedTuple):
    """Owner of each of T packed rows, and its place among the request's rows: [T] int64 each.

    covered: [T] bool, false for rows after the last request's, whose owner is the last request, too.
    """

    owner: torch.Tensor
    step: torch.Tensor
    covered: torch.Tensor

    @classmethod
    def of(cls, starts: torch.Tensor, count: int) -> "Rows":
        """Find the owners of `count` rows. starts: [B + 1] int, where requests' rows begin."""
        rows = torch.arange(count, device=starts.device)
        owner = torch.searchsorted(starts[1:].contiguous(), rows, right=True).clamp_(max=len(starts) - 2)
        return cls(owner, rows - starts[owner], rows < starts[-1])


def packed_convolution(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, states: torch.Tensor, rows: Rows
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute a depthwise causal convolution, ``y[t] = bias + Σ_k weight[k] · x[t - K + 1 + k]`` in fp32; inputs before
    a request's first row are its state's. A row reads the inputs before it rounded to the states' dtype.

    Args:
        x: [T, D]. weight: [D, K]. bias: [D] or None. states: [B, D, K - 1], the last inputs of each request.

    Returns:
        [T, D] in x's dtype, and the state after every row, [T, D, K - 1] in the states' dtype.
    """
    requests, width, known = states.shape
    # The K inputs that end with each row: among all states', then among all rows'.
    back = torch.arange(-known, 1, device=x.device)
    of_state = (rows.owner * known + known + rows.step)[:, None] + back
    of_rows = requests * known + torch.arange(len(x), device=x.device)[:, None] + back
    inputs = torch.cat([states.transpose(1, 2).reshape(-1, width), x.to(states.dtype)])
    inputs = inputs[torch.where(rows.step[:, None] + back < 0, of_state, of_rows)]
    taps = weight.float().t()
    out = (inputs[:, :-1].float() * taps[:-1]).sum(1) + x.float() * taps[-1]
    return (out if bias is None else out + bias.float()).to(x.dtype), inputs[:, 1:].transpose(1, 2)


def packed_verification(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, cache: Any, slots: torch.Tensor, rows: Rows
) -> torch.Tensor:
    """Run :func:`packed_convolution` over drafts: states are only read, and those after the rows go to the windows.

    Nothing is read on the host. States after padding rows, or after those of a request without a slot (0 or less, as a
    graph's padding has), go to the last place of the windows, which no request has.

    Args:
        x: [T, D]. weight: [D, K]. bias: [D] or None. slots: [B] int.
        cache: SGLang's record of a layer: ``conv[0]`` [slots, D, K - 1], ``intermediate_conv_window[0]``
            [requests + 1, steps, D, K - 1] (mutable).

    Returns:
        [T, D] in the dtype of `x`.
    """
    out, behind = packed_convolution(x, weight, bias, cache.conv[0][slots.long().clamp(min=0)], rows)
    windows = cache.intermediate_conv_window[0]
    live = rows.covered & (slots[rows.owner] > 0)
    windows[rows.owner.where(live, len(windows) - 1), rows.step.where(live, 0)] = behind.to(windows.dtype)
    return out


def activated(x: torch.Tensor, activation: str | None) -> torch.Tensor:
    """Return `x` after the activation that SGLang's configurations call `silu` or `swish`; `x` itself for None."""
    return F.silu(x) if activation in ("silu", "swish") else x


def transposed(cache: Any) -> Any:
    """Return SGLang's record of a KDA layer, whose convolution inputs are [K - 1, D], with views of them in the form of
    other layers, [D, K - 1]."""
    found = {
        name: [kept.mT for kept in getattr(cache, name)]
        for name in ("conv", "intermediate_conv_window")
        if hasattr(cache, name)
    }
    return replace(cache, **found)


Scan = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""A scan over states: the convolution's inputs [T, D] and time steps [T, H], both as projected → [T, H, P]."""


def mixer_forward(
    scan: Scan, mixer: Any, hidden_states: torch.Tensor, output: torch.Tensor | None, mup_vector: torch.Tensor | None
) -> torch.Tensor:
    """Compute the forward of a `MambaMixer2` whose states `scan` reads.

    hidden_states: [T, H]; mup_vector: multiplies the projection. Returns [T, H], in `output` too if given.
    """
    ranks = mixer.tp_size
    widths = [mixer.intermediate_size // ranks, mixer.conv_dim // ranks, mixer.num_heads // ranks]
    projected, _ = mixer.in_proj(hidden_states)
    if mup_vector is not None:
        projected = projected * mup_vector
    gate, mixed, dt = projected.split(widths, -1)
    # SGLang's norm looks for a kernel of the platform, and our CPU platform has none.
    norm = mixer.norm.forward_native if projected.device.type == "cpu" else mixer.norm
    found: torch.Tensor = mixer.out_proj(norm(scan(mixed, dt).flatten(1), gate))[0]
    if output is not None:
        output.copy_(found)
    return found


def convolution_of(mixer: Any) -> tuple[torch.Tensor, torch.Tensor | None, str]:
    """Return the convolution's weight [D, K], its bias [D] or None, and the activation after it."""
    return mixer.conv1d.weight.flatten(1), mixer.conv1d.bias, mixer.activation


def split_mixed(mixer: Any, mixed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Split the convolution's output [..., D] into x [..., H, P], b and c [..., G, N], which are views of it."""
    inner, grouped = mixer.intermediate_size // mixer.tp_size, mixer.groups_ssm_state_size // mixer.tp_size
    x, b, c = torch.split(mixed, [inner, grouped, grouped], -1)
    groups = mixer.n_groups // mixer.tp_size
    heads: torch.Tensor = torch.unflatten(x, -1, (-1, mixer.head_dim))
    return heads, torch.unflatten(b, -1, (groups, -1)), torch.unflatten(c, -1, (groups, -1))
