"""The functions that launch our Triton kernels, on the phantom card: they wait for nothing. No kernel runs."""

import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from itertools import chain
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

import pytest
import torch
from card import Card
from places import places_for_cards, reached
from streams import Streams
from whiflash_kernels import triton_kernels
from whiflash_kernels.triton_kernels.launch import multiprocessors

AT_KERNELS = {"attention": 1, "launch": 2}
"""Places that ask for a card, and that only these launches come to."""


class HostsNumbers:
    """Torch, but random numbers are drawn on the host: there is no card to draw them."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def Generator(device: torch.device) -> torch.Generator:  # noqa: N802  (torch's name)
        return torch.Generator()


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Launches, by the kernel's name: their tensors are the card's, and nothing is done."""
    from triton.runtime.jit import JITFunction

    found: Counter[str] = Counter()

    def run(self: Any, *args: Any, **kwargs: Any) -> None:
        host = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor) and not isinstance(t, Card)]
        assert not host, f"{self.fn.__name__} takes a tensor of the host"
        found[self.fn.__name__] += 1

    monkeypatch.setattr(JITFunction, "run", run)
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "kernels" / "bench"))
    yield found
    for name in ("cases", "shapes"):
        sys.modules.pop(name, None)


def test_launching_waits_for_nothing(world: Streams, launches: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import cases
    from shapes import SHAPES

    few = cases.CaseSizes(batches=(2, 4), context=256)
    sizes = {"hidden": 256, "heads": 16, "kv_heads": 2, "dim": 128, "vocab": 32768, "router_units": 32}
    monkeypatch.setattr(cases, "torch", HostsNumbers())
    bench = cases.Bench(replace(SHAPES["smollm2-135m"], **sizes), torch.device("cuda", 0), 4, few)
    multiprocessors.cache_clear()
    with reached(places_for_cards()) as places:
        families = (*cases.KERNELS, cases.catch_up_cases)
        for case in chain.from_iterable(family(bench) for family in families):
            case.call()  # tables of addresses are made once
            for noted in (world.stalls, world.pageable):
                noted.clear()
            case.call()
            assert not world.stalls, case.op
            assert not world.pageable, case.op
    assert set(launches) == launched_kernels()
    at_kernels = Counter(path for path, _ in places)
    wanted = {f"whiflash_kernels/triton_kernels/{name}.py": n for name, n in AT_KERNELS.items()}
    assert at_kernels.items() >= wanted.items()


def launched_kernels() -> set[str]:
    """Names of our Triton kernels, without the functions that they call."""
    from triton.runtime.jit import JITFunction

    modules = [
        import_module(f"{triton_kernels.__name__}.{module.name}") for module in iter_modules(triton_kernels.__path__)
    ]
    found = {
        value.fn.__name__ for module in modules for value in vars(module).values() if isinstance(value, JITFunction)
    }
    return {name for name in found if name.endswith("_kernel")}
