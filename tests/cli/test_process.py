"""The installed command as a user meets it: a process with an exit code, its answer on stdout, errors on stderr."""

import json
import os
import signal
import socket
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from in_process import whiflash

from whiflash_sglang.checkpoints.manifest import embedded_bundle
from whiflash_sglang.cli import check
from whiflash_sglang.engine.patching import Finding

WHIFLASH = str(Path(sys.executable).with_name("whiflash"))
HEAVY = ("torch", "sglang", "transformers", "numpy", "openai", "matplotlib", "datasets")
"""Modules that take seconds to import, which nobody who asks for help is to wait for."""


def said_in_one_line(done: subprocess.CompletedProcess[str]) -> str:
    """The one line on stderr; nothing on stdout."""
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("whiflash: error: ")
    return done.stderr


EARLY: list[tuple[Any, ...]] = [
    (("policy", "nonee"), "'nonee'", "none"),
    (("demo", "--router", "atuo"), "'atuo'", "auto"),
    (("bench", "--arms", "none,autoo"), "'autoo'", "auto"),
    (("bench", "--recorded", "log.jsonl", "--arms", "atuo"), "'atuo'"),
    (("bench", "--concurrency", "0"), "--concurrency"),
    (("lab", "evaluate", "--bundle", "b", "--prompts", "p", "--dtype", "float3"), "'float3'"),
    (("serve", "--whiflash-router", "atuo"), "'atuo'", "auto"),
    (("serve", "--port", "99999"), "--port 99999"),
]
WRONG: list[tuple[Any, ...]] = [
    (("bench", "--quik"), "--quik"),
    (("bnech",), "'bnech'"),
    (("trace",), "'file'"),
    (("lab", "evaluate", "--bundle", "b"), "--prompts"),
    (("bench", "--repetitions", "many"), "--repetitions"),
    (("lab", "export", "--config", "tiny"), "'out'"),
    (("train", "--config", "tiny", "--step", "dta"), "'dta'", "data"),
    (("train", "--config", "tiny"), "--out"),
    (("train", "--config", "tiny", "--out", "b", "--start-from", "c"), "--start-from c"),
    (("bench", "--arms", "auto@"), "'auto@'"),
    (("bench", "--arms", "auto,auto"), "--arms"),
    (("bench", "--recorded", "log.jsonl", "--arms", "EAGLE3"), "'EAGLE3'"),
    (("bench", "--recorded", "log.jsonl", "--arms", "auto+guess"), "'auto+guess'"),
    (("bench", "--recorded", "log.jsonl", "--arms", "auto,auto"), "--arms"),
    (("bench", "--concurrency", "many"), "--concurrency many"),
    (("bench", "--recorded", "log.jsonl", "--prompts", "p"), "--prompts"),
    (("serve", "--whiflash-router=atuo"), "'atuo'"),
    (("serve", "--whiflash-routr", "auto"), "'--whiflash-routr'", "--whiflash-router"),
    (("serve", "--whiflash-block-size", "1"), "--whiflash-block-size"),
    (("serve", "--whiflash-router"), "--whiflash-router"),
    (("bench", "--server-args", "--x 'y"), "--server-args --x 'y"),
    (("bench", "--server-args", "--dtype=float3"), "--dtype float3"),
    (("bench", "--out", "report.md"), "--out report.md"),
    (("policy", "--api-key", "a\x00b"), "--api-key"),
    *EARLY,
]
"""A command line, what its one line names, and what was meant where that is named, too."""
FAILING = [
    (("train", "--step", "data", "--config", "/nowhere/c.yaml"), "/nowhere/c.yaml"),
    (("train", "--out", "b", "--config", "/nowhere/c.yaml"), "/nowhere/c.yaml"),
    (("lab", "export", "out.npz", "--config", "/nowhere/c.yaml"), "/nowhere/c.yaml"),
    (("trace", "/nowhere/answers.json"), "/nowhere/answers.json"),
    (("policy", "none", "--url", "http://127.0.0.1:1"), "http://127.0.0.1:1"),
    (("serve", "/nowhere/target"), "/nowhere/target: no such directory"),
    (("serve", "--model-path=/nowhere/target"), "/nowhere/target: no such directory"),
    (("serve", "--speculative-draft-model-path", "/nowhere/bundle"), "/nowhere/bundle: no such directory"),
    (("serve", "--speculative-draft-model-path", "bundle-of-nobody"), "not a hub id of the form owner/name"),
    (("learn", "/nowhere/samples", "--config", "tiny", "--out", "b"), "/nowhere/samples: no such directory"),
    (("learn", "/", "--out", "b", "--config", "/nowhere/c.yaml"), "/nowhere/c.yaml"),
    (("bundle", "create", "--target", "/nowhere/t", "--eagle3", "a/b", "--out", "b"), "/nowhere/t"),
    (("bundle", "create", "--target", "a/b", "--eagle3", "/nowhere/e", "--out", "b"), "/nowhere/e"),
    (("lab", "features", "/nowhere/t.npz", "--config", "tiny"), "/nowhere/t.npz"),
    (("lab", "evaluate", "--bundle", str(embedded_bundle()), "--prompts", "/nowhere/p"), "/nowhere/p"),
    (("check", "--model-path", "/nowhere/t", "--draft", "a/b"), "/nowhere/t"),
    (("bench", "--bundle", "/nowhere/b"), "/nowhere/b"),
    (("bench", "--out", "/"), "--out / is a directory"),
    (("lab", "evaluate", "--bundle", "b", "--prompts", "p", "--out", "/"), "--out / is a directory"),
    (("bench", "--recorded", "/nowhere/r.jsonl"), "/nowhere/r.jsonl"),
    (("train", "--config", "tiny", "--step", "eagle3", "--start-from", "/nowhere/c"), "/nowhere/c"),
]
LIGHT = [line for line, *_ in (*EARLY, *FAILING)]
"""Command lines that are refused before anything heavy is imported."""
ALL_IN_ONE = f"""
import json, os, shlex, sys, tempfile
from typer.main import get_command
from whiflash_sglang.cli.app import app, main

def commands(command, path=()):
    yield path, command
    for name, inner in getattr(command, "commands", {{}}).items():
        yield from commands(inner, (*path, name))

def outcome(*line):
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        kept = os.dup(1), os.dup(2)
        os.dup2(out.fileno(), 1), os.dup2(err.fileno(), 2)
        sys.argv, code = ["whiflash", *line], 0
        try:
            main()
        except SystemExit as left:
            code = left.code
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os.dup2(kept[0], 1), os.dup2(kept[1], 2)
        out.seek(0), err.seek(0)
        return code, out.read().decode(), err.read().decode()

found = list(commands(get_command(app)))

def parsed(line):
    words = shlex.split(line.partition(" > ")[0])[1:]
    command = get_command(app)
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    command.make_context(line, words)
helps = {{" ".join(path): [outcome(*path, asked)[:2] for asked in ("--help", "-h")] for path, _ in found}}
flags = {{" ".join(path): [(o.is_flag, o.help) for o in c.params if "--json" in o.opts] for path, c in found}}
loaded = [name for name in {HEAVY!r} if name in sys.modules]
examples = [
    line.strip() for _, c in found for line in (c.help or "").splitlines() if line.strip().startswith("whiflash ")
]
for line in examples:
    parsed(line)
outcomes = [outcome(*line) for line in {LIGHT!r}]
loaded += [name for name in {HEAVY[:3]!r} if name in sys.modules]
outcomes += [outcome(*line) for line in json.load(sys.stdin)]
print(json.dumps([helps, flags, loaded, outcomes]))
"""
"""Help of every command, a look at every example, then command lines that fail."""
Outcomes = dict[tuple[str, ...], subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def all_in_one(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Any, Outcomes]:
    """Helps, flags, what was imported, and outcomes, of one process: others below show what one of its own does."""
    here = tmp_path_factory.mktemp("here")
    for name in ("serve.sh", "log.jsonl"):
        (here / name).touch()
    (here / "MODEL").mkdir()
    others = list(dict.fromkeys(line for line, *_ in WRONG if line not in LIGHT))
    done = subprocess.run(
        [sys.executable, "-c", ALL_IN_ONE],
        input=json.dumps(others),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "200", "TERM": "dumb"},
        cwd=here,
    )
    assert done.returncode == 0, done.stderr
    helps, flags, loaded, found = json.loads(done.stdout)
    lines = zip([*LIGHT, *others], found, strict=True)
    return helps, flags, loaded, {line: subprocess.CompletedProcess(line, *each) for line, each in lines}


