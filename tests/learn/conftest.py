"""Versions of the tiny drafters, and what plain decoding answers."""

from pathlib import Path

import pytest
from model_set import Models


@pytest.fixture(scope="session")
def plain(models: Models) -> list[list[int]]:
    from engine import engine
    from swapping import PROMPTS

    with engine(models.target) as e:
        found: list[list[int]] = e.generate(PROMPTS, max_new_tokens=60)
    return found


@pytest.fixture(scope="module")
def directory(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three versions: near the start, far from it, and one that names one drafter only."""
    from versioned import bundle_of, changed, trained, version

    from whiflash_sglang.updates.versions import publish

    root = tmp_path_factory.mktemp("versions")
    for number, strength in enumerate((0.05, 0.5)):
        version(models, root / "versions", root / f"made-{number}", trained(strength, number))
    alone = changed(models.dflash, root / "alone", trained(0.3, 9))
    publish(root / "versions", bundle_of(models, root / "alone-bundle", dflash=alone))
    return root / "versions"
