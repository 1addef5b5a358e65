"""What all tests share: the host that real servers are forked from, the limits on time, the option for evidence."""

import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from patience import pytest_report_header, pytest_timeout_set_timer  # noqa: F401  (hooks)
from server_host import ServerHost

if threading.current_thread() is threading.main_thread():
    # What a script starts in its background ignores Ctrl-C, and hands that on to every command under test.
    signal.signal(signal.SIGINT, signal.default_int_handler)

LONGEST = (
    "tests/bench/test_run.py",
    "tests/parallel/test_tensor_parallel.py",
    "tests/parallel/test_router.py",
    "tests/worker/test_overlap.py",
    "tests/agents/test_examples.py",
    "tests/worker/test_interpreted_rounds.py",
    "tests/platform/test_stock_command.py",
    "kernels/tests/test_interpreter.py",
    "tests/parallel/test_tensor_parallel_server.py",
    "tests/targets/test_targets.py",
    "tests/targets/test_trained.py",
    "tests/targets/test_training_features.py",
    "tests/targets/test_target_parity.py",
    "tests/targets/test_own_heads.py",
    "tests/platform/test_servers.py",
    "tests/gpu/test_serving_part.py",
    "tests/graphs/test_lag_and_graphs.py",
    "tests/parallel/test_data_parallel.py",
    "tests/cli/test_bundle.py",
)
"""Files of more than half a minute, longest first. They are begun first: a file is one worker's, and one that is begun
last is waited for by all others. Only the time of a whole run depends on this list."""


@pytest.fixture(scope="session")
def host() -> Iterator[ServerHost]:
    with ServerHost() as running:
        yield running


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--evidence", action="store_true", help="run the full matrices and write results/evidence/"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    rank = {config.rootpath / name: index for index, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path, len(rank)))
    if config.getoption("--evidence"):
        return
    skip = pytest.mark.skip(reason="full matrix; run `make evidence`")
    for item in items:
        if "evidence" in item.keywords:
            item.add_marker(skip)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if session.config.getoption("--evidence"):
        from evidence import write_summary

        write_summary()
