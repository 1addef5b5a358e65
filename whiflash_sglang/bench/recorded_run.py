"""What `whiflash bench --recorded` is asked for, carried out and shown."""

import json
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from whiflash_sglang.bench import provenance
from whiflash_sglang.bench.command import loads_of
from whiflash_sglang.bench.fleet import Fleet, launcher, threads
from whiflash_sglang.bench.recorded import (
    DEFAULT,
    measure,
    recorded_arms,
    recorded_tables,
    talks_of,
    write_result,
)
from whiflash_sglang.bench.subject import CPU_KV_TOKENS, build_subject
from whiflash_sglang.errors import ConfigError
from whiflash_sglang.progress import progress
from whiflash_sglang.recorded.benchmark import renderer_of
from whiflash_sglang.recorded.files import read_recorded
from whiflash_sglang.serving.server_host import ServerHost, shares_imports

MARGIN = 128
"""Positions of a context that no conversation takes: the widest drafts go behind the text."""


@dataclass(frozen=True)
class RecordedRun:
    """paths: recorded files. arms: names; `DEFAULT` where there are none. max_tokens: of an answer, None: all of it."""

    paths: tuple[Path, ...]
    arms: tuple[str, ...]
    concurrency: str
    repetitions: int
    max_tokens: int | None
    model_path: str | None
    bundle: str | None
    dtype: str
    server_args: tuple[str, ...] = ()
    log_dir: Path | None = None


def run_recorded(run: RecordedRun, *, as_json: bool, out: Path | None) -> dict[str, Any]:
    """Measure, show and write.

    Raises:
        ConfigError: an option is wrong, a file cannot be read, or nothing in it fits the context.
        WhiflashError: a server did not start, or did not answer as recorded.
    """
    loads = [int(load.value) for load in loads_of(run.concurrency, "")]
    if run.log_dir is not None:
        run.log_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="whiflash-bench-") as scratch, ExitStack() as stack:
        kinds = [name.partition("+")[0] for name in run.arms]
        subject = build_subject(run.model_path, run.bundle, run.dtype, run.server_args, Path(scratch), kinds)
        context = json.loads((subject.target / "config.json").read_text("utf-8"))["max_position_embeddings"]
        recorded = [one for path in run.paths for one in read_recorded(path)]
        talks, left_out = talks_of(
            recorded,
            renderer_of(subject.target, subject.bundle),
            max_tokens=run.max_tokens or context,
            room=min(context, CPU_KV_TOKENS // max(loads)) - MARGIN,
        )
        if not talks:
            raise ConfigError(f"no recorded answer fits a context of {context} tokens")
        arms = recorded_arms(run.arms or DEFAULT, subject, talks)
        bar = stack.enter_context(progress())
        host = None
        if shares_imports():
            host = stack.enter_context(ServerHost({"OMP_NUM_THREADS": str(threads())}))
            host.wait()
        fleet = stack.enter_context(Fleet(partial(launcher, host=host), run.log_dir))
        record = {**provenance.environment(subject.bundle), "busy_before": provenance.busy()}
        found = measure(arms, talks, loads, run.repetitions, fleet, bar)
    result = {
        "schema_version": 1,
        "files": [path.name for path in run.paths],
        "talks": len(talks),
        "answers": sum(len(talk.tasks) for talk in talks),
        "left_out": left_out,
        "tokens": sum(len(task.answer) for talk in talks for task in talk.tasks),
        "repetitions": run.repetitions,
        "concurrency": found,
        "provenance": {**record, "busy_after": provenance.busy(), "dtype": run.dtype},
    }
    if out is not None:
        write_result(result, out)
    if as_json:
        print(json.dumps(result, indent=1))
    else:
        for table in recorded_tables(result):
            Console().print(table)
    return result
