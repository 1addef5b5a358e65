"""Choice of the implementation that runs, and names that the package exports."""

import subprocess
import sys

import pytest
import torch
import whiflash_kernels
from kernel_backends import DEVICE, INTERPRETING
from whiflash_kernels.dispatch import backend_for

HERE = torch.zeros(1, device=DEVICE)


def test_by_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WHIFLASH_KERNELS", raising=False)
    assert backend_for(torch.zeros(1)) == "torch"
    assert backend_for(HERE) == ("triton" if DEVICE.type == "cuda" else "torch")


def test_torch_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WHIFLASH_KERNELS", "torch")
    assert backend_for(HERE) == "torch"


def test_triton_needs_cuda_or_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WHIFLASH_KERNELS", "triton")
    if INTERPRETING:
        assert backend_for(torch.zeros(1)) == "triton"
    else:
        with pytest.raises(RuntimeError, match="needs CUDA tensors, got one on cpu"):
            backend_for(torch.zeros(1))


def test_anything_else_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WHIFLASH_KERNELS", "cuda")
    with pytest.raises(ValueError, match="use one of auto, torch, triton"):
        backend_for(HERE)


def test_the_cpu_path_does_not_import_the_kernels() -> None:
    program = (
        "import sys, torch, whiflash_kernels\n"
        "whiflash_kernels.routing_stats(torch.zeros(1, 4))\n"
        "assert not [m for m in sys.modules if m.startswith('whiflash_kernels.triton_kernels')]\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=whiflash_kernels.__path__[0] + "/..")
