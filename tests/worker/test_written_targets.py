"""Copies of the target in drafters follow its weights when they are written; drafters in fp8 stay exact."""

import random
from pathlib import Path

import torch
from engine import engine
from model_set import Models
from tiny_models import tiny_target
from whiflash_kernels.float8 import quantise_rows
from whiflash_kernels.packed import _FLOAT8

PROMPTS = [random.Random(seed).choices(range(256), k=6 + 5 * seed) for seed in range(6)]


def is_quantised(weight: torch.Tensor) -> bool:
    pairs = zip(getattr(weight, _FLOAT8), quantise_rows(weight), strict=True)
    return all(torch.equal(held.double(), fresh.double()) for held, fresh in pairs)


def test_drafters_in_float8(models: Models) -> None:
    with engine(models.target) as e:
        plain = e.generate(PROMPTS, max_new_tokens=60)
    keys = {"quantization": {"eagle3": "fp8", "dflash": "fp8"}}
    with engine(models.target, whiflash=models.whiflash("random", keys)) as e:
        drafters, target = e.worker.kv_arms.values(), e.worker.target.lm_head
        assert e.generate(PROMPTS, max_new_tokens=60) == plain
        products = [weight for arm in drafters for weight in (arm._weights.kv, arm.model.head.weight)]
        products += [weight for arm in drafters for weight in arm.model.parameters() if weight.ndim == 2]
        assert all(map(is_quantised, products))
        target.mul_(torch.rand(target.shape))
        e.worker.target_written()
        assert not hasattr(target, _FLOAT8)
        assert is_quantised(e.worker.kv_arms["diffusion"].model.head.weight)


def test_rows_of_the_head_follow(models: Models, tmp_path: Path) -> None:
    """A block drafter that chooses from EAGLE-3's vocabulary keeps rows of the target's head."""
    flags = models.whiflash("diffusion", {"dflash_vocabulary": "eagle3"})
    with engine(models.target, whiflash=flags) as e:
        arm = e.worker.kv_arms["diffusion"]
        weight = arm._head.weight
        before = weight.clone()
        e.update_target(tiny_target(tmp_path / "other", seed=5))
        assert arm._head.weight is weight
        assert torch.equal(weight, arm.model.head.within(arm._head.kept).weight)
        assert not torch.equal(weight, before)
