"""The neural router: files read by shape, and what does not fit."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from whiflash_kernels import router_mlp

from whiflash_sglang.errors import CheckpointError
from whiflash_sglang.formats.router import AR_MINUS_DIFFUSION, DIFFUSION_MINUS_AR, Layers, read_router

HIDDEN = 8


def load(path: Path, sign: str | None = None) -> Layers:
    return read_router(path, HIDDEN, torch.device("cpu"), sign)


@pytest.mark.parametrize("heads", [False, True])
def test_foreign_names_are_read_by_shape_and_need_a_sign(tmp_path: Path, heads: bool) -> None:
    """ΔAL is turned round where its sign says so, and the drafts of heads are not."""
    first, second, bias, both = (torch.randn(size) for size in ((5, HIDDEN), (1, 5), (5,), (2, 5)))
    tensors = {"mlp.0.weight": first, "mlp.2.weight": second, "mlp.0.bias": bias}
    save_file(tensors | ({"heads.weight": both} if heads else {}), tmp_path / "any.safetensors")
    states = torch.randn(4, HIDDEN)
    inner = torch.nn.functional.gelu(states @ first.T + bias)
    for sign, turned in ((AR_MINUS_DIFFUSION, 1), (DIFFUSION_MINUS_AR, -1)):
        outputs = [turned * inner @ second.T, *([inner @ both.T] if heads else [])]
        for place in (tmp_path, tmp_path / "any.safetensors"):
            torch.testing.assert_close(router_mlp(states, *load(place, sign)), torch.cat(outputs, 1))
    with pytest.raises(CheckpointError, match="bundle create --router-sign"):
        load(tmp_path)


def test_a_sign_that_contradicts_the_file(tmp_path: Path) -> None:
    fits = {"a": torch.zeros(5, HIDDEN), "b": torch.zeros(1, 5)}
    save_file(fits, tmp_path / "router.safetensors", metadata={"delta_sign": AR_MINUS_DIFFUSION})
    with pytest.raises(CheckpointError, match="names delta_sign ar-minus-diffusion, the settings name"):
        load(tmp_path, DIFFUSION_MINUS_AR)


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
