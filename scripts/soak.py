"""Load and faults against real servers, a scenario after the other: `python scripts/soak.py --seconds 60 --json FILE`.

Every answer is compared with plain decoding's, which another server gave beforehand; a difference counts as a tie where
plain decoding's own two likeliest tokens are as good as equal there. SGLang checks its pools whenever it is idle, and
ends the server where a slot is lost. The models are tiny ones (`tests/tiny_models.py`); `--bundle embedded` serves the
shipped pair. Each scenario has a server of its own; if it breaks off or hangs, that is a crash, and the next
one begins.
"""

import argparse
import asyncio
import inspect
import json
import random
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path

import httpx
import outcome
import psutil
from soak_scenarios import ROOMY, SCENARIOS, Found, Plain, Run

from whiflash_sglang.serving import Server, ServerHost

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from patience import at_start

STILL = 600.0
"""Seconds of a quiet machine, beside four times its own, after which a scenario counts as hung."""
GROWN_MIB = 100
"""By more no process may grow in the second half of a scenario: what is cached is full by then."""
SETTLE_POLLS = 300
"""Asks for the state, five a second, until nothing of a request that is gone may be left."""


async def play(name: str, server: Server, plain_url: str, seconds: float, seed: int) -> Found:
    """A scenario, and what is left behind when all of its requests have ended."""
    found = Found(name)
    limits = httpx.Limits(max_connections=None)
    async with (
        httpx.AsyncClient(base_url=plain_url, timeout=None, limits=limits) as plain,
        httpx.AsyncClient(base_url=server.base_url, timeout=None, limits=limits) as client,
    ):
        began = time.monotonic()
        run = Run(Plain(plain), client, server, began + seconds, found, random.Random(seed))
        halfway = asyncio.create_task(sizes_after(seconds / 2, server))
        try:
            async with asyncio.timeout((4 * seconds + STILL) * at_start()):
                await SCENARIOS[name][0](run)
        except (httpx.HTTPError, TimeoutError, ValueError) as error:
            found.crashes += 1
            print(f"{name} broke off: {error!r}", file=sys.stderr, flush=True)
        found.seconds = round(time.monotonic() - began, 1)
        if name != "kill":
            await settle(run)
            judge_growth(found, await halfway, sizes(server))
        halfway.cancel()
    if name != "kill":
        log = server.log.read_text(errors="replace")
        found.crashes += log.count("Traceback")
        found.notes["log_mib"] = round(len(log) / 2**20, 1)
        if found.crashes:
            print(log[max(log.find("Traceback"), 0) :][:4000], file=sys.stderr, flush=True)
    return found


async def settle(run: Run) -> None:
    """Nothing of any request is kept when none runs."""
    try:
        for _ in range(SETTLE_POLLS):
            state = (await run.client.get("/whiflash/state")).raise_for_status().json()
            if not state["requests"]:
                break
            await asyncio.sleep(0.2)
        run.found.leaks += state["requests"]
        await asyncio.sleep(2)  # SGLang's own check, in the scheduler's idle loop
        run.found.leaks += state["memory"].get("lookup_index", 0) > 0
        run.found.leaks += len(state["quarantined"]) + sum(state["left_out"].values())
        (await run.client.get("/health")).raise_for_status()
    except httpx.HTTPError:
        run.found.crashes += 1


def sizes(server: Server) -> dict[int, int]:
    """MiB of memory that each process of a server has, by its id."""
    found = {}
    for pid in server.pids:
        with suppress(psutil.NoSuchProcess):
            found[pid] = psutil.Process(pid).memory_info().rss // 2**20
    return found


async def sizes_after(seconds: float, server: Server) -> dict[int, int]:
    await asyncio.sleep(seconds)
    return sizes(server)


def judge_growth(found: Found, halfway: dict[int, int], end: dict[int, int]) -> None:
    grown = max((end[pid] - mib for pid, mib in halfway.items() if pid in end), default=0)
    found.notes |= {"rss_mib": max(end.values(), default=0), "rss_grown_mib": grown}
    found.leaks += grown > GROWN_MIB


def arguments_of(bundle: str, root: Path) -> tuple[list[str], list[str]]:
    """Of plain decoding, and what WHIFLASH is given beside."""
    if bundle == "embedded":
        from whiflash_sglang.checkpoints.manifest import embedded_bundle
        from whiflash_sglang.embedded import ensure_target

        drafters = ["--speculative-draft-model-path", str(embedded_bundle())]
        return ["--model-path", str(ensure_target())], drafters
    from tiny_models import tiny_dflash, tiny_eagle3, tiny_target

    target = tiny_target(root / "target", peaked=True)
    eagle3, dflash = tiny_eagle3(root / "eagle3", target), tiny_dflash(root / "dflash", target)
    drafters = ["--speculative-draft-model-path", str(dflash), "--whiflash-eagle-draft", str(eagle3)]
    return ["--model-path", str(target), "--dtype", "float32"], drafters


def table(found: Sequence[Found]) -> str:
    """In Markdown."""
    names = ("scenario", "seconds", "requests", "tokens", "wrong", "ties", "failed", "leaks", "crashes")
    lines = [
        "| " + " | ".join((*names, "beside")) + " |",
        "| --- |" + " ---: |" * (len(names) - 1) + " --- |",
    ]
    for one in found:
        notes = ", ".join(f"{name} {value:.3g}" for name, value in one.notes.items())
        lines.append("| " + " | ".join((*(str(getattr(one, name)) for name in names), notes)) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60, help="of each scenario")
    parser.add_argument("--only", default=",".join(SCENARIOS), help=f"of {', '.join(SCENARIOS)}")
    parser.add_argument("--router", default="random", help="policy; random takes every arm")
    parser.add_argument("--bundle", choices=("tiny", "embedded"), default="tiny")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write the counts there, after every scenario")
    parser.add_argument("--markdown", type=Path, help="also write the table there, after every scenario")
    said = parser.parse_args()
    names = said.only.split(",")
    if unknown := set(names) - SCENARIOS.keys():
        parser.error(f"--only: {', '.join(sorted(unknown))} is no scenario; there are {', '.join(SCENARIOS)}")
    # An open load keeps a connection for each request that waits.
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    results: list[Found] = []
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="soak-")))
        host = stack.enter_context(ServerHost({"OMP_NUM_THREADS": "1"}, cwd=root))
        target, drafters = arguments_of(said.bundle, root)
        plain = stack.enter_context(Server([*target, *ROOMY, "--device", "cpu"], host=host))
        for name in names:
            ours = ["--speculative-algorithm", "WHIFLASH", "--whiflash-router", said.router, *drafters]
            with Server(
                [*target, *ours, *SCENARIOS[name][1], "--device", "cpu"], host=host, log=root / f"{name}.log"
            ) as server:
                results.append(asyncio.run(play(name, server, plain.base_url, said.seconds, said.seed)))
            if said.json:
                record = {
                    "seconds": said.seconds,
                    "router": said.router,
                    "models": said.bundle,
                    "seed": said.seed,
                }
                told = {**record, "scenarios": [asdict(one) for one in results]}
                said.json.write_text(json.dumps(told, indent=2) + "\n")
            if said.markdown:
                legend = (
                    f"{said.bundle} models, policy `{said.router}`. {inspect.cleandoc(str(Found.__doc__))}"
                )
                outcome.write(said.markdown, "Load and faults", legend, table(results))
            print(
                table(results[-1:]) if name == names[0] else table(results[-1:]).splitlines()[-1], flush=True
            )
    bad = sum(one.wrong + one.failed + one.leaks + one.crashes for one in results)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
