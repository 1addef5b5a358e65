"""An engine that is given versions of its drafters' weights."""

import random
from pathlib import Path
from typing import Any

import torch
from engine import Engine, engine
from model_set import Models

from whiflash_sglang.errors import ConfigError

PROMPTS = [random.Random(seed).choices(range(256), k=6 + 5 * seed) for seed in range(6)]


def serving(models: Models, directory: Path, router: str = "random", **options: Any) -> Any:
    flags = models.whiflash(router, whiflash_versions=str(directory))
    return engine(models.target, whiflash=flags, **options)


def swap(e: Engine, number: int) -> None:
    """Switch at once. Raises ConfigError where the version is refused."""
    weights = e.worker.weights
    weights.ask(number, "swap")
    reads(weights)
    assert weights.advance()
    if why := weights.outcomes["swap"]:
        raise ConfigError(why)


def reads(weights: Any) -> None:
    """Wait until the version that is being read has been."""
    weights._reading.join()


def parameters(e: Engine, arm: str) -> dict[str, torch.Tensor]:
    return dict(e.worker.kv_arms[arm].model.named_parameters())
