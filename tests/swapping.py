"""An engine that is given versions of its drafters' weights."""

import random
from pathlib import Path
from typing import Any

import torch
from engine import Engine, engine
from model_set import Models

PROMPTS = [random.Random(seed).choices(range(256), k=6 + 5 * seed) for seed in range(6)]


def serving(models: Models, directory: Path, router: str = "random", **options: Any) -> Any:
    flags = models.whiflash(router, whiflash_versions=str(directory))
    return engine(models.target, whiflash=flags, **options)


def swap(e: Engine, number: int) -> None:
    e.worker.weights.prepare(number)
    e.worker.weights.use(number)


def parameters(e: Engine, arm: str) -> dict[str, torch.Tensor]:
    return dict(e.worker.kv_arms[arm].model.named_parameters())
