"""The neural router in the worker: what it reads, what it decides, and that it never changes text."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from engine import Engine, engine
from model_set import Models

from whiflash_sglang.errors import CheckpointError, ConfigError
from whiflash_sglang.models.router import Router


def prompts() -> list[list[int]]:
    rng = random.Random(5)
    return [rng.choices(range(256), k=rng.randint(5, 40)) for _ in range(4)]


@pytest.fixture(scope="module")
def router(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    random_router = Router(64, 16, heads=True)
    with torch.no_grad():
        random_router.second.weight.mul_(20)  # predictions on both sides of the threshold
    path: Path = tmp_path_factory.mktemp("router") / "router.safetensors"
    random_router.save(path)
    return path


@contextmanager
def routed(models: Models, policy: str, router: Path, **flags: Any) -> Iterator[Engine]:
    options = models.whiflash(policy, whiflash_neural_router_path=str(router), **flags)
    with engine(models.target, whiflash=options) as e:
        yield e


@pytest.mark.parametrize("policy", ["neural", "auto"])
def test_a_router_changes_no_text(models: Models, router: Path, policy: str) -> None:
    with engine(models.target) as e:
        expected = e.generate(prompts(), max_new_tokens=60)
    with routed(models, policy, router) as e:
        used: set[str | None] = set()
        for i, prompt in enumerate(prompts()):
            e.submit(f"n{i}", prompt, max_new_tokens=60)
        e.run(lambda: used.update(state.previous for state in e.states.values()))
        assert [e.output(f"n{i}") for i in range(4)] == expected
        e.check_leaks()
    if policy == "neural":
        assert {"ar", "diffusion"} <= used


def test_predictions_are_those_of_the_state_before_the_bonus_token(models: Models, router: Path) -> None:
    options = {"device": torch.device("cpu"), "dtype": torch.float32}
    module = Router.load(router, hidden_size=64, **options)
    prompt = prompts()[0]
    checked = 0
    with routed(models, "neural", router) as e:
        e.submit("p", prompt, max_new_tokens=30)

        def check() -> None:
            nonlocal checked
            for state in e.states.values():
                if state.delta == state.delta:
                    committed = [*prompt, *e.requests["p"].output_ids]
                    final = models.reference.target.forward(committed[:-1]).final[-1:]
                    found = module.predict(final)
                    assert state.delta == pytest.approx(found.delta.item(), rel=1e-3, abs=1e-4)
                    eagle3, dflash = found.accepted[0].tolist()
                    assert state.predicted["ar"] == pytest.approx(1 + max(eagle3, 0), rel=1e-3, abs=1e-4)
                    assert state.predicted["diffusion"] == pytest.approx(
                        1 + max(dflash, 0), rel=1e-3, abs=1e-4
                    )
                    checked += 1

        e.run(check)
    assert checked > 3


def test_the_threshold_moves_at_run_time(models: Models, router: Path) -> None:
    with routed(models, "neural", router, whiflash_neural_router_threshold="1000") as e:
        for threshold, arm in ((1000.0, "diffusion"), (-1000.0, "ar")):
            e.worker.reconfigure({"neural_router_threshold": threshold})
            used: set[str | None] = set()
            e.submit(f"t{arm}", prompts()[1], max_new_tokens=20)
            e.run(lambda used=used: used.update(state.previous for state in e.states.values()))  # type: ignore[misc]
            assert used <= {arm, None}
            assert arm in used
        assert "delta" in e.worker.controller.policy.needs
        e.worker.reconfigure({"router": "auto"})
        assert "delta" in e.worker.controller.policy.needs


def test_without_a_router_there_is_no_neural_policy(models: Models) -> None:
    with engine(models.target, whiflash=models.whiflash("auto")) as e:
        assert "delta" not in e.worker.controller.policy.needs
        with pytest.raises(ConfigError, match="has no neural router"):
            e.worker.settings_with({"router": "neural"})


def test_a_router_of_another_target_stops_the_start(models: Models, tmp_path: Path) -> None:
    Router(32, 8).save(tmp_path / "router.safetensors")
    with (
        pytest.raises(CheckpointError, match=r"two linear layers \[M, 64\]"),
        routed(models, "auto", tmp_path / "router.safetensors"),
    ):
        pass
