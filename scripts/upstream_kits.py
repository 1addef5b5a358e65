# ruff: noqa: N802, N815 -- unittest's names
"""SGLang's own server tests, as its wheel has them (`sglang.test.kits`), unmodified, against a plain server and ours.

    python scripts/upstream_kits.py --json results/upstream-kits.json

They were written for larger models, so some fail with any decoder on the tiny one that is served here. Success means
that nothing fails with WHIFLASH that passes without. A test that does not end is ended with its server, and the next
one has another. With `--go-on`, tests that `--json` holds already are not run again.
"""

import argparse
import faulthandler
import importlib
import io
import json
import multiprocessing
import os
import shlex
import signal
import sys
import tempfile
import unittest
from collections.abc import Callable, Iterable
from contextlib import ExitStack, redirect_stdout
from functools import partial
from itertools import groupby
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from whiflash_lab.servers import Server, ServerHost, runs
from whiflash_sglang.engine.supported import installed
from whiflash_sglang.files import provenance

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from patience import within

SHORT_CONTEXT = ("--context-length", "512", "--page-size", "256", "--chunked-prefill-size", "4096")
PLAINLY = """
basic_api_contract_kit:BasicAPIContractMixin basic_decode_correctness_kit:BasicDecodeCorrectnessMixin
basic_scheduler_stress_kit:BasicSchedulerStressMixin ebnf_constrained_kit:EBNFConstrainedMixin
regex_constrained_kit:RegexConstrainedMixin json_constrained_kit:JSONConstrainedMixin json_mode_kit:JSONModeMixin
matched_stop_kit:MatchedStopMixin anthropic_messages_kit:AnthropicMessagesMixin abort_timeout_kit:AbortAllMixin
pause_generation_kit:PauseResumeInPlaceMixin spec_server_kits:SpecCorrectnessKit spec_server_kits:SpecLogprobKit
spec_server_kits:SpecPenaltyKit spec_server_kits:SpecFeatureKit spec_server_kits:SpecHiddenStatesKit
spec_server_kits:SpecGrammarKit streaming_session_kit:StreamingSessionKitMixin
"""
KITS: dict[str, tuple[str, ...]] = dict.fromkeys(PLAINLY.split(), ())
KITS["streaming_session_kit:AbortLeakReproKitMixin"] = SHORT_CONTEXT
"""Tests that ask a server by its URL, and need no GPU, second server or data set from the network; and flags of a
server for them, beside `ARGUMENTS`.
"""

SECONDS = 600.0
"""Limit of a test in seconds on a quiet machine, unless the command line names another."""

READING = """\
The tests are those of SGLang's wheel (`sglang.test.kits`) that ask a server by its URL. Tests that need a GPU, a data
set, a second server, or flags that no CPU server takes are left out. They were written for models of eight billion
parameters, so a tiny model fails some with any decoder. `test_acc_length` and `test_batch_generation` want the
acceptance length of SGLang's own pair; plain decoding reports none to the latter."""
SHOWN = 70  # characters of a complaint in the table; the JSON has up to 140
ENDED = " (and the server ended)"
FORK = multiprocessing.get_context("fork")
ARGUMENTS = (
    *("--max-running-requests", "8", "--max-total-tokens", "20000", "--device", "cpu", "--dtype", "float32"),
    *("--enable-return-hidden-states", "--enable-streaming-session"),
)


class Renewed(ExitStack):
    """A server with these arguments; if a request has ended it, a new one is started in its place."""

    def __init__(self, arguments: list[str], host: ServerHost) -> None:
        super().__init__()
        self._new = partial(Server, arguments, host=host)
        self._server: Server | None = None

    @property
    def lives(self) -> bool:
        pids = self._server.pids if self._server else ()
        return bool(pids) and all(map(runs, pids))

    @property
    def server(self) -> Server:
        """The running server, started now if there is none."""
        if self._server is None or not self.lives:
            self.close()
            self._server = self.enter_context(self._new())
        return self._server


