"""What all tests share: the host that real servers are forked from, the limits on time, the option for evidence."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from patience import pytest_report_header, pytest_timeout_set_timer  # noqa: F401  (hooks)
from server_host import ServerHost


@pytest.fixture(scope="session")
def host() -> Iterator[ServerHost]:
    with ServerHost() as running:
        yield running


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--evidence", action="store_true", help="run the full matrices and write results/evidence/"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
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