@pytest.fixture
def outcomes(all_in_one: tuple[Any, Any, Any, Outcomes]) -> Outcomes:
    return all_in_one[3]


@pytest.mark.parametrize("row", WRONG, ids=lambda row: " ".join(row[0]))
def test_a_wrong_command_line_ends_with_2(outcomes: Outcomes, row: tuple[Any, ...]) -> None:
    arguments, named, *meant = row
    done = outcomes[arguments]
    line = said_in_one_line(done)
    assert done.returncode == 2
    assert named in line
    assert "--help" in line, "says where to read on"
    assert all(f"did you mean {word}?" in line for word in meant)


@pytest.mark.parametrize(("arguments", "named"), FAILING)
def test_a_failure_ends_with_1_and_names_the_thing(outcomes: Outcomes, arguments: tuple[str, ...], named: str) -> None:
    done = outcomes[arguments]
    assert done.returncode == 1
    assert named in said_in_one_line(done)


def test_a_process_ends_as_its_command_does() -> None:
    wrong, failing = WRONG[0][0], FAILING[3][0]
    for arguments, code in ((wrong, 2), (failing, 1)):
        done = subprocess.run([WHIFLASH, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == code
        said_in_one_line(done)


def test_a_port_in_use_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for line in (("serve", "--port", port), ("serve", "OWNER/MODEL", f"--port={port}")):
            done = whiflash(*line)
            assert done.returncode == 1
            assert f"--port {port} of 127.0.0.1 is in use" in said_in_one_line(done)


def test_a_missing_drafter_is_named_once() -> None:
    done = whiflash("check", "--draft", "/nowhere/draft")
    assert done.returncode == 1
    assert done.stdout.count("/nowhere/draft") == 1, done.stdout


def test_a_traceback_is_there_for_whoever_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WHIFLASH_DEBUG", "1")
    done = whiflash("trace", "/nowhere/answers.json")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert done.stderr.endswith("whiflash: error: /nowhere/answers.json cannot be read: No such file or directory\n")


def test_version() -> None:
    done = whiflash("--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"whiflash {version('whiflash-sglang')} (sglang {version('sglang')})\n"


def test_without_a_command_it_shows_what_there_is_and_ends_with_2() -> None:
    done = whiflash()
    assert done.returncode == 2
    assert "bench" in done.stdout + done.stderr
    assert "error" not in done.stderr
    for group in ("bundle", "lab"):
        done = whiflash(group)
        assert (done.returncode, done.stderr) == (2, ""), group
        assert "Commands" in done.stdout


@pytest.mark.parametrize(
    ("sent", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)],
    ids=["ctrl-c", "terminate", "hangup"],
)
def test_an_interrupted_command_says_so(sent: signal.Signals, code: int) -> None:
    """While it waits for a server that has taken its connection and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/v1/"  # an OpenAI client's
        waiting = subprocess.Popen(
            [WHIFLASH, "policy", "--url", url],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # A suite that runs in the background has Ctrl-C ignored, and its children would ignore it too.
            preexec_fn=lambda: [signal.signal(one, signal.SIG_DFL) for one in (signal.SIGINT, signal.SIGHUP)],
        )
        connection, _ = silent.accept()
        with connection:
            assert connection.recv(64).startswith(b"GET /whiflash/state ")
            waiting.send_signal(sent)
            _, said = waiting.communicate()
    assert waiting.returncode == code
    assert "Traceback" not in said


def test_a_closed_pipe_is_no_error(tmp_path: Path) -> None:
    done = subprocess.run(
        f"{WHIFLASH} bench --help | head -1; exit ${{PIPESTATUS[0]}}",
        shell=True,
        executable="/bin/bash",
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr


MOST_COMMANDS = 14
"""Without those of `whiflash lab`."""


def test_help_and_wrong_values_import_nothing_heavy(all_in_one: tuple[Any, Any, Any, Outcomes]) -> None:
    helps, flags, loaded, _ = all_in_one
    assert loaded == []
    groups = {"", "lab", "bundle"}
    assert len([name for name in helps if name not in groups and not name.startswith("lab ")]) <= MOST_COMMANDS
    assert all(f"─ {name} ─" in helps[""][0][1] for name in ("Serve", "Look", "Decide", "Train"))
    assert {code for shown in helps.values() for code, _ in shown} == {0}
    for command, ((_, shown), _) in helps.items():
        # A reader copies an example into a shell, where a bar would be a pipe.
        examples = [line.strip() for line in shown.splitlines() if line.strip().startswith("whiflash ")]
        assert not [line for line in examples if "|" in line]
        assert "<bool>" not in shown, "a switch takes no value"
        group = f"{command} " in " ".join([*helps, ""]) and "Commands" in shown
        assert group or any(line.startswith(f"whiflash {command}") for line in examples), command
    # A switch, and the result on stdout; files are written with `--out`.
    switches = [flag for flag in flags.values() if flag]
    assert len(switches) > 9
    assert switches == [[[True, "Print only the result, as JSON."]]] * len(switches)


def test_check_shows_failures_all_or_json(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [Finding("python", True, "3.11"), Finding("x:y", False, "missing"), Finding("z", True, "there")]
    monkeypatch.setattr(check, "findings", lambda: found)
    lines = ["ok   python: 3.11", "FAIL x:y: missing", "ok   z: there", "1 of 3 failed"]
    done = whiflash("check")
    assert (done.returncode, done.stdout.splitlines()) == (1, [lines[1], lines[3]])
    done = whiflash("check", "-v")
    assert (done.returncode, done.stdout.splitlines()) == (1, lines)
    done = whiflash("check", "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout)[1] == {"name": "x:y", "ok": False, "detail": "missing"}
    del found[1]
    done = whiflash("check")
    assert (done.returncode, done.stdout) == (0, "2 of 2 right\n")
