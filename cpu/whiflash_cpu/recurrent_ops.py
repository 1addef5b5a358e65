"""Torch versions of SGLang's operators of recurrent layers: causal convolutions, the gated delta rule (Qwen3-Next, Kimi
Linear) and Mamba 2's scan. Rows of B requests are packed, and each request starts from its own stored state.
"""

from collections.abc import Callable
from typing import Any

import torch

from whiflash_sglang.engine.forward.recurrences import PAD_SLOT, Rows, activated, packed_convolution


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
    """Apply the gated delta rule row by row: ``S ← e^decay · S``, ``S ← S + beta · (v - S k) kᵀ``, ``o = S q / √K``,
    with queries and keys of length 1. Follows transformers' `torch_recurrent_gated_delta_rule` (arXiv 2412.06464);
    with a decay per channel of the key, `recurrent_kimi_delta_attention` (KDA, arXiv 2510.26692).

    query, key: [T, Hk, K]. value: [T, H, V], H a multiple of Hk. decay: [T, H] or [T, H, K] fp32. beta: [T, H] fp32.
    states: [B, H, V, K]. Other parameters and the results: see :func:`recurrence`; outputs have value's dtype.
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
    """Scan Mamba 2's states (arXiv 2405.21060): ``S ← e^(dt · a) · S + dt · x bᵀ``, ``y = S c + skip · x``, row by row.

    x: [T, H, P]. dt: [T, H] fp32, positive. a, skip: [H]. b, c: [T, G, N], H a multiple of G. states: [B, H, P, N].
    Other parameters and the results: see :func:`recurrence`; the outputs have x's dtype.
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
"""step(i, states before every request's row i) → the states after those rows, and their outputs."""


def recurrence(
    step: Step, states: torch.Tensor, longest: int, rows: Rows, *, every: bool, marks: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Call `step` for the first rows of all requests, then for their second rows, up to row number `longest`.

    states: [B, H, X, Y], before the first rows. every: return the states after every row. marks: [B] int64, the number
    of rows after which each request's state is returned too.

    Returns in fp32: outputs [T, …]; states after the last rows [B, H, X, Y], or with `every` after each row
    [B, longest, H, X, Y]; the states after `marks` rows, which are `states` for a mark of 0.
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
    """Return [B, S], the index of each request's rows among `count` packed rows, S rows for the longest request; and
    [B, S, 1], whether the request has that row. A missing row leaves the state unchanged."""
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
    """Apply :func:`packed_convolution` to prompts or parts of them. Returns [D, T] in x's dtype.

    x: [D, T]. weight: [D, K]. bias: [D]. query_start_loc: [B + 1] int. cache_indices: [B] int, slots.
    has_initial_state: [B] bool, whether a request has a stored state. conv_states: [slots, D, K - 1] (mutable):
    afterwards the last inputs of each request.
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
    """Apply :func:`packed_convolution` to one more input of every request. Returns [B, D] in x's dtype.

    x: [B, D]. conv_state: [slots, D, K - 1] (mutable). weight: [D, K]. bias: [D]. conv_state_indices: [B] int.
    """
    if cache_seqlens is not None or conv_state_indices is None or x.dim() != 2:
        raise ValueError("causal_conv1d_update on the CPU takes one input of every request, and slots")
    slots = conv_state_indices.long()
    rows = Rows.of(torch.arange(len(x) + 1, device=x.device), len(x))
    out, behind = packed_convolution(x, weight, bias, conv_state[slots], rows)
    conv_state[slots] = behind
    return activated(out, activation)


def scatter_mamba_states_after_mtp_verify(
    mamba_caches: Any,
    state_indices_tensor: torch.Tensor,
    last_correct_step_indices: torch.Tensor,
    mamba_track_indices: torch.Tensor | None,
    mamba_steps_to_track: torch.Tensor | None,
    src_indices_raw: torch.Tensor | None = None,
) -> None:
    """Commit a verification: every request's state becomes the state after its last accepted row.

    mamba_caches: SGLang's record of a verification's states: ``conv`` [L, slots, D, K - 1] (mutable) and
    ``intermediate_conv_window`` [L, rows, steps, D, K - 1] of each kind, and ``temporal`` and ``intermediate_ssm``.
    state_indices_tensor: [B] int, slots. last_correct_step_indices: [B] int, the row; negative: none.
    mamba_track_indices, mamba_steps_to_track: a second slot and row of each request, or None. src_indices_raw: [B] int,
    rows of the windows; None: the first B.
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