def models(root: Path) -> tuple[str, list[str]]:
    """Write a tiny target and drafters to `root`; return its path and the arguments of a WHIFLASH server for it."""
    from tiny_models import tiny_dflash, tiny_eagle3, tiny_target

    target = tiny_target(root / "target", peaked=True)
    drafters = ["--speculative-draft-model-path", str(tiny_dflash(root / "d", target))]
    drafters += ["--whiflash-eagle-draft", str(tiny_eagle3(root / "e", target))]
    return str(target), ["--speculative-algorithm", "WHIFLASH", "--whiflash-router", "random", *drafters]


def names_in(kit: str) -> list[str]:
    return list(unittest.defaultTestLoader.getTestCaseNames(_class_of(kit, {})))


def test_of(kit: str, name: str, renewed: Renewed, model: str) -> unittest.TestCase:
    """Return a test as SGLang's fixtures make it, for a server that runs already."""
    from openai import OpenAI

    server = renewed.server
    fields: dict[str, Any] = {
        "_tokenizer": None,
        "base_url": server.base_url,
        "model": model,
        "served_model_name": model,
        "api_key": "unused",
        "client": OpenAI(base_url=f"{server.base_url}/v1", api_key="unused"),
        "process": SimpleNamespace(poll=lambda: None if renewed.lives else 1),
        "maxDiff": None,
    }
    return _class_of(kit, fields)(name)


def _class_of(kit: str, fields: dict[str, Any]) -> type[unittest.TestCase]:
    from sglang.test.server_fixtures.spec_eagle_fixture import SpecEagleServerBase

    module, _, name = kit.partition(":")
    mixin = getattr(importlib.import_module(f"sglang.test.kits.{module}"), name)
    return type(name, (mixin, SpecEagleServerBase), fields)


class Outcome(unittest.TestResult):
    """Outcome of a test: passed, skipped with the reason, or failed with the error's message."""

    became = "passed"

    def addSkip(self, test: unittest.TestCase, reason: str) -> None:
        self.became = f"skipped: {reason}"

    def addFailure(self, test: unittest.TestCase, err: Any) -> None:
        error = err[1]
        # SGLang's own test case wraps what was raised.
        error = error.__context__ or error if str(error).startswith("retry()") else error
        said = " ".join(str(error).split()).replace("|", "\\|").replace("`", "'")
        self.became = f"failed: {type(error).__name__}: {said[:140]}"

    addError = addFailure

    def addSubTest(self, test: unittest.TestCase, subtest: Any, err: Any) -> None:
        if err is not None:
            self.addFailure(test, err)


def name_of(test: unittest.TestCase) -> str:
    return f"{type(test).__name__}.{test.id().rsplit('.', 1)[-1]}"


def outcome_of(test: unittest.TestCase, seconds: float) -> str | None:
    """Run a test in a process of its own and return its outcome; None: it was killed at its limit, with a traceback.

    seconds: limit on a machine without other load.
    """
    ours, theirs = FORK.Pipe(duplex=False)
    child = FORK.Process(target=_play, args=(test, theirs), daemon=True)
    child.start()
    theirs.close()
    try:
        if within(seconds, ours.poll):
            return str(ours.recv())
        os.kill(child.pid or 0, signal.SIGABRT)
        child.join()
        return None
    except EOFError:
        child.join()
        return f"failed: its process ended with {child.exitcode}"
    finally:
        child.kill()  # its outcome was read already; a thread of it may still wait for an answer
        child.join()


def _play(test: unittest.TestCase, told: Connection) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    faulthandler.enable()
    outcome = Outcome()
    with redirect_stdout(io.StringIO()):
        test.run(outcome)
    told.send(outcome.became)


