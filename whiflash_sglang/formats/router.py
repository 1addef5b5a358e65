"""The neural router (arXiv 2606.07710), an MLP with GELU from the target's final state to the gain ΔAL.

The published release does not name its tensors, so they are found by shape: one matrix [M, H] and one [1, M], each
with an optional bias. Our files also say in their metadata what ΔAL means (`delta_sign`), and may carry two *heads*
(`heads.weight` [2, M], `heads.bias` [2]) on the same hidden layer: the drafts that a round of EAGLE-3 and of DFlash
is expected to get accepted, for policies that weigh tokens against cost.
"""

from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from whiflash_sglang.errors import CheckpointError
from whiflash_sglang.files.jsonl import staged

AR_MINUS_DIFFUSION = "ar-minus-diffusion"
DIFFUSION_MINUS_AR = "diffusion-minus-ar"
SIGNS = (AR_MINUS_DIFFUSION, DIFFUSION_MINUS_AR)
_HEADS = "heads."


class Layers(NamedTuple):
    """The MLP's weights for `whiflash_kernels.router_mlp`. Row 0 of the second layer is ΔAL = AL(EAGLE-3) - AL(DFlash);
    rows 1 and 2, if the file has heads, are the accepted drafts of EAGLE-3 and of DFlash.

    `w1` [M, H], `b1` [M], `w2` [1 or 3, M], `b2` [1 or 3].
    """

    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor


class Router(nn.Module):
    """Predicts EAGLE-3's gain in acceptance length over DFlash, and if it has `heads` the accepted drafts of both."""

    def __init__(self, hidden_size: int, width: int, *, heads: bool = False) -> None:
        """Make an untrained router; `hidden_size` is the target's, `width` the MLP's."""
        super().__init__()
        self.first = nn.Linear(hidden_size, width)
        self.second = nn.Linear(width, 1)
        self.heads = nn.Linear(width, 2) if heads else None

    def forward(self, final: Tensor) -> Tensor:
        """Predict ΔAL [B] from `final` [B, H], the target's final-normed states at the last committed position."""
        predicted: Tensor = self.second(self._hidden(final))[:, 0]
        return predicted

    def predict(self, final: Tensor) -> tuple[Tensor, Tensor]:
        """Predict from `final` [B, H]: ΔAL [B], and the accepted drafts of EAGLE-3 and of DFlash [B, 2].

        Raises `CheckpointError` if the router has no heads.
        """
        if self.heads is None:
            raise CheckpointError("this router predicts ΔAL only; it has no heads")
        hidden = self._hidden(final)
        return self.second(hidden)[:, 0], self.heads(hidden)

    def _hidden(self, final: Tensor) -> Tensor:
        return F.gelu(self.first(final.to(self.first.weight.dtype)))

    def layers(self) -> Layers:
        """Return the weights in the kernel's form."""
        seconds = [self.second] if self.heads is None else [self.second, self.heads]
        return Layers(
            self.first.weight.detach(),
            self.first.bias.detach(),
            torch.cat([layer.weight.detach() for layer in seconds]),
            torch.cat([layer.bias.detach() for layer in seconds]),
        )

    @classmethod
    def load(
        cls, path: Path, *, hidden_size: int, device: torch.device, dtype: torch.dtype, delta_sign: str | None = None
    ) -> "Router":
        """Read a router from a .safetensors file, or from a directory with one.

        Args:
            delta_sign: one of `SIGNS`, for a file whose metadata does not say what its ΔAL means.

        Raises:
            CheckpointError: saying what was found, where the file does not fit or its sign is not known.
        """
        file, tensors, sign = _read(path)
        weights = _fit(file, tensors, hidden_size)
        if _sign(file, sign, delta_sign) == DIFFUSION_MINUS_AR:
            weights |= {name: -weights[name] for name in ("second.weight", "second.bias")}
        router = cls(hidden_size, len(weights["first.bias"]), heads=_HEADS + "weight" in weights)
        router.load_state_dict(weights)
        return router.to(device=device, dtype=dtype).eval()

    def save(self, path: Path, dtype: torch.dtype = torch.float32) -> None:
        """Write the router to one file, complete or not at all."""
        tensors = {name: value.detach().cpu().to(dtype).contiguous() for name, value in self.state_dict().items()}
        with staged(path) as file:
            save_file(tensors, file, metadata={"delta_sign": AR_MINUS_DIFFUSION})
            file.chmod(0o644)


def _read(path: Path) -> tuple[Path, dict[str, Tensor], str | None]:
    """Return the router's file, its tensors (float32), and the `delta_sign` of its metadata, None if missing."""
    file = path
    if path.is_dir():
        files = sorted(path.glob("*.safetensors"))
        if len(files) != 1:
            raise CheckpointError(f"{path} has {len(files)} .safetensors files; a router directory needs exactly one")
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
    return file, tensors, sign


def _sign(file: Path, named: str | None, setting: str | None) -> str:
    """Return the sign of the file's ΔAL, from its metadata or the settings. Raises CheckpointError if they differ."""
    sign = named or setting
    if sign is None:
        raise CheckpointError(
            f"{file} does not say which way round its prediction is: make a bundle with "
            f"`whiflash bundle create --router-sign`, one of {', '.join(SIGNS)}"
        )
    if setting is not None and sign != setting:
        raise CheckpointError(
            f"{file} names delta_sign {sign}, the settings name {setting}: remove router.delta_sign from whiflash.json"
        )
    return sign


def _fit(file: Path, tensors: dict[str, Tensor], hidden_size: int) -> dict[str, Tensor]:
    """Return the state dictionary of a `Router` from the file's tensors, found by shape. Raises CheckpointError."""
    plain = {name: tensor for name, tensor in tensors.items() if not name.startswith(_HEADS)}
    matrices = [tensor for tensor in plain.values() if tensor.ndim == 2]
    vectors = [tensor for tensor in plain.values() if tensor.ndim == 1]
    seconds = [tensor for tensor in matrices if len(tensor) == 1]
    firsts = [tensor for tensor in matrices if tensor.shape[1] == hidden_size and len(tensor) > 1]
    heads = tensors.get(_HEADS + "weight")
    fits = len(matrices) == 2 and len(seconds) == 1 and len(firsts) == 1
    fits = fits and seconds[0].shape[1] == len(firsts[0])
    if not fits or (heads is not None and heads.shape != (2, len(firsts[0]))):
        shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items()) or "nothing"
        raise CheckpointError(f"{file} does not hold two linear layers [M, {hidden_size}] and [1, M]; found {shapes}")

    def bias(size: int) -> Tensor:
        return next((vector for vector in vectors if len(vector) == size), torch.zeros(size))

    weights = {
        "first.weight": firsts[0],
        "first.bias": bias(len(firsts[0])),
        "second.weight": seconds[0],
        "second.bias": bias(1),
    }
    if heads is not None:
        weights[_HEADS + "weight"] = heads
        weights[_HEADS + "bias"] = tensors.get(_HEADS + "bias", torch.zeros(2))
    return weights
