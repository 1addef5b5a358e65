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


SHAPES = {  # in the order of the fields above
    "qwen3-8b": ModelShape("Qwen3-8B", 4096, 32, 8, 128, 12_288, 151_936, 7, (0, 2, 3, 4, 6), (0, 1, 5), 5, 16, 512),
    "smollm2-135m": ModelShape("SmolLM2-135M", 576, 9, 3, 64, 1536, 49_152, 5, (0, 2, 4), (0, 1, 3), 2, 8, 256),
}
