"""The neural router in the worker: what it reads, what it decides, and that it never changes text."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from engine import Engine, engine
from model_set import Models
from plain import plain_texts
from traffic import Arrival, play

from whiflash_sglang.errors import CheckpointError, ConfigError
from whiflash_sglang.formats.router import Router

ROUTER = "neural"
RNG = random.Random(5)
ARRIVALS = [
    Arrival(f"n{i}", 0, tuple(RNG.choices(range(256), k=RNG.randint(5, 40))), {"max_new_tokens": 60}) for i in range(4)
]


@pytest.fixture(scope="module")
def router(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    random_router = Router(64, 16, heads=True)
    with torch.no_grad():
        random_router.second.weight.mul_(20)  # predictions on both sides of the threshold
    path: Path = tmp_path_factory.mktemp("router") / "router.safetensors"
    random_router.save(path)
    return path


def test_without_a_router_there_is_no_neural_policy(models: Models) -> None:
    with engine(models.target, whiflash=models.whiflash("auto")) as e:
        assert "delta" not in e.worker.controller.policy.needs
        with pytest.raises(ConfigError, match="has no neural router"):
            e.worker.settings_with({"router": "neural"})


def test_a_router_of_another_target_stops_the_start(models: Models, tmp_path: Path) -> None:
    Router(32, 8).save(tmp_path / "router.safetensors")
    flags = models.whiflash("auto", whiflash_neural_router_path=str(tmp_path / "router.safetensors"))
    with pytest.raises(CheckpointError, match=r"two linear layers \[M, 64\]"), engine(models.target, whiflash=flags):
        pass


@pytest.fixture(scope="module")
def expected(models: Models) -> dict[str, list[int]]:
    return plain_texts(models.target, ARRIVALS)


@pytest.fixture(scope="module")
def shared(models: Models, router: Path, expected: dict[str, list[int]]) -> Iterator[Engine]:
    flags = models.whiflash(ROUTER, whiflash_neural_router_path=str(router))
    with engine(models.target, whiflash=flags) as e:
        yield e


@pytest.mark.parametrize("policy", ["neural", "auto"])
def test_a_router_changes_no_text(running: Engine, expected: dict[str, list[int]], policy: str) -> None:
    running.start_over(policy)
    used: set[str | None] = set()
    texts = play(running, ARRIVALS, lambda: used.update(s.previous for s in running.states.values()))
    assert texts == expected
    if policy == "neural":
        assert {"ar", "diffusion"} <= used


def test_predictions_are_those_of_the_state_before_the_bonus_token(
    running: Engine, models: Models, router: Path
) -> None:
    options = {"device": torch.device("cpu"), "dtype": torch.float32}
    module = Router.load(router, hidden_size=64, **options)
    prompt, checked = list(ARRIVALS[0].prompt), 0
    running.submit("p", prompt, max_new_tokens=30)

    def check() -> None:
        nonlocal checked
        for state in running.states.values():
            if state.delta == state.delta:
                committed = [*prompt, *running.requests["p"].output_ids]
                delta, drafts = module.predict(models.reference.target.forward(committed[:-1]).final[-1:])
                assert state.delta == pytest.approx(delta.item(), rel=1e-3, abs=1e-4)
                for arm, accepted in zip(("ar", "diffusion"), drafts[0].tolist(), strict=True):
                    assert state.predicted[arm] == pytest.approx(1 + max(accepted, 0), rel=1e-3, abs=1e-4)
                checked += 1

    running.run(check)
    assert checked > 3


def test_the_threshold_moves_at_run_time(running: Engine) -> None:
    for threshold, arm in ((1000.0, "diffusion"), (-1000.0, "ar")):
        running.worker.reconfigure({"neural_router_threshold": threshold})
        used: set[str | None] = set()
        running.submit(f"t{arm}", ARRIVALS[1].prompt, max_new_tokens=20)
        running.run(lambda used=used: used.update(s.previous for s in running.states.values()))  # type: ignore[misc]
        assert used <= {arm, None}
        assert arm in used
    assert "delta" in running.worker.controller.policy.needs
    running.worker.reconfigure({"router": "auto"})
    assert "delta" in running.worker.controller.policy.needs
