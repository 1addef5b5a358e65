"""The neural router: files read by shape, and what does not fit."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from whiflash_kernels import router_mlp

from whiflash_sglang.errors import CheckpointError
from whiflash_sglang.formats.router import AR_MINUS_DIFFUSION, DIFFUSION_MINUS_AR, Router

HIDDEN = 8


def load(path: Path, sign: str | None = None) -> Router:
    options = {"device": torch.device("cpu"), "dtype": torch.float32}
    return Router.load(path, hidden_size=HIDDEN, delta_sign=sign, **options)


@pytest.mark.parametrize("heads", [False, True])
def test_a_saved_router_is_the_same(tmp_path: Path, heads: bool) -> None:
    router = Router(HIDDEN, 5, heads=heads)
    router.save(tmp_path / "router.safetensors")
    states = torch.randn(3, HIDDEN)
    for place in (tmp_path, tmp_path / "router.safetensors"):
        again = load(place)
        assert torch.equal(again(states), router(states))
        if heads:
            assert torch.equal(again.predict(states)[1], router.predict(states)[1])
        else:
            with pytest.raises(CheckpointError, match="no heads"):
                again.predict(states)


def test_foreign_names_are_read_by_shape_and_need_a_sign(tmp_path: Path) -> None:
    first, second, bias = torch.randn(5, HIDDEN), torch.randn(1, 5), torch.randn(5)
    save_file({"mlp.0.weight": first, "mlp.2.weight": second, "mlp.0.bias": bias}, tmp_path / "any.safetensors")
    states = torch.randn(4, HIDDEN)
    expected = torch.nn.functional.gelu(states @ first.T + bias) @ second[0]
    torch.testing.assert_close(load(tmp_path, AR_MINUS_DIFFUSION)(states), expected)
    torch.testing.assert_close(load(tmp_path, DIFFUSION_MINUS_AR)(states), -expected)
    with pytest.raises(CheckpointError, match="bundle create --router-sign"):
        load(tmp_path)


def test_a_sign_that_contradicts_the_file(tmp_path: Path) -> None:
    Router(HIDDEN, 5).save(tmp_path / "router.safetensors")
    with pytest.raises(CheckpointError, match="names delta_sign ar-minus-diffusion, the settings name"):
        load(tmp_path, DIFFUSION_MINUS_AR)


def test_the_kernels_layers_are_the_routers() -> None:
    router, states = Router(HIDDEN, 5, heads=True), torch.randn(6, HIDDEN)
    delta, accepted = router.predict(states)
    torch.testing.assert_close(router_mlp(states, *router.layers()), torch.cat([delta[:, None], accepted], 1))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"a": torch.zeros(5, HIDDEN + 1), "b": torch.zeros(1, 5)}, r"found a \[5, 9\], b \[1, 5\]"),
        ({"a": torch.zeros(5, HIDDEN), "b": torch.zeros(1, 6)}, "does not hold two linear layers"),
        ({"a": torch.zeros(5, HIDDEN)}, r"found a \[5, 8\]"),
        (
            {"a": torch.zeros(5, HIDDEN), "b": torch.zeros(1, 5), "heads.weight": torch.zeros(3, 5)},
            r"heads.weight \[3, 5\]",
        ),
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
