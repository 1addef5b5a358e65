"""The tiny checkpoints of the worker's tests, for tests with an engine; the others import no torch."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from model_set import Models

sys.path.insert(0, str(Path(__file__).parents[1] / "worker"))


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> "Models":
    from model_set import build_models

    return build_models(tmp_path_factory.mktemp("models"))
