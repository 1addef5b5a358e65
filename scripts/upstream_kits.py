# ruff: noqa: N802, N815 -- unittest's names
"""SGLang's own server tests, as its wheel has them (`sglang.test.kits`), unmodified, against a plain server and ours.

    python scripts/upstream_kits.py --json results/upstream-kits.json

They were written for larger models, so some fail whatever decodes: what counts is that nothing fails with WHIFLASH that
passes without. The model is the shipped 135M one; `--tiny` takes one of random weights, which rehearses the script.
"""

import argparse
import importlib
import io
import json
import sys
import tempfile
import unittest
from contextlib import ExitStack, redirect_stdout
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import outcome

from whiflash_sglang.compat.patching import SGLANG_VERSION
from whiflash_sglang.serving.server import Server, runs
from whiflash_sglang.serving.server_host import ServerHost

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

KITS = (
    "basic_api_contract_kit:BasicAPIContractMixin",
    "basic_decode_correctness_kit:BasicDecodeCorrectnessMixin",
    "basic_scheduler_stress_kit:BasicSchedulerStressMixin",
    "ebnf_constrained_kit:EBNFConstrainedMixin",
    "regex_constrained_kit:RegexConstrainedMixin",
    "json_constrained_kit:JSONConstrainedMixin",
    "json_mode_kit:JSONModeMixin",
    "matched_stop_kit:MatchedStopMixin",
    "anthropic_messages_kit:AnthropicMessagesMixin",
    "pause_generation_kit:PauseResumeInPlaceMixin",
    "abort_timeout_kit:AbortAllMixin",
    "spec_server_kits:SpecCorrectnessKit",
    "spec_server_kits:SpecLogprobKit",
    "spec_server_kits:SpecPenaltyKit",
    "spec_server_kits:SpecFeatureKit",
    "spec_server_kits:SpecHiddenStatesKit",
    "spec_server_kits:SpecGrammarKit",
    "streaming_session_kit:StreamingSessionKitMixin",
    "streaming_session_kit:AbortLeakReproKitMixin",
)
"""Those that ask a server by its URL, and need neither a GPU, a second server nor a data set from the network."""

READING = """\
Run are the tests of SGLang's wheel (`sglang.test.kits`) that ask a server by its URL; left out are those that need a
GPU, a data set, another server beside, or one that is started with other flags. They were written for models of eight
billion parameters, so what a small one does not know fails whatever decodes. `test_acc_length` and
`test_batch_generation` ask for an acceptance length that SGLang's own pair of models has; plain decoding tells the
latter none."""
ENDED = " (and the server ended)"

ARGUMENTS = ("--max-running-requests", "8", "--max-total-tokens", "20000", "--device", "cpu")
FLAGS = ("--enable-return-hidden-states", "--enable-streaming-session")


class Renewed:
    """A server with these arguments, and another one in its place where a request has ended it."""

    def __init__(self, arguments: list[str], host: ServerHost) -> None:
        self._start = partial(Server, arguments, host=host)
        self._running = ExitStack()

    def __enter__(self) -> "Renewed":
        self._server = self._running.enter_context(self._start())
        return self

    def __exit__(self, *_: object) -> None:
        self._running.close()

    @property
    def lives(self) -> bool:
        pids = self._server.pids
        return bool(pids) and all(map(runs, pids))

    @property
    def server(self) -> Server:
        """One that lives."""
        if not self.lives:
            self._running.close()
            self._server = self._running.enter_context(self._start())
        return self._server


def tests_of(kit: str, renewed: Renewed, model: str) -> list[unittest.TestCase]:
    """A kit's tests as SGLang's fixtures run them, but for starting a server."""
    from openai import OpenAI
    from sglang.test.server_fixtures.spec_eagle_fixture import SpecEagleServerBase

    server = renewed.server
    module, _, name = kit.partition(":")
    mixin = getattr(importlib.import_module(f"sglang.test.kits.{module}"), name)
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
    made = type(name, (mixin, SpecEagleServerBase), fields)
    return [made(test) for test in unittest.defaultTestLoader.getTestCaseNames(made)]


