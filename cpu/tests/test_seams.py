"""Every private name that the platform replaces exists in this SGLang with the expected parameters."""

import sys
from types import ModuleType, SimpleNamespace

import pytest

from whiflash_cpu import seams
from whiflash_cpu.cpu import CpuPlatform
from whiflash_cpu.seam_tables import EARLY_SEAMS, MODEL_SEAMS, SEAMS, Seam
from whiflash_sglang.engine import patching


def test_every_seam_fits_the_installed_sglang() -> None:
    checks = seams.verify_seams()
    assert len(checks) == len({seam.path for seam in (*EARLY_SEAMS, *SEAMS)})
    assert [check for check in checks if not check.ok] == []


@pytest.mark.parametrize("layer", MODEL_SEAMS)
def test_the_seams_of_some_layers_fit_too(layer: str) -> None:
    checks = [seams._check(seam) for seam in MODEL_SEAMS[layer]()]
    assert checks
    assert [check for check in checks if not check.ok] == []


@pytest.fixture
def stranger(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module that stands for an SGLang in which a name has changed."""
    module = ModuleType("sglang.stranger")
    monkeypatch.setitem(sys.modules, "sglang.stranger", module)
    return module


def expected_here(a: int, b: int) -> None:
    """A replacement of two parameters."""


@pytest.mark.parametrize(
    ("value", "absent", "complaint"),
    [
        (lambda a: None, False, "parameters are ['a'], expected ['a', 'b']"),
        (None, False, "expected a function, found None"),
        (expected_here, True, "expected no operator on this platform"),
    ],
)
def test_a_changed_name_is_reported(stranger: ModuleType, value: object, absent: bool, complaint: str) -> None:
    stranger.name = value  # type: ignore[attr-defined]
    check = seams._check(Seam("sglang.stranger", "name", expected_here, absent=absent))
    assert not check.ok
    assert complaint in check.detail


def test_a_missing_name_stops_the_start(stranger: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patching, "_replaced", {})
    monkeypatch.setattr(seams, "SEAMS", (Seam(stranger.__name__, "gone", expected_here),))
    with pytest.raises(RuntimeError, match=r"sglang\.stranger:gone: missing"):
        seams.install_seams.__wrapped__()
    assert patching._replaced == {}


def test_installing_follows_earlier_imports(stranger: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def upstream(a: int, b: int) -> None:
        """The name's value before."""

    importer = ModuleType("sglang.importer")
    monkeypatch.setitem(sys.modules, "sglang.importer", importer)
    stranger.name = importer.name = upstream  # type: ignore[attr-defined]
    monkeypatch.setattr(patching, "_replaced", {})
    monkeypatch.setattr(seams, "SEAMS", (Seam(stranger.__name__, "name", expected_here),))
    monkeypatch.setattr(seams, "EARLY_SEAMS", ())
    seams.install_seams.__wrapped__()
    assert stranger.name is expected_here
    assert importer.name is expected_here
    assert seams.verify_seams()[0].ok, "a check after the installation still looks at upstream's value"


def test_what_needs_overlap_is_refused() -> None:
    with pytest.raises(ValueError, match="--enable-prefill-delayer needs overlap scheduling"):
        CpuPlatform().apply_server_args_defaults(SimpleNamespace(device="cpu", enable_prefill_delayer=True))
