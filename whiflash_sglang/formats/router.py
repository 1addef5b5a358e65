"""The neural router (arXiv 2606.07710), an MLP with GELU from the target's final state to the gain ΔAL.

The published release does not name its tensors, so they are found by shape: one matrix [M, H] and one [1, M], each
with an optional bias. Our files also say in their metadata what ΔAL means (`delta_sign`), and may carry two *heads*
(`heads.weight` [2, M], `heads.bias` [2]) on the same hidden layer: the drafts that a round of EAGLE-3 and of DFlash
is expected to get accepted, for policies that weigh tokens against cost.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from whiflash_sglang.errors import CheckpointError

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


def read_router(path: Path, hidden_size: int, device: torch.device, delta_sign: str | None = None) -> Layers:
    """Read a router's weights in fp32 from a .safetensors file, or from a directory with one.

    Args:
        hidden_size: the target's. delta_sign: one of `SIGNS`, for a file whose metadata does not say its sign.

    Raises:
        CheckpointError: saying what was found, where the file does not fit or its sign is not known.
    """
    file, tensors, sign = _read(path)
    w1, b1, w2, b2 = _fit(file, tensors, hidden_size)
    found = sign or delta_sign
    if found is None:
        raise CheckpointError(
            f"{file} does not say which way round its prediction is: make a bundle with "
            f"`whiflash bundle create --router-sign`, one of {', '.join(SIGNS)}"
        )
    if delta_sign not in (None, found):
        raise CheckpointError(
            f"{file} names delta_sign {found}, the settings name {delta_sign}: "
            "remove router.delta_sign from whiflash.json"
        )
    if found == DIFFUSION_MINUS_AR:
        w2[0], b2[0] = -w2[0], -b2[0]
    return Layers(*(each.to(device) for each in (w1, b1, w2, b2)))


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


def _fit(file: Path, tensors: dict[str, Tensor], hidden_size: int) -> Layers:
    """Return the layers of the file's tensors, found by shape. Raises CheckpointError."""
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

    w2, b2 = seconds[0], bias(1)
    if heads is not None:
        w2 = torch.cat([w2, heads])
        b2 = torch.cat([b2, tensors.get(_HEADS + "bias", torch.zeros(2))])
    return Layers(firsts[0], bias(len(firsts[0])), w2, b2)