def run(
    start: Callable[[tuple[str, ...]], Renewed],
    model: str,
    kits: Iterable[str],
    found: dict[str, str],
    save: Callable[[], None],
    seconds: float = SECONDS,
) -> None:
    """Run the tests that `found` lacks, and add their outcomes by name.

    Args:
        start: starts a server with further flags. save: called after each test.
    """
    for flags, group in groupby(kits, lambda kit: KITS[kit]):
        tests = [(kit, name) for kit in group for name in names_in(kit)]
        left = [(kit, name) for kit, name in tests if f"{kit.partition(':')[2]}.{name}" not in found]
        if not left:
            continue
        with start(flags) as renewed:
            for kit, name in left:
                print(f"{kit} {name} …", file=sys.stderr, flush=True)
                test = test_of(kit, name, renewed, model)
                told = outcome_of(test, seconds)
                found[name_of(test)] = told or f"failed: not over within {seconds:g} s of a quiet machine"
                if not renewed.lives:
                    found[name_of(test)] += ENDED
                if told is None:
                    renewed.close()  # the next test has another server
                save()


def table(plain: dict[str, str], ours: dict[str, str]) -> str:
    """Return a table of the tests that fail or are skipped on either side. An equal outcome is shown once."""
    found = {name: (outcome, ours.get(name, "missing")) for name, outcome in plain.items()}
    lines = ["| test | plain decoding | WHIFLASH |", "| --- | --- | --- |"]
    for name, (without, drafting) in found.items():
        if (without, drafting) != ("passed", "passed"):
            said = "the same" if drafting == without else _short(drafting)
            lines.append(f"| `{name}` | {_short(without)} | {said} |")
    both = len(found) - len(lines) + 2
    return f"{both} tests pass on both sides. The others:\n\n" + "\n".join(lines)


def _short(outcome: str) -> str:
    told = outcome.removesuffix(ENDED)
    cut = told if len(told) <= SHOWN else told[:SHOWN].rstrip("\\") + "…"
    return cut + (ENDED if told != outcome else "")


def page(sums: str, rows: str) -> str:
    """Return the page in Markdown: sums, rows of tests, and the command, revision and machine."""
    made = provenance.made_by(())
    revision = made["revision"][:12] + (" with changes" if made["uncommitted_changes"] else "")
    command, cpu = shlex.join(made["command"]), made["hardware"]["cpu"]
    how = f"`python scripts/{command}`, revision {revision}; Python {made['python']}; {cpu}."
    parts = "# SGLang's own server tests", f"{sums}.", READING, rows, "## How to reproduce", how
    return "\n\n".join(parts) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for a test, on a quiet machine")
    parser.add_argument("--go-on", action="store_true", help="leave out what --json holds already")
    parser.add_argument("--json", type=Path, required=True, help="write the outcomes there, after every test")
    parser.add_argument("--markdown", type=Path, help="also write the table there")
    given = parser.parse_args()
    # Terminated, it still ends the test that runs and the servers.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    told: dict[str, Any] = {"sglang": installed(), "plain": {}, "whiflash": {}}
    if given.go_on and given.json.is_file():
        told = json.loads(given.json.read_text("utf-8"))
        if told["sglang"] != installed():
            parser.error(f"{given.json} is of SGLang {told['sglang']}, not {installed()}: leave out --go-on")

    def save() -> None:
        given.json.write_text(json.dumps(told, indent=2) + "\n")

    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kits-")))
        host = stack.enter_context(ServerHost({"OMP_NUM_THREADS": "1"}, cwd=root))
        model, ours = models(root)
        for side, more in (("plain", []), ("whiflash", ours)):
            arguments = ["--model-path", model, *ARGUMENTS, *more]
            run(
                lambda flags, all=arguments: Renewed([*all, *flags], host), model, KITS, told[side], save, given.seconds
            )
    plain, drafting = told["plain"], told["whiflash"]
    lost = [name for name, outcome in plain.items() if outcome == "passed" != drafting.get(name)]
    passed = sum(outcome == "passed" for outcome in drafting.values())
    sums = f"SGLang {installed()}: {passed} of {len(plain)} pass with WHIFLASH, {len(lost)} fewer than without"
    print(f"{table(plain, drafting)}\n\n{sums}")
    if given.markdown:
        given.markdown.write_text(page(sums, table(plain, drafting)))
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