class Outcomes(unittest.TestResult):
    """What became of each test: passed, skipped, or the last line of its complaint."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, str] = {}

    def addSuccess(self, test: unittest.TestCase) -> None:
        self.found.setdefault(name_of(test), "passed")

    def addSkip(self, test: unittest.TestCase, reason: str) -> None:
        self.found[name_of(test)] = f"skipped: {reason}"

    def addFailure(self, test: unittest.TestCase, err: Any) -> None:
        error = err[1]
        # SGLang's own test case wraps what was raised.
        error = error.__context__ or error if str(error).startswith("retry()") else error
        said = " ".join(str(error).split()).replace("|", "\\|").replace("`", "'")
        self.found[name_of(test)] = f"failed: {type(error).__name__}: {said[:140]}"

    addError = addFailure

    def addSubTest(self, test: unittest.TestCase, subtest: Any, err: Any) -> None:
        if err is not None:
            self.addFailure(test, err)


def name_of(test: unittest.TestCase) -> str:
    return f"{type(test).__name__}.{test.id().rsplit('.', 1)[-1]}"


def run(renewed: Renewed, model: str, kits: tuple[str, ...]) -> dict[str, str]:
    """What became of each test."""
    outcomes = Outcomes()
    for kit in kits:
        print(f"{kit} …", file=sys.stderr, flush=True)
        for place in range(len(tests_of(kit, renewed, model))):
            test = tests_of(kit, renewed, model)[place]
            with redirect_stdout(io.StringIO()):
                test.run(outcomes)
            if not renewed.lives:
                outcomes.found[name_of(test)] += ENDED
    return outcomes.found


def arguments_of(tiny: bool, root: Path) -> tuple[str, list[str], list[str]]:
    """The model, what both servers are given, and what WHIFLASH's is given beside."""
    ours = ["--speculative-algorithm", "WHIFLASH", "--whiflash-router", "random"]
    if not tiny:
        from whiflash_sglang.checkpoints.manifest import embedded_bundle
        from whiflash_sglang.embedded.cache import ensure_target

        model = str(ensure_target())
        return model, [*ARGUMENTS, *FLAGS], [*ours, "--speculative-draft-model-path", str(embedded_bundle())]
    from tiny_models import tiny_dflash, tiny_eagle3, tiny_target

    target = tiny_target(root / "target", peaked=True)
    drafters = ["--speculative-draft-model-path", str(tiny_dflash(root / "d", target))]
    drafters += ["--whiflash-eagle-draft", str(tiny_eagle3(root / "e", target))]
    return str(target), [*ARGUMENTS, *FLAGS, "--dtype", "float32"], [*ours, *drafters]


def table(plain: dict[str, str], ours: dict[str, str]) -> str:
    lines = ["| test | plain decoding | WHIFLASH |", "| --- | --- | --- |"]
    lines += [f"| `{name}` | {plain[name]} | {ours.get(name, 'missing')} |" for name in plain]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="kits whose name contains this")
    parser.add_argument("--tiny", action="store_true", help="a tiny model of random weights")
    parser.add_argument("--json", type=Path, help="also write the outcomes there")
    parser.add_argument("--markdown", type=Path, help="also write the table there")
    said = parser.parse_args()
    kits = tuple(kit for kit in KITS if said.only in kit)
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kits-")))
        host = stack.enter_context(ServerHost({"OMP_NUM_THREADS": "1"}, cwd=root))
        model, shared, ours = arguments_of(said.tiny, root)
        found = []
        for more in ([], ours):
            with Renewed(["--model-path", model, *shared, *more], host) as renewed:
                found.append(run(renewed, model, kits))
    plain, drafting = found
    lost = [name for name, outcome in plain.items() if outcome == "passed" != drafting.get(name)]
    print(table(plain, drafting))
    passed = sum(outcome == "passed" for outcome in drafting.values())
    sums = f"SGLang {SGLANG_VERSION}: {passed} of {len(plain)} pass with WHIFLASH, {len(lost)} fewer than without"
    print(f"\n{sums}")
    if said.markdown:
        outcome.write(said.markdown, "SGLang's own server tests", sums + ".", READING, table(plain, drafting))
    if said.json:
        told = {"sglang": SGLANG_VERSION, "model": "tiny" if said.tiny else Path(model).name}
        said.json.write_text(json.dumps({**told, "plain": plain, "whiflash": drafting}, indent=2) + "\n")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
