"""Commands and checks of other distributions: found where they are installed, named where they are not."""

from collections.abc import Mapping
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.main import get_command
from typer.testing import CliRunner

from whiflash_sglang.cli import check, elsewhere
from whiflash_sglang.files import cpu


def commands(group: typer.Typer) -> list[str]:
    """Names of the commands and groups that were registered."""
    return list(getattr(get_command(group), "commands", {}))


def registered(name: str) -> list[str]:
    app, lab = typer.Typer(), typer.Typer()
    for group in (app, lab):
        group.callback()(lambda: None)
    elsewhere.register(name, app, lab)
    return [*commands(app), *(f"lab {command}" for command in commands(lab))]


@pytest.fixture
def nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only whiflash-sglang is installed."""
    none: Mapping[str, EntryPoint] = {}
    monkeypatch.setattr(elsewhere, "installed", lambda group: none)


@pytest.mark.parametrize("name", elsewhere.BROUGHT)
def test_the_table_names_what_each_distribution_brings(name: str) -> None:
    part, brought = elsewhere.BROUGHT[name]
    assert elsewhere.installed(elsewhere.COMMANDS)[name].value.startswith(f"whiflash_{part}.")
    assert sorted(registered(name)) == sorted(brought)


@pytest.mark.usefixtures("nothing_else")
def test_a_command_that_is_not_installed_names_its_package() -> None:
    app, lab = typer.Typer(), typer.Typer()
    app.callback()(lambda: None)
    for name in elsewhere.BROUGHT:
        elsewhere.register(name, app, lab)
    app.add_typer(lab, name="lab")
    for part, brought in elsewhere.BROUGHT.values():
        for command in brought:
            for rest in ([], ["--help"], ["word", "--quick", "-x"]):
                done = CliRunner().invoke(app, [*command.split(), *rest])
                assert done.exit_code == 2, command
                named = f"{command}: whiflash-{part} is not installed: pip install dist/*.whl"
                assert done.stderr.startswith(f"whiflash: error: {named}")


def test_commands_of_others_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Any] = []
    monkeypatch.setattr(EntryPoint, "load", lambda _: lambda *given: found.append(given))
    theirs = EntryPoint("theirs", "theirs:register", elsewhere.COMMANDS)
    monkeypatch.setattr(elsewhere, "installed", lambda group: {"theirs": theirs})
    app, lab = typer.Typer(), typer.Typer()
    elsewhere.register_others(app, lab)
    assert found == [(app, lab)]


@pytest.mark.usefixtures("nothing_else")
def test_checks_that_are_not_installed_name_their_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "serve.sh").write_text("sglang serve OWNER/MODEL")
    with pytest.raises(check.UsageError, match=r"--recipe: whiflash-lab .*pip install dist/"):
        check.check(recipe=tmp_path / "serve.sh")
    monkeypatch.setattr(cpu, "serves_here", lambda: True)
    (found,) = check._platform()
    assert not found.ok
    assert "whiflash-cpu is not installed" in found.detail
