"""What a person sees who starts it wrongly: one line that names the thing, and nothing that keeps running."""

from collections.abc import Callable
from pathlib import Path

import pytest
from engine import engine
from tiny_models import tiny_dflash, tiny_eagle3, tiny_target

from whiflash_sglang.errors import CheckpointError

Arguments = Callable[..., list[str]]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    target = tiny_target(root / "target")
    return {
        "target": target,
        "eagle3": tiny_eagle3(root / "eagle3", target),
        "dflash": tiny_dflash(root / "dflash", target),
    }


@pytest.fixture(scope="module")
def launch(checkpoints: dict[str, Path]) -> Arguments:
    """The launcher's own parsing of a command line, plugins loaded."""
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import prepare_server_args

    load_plugins()

    def parse(*arguments: str, draft: str = "dflash", eagle: str | None = "eagle3") -> object:
        command = ["--model-path", str(checkpoints["target"]), "--device", "cpu"]
        command += ["--speculative-algorithm", "WHIFLASH"]
        command += ["--speculative-draft-model-path", str(checkpoints.get(draft, draft))]
        command += ["--whiflash-eagle-draft", str(checkpoints[eagle])] if eagle else []
        return prepare_server_args([*command, *arguments])

    return parse


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--whiflash-router", "fastest"], "whiflash: error: --whiflash-router: .*'fastest'"),
        (["--whiflash-entropy-threshold", "warm"], "whiflash: error: --whiflash-entropy-threshold: .*'warm'"),
        (["--whiflash-block-size", "1"], "whiflash: error: --whiflash-block-size: .*2"),
        (["--whiflash-drafters", "ddt-e3"], "whiflash: error: --whiflash-drafters ddt-e3 .*use df-e3"),
        (
            ["--whiflash-neural-router-threshold", "nan"],
            "whiflash: error: --whiflash-neural-router-threshold: ",
        ),
    ],
)
def test_a_wrong_flag_stops_the_launcher(launch: Arguments, arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message) as stopped:
        launch(*arguments)
    assert "\n" not in str(stopped.value)


def test_a_wrong_draft_path_stops_the_launcher(launch: Arguments) -> None:
    with pytest.raises(SystemExit, match=r"whiflash: error: .*nowhere: no such directory"):
        launch(draft="/nowhere")
    with pytest.raises(SystemExit, match=r"whiflash: error: .*--whiflash-eagle-draft must name"):
        launch(eagle=None)


def test_a_right_command_line_is_taken(launch: Arguments, checkpoints: dict[str, Path]) -> None:
    arguments = launch("--whiflash-router", "ar", "--whiflash-block-size", "4")
    settings = arguments._whiflash  # type: ignore[attr-defined]
    assert (settings.router, settings.block_size, settings.eagle3) == ("ar", 4, checkpoints["eagle3"])


def test_a_worker_does_not_start_on_a_damaged_checkpoint(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """And what it had begun is taken down: the next start in the same process works."""
    broken = tiny_eagle3(tmp_path / "eagle3", checkpoints["target"])
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    flags = {"draft": checkpoints["dflash"], "whiflash_router": "ar"}
    with (
        pytest.raises(CheckpointError, match=rf"{weights} is damaged or truncated: .*; fetch it again"),
        engine(checkpoints["target"], whiflash={**flags, "whiflash_eagle_draft": str(broken)}),
    ):
        pass
    whole = {**flags, "whiflash_eagle_draft": str(checkpoints["eagle3"])}
    with engine(checkpoints["target"], whiflash=whole) as e:
        assert len(e.generate([[1, 2, 3]], max_new_tokens=4)[0]) == 4


def test_serve_fills_in_what_is_left_open() -> None:
    from whiflash_sglang.cli.serve import COMPACT_JSON, server_arguments, server_environment

    given = server_arguments(["--model-path", "owner/model", "--port", "33001"])
    assert given[:2] == ["--speculative-algorithm", "WHIFLASH"]
    assert given[-4:] == ["--model-path", "owner/model", "--port", "33001"]
    assert "WHIFLASH" not in server_arguments(["--model-path=x", "--speculative-algorithm", "EAGLE3"])
    assert COMPACT_JSON not in given
    assert server_environment(["--model-path=x"]) == {}


def test_serve_keeps_the_embedded_target_to_schemas(monkeypatch: pytest.MonkeyPatch) -> None:
    from whiflash_sglang.cli.serve import COMPACT_JSON, server_arguments, server_environment

    monkeypatch.setattr("whiflash_sglang.embedded.ensure_target", lambda: Path("/models/t"))
    assert COMPACT_JSON in server_arguments([])
    assert COMPACT_JSON not in server_arguments(["--constrained-json-max-whitespace-cnt=3"])
    assert server_environment(["--port", "1"]) == {"SGLANG_TOOL_STRICT_LEVEL": "2"}


def test_every_command_has_help_with_an_example() -> None:
    from typer.testing import CliRunner

    from whiflash_sglang.cli import app

    runner = CliRunner()
    for command in app.registered_commands:
        assert command.callback is not None
        name = command.name or command.callback.__name__
        result = runner.invoke(app, [name, "--help"])
        assert result.exit_code == 0, name
        assert f"whiflash {name}" in result.output.replace("\n", " ").replace("  ", " "), name
