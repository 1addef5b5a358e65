"""Draft models that SGLang 0.5.23 does not load, from their published definition: plain fp32, one row at a time."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

EPS, QK_EPS, THETA = 1e-6, 0.05, 10000.0
Weights = Mapping[str, Tensor]


def norm(x: Tensor, weight: Tensor, eps: float = EPS) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def turn(x: Tensor, positions: Tensor) -> Tensor:
    """RoPE of [T, heads, D] as a complex rotation of (i, i + D/2)."""
    half = x.shape[-1] // 2
    angles = positions[:, None] * THETA ** (-torch.arange(half) / half)
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.cat([turned.real, turned.imag], -1)


def attend(q: Tensor, k: Tensor, v: Tensor, seen: list[slice]) -> Tensor:
    """Row t of q [T, Hq, D] over the keys `seen[t]` of k and v [S, Hkv, D]."""
    out = torch.empty_like(q)
    shared = q.shape[1] // k.shape[1]
    for row, span in enumerate(seen):
        for head in range(q.shape[1]):
            scores = k[span, head // shared] @ q[row, head] * q.shape[2] ** -0.5
            out[row, head] = scores.softmax(0) @ v[span, head // shared]
    return out


def heads(x: Tensor, w: Weights, name: str, size: int) -> Tensor:
    rows = (F.linear(x, w[f"self_attn.{name}_proj.weight"])).view(len(x), -1, size)
    kind = f"self_attn.{name}_norm.weight"
    return norm(rows, w[kind]) if kind in w else rows


def mlp(x: Tensor, w: Weights) -> Tensor:
    gated = F.silu(F.linear(x, w["mlp.gate_proj.weight"])) * F.linear(x, w["mlp.up_proj.weight"])
    return F.linear(gated, w["mlp.down_proj.weight"])


def layer_of(weights: Weights, index: int) -> dict[str, Tensor]:
    start = f"layers.{index}."
    return {name.removeprefix(start): value for name, value in weights.items() if name.startswith(start)}


def block(weights: Weights, embedded: Tensor, features: Tensor, size: int, windows: list[int | None]) -> Tensor:
    """DFlash's block (speculators, DeepSpec): states [W, H] of `embedded` behind the context's `features`.

    windows: per layer, None for a layer that sees everything; else what is before, the row itself counted.
    """
    context = norm(F.linear(features, weights["fc.weight"]), weights["hidden_norm.weight"])
    count, width = len(context), len(embedded)
    places = torch.arange(count + width)
    hidden = embedded
    for index, window in enumerate(windows):
        w = layer_of(weights, index)
        inner = norm(hidden, w["input_layernorm.weight"])
        both = torch.cat([context, inner])
        q, k = turn(heads(inner, w, "q", size), places[count:]), turn(heads(both, w, "k", size), places)
        everything = [slice(0, count + width)] * width
        ends = range(count + 1, count + width + 1)
        seen = everything if window is None else [slice(max(0, end - window), end) for end in ends]
        mixed = attend(q, k, heads(both, w, "v", size), seen).flatten(1)
        hidden = hidden + F.linear(mixed, w["self_attn.o_proj.weight"])
        hidden = hidden + mlp(norm(hidden, w["post_attention_layernorm.weight"]), w)
    return norm(hidden, weights["norm.weight"])


def eagle_rows(
    weights: Weights, embedding: Tensor, hidden: Tensor, ids: list[int], size: int, *, before_residual: bool
) -> Tensor:
    """Rows [T, H] behind EAGLE-3's layers; those above the first read rows alone (vLLM's `llama_eagle3.py`)."""
    places, seen = torch.arange(len(ids)), [slice(0, row + 1) for row in range(len(ids))]
    entry = normed = norm(hidden, weights["layers.0.hidden_norm.weight"])
    hidden = normed if before_residual else hidden
    for index in range(sum(name.endswith("o_proj.weight") for name in weights)):
        w = layer_of(weights, index)
        embedded = norm(embedding[torch.tensor(ids)], w["input_layernorm.weight"])
        entry = norm(hidden, w["input_layernorm.weight"]) if index else torch.cat([embedded, normed], 1)
        q, k = (turn(heads(entry, w, name, size), places) for name in "qk")
        mixed = attend(q, k, heads(entry, w, "v", size), seen).flatten(1)
        hidden = hidden + F.linear(mixed, w["self_attn.o_proj.weight"])
        hidden = hidden + mlp(norm(hidden, w["post_attention_layernorm.weight"]), w)
    return hidden


def parallel(weights: Weights, features: Tensor, tokens: list[int], steps: int, size: int, mask: int) -> Tensor:
    """P-EAGLE's drafts (vLLM's `parallel_drafting`): ids of the drafter's own head; `mask` is a token."""
    unknown = weights["mask_hidden"].view(1, -1).expand(steps - 1, -1)
    hidden = F.linear(torch.cat([features, unknown]), weights["fc.weight"])
    ids = [*tokens, *[mask] * (steps - 1)]
    rows = eagle_rows(weights, weights["embed_tokens.weight"], hidden, ids, size, before_residual=True)
    return (norm(rows[-steps:], weights["norm.weight"]) @ weights["lm_head.weight"].T).argmax(-1)


