"""Command lines of SGLang's own launchers: judged early if they name WHIFLASH, else left alone."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from whiflash_sglang.engine.launch import early
from whiflash_sglang.errors import UsageError
from whiflash_sglang.serve import plugin


@pytest.fixture
def port() -> Iterator[int]:
    """Another server listens there."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        yield taken.getsockname()[1]


OURS = ["--speculative-algorithm", "WHIFLASH"]
LAUNCHERS = [["/env/bin/sglang", "serve"], ["/env/lib/sglang/launch_server.py"]]


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_server_of_ours_is_judged(
    launcher: list[str], port: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    written = tmp_path / "server.yaml"
    written.write_text("speculative-algorithm: whiflash\n")
    for words in (OURS, ["--config", str(written)]):
        line = [*launcher, "--model-path", "OWNER/MODEL", "--port", str(port), *words]
        monkeypatch.setattr("sys.argv", line)
        with pytest.raises(SystemExit, match=f"--port {port} of 127.0.0.1 is in use"):
            plugin._check_command_line()
    monkeypatch.setattr("sys.argv", [*line, "--speculative-algorithm", "EAGLE3"])
    plugin._check_command_line()  # the command line says more than the file


@pytest.mark.parametrize(
    "line",
    [
        *([*launcher, "--model-path", "/nowhere", "--port"] for launcher in LAUNCHERS),
        [*LAUNCHERS[0], "--config", "/nowhere.yaml", "--speculative-algorithm", "EAGLE3", "--port"],
        ["/env/bin/sglang", "serve", "OWNER/MODEL", *OURS, "--node-rank", "1", "--port"],  # listens nowhere
        ["/env/bin/sglang", "generate", *OURS, "--port"],
        ["/env/bin/other", *OURS, "--port"],
    ],
)
def test_what_is_not_ours_is_left_alone(line: list[str], port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", [*line, str(port)])
    plugin._check_command_line()


def test_every_flag_of_sglang_is_known_without_importing_it() -> None:
    from whiflash_lab.recipes.judge import _parser

    flags = {name for action in _parser()._actions for name in action.option_strings if name[:2] == "--"}
    assert len(flags) > 400
    early._check_names(flags | {flag[:-1] for flag in flags if len(flag) > 6})
    with pytest.raises(UsageError, match=r"--prot is no flag of SGLang .*; did you mean --port\?"):
        early._check_names(["--prot"])
