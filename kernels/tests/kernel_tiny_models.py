"""A tiny target and its two drafters in plain torch, float32, random weights: slow, without caches, obvious.

The target recomputes a whole sequence for every forward. The drafters read their context only from paged pools,
as in an engine, so what catch-up wrote there decides what they draft.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from whiflash_kernels import DFlashWeights, Eagle3Weights, KVPools

VOCAB, HIDDEN, HEADS, DIM, MAX_POSITION = 13, 32, 2, 16, 160
MASK_TOKEN = VOCAB - 1
CAPTURED = 4
EAGLE_CHUNKS, DFLASH_CHUNKS = (0, 1, 2), (3, 1)
EPS = 1e-6


class Weights:
    """Seeded matrices, scaled so that activations keep their size."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.device = device

    def __call__(self, *size: int) -> Tensor:
        values = torch.randn(*size, generator=self.generator)
        return (values * size[-1] ** -0.5 if len(size) > 1 else 1 + 0.1 * values).to(self.device)


def rope_table(device: torch.device) -> Tensor:
    """[MAX_POSITION, DIM]: cosines, then sines."""
    frequencies = 100.0 ** (-torch.arange(DIM // 2) / (DIM // 2))
    angles = torch.arange(MAX_POSITION)[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1).to(device)


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, EPS)


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate ``[N, heads, DIM]`` by ``[N, DIM]`` rows of the table."""
    cosine, sine = rope[:, None].chunk(2, dim=-1)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of ``[N, heads, DIM]`` queries over ``[M, heads, DIM]``: [N, heads * DIM]."""
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), attn_mask=mask
    )
    return out.transpose(0, 1).flatten(1)


@dataclass
class Block:
    """One transformer layer: norms, attention matrices and a two-matrix MLP."""

    qkv: Tensor
    out: Tensor
    up: Tensor
    down: Tensor
    norm_in: Tensor
    norm_mlp: Tensor

    @classmethod
    def random(cls, make: Weights, inputs: int = HIDDEN) -> "Block":
        width = HEADS * DIM
        return cls(
            make(3 * width, inputs),
            make(HIDDEN, width),
            make(64, HIDDEN),
            make(HIDDEN, 64),
            make(HIDDEN),
            make(HIDDEN),
        )

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = F.linear(x, self.qkv).view(x.shape[0], 3, HEADS, DIM).unbind(1)
        return q, k, v

    def finish(self, residual: Tensor, attended: Tensor) -> Tensor:
        x = residual + F.linear(attended, self.out)
        return x + F.linear(F.silu(F.linear(norm(x, self.norm_mlp), self.up)), self.down)


@dataclass
class Forward:
    """What one target forward gives for every position of a sequence."""

    logits: Tensor
    features: Tensor
    """[len, CAPTURED * HIDDEN], layer outputs side by side."""
    hidden: Tensor
    """[len, HIDDEN], after the final norm."""


class Target:
    """A causal transformer of ``CAPTURED`` layers, every one of them captured."""

    def __init__(self, device: torch.device) -> None:
        make = Weights(0, device)
        self.embedding = make(VOCAB, HIDDEN) * HIDDEN**0.5
        self.blocks = [Block.random(make) for _ in range(CAPTURED)]
        self.final_norm, self.rope = make(HIDDEN), rope_table(device)

    def head(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.embedding)

    def __call__(self, tokens: list[int]) -> Forward:
        x = self.embedding[torch.tensor(tokens, device=self.rope.device)]
        rope, length = self.rope[: len(tokens)], len(tokens)
        causal = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
        captured = []
        for block in self.blocks:
            q, k, v = block.project(norm(x, block.norm_in))
            x = block.finish(x, attend(rotate(q, rope), rotate(k, rope), v, causal))
            captured.append(x)
        hidden = norm(x, self.final_norm)
        return Forward(self.head(hidden), torch.cat(captured, dim=1), hidden)

    def generate(self, tokens: list[int], count: int) -> list[int]:
        """Plain greedy decoding."""
        tokens = list(tokens)
        for _ in range(count):
            tokens.append(int(self(tokens).logits[-1].argmax()))
        return tokens


