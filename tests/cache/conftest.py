"""Both arms on tiny random checkpoints, without an engine."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from replay import Arms, load_arms


@pytest.fixture(scope="session")
def arms(tmp_path_factory: pytest.TempPathFactory) -> Arms:
    return load_arms(tmp_path_factory.mktemp("models"))
