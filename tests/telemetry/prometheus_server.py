"""A real Prometheus with the rules of `deploy/`, that scrapes the servers it is given; and what it answers."""

import json
import math
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import yaml
from patience import wait_until
from server_host import answers

from whiflash_lab.servers import free_port

ROOT = Path(__file__).parents[2]
RULES = ROOT / "deploy" / "prometheus"
WHERE = f"{os.environ.get('PATH', '')}:{ROOT / '.tools' / 'usr' / 'bin'}"
"""`make prometheus` puts Debian's package into .tools."""


def program(name: str) -> str | None:
    """Path of `prometheus` or `promtool`, if it is installed."""
    return shutil.which(name, path=WHERE)


class Prometheus:
    """A running Prometheus."""

    def __init__(self, url: str) -> None:
        self.url = url

    def ask(self, path: str, **parameters: Any) -> Any:
        """`data` of an answer of its API. Raises AssertionError with what it said instead."""
        answer = httpx.get(f"{self.url}/api/v1/{path}", params=parameters, timeout=None)
        found = answer.json()
        assert found["status"] == "success", f"{parameters}: {found}"
        return found["data"]

    def query(self, expression: str) -> list[tuple[dict[str, str], float]]:
        """Labels and value of every series of an expression now."""
        found = self.ask("query", query=expression)["result"]
        return [(one["metric"], float(one["value"][1])) for one in found]

    def total(self, expression: str) -> float:
        """The sum of an expression; NaN where it has no series."""
        found = self.query(expression)
        return sum(value for _, value in found) if found else math.nan

    def rules(self) -> list[dict[str, Any]]:
        """Every rule with its health."""
        return [rule for group in self.ask("rules")["groups"] for rule in group["rules"]]


@contextmanager
def prometheus(folder: Path, servers: Sequence[str], interval: str = "1s") -> Iterator[Prometheus]:
    """A Prometheus that scrapes `servers` (host:port) at every `interval`, with the configuration of `deploy/`.

    Args:
        folder: for what it keeps.
    """
    settings = yaml.safe_load((RULES / "prometheus.yml").read_text("utf-8"))
    settings["global"] |= {"scrape_interval": interval, "scrape_timeout": interval, "evaluation_interval": interval}
    settings["rule_files"] = [str(RULES / name) for name in settings["rule_files"]]
    settings["scrape_configs"][0]["static_configs"] = [{"targets": list(servers)}]
    (folder / "prometheus.yml").write_text(json.dumps(settings))
    port = free_port()
    command = [
        str(program("prometheus")),
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with (folder / "prometheus.log").open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    found = Prometheus(f"http://127.0.0.1:{port}")
    try:
        wait_until(lambda: process.poll() is not None or answers(f"{found.url}/-/ready"))
        assert process.poll() is None, (folder / "prometheus.log").read_text()
        yield found
    finally:
        process.kill()
        process.wait()
