"""Torch versions of what recurrent layers compute: causal convolutions, the gated delta rule (Qwen3-Next, Kimi
Linear) and Mamba 2's scan. Rows of B requests are packed, and each request goes on from its state. Beside them is what
SGLang's layers do around such a state.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

PAD_SLOT = -1
"""As SGLang's ``PAD_SLOT_ID``."""


class Rows(NamedTuple):
    """Owner of each of T packed rows, and its place among the request's rows: [T] int64 each.

    covered: [T] bool, false of rows behind the last request's, which count as its own otherwise.
    """

    owner: torch.Tensor
    step: torch.Tensor
    covered: torch.Tensor

    @classmethod
    def of(cls, starts: torch.Tensor, count: int) -> "Rows":
        """starts: [B + 1] int, where requests' rows begin."""
        rows = torch.arange(count, device=starts.device)
        owner = torch.searchsorted(starts[1:].contiguous(), rows, right=True).clamp_(max=len(starts) - 2)
        return cls(owner, rows - starts[owner], rows < starts[-1])


def packed_convolution(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, states: torch.Tensor, rows: Rows
) -> tuple[torch.Tensor, torch.Tensor]:
    """Depthwise causal convolution, ``y[t] = bias + Σ_k weight[k] · x[t - K + 1 + k]`` in fp32; inputs before a
    request's first row are its state's. A row reads those before it rounded to what states are kept in.

    Args:
        x: [T, D]. weight: [D, K]. bias: [D] or None. states: [B, D, K - 1], the last inputs of each request.

    Returns:
        [T, D] in x's dtype, and the state behind every row, [T, D, K - 1] in the states' dtype.
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
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    cache: Any,
    slots: torch.Tensor,
    rows: Rows,
) -> torch.Tensor:
    """:func:`packed_convolution` of drafts: the states are read, those behind the rows written down.

    Nothing is read on the host. States after padding rows, or after those of a request without a slot (0 or less, as a
    graph's padding has), go to the last request of the windows, which is nobody's.

    Args:
        x: [T, D]. weight: [D, K]. bias: [D] or None. slots: [B] int.
        cache: SGLang's record of a layer: ``conv[0]`` [slots, D, K - 1], ``intermediate_conv_window[0]``
            [requests + 1, steps, D, K - 1] (mutable).

    Returns:
        [T, D] in the dtype of `x`.
    """
    states = cache.conv[0][slots.long().clamp(min=0)]
    out, behind = packed_convolution(x, weight, bias, states, rows)
    windows = cache.intermediate_conv_window[0]
    live = rows.covered & (slots[rows.owner] > 0)
    windows[rows.owner.where(live, len(windows) - 1), rows.step.where(live, 0)] = behind.to(windows.dtype)
    return out


def gated_delta_rule(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    decay: torch.Tensor,
    beta: torch.Tensor,
    states: torch.Tensor,
    starts: torch.Tensor,
    rows: Rows,
    *,
    every: bool,
    marks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``S ← e^decay · S``, ``S ← S + beta · (v - S k) kᵀ``, ``o = S q / √K``, row by row, all requests at once; queries
    and keys are divided by their lengths. As transformers' `torch_recurrent_gated_delta_rule` (arXiv 2412.06464), and
    with a decay for each channel of the key its `recurrent_kimi_delta_attention` (KDA, arXiv 2510.26692).

    Args:
        query, key: [T, Hk, K]. value: [T, H, V], H a multiple of Hk. decay: [T, H] or [T, H, K] fp32. beta: [T, H]
            fp32. states: [B, H, V, K].
        starts, rows, every, marks: as of :func:`recurrence`.

    Returns:
        As of :func:`recurrence`, the first in value's dtype.
    """
    place, present = _side_by_side(starts, len(value))
    repeats = value.shape[1] // key.shape[1]
    q, k = (_normalized(x.float()).repeat_interleave(repeats, 1)[place] for x in (query, key))
    by_channel = decay if decay.dim() == 3 else decay[..., None]
    v, kept = value.float()[place], by_channel.exp()[place].where(present[..., None], 1.0)
    learned = beta[place].where(present, 0.0)

    def step(i: int, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        state = state * kept[:, i, :, None]
        error = v[:, i] - torch.einsum("bhvk,bhk->bhv", state, k[:, i])
        state = state + torch.einsum("bhv,bhk->bhvk", error * learned[:, i, :, None], k[:, i])
        return state, torch.einsum("bhvk,bhk->bhv", state, q[:, i])

    out, behind, marked = recurrence(step, states, place.shape[1], rows, every=every, marks=marks)
    return (out * key.shape[-1] ** -0.5).to(value.dtype), behind, marked


def selective_scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    skip: torch.Tensor,
    states: torch.Tensor,
    starts: torch.Tensor,
    rows: Rows,
    *,
    every: bool,
    marks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mamba 2 (arXiv 2405.21060): ``S ← e^(dt · a) · S + dt · x bᵀ``, ``y = S c + skip · x``, row by row.

    Args:
        x: [T, H, P]. dt: [T, H] fp32, positive. a, skip: [H]. b, c: [T, G, N], H a multiple of G. states: [B, H, P, N].
        starts, rows, every, marks: as of :func:`recurrence`.

    Returns:
        As of :func:`recurrence`, the first in x's dtype.
    """
    place, present = _side_by_side(starts, len(x))
    repeats = x.shape[1] // b.shape[1]
    written, read = (g.float().repeat_interleave(repeats, 1)[place] for g in (b, c))
    kept = (dt * a).exp()[place].where(present, 1.0)
    taken = (x.float() * dt[..., None])[place].where(present[..., None], 0.0)

    def step(i: int, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        state = state * kept[:, i, :, None, None]
        state = state + torch.einsum("bhp,bhn->bhpn", taken[:, i], written[:, i])
        return state, torch.einsum("bhpn,bhn->bhp", state, read[:, i])

    out, behind, marked = recurrence(step, states, place.shape[1], rows, every=every, marks=marks)
    return (out + x.float() * skip.float()[:, None]).to(x.dtype), behind, marked


Step = Callable[[int, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""The states before the rows of a number, one of each request: those behind them, and the outputs."""


def recurrence(
    step: Step, states: torch.Tensor, longest: int, rows: Rows, *, every: bool, marks: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`step` for the first rows of all requests, then for the second, up to `longest`.

    Args:
        states: [B, H, X, Y], before the first rows. every: keep the states behind every row.
        marks: [B] int64, of how many rows of each request the state is kept too.

    Returns:
        In fp32: outputs [T, …]; states behind the last rows [B, H, X, Y], or with `every` behind all
        [B, longest, H, X, Y]; those behind as many rows as `marks` says, which are `states` for none.
    """
    state, outputs, behind = states.float(), [], []
    marked = state
    for i in range(longest):
        state, out = step(i, state)
        outputs.append(out)
        if every:
            behind.append(state)
        if marks is not None:
            marked = state.where((marks == i + 1)[:, None, None, None], marked)
    packed = torch.stack(outputs, 1)[rows.owner, rows.step.where(rows.covered, 0)]
    return packed, torch.stack(behind, 1) if every else state, marked


def _side_by_side(starts: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, S] the place of each row of a request among `count` packed ones, S of the longest; [B, S, 1] whether it has
    that row: a row that it lacks leaves its state unchanged."""
    lengths = starts.diff()
    steps = torch.arange(int(lengths.max()), device=starts.device)
    return (starts[:-1, None] + steps).clamp_(max=count - 1), (steps < lengths[:, None])[..., None]


def _normalized(x: torch.Tensor) -> torch.Tensor:
    return x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()


def causal_conv1d_fn(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    query_start_loc: torch.Tensor | None = None,
    cache_indices: torch.Tensor | None = None,
    has_initial_state: torch.Tensor | None = None,
    conv_states: torch.Tensor | None = None,
    activation: str | None = "silu",
    pad_slot_id: int = PAD_SLOT,
    **kwargs: Any,
) -> torch.Tensor:
    """:func:`packed_convolution` of prompts or parts of them.

    Args:
        x: [D, T]. weight: [D, K]. bias: [D]. query_start_loc: [B + 1] int. cache_indices: [B] int, slots.
        has_initial_state: [B] bool, whether a request goes on from its state.
        conv_states: [slots, D, K - 1] (mutable): afterwards the last inputs of each request.

    Returns:
        [D, T] in x's dtype.
    """
    if query_start_loc is None or cache_indices is None or has_initial_state is None or conv_states is None:
        raise ValueError("causal_conv1d_fn on the CPU takes packed requests with states")
    starts, slots = query_start_loc.long(), cache_indices.long()
    before = conv_states[slots].to(x.dtype).where(has_initial_state[:, None, None], 0.0)
    out, behind = packed_convolution(x.t(), weight, bias, before, Rows.of(starts, x.shape[1]))
    conv_states[slots] = behind[starts[1:] - 1].to(conv_states.dtype)
    return activated(out, activation).t()


def causal_conv1d_update(
    x: torch.Tensor,
    conv_state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: torch.Tensor | None = None,
    conv_state_indices: torch.Tensor | None = None,
    pad_slot_id: int = PAD_SLOT,
) -> torch.Tensor:
    """:func:`packed_convolution` of the next input of every request.

    Args:
        x: [B, D]. conv_state: [slots, D, K - 1] (mutable). weight: [D, K]. bias: [D]. conv_state_indices: [B] int.

    Returns:
        [B, D] in x's dtype.
    """
    if cache_seqlens is not None or conv_state_indices is None or x.dim() != 2:
        raise ValueError("causal_conv1d_update on the CPU takes one input of every request, and slots")
    slots = conv_state_indices.long()
    rows = Rows.of(torch.arange(len(x) + 1, device=x.device), len(x))
    out, behind = packed_convolution(x, weight, bias, conv_state[slots], rows)
    conv_state[slots] = behind
    return activated(out, activation)


def activated(x: torch.Tensor, activation: str | None) -> torch.Tensor:
    """`x` through what SGLang's configurations call `silu` or `swish`; itself for None."""
    return F.silu(x) if activation in ("silu", "swish") else x


def scatter_mamba_states_after_mtp_verify(
    mamba_caches: Any,
    state_indices_tensor: torch.Tensor,
    last_correct_step_indices: torch.Tensor,
    mamba_track_indices: torch.Tensor | None,
    mamba_steps_to_track: torch.Tensor | None,
    src_indices_raw: torch.Tensor | None = None,
) -> None:
    """Commit: every request's state becomes the one behind its last accepted row.

    Args:
        mamba_caches: SGLang's record of a verification's states: ``conv`` [L, slots, D, K - 1] (mutable) and
            ``intermediate_conv_window`` [L, rows, steps, D, K - 1] of each kind, ``temporal`` and ``intermediate_ssm``
            likewise.
        state_indices_tensor: [B] int, slots. last_correct_step_indices: [B] int, the row; negative: none.
        mamba_track_indices, mamba_steps_to_track: a second slot and row of each request, or None.
        src_indices_raw: [B] int, rows of the windows; None: the first B.
    """
    pairs = [*zip(mamba_caches.conv, mamba_caches.intermediate_conv_window, strict=True)]
    pairs.append((mamba_caches.temporal, mamba_caches.intermediate_ssm))
    rows = torch.arange(len(state_indices_tensor)) if src_indices_raw is None else src_indices_raw.long()
    commits = [(state_indices_tensor, last_correct_step_indices)]
    if mamba_track_indices is not None and mamba_steps_to_track is not None:
        commits.append((mamba_track_indices, mamba_steps_to_track))
    for slots, steps in commits:
        kept = (slots >= 0) & (steps >= 0)
        for states, windows in pairs:
            if states.numel():
                states[:, slots[kept].long()] = windows[:, rows[kept], steps[kept].long()]


def transposed(cache: Any) -> Any:
    """SGLang's record of a layer of KDA, whose convolution inputs are transposed, [K - 1, D], as others
    have it: [D, K - 1], of the same memory."""
    found = {
        name: [kept.mT for kept in getattr(cache, name)]
        for name in ("conv", "intermediate_conv_window")
        if hasattr(cache, name)
    }
    return replace(cache, **found)


Scan = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Reads states: the convolution's inputs [T, D] and steps of time [T, H], as projected → [T, H, P]."""


def mixer_forward(
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


def split_mixed(mixer: Any, mixed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [..., H, P], b and c [..., G, N] of what was convolved, [..., D]; views of it."""
    inner, grouped = mixer.intermediate_size // mixer.tp_size, mixer.groups_ssm_state_size // mixer.tp_size
    x, b, c = torch.split(mixed, [inner, grouped, grouped], -1)
    groups = mixer.n_groups // mixer.tp_size
    heads: torch.Tensor = torch.unflatten(x, -1, (-1, mixer.head_dim))
    return heads, torch.unflatten(b, -1, (groups, -1)), torch.unflatten(c, -1, (groups, -1))
