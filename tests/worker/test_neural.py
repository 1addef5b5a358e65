"""The neural router in the worker: what it reads, what it decides, and that it never changes text."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from engine import Engine, engine
from model_set import Models
from plain import plain_texts
from safetensors.torch import save_file
from traffic import Arrival, play
from whiflash_kernels import router_mlp

from whiflash_sglang.errors import CheckpointError
from whiflash_sglang.formats.router import AR_MINUS_DIFFUSION, read_router

ROUTER = "neural"
RNG = random.Random(5)
ARRIVALS = [
    Arrival(f"n{i}", 0, tuple(RNG.choices(range(256), k=RNG.randint(5, 40))), {"max_new_tokens": 60}) for i in range(4)
]


@pytest.fixture(scope="module")
def router(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random, with heads; its predictions are on both sides of the threshold."""
    torch.manual_seed(1)
    tensors = {"first": torch.randn(16, 64) / 8, "second": 5 * torch.randn(1, 16), "heads.weight": torch.randn(2, 16)}
    path: Path = tmp_path_factory.mktemp("router") / "router.safetensors"
    save_file(tensors, path, metadata={"delta_sign": AR_MINUS_DIFFUSION})
    return path


def test_a_router_of_another_target_stops_the_start(models: Models, tmp_path: Path) -> None:
    save_file({"first": torch.zeros(8, 32), "second": torch.zeros(1, 8)}, tmp_path / "router.safetensors")
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
    layers = read_router(router, 64, torch.device("cpu"))
    prompt, checked = list(ARRIVALS[0].prompt), 0
    running.submit("p", prompt, max_new_tokens=30)

    def check() -> None:
        nonlocal checked
        for state in running.states.values():
            if state.delta == state.delta:
                committed = [*prompt, *running.requests["p"].output_ids]
                final = models.reference.target.forward(committed[:-1]).final[-1:]
                delta, *drafts = router_mlp(final, *layers)[0].tolist()
                assert state.delta == pytest.approx(delta, rel=1e-3, abs=1e-4)
                for arm, accepted in zip(("ar", "diffusion"), drafts, strict=True):
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
