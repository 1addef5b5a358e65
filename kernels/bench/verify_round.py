"""A target's verification round with random weights: what a switch is compared with."""

import torch
import torch.nn.functional as F
from measure import Call
from shapes import ModelShape


def verify_round(shape: ModelShape, device: torch.device, rows: int, context: int) -> Call:
    """One request's target forward over ``rows`` tokens after ``context`` cached ones.

    All matrix products, norms, attention over the cache and the head, each layer with weights of its own; no
    rotation, no cache writes and no sampling, so a real round takes longer and the shares reported against this
    one are upper bounds.
    """
    generator = torch.Generator(device=device).manual_seed(0)

    def random(*size: int) -> torch.Tensor:
        values = torch.randn(size, device=device, generator=generator, dtype=shape.dtype)
        return values.mul_(size[-1] ** -0.5)

    q_size, kv_size = shape.heads * shape.dim, shape.kv_heads * shape.dim
    layers = [
        (
            random(q_size + 2 * kv_size, shape.hidden),
            random(shape.hidden, q_size),
            random(2 * shape.intermediate, shape.hidden),
            random(shape.hidden, shape.intermediate),
            random(1, shape.kv_heads, context + rows, shape.dim),
            random(1, shape.kv_heads, context + rows, shape.dim),
        )
        for _ in range(shape.layers)
    ]
    head, x0 = random(shape.vocab, shape.hidden), random(rows, shape.hidden)
    mask = torch.ones(rows, context + rows, dtype=torch.bool, device=device).tril(context)
    size = (shape.hidden,)

    def call() -> None:
        x = x0
        for qkv, out, up, down, k, v in layers:
            q = F.linear(F.rms_norm(x, size), qkv)[:, :q_size].view(1, rows, shape.heads, shape.dim)
            attended = F.scaled_dot_product_attention(
                q.transpose(1, 2), k, v, attn_mask=mask, enable_gqa=True
            )
            x = x + F.linear(attended.transpose(1, 2).reshape(rows, q_size), out)
            gate, value = F.linear(F.rms_norm(x, size), up).chunk(2, dim=-1)
            x = x + F.linear(F.silu(gate) * value, down)
        F.linear(F.rms_norm(x, size), head)

    return call
