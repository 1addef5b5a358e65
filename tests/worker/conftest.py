"""The engine of a module as after its start, and adapters of its target."""

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from adapters import Adapter
    from engine import Engine
    from model_set import Models


@pytest.fixture
def running(shared: "Engine", request: pytest.FixtureRequest) -> "Engine":
    """The module's `shared`, as after a start with its `ROUTER`. Tests that start another engine come before."""
    shared.start_over(request.module.ROUTER)
    shared.requests.clear()
    return shared


@pytest.fixture(scope="session")
def adapters(models: "Models", tmp_path_factory: pytest.TempPathFactory) -> "dict[str, Adapter]":
    from adapters import ATTENTION, make_adapter

    root = tmp_path_factory.mktemp("adapters")
    made = (
        make_adapter(models, root, "one", seed=1, rank=4),
        make_adapter(models, root, "two", seed=2, rank=8, modules=ATTENTION),
        make_adapter(models, root, "three", seed=3, rank=2),
    )
    return {adapter.name: adapter for adapter in made}
