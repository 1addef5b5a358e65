"""`whiflash bench`: WHIFLASH beside plain decoding and SGLang's own speculative arms."""

import shlex
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from whiflash_sglang.bench.arms import KNOWN, NO_HINTS, QUICK, VARIANTS, build_arms
from whiflash_sglang.bench.cells import Journal, Load
from whiflash_sglang.bench.fleet import Fleet
from whiflash_sglang.bench.markdown import render
from whiflash_sglang.bench.plots import draw
from whiflash_sglang.bench.prompts import load_prompts, sample, shipped
from whiflash_sglang.bench.report import Report
from whiflash_sglang.bench.runner import Plan, Runner
from whiflash_sglang.bench.subject import build_subject
from whiflash_sglang.errors import ConfigError, WhiflashError

QUICK_MINUTES = 4.5


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is measured. per_category: prompts, None for all."""

    arms: list[str]
    per_category: int | None
    max_tokens: int
    minutes: float | None


def scale_of(
    quick: bool, arms: str | None, per_category: int | None, max_tokens: int | None, minutes: float | None
) -> Scale:
    """What was asked for, completed by what `--quick` or a full run means."""
    names = [name.strip() for name in arms.split(",") if name.strip()] if arms else None
    if quick:
        return Scale(
            names or list(QUICK),
            per_category or 1,
            max_tokens or 64,
            QUICK_MINUTES if minutes is None else minutes,
        )
    everything = [name for name in KNOWN if name not in (NO_HINTS, *VARIANTS)]
    return Scale(names or everything, per_category, max_tokens or 160, minutes)


def loads_of(concurrency: str, rates: str) -> list[Load]:
    """Raises ConfigError naming the option that is wrong."""
    loads = [Load(kind="closed", value=value) for value in _numbers("--concurrency", concurrency)]
    if any(load.value != int(load.value) for load in loads):
        raise ConfigError(f"--concurrency {concurrency}: whole numbers")
    loads += [Load(kind="open", value=value) for value in _numbers("--rates", rates)]
    if not loads:
        raise ConfigError("nothing to measure: give --concurrency or --rates")
    return loads


def _numbers(option: str, text: str) -> list[float]:
    try:
        values = [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ConfigError(f"{option} {text}: numbers, separated by commas") from None
    if any(not 0 < value < float("inf") for value in values):
        raise ConfigError(f"{option} {text}: every number must be above zero")
    return values


def register(app: typer.Typer) -> None:
    @app.command()
    def bench(
        quick: Annotated[bool, typer.Option(help="A first answer in under five minutes: four arms.")] = False,
        arms: Annotated[str | None, typer.Option(help=f"Comma-separated, of {', '.join(KNOWN)}.")] = None,
        prompts: Annotated[str | None, typer.Option(help="JSONL file, or data set of the hub.")] = None,
        per_category: Annotated[int | None, typer.Option(min=1, help="Prompts of each category.")] = None,
        max_tokens: Annotated[int | None, typer.Option(min=2, help="Longest answer.")] = None,
        concurrency: Annotated[str, typer.Option(help="Closed loops: requests in flight.")] = "1",
        rates: Annotated[str, typer.Option(help="Open loops: arrivals per second.")] = "",
        repetitions: Annotated[int, typer.Option(min=1, help="Of everything, at most.")] = 3,
        minutes: Annotated[
            float | None, typer.Option(help="Start no repetition that would end later.")
        ] = None,
        interleave: Annotated[bool, typer.Option(help="All servers up at once, prompts in turn.")] = True,
        restart: Annotated[bool, typer.Option(help="New servers for every repetition.")] = False,
        scaling: Annotated[bool, typer.Option(help="Also a round's cost against batch and context.")] = False,
        json_path: Annotated[Path | None, typer.Option("--json", help="Write the report here.")] = None,
        markdown_path: Annotated[
            Path | None, typer.Option("--markdown", help="Write the tables here.")
        ] = None,
        plots: Annotated[Path | None, typer.Option(help="Write pictures into this directory.")] = None,
        resume: Annotated[
            bool, typer.Option(help="Go on with the interrupted run of the same --json.")
        ] = False,
        model_path: Annotated[str | None, typer.Option(help="Target: directory or hub id.")] = None,
        bundle: Annotated[str | None, typer.Option(help="Drafters: directory or hub id.")] = None,
        dtype: Annotated[str, typer.Option(help="Of every arm: bfloat16 or float32.")] = "bfloat16",
        server_args: Annotated[str, typer.Option(help="More arguments for every server.")] = "",
        log_dir: Annotated[Path | None, typer.Option(help="Keep the servers' logs here.")] = None,
    ) -> None:
        """Measure WHIFLASH beside plain decoding, EAGLE3, DFLASH and NGRAM on this machine.

        Every answer is compared with plain decoding's. Without --prompts a sample of 42 prompts is used.

        Examples: whiflash bench --quick |
        whiflash bench --concurrency 1,4,8 --json out.json --markdown out.md --plots pictures
        """
        scale = scale_of(quick, arms, per_category, max_tokens, minutes)
        if dtype not in ("bfloat16", "float32"):
            raise ConfigError(f"--dtype {dtype}: bfloat16 or float32")
        if resume and json_path is None:
            raise ConfigError("--resume goes on with the run that writes to --json FILE; name it")
        if scaling and not (interleave and "auto" in scale.arms):
            raise ConfigError(
                "--scaling measures the arm auto while all servers are up: drop --no-interleave"
            )
        if restart and not interleave:
            raise ConfigError("--restart is for interleaved runs: drop --no-interleave")
        if plots is not None and find_spec("matplotlib") is None:
            raise ConfigError("--plots needs matplotlib: pip install 'whiflash-sglang[train]'")
        chosen = sample(load_prompts(prompts or str(shipped())), scale.per_category)
        loads = loads_of(concurrency, rates)
        for directory in (log_dir, json_path and json_path.parent, markdown_path and markdown_path.parent):
            if directory is not None:
                directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="whiflash-bench-") as scratch:
            extra = shlex.split(server_args)
            subject = build_subject(model_path, bundle, dtype, extra, Path(scratch), scale.arms)
            plan = Plan(
                subject=subject,
                arms=tuple(build_arms(scale.arms, subject)),
                prompts=tuple(chosen),
                loads=tuple(loads),
                repetitions=repetitions,
                max_tokens=scale.max_tokens,
                interleave=interleave,
                restart=restart,
                minutes=scale.minutes,
                scaling=scaling,
            )
            cells = (json_path or Path(scratch) / "report.json").with_suffix(".cells.jsonl")
            report = run(plan, cells, log_dir, resume=resume)
        publish(report, json_path, markdown_path, plots)


def run(plan: Plan, cells: Path, log_dir: Path | None, *, resume: bool) -> Report:
    """Carry out `plan` with its progress on the terminal; the servers end with it."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("left:"),
        TimeRemainingColumn(),
    )
    with (
        Progress(
            *columns, console=Console(stderr=True), transient=True, speed_estimate_period=600
        ) as progress,
        Fleet(log_dir=log_dir) as fleet,
    ):
        return Runner(plan, fleet, Journal(cells, plan.fingerprint), progress).run(resume=resume)


def publish(report: Report, json_path: Path | None, markdown_path: Path | None, plots: Path | None) -> None:
    """Show the tables, write what was asked for; a WHIFLASH arm that failed or differs ends with exit code 1."""
    text = render(report)
    Console().print(Markdown(text))
    if json_path is not None:
        _write(json_path, report.model_dump_json(indent=1) + "\n")
    if markdown_path is not None:
        _write(markdown_path, text)
    if plots is not None:
        draw(report, plots)
    ours = [arm for arm, server in report.provenance["servers"].items() if "WHIFLASH" in server["arguments"]]
    failed = [arm for arm in ours if arm in report.unavailable]
    differs = sorted(
        {d["arm"] for d in report.differences if d["arm"] in ours and d["verdict"] == "different"}
    )
    if failed or differs:
        problems = [f"{arm}: {report.unavailable[arm]}" for arm in failed]
        problems += [f"{arm}: answers differ from plain decoding's" for arm in differs]
        raise WhiflashError("; ".join(problems))


def _write(path: Path, text: str) -> None:
    staged = path.with_name(path.name + ".part")
    staged.write_text(text, encoding="utf-8")
    staged.replace(path)
