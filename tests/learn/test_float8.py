"""A server whose drafters multiply in fp8: the text stays, and every version of their weights is quantised."""

from pathlib import Path

import torch
from engine import engine
from model_set import Models
from swapping import PROMPTS, swap
from whiflash_kernels.float8 import quantise_rows
from whiflash_kernels.packed import _FLOAT8


def is_quantised(weight: torch.Tensor) -> bool:
    pairs = zip(getattr(weight, _FLOAT8), quantise_rows(weight), strict=True)
    return all(torch.equal(held.double(), fresh.double()) for held, fresh in pairs)


def test_versions_are_quantised(models: Models, directory: Path, plain: list[list[int]]) -> None:
    keys = {"quantization": {"eagle3": "fp8", "dflash": "fp8"}}
    with engine(
        models.target, whiflash=models.whiflash("random", keys, whiflash_versions=str(directory))
    ) as e:
        arms, target = e.worker.kv_arms.values(), e.worker.target.lm_head
        for number in (0, 1, 2, 3):
            swap(e, number)
            assert e.generate(PROMPTS, max_new_tokens=60) == plain
            held = [weight for arm in arms for weight in (arm._weights.kv, arm.model.head.weight)]
            assert all(
                map(is_quantised, held + [w for arm in arms for w in arm.model.parameters() if w.ndim == 2])
            )
        target.mul_(torch.rand(target.shape))
        e.worker.target_written()
        assert not hasattr(target, _FLOAT8)
        assert is_quantised(e.worker.kv_arms["diffusion"].model.head.weight)
