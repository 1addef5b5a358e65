"""Attention of generation against the formula in float64, compiled and in torch; without a compiler, torch goes on."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from whiflash_sglang.train.answers import attention
from whiflash_sglang.train.answers.attention import decode_attention


@pytest.fixture(params=["compiled", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(attention, "_compiled", lambda: None)
    elif attention._compiled() is None:
        pytest.skip("no C++ compiler here")
    return str(request.param)


@pytest.fixture
def uncompiled() -> Iterator[None]:
    """Ask for the compiler anew, and again afterwards."""
    attention._compiled.cache_clear()
    yield
    attention._compiled.cache_clear()


def slots(
    rows: int, heads: int, share: int, size: int, capacity: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys, values, ends and bias as generation hands them over; beyond a row's end there is rubbish."""
    torch.manual_seed(rows * capacity)
    q = torch.randn(rows, heads * share, size).bfloat16()
    keys = torch.randn(rows, heads, size, capacity).bfloat16()
    values = torch.randn(rows, heads, capacity, size).bfloat16()
    ends = torch.randint(0, capacity, (rows,))
    ends[0] = 0
    for row, end in enumerate(ends.tolist()):
        keys[row, :, :, end + 1 :] = 1e30
        values[row, :, end + 1 :] = 1e30
    unseen = torch.arange(int(ends.max()) + 1)[None] > ends[:, None]
    bias = torch.zeros(unseen.shape).masked_fill_(unseen, float("-inf")).repeat_interleave(heads, 0)[:, None]
    return q, keys, values, ends, bias


def by_formula(q: Tensor, keys: Tensor, values: Tensor, ends: Tensor) -> Tensor:
    heads, size = keys.shape[1:3]
    mixed = torch.empty(q.shape, dtype=torch.float64)
    for row, end in enumerate(ends.tolist()):
        for head in range(q.shape[1]):
            own = head // (q.shape[1] // heads)
            k, v = keys[row, own, :, : end + 1].double(), values[row, own, : end + 1].double()
            mixed[row, head] = (q[row, head].double() @ k * size**-0.5).softmax(-1) @ v
    return mixed


@pytest.mark.parametrize(
    ("rows", "heads", "share", "size", "capacity"),
    [(5, 3, 3, 64, 384), (1, 1, 1, 4, 1), (3, 2, 4, 80, 33), (2, 8, 1, 128, 70)],
)
def test_it_is_the_formula(way: str, rows: int, heads: int, share: int, size: int, capacity: int) -> None:
    q, keys, values, ends, bias = slots(rows, heads, share, size, capacity)
    found = decode_attention(q, keys, values, ends, bias)
    assert (found.shape, found.dtype) == (q.shape, torch.bfloat16)
    wanted = by_formula(q, keys, values, ends)
    rounded = 2**-8 if way == "compiled" else 2**-5  # torch rounds scores and weights to bfloat16 on the way
    torch.testing.assert_close(found.double(), wanted, rtol=rounded, atol=rounded)


def test_the_process_keeps_its_subnormal_numbers(tmp_path: Path) -> None:
    program = (
        "from whiflash_sglang.train.answers import attention\n"
        "print(attention._compiled() is not None, 5e-324 * 1.0 > 0, 1e-310 / 2 > 0)"
    )
    environment = os.environ | {"WHIFLASH_CACHE": str(tmp_path)}
    said = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    if said.stdout.startswith("False"):
        pytest.skip("no C++ compiler here")
    assert said.stdout == "True True True\n", said.stderr
    assert [x.suffix for x in tmp_path.glob("compiled/*")] == [".so"]


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_threads_share_the_rows(rows: int) -> None:
    if attention._compiled() is None:
        pytest.skip("no C++ compiler here")
    given = slots(rows, 2, 2, 16, 40)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = decode_attention(*given)
        torch.set_num_threads(5)
        assert torch.equal(decode_attention(*given), alone)
    finally:
        torch.set_num_threads(before)


def test_other_types_go_through_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_compiled", lambda: pytest.fail("not for float32"))
    q, keys, values, ends, bias = slots(3, 2, 2, 16, 20)
    found = decode_attention(q.float(), keys.float(), values.float(), ends, bias)
    torch.testing.assert_close(found.double(), by_formula(q, keys, values, ends), rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("failure", ["no compiler", "it fails", "no room"])
def test_without_a_compiler_generation_goes_on(
    failure: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WHIFLASH_CACHE", str(tmp_path / "cache"))
    if failure == "no compiler":
        monkeypatch.setattr("shutil.which", lambda name: None)
    elif failure == "it fails":
        error = subprocess.CalledProcessError(1, "c++")
        monkeypatch.setattr("subprocess.run", lambda *args, **options: (_ for _ in ()).throw(error))
    else:
        (tmp_path / "cache").write_text("a file where the directory should be")
    q, keys, values, ends, bias = slots(2, 1, 2, 8, 12)
    found = decode_attention(q, keys, values, ends, bias)
    torch.testing.assert_close(found.double(), by_formula(q, keys, values, ends), rtol=0.05, atol=0.05)
    assert not list(tmp_path.glob("cache/compiled/*.so"))
