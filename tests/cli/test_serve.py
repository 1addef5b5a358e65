"""`whiflash serve`: what is asked for is served; only what is left open is filled in."""

import io
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from in_process import whiflash

from whiflash_sglang.checkpoints.manifest import embedded_bundle
from whiflash_sglang.cli.serve import _url
from whiflash_sglang.cli.serve_line import ServeLine
from whiflash_sglang.errors import ConfigError

WHIFLASH = str(Path(sys.executable).with_name("whiflash"))
LAUNCHER = [str(Path(sys.executable).with_name("sglang")), "serve"]


def printed(*arguments: str) -> list[str]:
    """The words of `whiflash serve … --print-command`."""
    return shlex.split(whiflash("serve", *arguments, "--print-command").stdout)


def given_model(words: list[str]) -> str:
    assert words.count("--model-path") == 1
    return words[words.index("--model-path") + 1]


def test_a_model_given_as_first_argument_is_served() -> None:
    words = printed("Qwen/Qwen3-8B", "--port", "30001")
    assert words[:2] == LAUNCHER, "nothing is set up for the embedded target"
    assert given_model(words) == "Qwen/Qwen3-8B"
    assert words[-2:] == ["--port", "30001"]
    assert words[words.index("--speculative-algorithm") + 1] == "WHIFLASH"
    assert _url(ServeLine.read(["--host", "::1", "--ssl-certfile", "c.pem"])) == "https://[::1]:30000"


@pytest.mark.parametrize("spelled", ["model-path", "model_path", "model"])
@pytest.mark.parametrize("joined", [False, True])
def test_a_model_of_the_configuration_file_is_served(tmp_path: Path, spelled: str, joined: bool) -> None:
    config = tmp_path / "my.yaml"
    config.write_text(f"{spelled}: Qwen/Qwen3-8B\nspeculative-algorithm: EAGLE3\n")
    words = printed(*([f"--config={config}"] if joined else ["--config", str(config)]))
    # `sglang serve` looks for the model on its command line only.
    asked = ["--model-path", "Qwen/Qwen3-8B", "--config", str(config)]
    assert words == [*LAUNCHER, "--model-type", "llm", *asked], "the file says everything, and SGLang must see it"


def test_a_configuration_file_without_a_model_leaves_the_target_open(tmp_path: Path) -> None:
    config = tmp_path / "my.yaml"
    config.write_text("port: 30001\nserved-model-name: mine\n")
    words = printed("--config", str(config))
    assert "smollm2-135m-instruct" in given_model(words)
    assert "--served-model-name" not in words
    assert words[words.index("--speculative-algorithm") + 1] == "WHIFLASH"


def test_a_configuration_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for name, content in (("gone.yaml", None), ("list.yaml", "- a\n"), ("broken.yaml", "a: [\n")):
        if content is not None:
            (tmp_path / name).write_text(content)
        done = whiflash("serve", "--config", str(tmp_path / name), "--print-command")
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
        assert name in done.stderr


def test_flags_of_the_model_are_recognised_as_the_launcher_recognises_them() -> None:
    spellings = {
        ("--model", "a/b"): ["--model", "a/b"],
        ("--model=a/b",): ["--model=a/b"],
        ("--model-path=a/b",): ["--model-path=a/b"],
        ("--model-p", "a/b"): ["--model-path", "a/b"],
    }
    for model, read in spellings.items():
        words = printed(*model)
        assert words[:2] == LAUNCHER
        assert words[-len(read) :] == read
        assert "--served-model-name" not in words


def test_only_what_whiflash_serves_is_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another algorithm's draft may be a name that only SGLang knows; a host may have addresses of one kind."""
    opened: list[tuple[str, int]] = []
    known = {"six": [socket.AF_INET6], "both": [socket.AF_INET6, socket.AF_INET]}
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *_, **__: [(kind,) for kind in known[host]])
    monkeypatch.setattr(
        socket, "create_server", lambda place, family: opened.append((place[0], family)) or io.BytesIO()
    )
    draft = ["a/b", "--speculative-draft-model-path", "/nowhere/draft", "--host"]
    ServeLine.read([*draft, "six", "--speculative-algorithm", "EAGLE3"]).check()
    ServeLine.read(["a/b", "--host", "both"]).check()
    assert opened == [("six", socket.AF_INET6), ("both", socket.AF_INET)]
    for algorithm in ([], ["--speculative-algorithm", "whiflash"]):
        with pytest.raises(ConfigError, match="--speculative-draft-model-path /nowhere/draft: no such directory"):
            ServeLine.read([*draft, "six", *algorithm]).check()


def test_the_command_is_quoted_for_a_shell() -> None:
    given = ["--served-model-name", "it's $HOME; `ls`", "--json-model-override-args", '{"a": 1}']
    command = [WHIFLASH, "serve", "a/b", *given, "--print-command"]
    line = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    shell = f'for word in {line}; do printf "%s\\0" "$word"; done'
    words = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=True).stdout
    assert words.split("\0")[-5:-1] == given


def test_the_embedded_target_comes_with_what_keeps_its_calls_valid() -> None:
    words = printed()
    assert words[:2] == ["env", "SGLANG_TOOL_STRICT_LEVEL=2"]
    assert words[2:4] == LAUNCHER
    assert "--constrained-json-disable-any-whitespace" in words
    assert words[words.index("--speculative-draft-model-path") + 1] == str(embedded_bundle())
    assert str(embedded_bundle()) not in printed("--speculative-algorithm", "EAGLE3")
    assert str(embedded_bundle()) not in printed("--speculative-draft-model-path", "a/b")
    assert "--constrained-json-disable-any-whitespace" not in printed("--constrained-json-max-whitespace-cnt=3")
