"""router_mlp against float64 loops."""

import kernel_oracles as oracles
import pytest
import torch
from kernel_backends import DEVICE, guarded_outputs, running
from kernel_tolerances import assert_close
from whiflash_kernels import router_mlp


def layers(hidden: int, units: int, outputs: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(hidden + units)
    sizes = [(units, hidden), (units,), (outputs, units), (outputs,)]
    return [(torch.randn(*size, generator=generator) * size[-1] ** -0.5).to(dtype).to(DEVICE) for size in sizes]


def states(rows: int, hidden: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(rows, hidden, generator=torch.Generator().manual_seed(rows)).to(dtype).to(DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "hidden", "units", "outputs"),
    [(1, 576, 256, 1), (2, 100, 40, 3), (17, 64, 16, 1), (64, 33, 7, 2), (65, 33, 7, 2), (256, 16, 8, 1)],
)
def test_router(backend: str, dtype: torch.dtype, rows: int, hidden: int, units: int, outputs: int) -> None:
    weights, x = layers(hidden, units, outputs, dtype), states(rows, hidden, dtype)
    with running(backend), guarded_outputs():
        out = router_mlp(x, *weights)
    assert out.dtype == torch.float32
    assert_close(out, oracles.router(x.cpu(), *(w.cpu() for w in weights)), "router", dtype)


def test_strided_states_and_bf16_ones(backend: str) -> None:
    weights = layers(64, 32, 1, torch.float32)
    rows = states(6, 128, torch.float32)[::2, 32:96]
    columns = states(64, 3, torch.float32).t()
    with running(backend):
        for x in (rows, columns, states(3, 64, torch.bfloat16)):
            expected = oracles.router(x.cpu(), *(w.cpu() for w in weights))
            assert_close(router_mlp(x, *weights), expected, "router", torch.float32)


def test_results_repeat_and_do_not_depend_on_the_batch(backend: str) -> None:
    weights, x = layers(576, 256, 1, torch.float32), states(5, 576, torch.float32)
    with running(backend):
        out = router_mlp(x, *weights)
        assert torch.equal(out, router_mlp(x, *weights))
        if backend == "triton":
            assert torch.equal(out[2:3], router_mlp(x[2:3], *weights))


def test_no_rows(backend: str) -> None:
    with running(backend):
        assert router_mlp(states(0, 16, torch.float32), *layers(16, 8, 2, torch.float32)).shape == (0, 2)


def test_rejects_layers_that_do_not_fit() -> None:
    w1, b1, w2, b2 = layers(16, 8, 2, torch.float32)
    with pytest.raises(ValueError, match="hidden states of size 17"):
        router_mlp(states(1, 17, torch.float32), w1, b1, w2, b2)
    with pytest.raises(ValueError, match="do not fit each other"):
        router_mlp(states(1, 16, torch.float32), w1, b1, w2[:, 1:], b2)