def chain(
    weights: Weights,
    embedding: Tensor,
    features: Tensor,
    tokens: list[int],
    steps: int,
    size: int,
    *,
    before_residual: bool = False,
    before_fc: bool = False,
    each_before_fc: bool = False,
    feed_normed: bool = False,
) -> list[int]:
    """EAGLE-3's greedy chain: ids of the drafter's own head.

    Args:
        features: [n, F] of positions 0…n-1. tokens: n ids, of positions 1…n.
        before_residual, before_fc, each_before_fc, feed_normed:
            speculators' norm_before_residual, norm_before_fc, fc_norm and norm_output.
    """
    if before_fc:
        features = norm(features, weights["input_norm.weight"])
    if each_before_fc:
        chunks = features.unflatten(1, (-1, embedding.shape[1]))
        normed = [norm(chunks[:, i], weights[f"fc_norm.{i}.weight"]) for i in range(chunks.shape[1])]
        features = torch.cat(normed, 1)
    states, ids, drafted = list(F.linear(features, weights["fc.weight"])), list(tokens), []
    offsets = weights.get("d2t")
    for _ in range(steps):
        out = eagle_rows(weights, embedding, torch.stack(states), ids, size, before_residual=before_residual)
        last = norm(out[-1], weights["norm.weight"])
        choice = int(F.linear(last, weights["lm_head.weight"]).argmax())
        drafted.append(choice)
        ids.append(choice if offsets is None else choice + int(offsets[choice]))
        states.append(last if feed_normed else out[-1])
    return drafted


def refined(weights: Weights, states: Tensor, head: Tensor, ids: Tensor, bonus: int, passes: int, first: int) -> Tensor:
    """xPress's logits [D, K] (speculators) for the rows from `first` on of a block's `states` [W, H].

    head: [K, H]. ids: [K] int64, of the target. bonus: stands for the token before it, too.
    """
    w = {name.removeprefix("xpress_head."): value for name, value in weights.items()}
    alone = logits = states[first:] @ head.T
    mean = w["down_g.weight"] @ states.mean(0)
    for _ in range(passes):
        before = [*[bonus] * (first + 1), *ids[logits.argmax(-1)[:-1]].tolist()]
        x = [
            w["in_proj.weight"] @ torch.cat([w["down_h.weight"] @ state, mean, w["w1.weight"][token]])
            for state, token in zip(states, before, strict=True)
        ]
        rows = range(first, len(x))
        latent = torch.stack([x[k] + sum(w["mix.L"][:, k, j] * x[j] for j in range(k + 1)) for k in rows])
        logits = alone + (latent + mlp(latent, w)) @ w["w2.weight"].T
    return logits


def affine(w: Weights, name: str, x: Tensor) -> Tensor:
    return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))


def jump(w: Weights, embedding: Tensor, features: Tensor, bonus: int, noise: Tensor, size: int) -> Tensor:
    """FlashMap's states [K, Ht] for the target's head (flashmap 0.1.0): one jump from `noise` [K, V] to the block."""
    half = w["time_embed.linear_1.weight"].shape[1] // 2
    rates = 1000.0 * 10000.0 ** (-torch.arange(half) / half)
    times = torch.zeros(())
    for time, name in enumerate(("time_embed", "jump_embed")):
        inner = affine(w, f"{name}.linear_1", torch.cat([(time * rates).cos(), (time * rates).sin()]))
        times = times + affine(w, f"{name}.linear_2", F.silu(inner))

    def modulated(x: Tensor, name: str) -> tuple[Tensor, Tensor]:
        scale, shift, gate = affine(w, f"{name}_adaln.linear", F.silu(times)).chunk(3)
        return F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale) + shift, gate

    def mixed(name: str, x: Tensor, at: Tensor, seen: Tensor, seen_at: Tensor) -> Tensor:
        turned = []
        for kind, rows, places in (("q", x, at), ("k", seen, seen_at)):
            wide = affine(w, f"{name}.{kind}_proj", rows).view(len(rows), -1, size)
            normed = norm(wide, w[f"{name}.{kind}_norm.weight"], QK_EPS)
            # Neighbours turn: beside each other or half a head apart, products are the same.
            turned.append(turn(normed.unflatten(-1, (-1, 2)).mT.flatten(-2), places))
        values = affine(w, f"{name}.v_proj", seen).view(len(seen), -1, size)
        return affine(w, f"{name}.o_proj", attend(*turned, values, [slice(None)] * len(x)).flatten(1))

    anchor = affine(w, "anchor_proj", embedding[bonus][None])
    fused = norm(affine(w, "fc", features), w["hidden_norm.weight"])
    context = torch.cat([fused, norm(anchor, w["anchor_norm.weight"])])
    before, places = torch.arange(len(context) + len(noise)).split([len(context), len(noise)])
    read = norm(noise @ embedding, w["noise_norm.weight"])
    x = affine(w, "x_embed", norm(embedding.mean(0), w["state_norm.weight"]) + w["noise_gate"] * read)
    for layer in (f"layers.{i}." for i in range(sum(name.endswith("fc1.weight") for name in w))):
        inner, gate = modulated(x, f"{layer}self_attn")
        x = x + gate * mixed(f"{layer}self_attn", inner, places, inner, places)
        inner, gate = modulated(x, f"{layer}cross_attn")
        x = x + gate * mixed(f"{layer}cross_attn", inner, places, context, before)
        inner, gate = modulated(x, f"{layer}mlp")
        x = x + gate * affine(w, f"{layer}mlp.fc2", F.gelu(affine(w, f"{layer}mlp.fc1", inner)))
    return affine(w, "head", modulated(x, "final")[0])
