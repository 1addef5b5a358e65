"""One set of tiny checkpoints for the tests of the platform."""

from dataclasses import dataclass
from pathlib import Path

import pytest
from tiny_models import tiny_dflash, tiny_eagle3, tiny_target

pytest_plugins = ("suite",)


@dataclass(frozen=True)
class Checkpoints:
    target: Path
    eagle3: Path
    dflash: Path

    @property
    def arguments(self) -> list[str]:
        """Command line of a float32 server."""
        return ["--model-path", str(self.target), "--dtype", "float32"]


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    """A target whose greedy output has runs that random drafters get right for several tokens."""
    root = tmp_path_factory.mktemp("checkpoints")
    target = tiny_target(root / "target", peaked=True)
    return Checkpoints(
        target=target,
        eagle3=tiny_eagle3(root / "eagle3", target, draft_vocab_size=200),
        dflash=tiny_dflash(root / "dflash", target),
    )
