"""Tiny checkpoints for graphs of whole forwards."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "worker"))
sys.path.insert(0, str(Path(__file__).parents[1] / "cache"))
sys.path.insert(0, str(Path(__file__).parents[1] / "targets"))

from model_set import Models, build_models
from replay import Arms, load_arms


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return build_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def arms(tmp_path_factory: pytest.TempPathFactory) -> Arms:
    return load_arms(tmp_path_factory.mktemp("arms"))
