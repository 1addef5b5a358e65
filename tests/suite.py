"""Parts that all tests share: tiny models, the host that real servers are forked from, limits on time, options."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
import tomllib
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from patience import at_start, pytest_report_header, pytest_timeout_set_timer  # noqa: F401  (hooks)
from server_host import ServerHost

from whiflash_sglang.engine import supported

WITH_HELPERS = (
    *("cache", "docs", "graphs", "learn", "lookup", "models", "parallel"),
    *("phantom", "structure", "targets", "telemetry", "worker"),
)
"""Folders whose modules tests import by name."""
sys.path[1:1] = [str(Path(__file__).parent / name) for name in WITH_HELPERS]

NEWEST = supported.SUPPORTED[-1]
if os.environ.get("WHIFLASH_CANARY") and supported.installed() not in supported.SUPPORTED:
    # `scripts/upstream.py --test`: before anything imports what is supported
    supported.SUPPORTED += (str(supported.installed()),)

if TYPE_CHECKING:
    from model_set import Models
    from replay import Arms

if threading.current_thread() is threading.main_thread():
    # A script's background jobs ignore Ctrl-C, and hand that on to every command under test.
    signal.signal(signal.SIGINT, signal.default_int_handler)

SHARING = tuple(f"tests/agents/test_{name}.py" for name in ("http", "traces", "features"))
"""Files of one worker: they share two servers, whose weights the last of them updates, after which SGLang serves under
the path of the checkpoint instead of its name. Every other file is one worker's by itself. A worker imports SGLang once
for all servers that it forks, and once for all ranks."""

LONGEST = (
    *SHARING,
    "tests/phantom/test_server.py",
    "tests/parallel/test_prefill_and_decode.py",
    "tests/parallel/test_dp_attention.py",
    "tests/parallel/test_overlapping_ranks.py",
    "tests/parallel/test_vocabularies.py",
    "tests/learn/test_http.py",
    "lab/tests/bench/test_run.py",
    "lab/tests/bench/test_recorded_bench.py",
    "tests/telemetry/test_server_metrics.py",
    "cpu/tests/test_server_host.py",
    "cpu/tests/test_stock_command.py",
    *(f"tests/agents/test_{name}.py" for name in ("parsed_streams", "workers", "secrets", "fields", "pairs")),
    "tests/targets/test_images.py",
    "train/tests/learner/test_learner.py",
    "tests/worker/test_plain_text.py",
    "tests/worker/test_hicache.py",
    "tests/targets/test_targets.py",
    "tests/targets/test_window_pool.py",
    "tests/worker/test_quarantine.py",
    "tests/targets/test_recurrent_trees.py",
    "tests/worker/test_sampling.py",
    "tests/worker/test_adapters.py",
    "tests/worker/test_structure.py",
    "tests/worker/test_sessions.py",
    "tests/worker/test_embedded.py",
    "tests/graphs/test_verify_graphs.py",
)
"""Files that fork servers or ranks, then others of more than half a minute, longest first. A file is one worker's, and
one that is begun last is waited for by all others. Only the time of a whole run depends on this list."""

NIGHTLY = (
    "kernels/tests/test_interpreter.py",
    "tests/agents/test_examples.py",
    "tests/gpu/test_serving_part.py",
    "tests/parallel/test_data_parallel.py",
    "tests/parallel/test_tensor_parallel.py",
    "tests/parallel/test_tensor_parallel_server.py",
    "tests/routing/test_slow_moments.py",
    "tests/targets/test_media_server.py",
    "train/tests/test_trained.py",
    "tests/worker/test_interpreted_rounds.py",
)
"""Minutes each, and seldom red where the rest is green: `make evidence` runs them."""

NOT_FAST = ("tests/routing/test_hinted.py",)
"""Simulations of thousands of rounds. `make fast` leaves them out, and what imports SGLang or starts a process."""


class NoSGLang:
    """Skips what imports SGLang, which takes half a minute, or FlashInfer, which takes nine seconds."""

    def find_spec(self, name: str, *_: object) -> None:
        """As of `importlib.abc.MetaPathFinder`."""
        package = name.partition(".")[0]
        if package in ("sglang", "flashinfer"):
            pytest.skip(f"imports {package}", allow_module_level=True)


def no_process(*_: object, **__: object) -> None:
    """In place of `subprocess.Popen.__init__`: skips the test.

    In a task a skip would end only the task, and who waits for it would wait for ever. There no program is found, which
    callers such as `platform.processor` expect.
    """
    with suppress(RuntimeError):
        asyncio.get_running_loop()
        raise FileNotFoundError("--fast starts no process")
    pytest.skip("starts a process")


@pytest.fixture(scope="session")
def host(request: pytest.FixtureRequest) -> Iterator[ServerHost]:
    if request.config.getoption("--fast"):
        pytest.skip("starts a server")
    with ServerHost() as running:
        yield running


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> "Models":
    """A tiny target and its two drafters."""
    from model_set import build_models

    return build_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def arms(tmp_path_factory: pytest.TempPathFactory) -> "Arms":
    """Both arms on tiny random checkpoints, without an engine."""
    from replay import load_arms

    return load_arms(tmp_path_factory.mktemp("arms"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--evidence", action="store_true", help="run the full matrices and write results/evidence/")
    parser.addoption(
        "--fast", action="store_true", help="run what needs neither SGLang nor a server, with few examples each"
    )
    parser.addoption(
        "--seconds", type=Path, metavar="PAGE", help="write the seconds of each file of this run to a page"
    )


def pytest_configure(config: pytest.Config) -> None:
    examples = 10 if config.getoption("--fast") else hypothesis.settings.default.max_examples
    hypothesis.settings.register_profile("suite", max_examples=examples, deadline=None)  # nothing depends on speed
    hypothesis.settings.load_profile("suite")
    if config.getoption("--fast"):
        sys.meta_path.insert(0, NoSGLang())  # type: ignore[arg-type]


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    left_out = {config.rootpath / name for name in NOT_FAST}
    return (config.getoption("--fast") and collection_path in left_out) or None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    rank = {config.rootpath / name: index for index, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path, len(rank)))
    nightly = {config.rootpath / name for name in NIGHTLY}
    for item in items:
        if item.path in nightly:
            item.add_marker("evidence")
    if supported.installed() != NEWEST:
        lists = pytest.mark.skip(reason=f"a list of SGLang {NEWEST}")
        for item in items:
            if "newest" in item.keywords:
                item.add_marker(lists)
    if config.getoption("--evidence"):
        return
    skip = pytest.mark.skip(reason="a matrix, or nightly; run `make evidence`")
    for item in items:
        if "evidence" in item.keywords:
            item.add_marker(skip)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadFileScheduling

    class BySharing(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return SHARING[0] if file in SHARING else file

    return BySharing(config, log)


def pytest_collection_finish(session: pytest.Session) -> None:
    if session.config.getoption("--fast"):
        subprocess.Popen.__init__ = no_process  # type: ignore[method-assign,assignment]


BEGAN = time.monotonic()
SECONDS: dict[str, float] = defaultdict(float)
TESTS = Counter[str]()
"""By file: seconds of set-ups, tests and tear-downs, and how many tests ran."""


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    file = report.nodeid.partition("::")[0]
    SECONDS[file] += report.duration
    TESTS[file] += report.when == "call"


def page_of_seconds(status: int) -> str:
    """Return the page that `--seconds` writes, in Markdown."""
    from whiflash_sglang.files.provenance import busy, made_by

    made = made_by(("sglang", "torch")) | busy()
    long = sorted((seconds, file) for file, seconds in SECONDS.items() if seconds >= 1)[::-1]
    rows = "".join(f"| `{file}` | {seconds:.0f} | {TESTS[file]} |\n" for seconds, file in long)
    minutes, rest = (time.monotonic() - BEGAN) / 60, len(SECONDS) - len(long)
    return f"""# Seconds of the test suite

