"""The router: files read by shape, a fit that recovers a known rule, figures worked out by hand."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from whiflash_sglang.errors import CheckpointError
from whiflash_sglang.models.router import AR_MINUS_DIFFUSION, Router
from whiflash_sglang.train.evaluate import Replay
from whiflash_sglang.train.router import (
    RouterData,
    RouterSettings,
    router_choices,
    router_data,
    router_quality,
    train_router,
    write_calibration_plot,
)

HIDDEN = 8


def load(path: Path) -> Router:
    return Router.load(path, hidden_size=HIDDEN, device=torch.device("cpu"), dtype=torch.float32)


def test_a_saved_router_is_the_same(tmp_path: Path) -> None:
    router = Router(HIDDEN, 5)
    router.save(tmp_path / "router.safetensors")
    states = torch.randn(3, HIDDEN)
    for place in (tmp_path, tmp_path / "router.safetensors"):
        again = load(place)
        assert torch.equal(again(states), router(states))
        assert again.delta_sign == AR_MINUS_DIFFUSION


def test_foreign_names_are_read_by_shape(tmp_path: Path) -> None:
    first, second, bias = torch.randn(5, HIDDEN), torch.randn(1, 5), torch.randn(5)
    save_file(
        {"mlp.0.weight": first, "mlp.2.weight": second, "mlp.0.bias": bias}, tmp_path / "any.safetensors"
    )
    router = load(tmp_path / "any.safetensors")
    states = torch.randn(4, HIDDEN)
    expected = torch.nn.functional.gelu(states @ first.T + bias) @ second[0]
    torch.testing.assert_close(router(states), expected)
    assert router.delta_sign is None


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"a": torch.zeros(5, HIDDEN + 1), "b": torch.zeros(1, 5)}, r"found a \[5, 9\], b \[1, 5\]"),
        ({"a": torch.zeros(5, HIDDEN), "b": torch.zeros(1, 6)}, "does not hold two linear layers"),
        ({"a": torch.zeros(5, HIDDEN)}, r"found a \[5, 8\]"),
    ],
)
def test_other_shapes_are_named(tmp_path: Path, tensors: dict[str, torch.Tensor], message: str) -> None:
    save_file(tensors, tmp_path / "r.safetensors")
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path / "r.safetensors")


def test_missing_damaged_and_wrongly_signed_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is missing"):
        load(tmp_path / "none.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"\x00" * 30)
    with pytest.raises(CheckpointError, match="damaged or truncated"):
        load(tmp_path / "bad.safetensors")
    good = {"a": torch.zeros(5, HIDDEN), "b": torch.zeros(1, 5)}
    save_file(good, tmp_path / "sign.safetensors", metadata={"delta_sign": "up"})
    with pytest.raises(CheckpointError, match="delta_sign 'up'"):
        load(tmp_path / "sign.safetensors")
    with pytest.raises(CheckpointError, match=r"has 2 \.safetensors files"):
        load(tmp_path)


def test_a_known_rule_is_recovered(tmp_path: Path) -> None:
    torch.manual_seed(0)
    states = torch.randn(3000, HIDDEN)
    delta = torch.round(2 * states[:, 0])
    train, held = RouterData(states[:2500], delta[:2500]), RouterData(states[2500:], delta[2500:])
    router = train_router(
        train, tmp_path / "router", RouterSettings(width=32, epochs=12, batch=128, learning_rate=2e-2)
    )
    quality = router_quality(load(tmp_path / "router"), held, entropy=torch.rand(500))
    assert quality.r_squared > 0.9
    assert quality.sign_accuracy > 0.95
    assert quality.entropy_sign_accuracy < 0.7
    write_calibration_plot(router, held, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_entropys_accuracy_is_its_best_threshold() -> None:
    data = RouterData(torch.zeros(5, HIDDEN), torch.tensor([-1.0, -1.0, 2.0, 0.0, 1.0]))
    quality = router_quality(Router(HIDDEN, 2), data, entropy=torch.tensor([0.1, 0.9, 0.5, 0.0, 0.7]))
    assert quality.entropy_sign_accuracy == pytest.approx(0.75)


def test_data_and_choices_follow_the_replay() -> None:
    accepted = {"eagle3": np.array([3, 0, 1, 5]), "dflash": np.array([1, 2, 1, 0])}
    answer = Replay("a", "chat", accepted, torch.randn(4, HIDDEN), 3)
    assert router_data([answer]).delta.tolist() == [2, -2, 0]
    router = Router(HIDDEN, 2)
    with torch.no_grad():
        router.second.weight.zero_()
        router.second.bias.fill_(0.4)
    assert set(router_choices(router, answer, 0.5).values()) == {"dflash"}
    assert set(router_choices(router, answer, 0.3).values()) == {"eagle3"}