def empty_pools(layers: int, slots: int, device: torch.device) -> KVPools:
    """Pools full of NaN: whatever was not written poisons the attention that reads it."""
    size = (slots, HEADS, DIM)
    return KVPools(
        tuple(torch.full(size, torch.nan, device=device) for _ in range(layers)),
        tuple(torch.full(size, torch.nan, device=device) for _ in range(layers)),
    )


class DFlash:
    """Block-diffusion drafter: one non-causal pass over [bonus, mask, ...] and the context's K and V."""

    chunks = DFLASH_CHUNKS

    def __init__(self, target: Target, slots: int) -> None:
        make = Weights(1, target.rope.device)
        self.target, self.blocks = target, [Block.random(make) for _ in range(2)]
        self.q_norm, self.k_norm, self.final_norm = make(2, DIM) * 4, make(2, DIM) * 4, make(HIDDEN)
        self.weights = DFlashWeights(
            fc=make(HIDDEN, len(self.chunks) * HIDDEN),
            hidden_norm=make(HIDDEN),
            kv=torch.cat([block.qkv[HEADS * DIM :] for block in self.blocks]),
            k_norm=self.k_norm,
            eps=EPS,
        )
        self.pools = empty_pools(2, slots, target.rope.device)

    def draft(self, bonus: int, slots: Tensor, count: int) -> list[int]:
        """Draft ``count`` tokens after ``bonus``; ``slots`` are those of the committed context."""
        length = slots.shape[0]
        rope = self.target.rope[length : length + count + 1]
        x = self.target.embedding[torch.tensor([bonus] + [MASK_TOKEN] * count, device=slots.device)]
        for layer, block in enumerate(self.blocks):
            q, k, v = block.project(norm(x, block.norm_in))
            q, k = rotate(norm(q, self.q_norm[layer]), rope), rotate(norm(k, self.k_norm[layer]), rope)
            k = torch.cat([self.pools.k[layer][slots], k])
            v = torch.cat([self.pools.v[layer][slots], v])
            x = block.finish(x, attend(q, k, v, None))
        return self.target.head(norm(x[1:], self.final_norm)).argmax(dim=-1).tolist()


class Eagle3:
    """One-layer autoregressive drafter over [embedding of the next token | fused feature]."""

    chunks = EAGLE_CHUNKS

    def __init__(self, target: Target, slots: int) -> None:
        make = Weights(2, target.rope.device)
        self.target, self.block, self.final_norm = target, Block.random(make, 2 * HIDDEN), make(HIDDEN)
        self.weights = Eagle3Weights(
            fc=make(HIDDEN, len(self.chunks) * HIDDEN),
            embedding=target.embedding,
            input_norm=make(HIDDEN),
            hidden_norm=make(HIDDEN),
            kv=self.block.qkv[HEADS * DIM :],
            eps=EPS,
        )
        self.pools = empty_pools(1, slots, target.rope.device)

    def draft(self, bonus: int, fused: Tensor, slots: Tensor, position: int, count: int) -> list[int]:
        """Draft ``count`` tokens after ``bonus`` from the fused feature ``[1, H]`` of the last committed position.

        ``slots`` reach past the context: the chain writes its provisional K and V there.
        """
        drafts, token, hidden = [], bonus, fused
        for step in range(count):
            rope = self.target.rope[position + step][None]
            embedded = norm(self.target.embedding[token][None], self.weights.input_norm)
            q, k, v = self.block.project(torch.cat([embedded, norm(hidden, self.weights.hidden_norm)], dim=1))
            self.pools.k[0][slots[position + step]] = rotate(k, rope)[0]
            self.pools.v[0][slots[position + step]] = v[0]
            seen = slots[: position + step + 1]
            attended = attend(rotate(q, rope), self.pools.k[0][seen], self.pools.v[0][seen], None)
            hidden = self.block.finish(hidden, attended)
            token = int(self.target.head(norm(hidden, self.final_norm)).argmax())
            drafts.append(token)
        return drafts