A run of {len(SECONDS)} files took {minutes:.1f} minutes, or {minutes / at_start():.1f} on a quiet machine (this one was
{at_start():.1f} times slower), and ended with status {status}. The table counts tests and their fixtures, not imports.
The other {rest} files took less than a second each.

| file | seconds | tests |
| --- | --- | --- |
{rows}
By `make test PAGE=results/suite.md` on {made["hardware"]["cpu"]}, {made["hardware"]["cores"]} cores; \
Python {made["python"]}; load {made["load_1min"]:.1f}; \
revision {made["revision"][:8]}{" and changes" * made["uncommitted_changes"]}.
"""


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """How long a whole run took, if that is beyond its budget."""
    if config.args_source is config.ArgsSource.TESTPATHS and not config.getoption("--evidence"):
        target, spent = ("fast" if config.getoption("--fast") else "test", (time.monotonic() - BEGAN) / at_start())
        most = tomllib.loads((config.rootpath / "budgets.toml").read_text("utf-8"))["seconds"][target]
        if spent > most:
            raising = "Make tests cheaper, or raise it in a commit that says why."
            terminalreporter.write_line(f"make {target}: {spent:.0f} quiet seconds, budget {most}. {raising}")


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    page = session.config.getoption("--seconds")
    if page and not hasattr(session.config, "workerinput"):
        page.write_text(page_of_seconds(int(exitstatus)), "utf-8")
    if session.config.getoption("--evidence"):
        from evidence import write_summary

        write_summary()
