"""The neural router (arXiv 2606.07710): the target's final hidden state → 2-layer MLP with GELU → predicted ΔAL.

The published release does not name its tensors, so a file is read by shape: one matrix [M, H] and one [1, M], each
with an optional bias. Our files also say in their metadata what ΔAL means (`delta_sign`).
"""

from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from whiflash_sglang.errors import CheckpointError

AR_MINUS_DIFFUSION = "ar-minus-diffusion"
SIGNS = (AR_MINUS_DIFFUSION, "diffusion-minus-ar")
ROUTER_FILE = "router.safetensors"


class Router(nn.Module):
    """Predicts the gain in acceptance length.

    Attributes: `delta_sign` one of `SIGNS`, or None where the file does not say.
    """

    def __init__(self, hidden_size: int, width: int, delta_sign: str | None = AR_MINUS_DIFFUSION) -> None:
        """Untrained; `hidden_size` is the target's, `width` the MLP's."""
        super().__init__()
        self.first = nn.Linear(hidden_size, width)
        self.second = nn.Linear(width, 1)
        self.delta_sign = delta_sign

    def forward(self, final: Tensor) -> Tensor:
        """`final` [B, H] states after the target's final norm, at the last committed position → ΔAL [B]."""
        predicted: Tensor = self.second(F.gelu(self.first(final.to(self.first.weight.dtype))))[:, 0]
        return predicted

    @classmethod
    def load(cls, path: Path, *, hidden_size: int, device: torch.device, dtype: torch.dtype) -> "Router":
        """Read a .safetensors file or a directory with one. Raises `CheckpointError` saying what was found."""
        found = _read(path)
        parts = _fit(found, hidden_size)
        router = cls(hidden_size, len(parts.first), found.sign)
        with torch.no_grad():
            router.first.weight.copy_(parts.first)
            router.second.weight.copy_(parts.second)
            router.first.bias.copy_(parts.first_bias)
            router.second.bias.copy_(parts.second_bias)
        return router.to(device=device, dtype=dtype).eval()

    def save(self, path: Path, dtype: torch.dtype = torch.float32) -> None:
        """Write one file, complete or not at all."""
        tensors = {
            name: value.detach().cpu().to(dtype).contiguous() for name, value in self.state_dict().items()
        }
        staged = path.with_suffix(".partial")
        save_file(tensors, staged, metadata={"delta_sign": self.delta_sign or ""})
        staged.chmod(0o644)
        staged.replace(path)


class _File(NamedTuple):
    path: Path
    tensors: dict[str, Tensor]
    sign: str | None


class _Parts(NamedTuple):
    first: Tensor
    first_bias: Tensor
    second: Tensor
    second_bias: Tensor


def _read(path: Path) -> _File:
    file = path
    if path.is_dir():
        files = sorted(path.glob("*.safetensors"))
        if len(files) != 1:
            raise CheckpointError(
                f"{path} has {len(files)} .safetensors files; a router directory needs exactly one"
            )
        file = files[0]
    try:
        with safe_open(file, framework="pt") as handle:
            tensors = {name: handle.get_tensor(name).float() for name in handle.keys()}  # noqa: SIM118
            sign = (handle.metadata() or {}).get("delta_sign") or None
    except FileNotFoundError:
        raise CheckpointError(f"the router file {file} is missing") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"the router file {file} is damaged or truncated: {error}") from None
    if sign is not None and sign not in SIGNS:
        raise CheckpointError(f"{file}: delta_sign {sign!r} in the metadata is not one of {', '.join(SIGNS)}")
    return _File(file, tensors, sign)


def _fit(found: _File, hidden_size: int) -> _Parts:
    matrices = [tensor for tensor in found.tensors.values() if tensor.ndim == 2]
    vectors = [tensor for tensor in found.tensors.values() if tensor.ndim == 1]
    seconds = [tensor for tensor in matrices if len(tensor) == 1]
    firsts = [tensor for tensor in matrices if tensor.shape[1] == hidden_size and len(tensor) > 1]
    if len(matrices) != 2 or len(seconds) != 1 or len(firsts) != 1 or seconds[0].shape[1] != len(firsts[0]):
        shapes = (
            ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in found.tensors.items()) or "nothing"
        )
        raise CheckpointError(
            f"{found.path} does not hold two linear layers [M, {hidden_size}] and [1, M]; found {shapes}"
        )
    width = len(firsts[0])

    def bias(size: int) -> Tensor:
        return next((vector for vector in vectors if len(vector) == size), torch.zeros(size))

    return _Parts(firsts[0], bias(width), seconds[0], bias(1))
