"""Names of SGLang's that are used are checked."""

import sys
from types import ModuleType
from typing import Any

import pytest

from whiflash_sglang.engine import algorithm, patches, patching
from whiflash_sglang.engine.supported import UNTESTED
from whiflash_sglang.http import command_line
from whiflash_sglang.serve import plugin


def test_every_name_exists_with_the_expected_parameters() -> None:
    assert patches.missing() == []
    assert [finding for finding in patching.verify_names() if not finding.ok] == []


def test_the_table_of_patches_is_what_the_sources_decorate() -> None:
    """A module that replaces something and is not listed would be checked only where it is installed."""
    patches.missing()
    decorated = {path for path, *_ in patches.replaced()}
    assert decorated == patching.PATCHES.keys()
    assert len(decorated) <= 32


def test_nothing_is_replaced_where_one_name_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("sglang_stand_in")
    module.there = lambda a: a  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sglang_stand_in", module)
    monkeypatch.setattr(patching, "PATCHES", {})
    monkeypatch.setattr(patching, "_replaced", {})
    ours = ModuleType(__name__)
    around = patching.around("sglang_stand_in:there", params=("a",), why="w", until="u")

    @around
    def doubled(original: Any, a: int) -> int:
        """Twice. More."""
        return 2 * int(original(a))

    @patching.around("sglang_stand_in:gone", why="w", until="u")
    def gone(original: Any) -> None:
        """Never."""

    with pytest.raises(patching.IncompatibleEngineError, match="sglang_stand_in:gone: missing"):
        patching.install(ours)
    assert module.there(1) == 1
    patching.PATCHES.pop("sglang_stand_in:gone")
    patching.install(ours)
    patching.install(ours)
    assert module.there(1) == 2
    assert patching.PATCHES["sglang_stand_in:there"].does == "Twice"
    assert [finding.ok for finding in patching.verify_names()[-1:]] == [True]
    with pytest.raises(ValueError, match="has no docstring"):
        around(lambda original, a: a)


def test_a_lost_name_or_parameter_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {
        "sglang.srt.server_args:ServerArgs.no_such_thing": (),
        "sglang.srt.server_args:prepare_server_args": ("no_such_parameter",),
    }
    monkeypatch.setattr(patching, "PATCHES", {})
    monkeypatch.setattr(patching, "PRIVATE_NAMES", names)
    assert [f.ok for f in patching.verify_names()[1:]] == [False, False]
    with pytest.raises(patching.IncompatibleEngineError, match="no_such_thing"):
        patching.require_names()


def test_another_version_serves_if_that_is_allowed_and_all_names_are_there(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for module in (command_line, patching):
        monkeypatch.setattr(module, "installed", lambda: "9.9.9")
    for owner, name in ((algorithm, "register"), (command_line, "offer")):
        monkeypatch.setattr(owner, name, lambda *_: None)
    monkeypatch.setattr(plugin, "_registered", False)
    monkeypatch.setenv(UNTESTED, "")
    line = ["sglang", "serve", "--speculative-algorithm", "WHIFLASH"]
    monkeypatch.setattr("sys.argv", line)
    with pytest.raises(SystemExit, match=r"9\.9\.9 installed.*--whiflash-untested-sglang on"):
        plugin.register()
    line += ["--whiflash-untested-sglang", "on"]
    plugin.register()
    command_line.require_names()
    assert "not tested with SGLang 9.9.9" in caplog.text
    gone = f"{patching.HEAVY[0]}:gone"  # a tested release is not asked for it at a start
    monkeypatch.setattr(patching, "PRIVATE_NAMES", {gone: ()})
    with pytest.raises(patching.IncompatibleEngineError, match=f"{gone}: missing"):
        command_line.require_names()


def test_a_name_is_looked_for_behind_what_stands_in_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A platform's replacement need not have what the check asks SGLang's own for, nor may it hide that it is gone."""
    module = ModuleType("sglang_stand_in")

    class Own:
        def asked(self, a: int) -> None: ...

    class Replacement:
        def ours(self) -> None: ...

    module.Backend = Replacement  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sglang_stand_in", module)
    monkeypatch.setitem(patching._replaced, "sglang_stand_in:Backend", Own)
    names = ("Backend.asked", "Backend.ours", "Backend")
    monkeypatch.setattr(patching, "PATCHES", {})
    monkeypatch.setattr(patching, "PRIVATE_NAMES", {f"sglang_stand_in:{name}": () for name in names})
    assert [finding.ok for finding in patching.verify_names()[1:]] == [True, False, True]
