"""The models whose shapes are measured."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a target and of its drafters; attention heads are ``dim`` wide in both."""

    name: str
    hidden: int
    heads: int
    kv_heads: int
    dim: int
    intermediate: int
    vocab: int
    captured: int
    """Target layers that are captured: the union of both drafters'."""
    dflash_chunks: tuple[int, ...]
    eagle3_chunks: tuple[int, ...]
    dflash_layers: int
    block: int
    router_units: int
    dtype: torch.dtype = torch.bfloat16


SHAPES = {
    "qwen3-8b": ModelShape(
        name="Qwen3-8B",
        hidden=4096,
        heads=32,
        kv_heads=8,
        dim=128,
        intermediate=12_288,
        vocab=151_936,
        captured=7,
        dflash_chunks=(0, 2, 3, 4, 6),
        eagle3_chunks=(0, 1, 5),
        dflash_layers=5,
        block=16,
        router_units=512,
    ),
    "smollm2-135m": ModelShape(
        name="SmolLM2-135M",
        hidden=576,
        heads=9,
        kv_heads=3,
        dim=64,
        intermediate=1536,
        vocab=49_152,
        captured=5,
        dflash_chunks=(0, 2, 4),
        eagle3_chunks=(0, 1, 3),
        dflash_layers=2,
        block=8,
        router_units=256,
    ),
}
