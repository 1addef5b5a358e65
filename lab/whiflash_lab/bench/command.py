"""Carries out `whiflash bench` and publishes its report."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console
from rich.markdown import Markdown

from whiflash_lab.bench.arms import FLAGS, KNOWN, NO_HINTS, QUICK, VARIANTS
from whiflash_lab.bench.cells import Journal
from whiflash_lab.bench.fleet import fleet_of
from whiflash_lab.bench.pages import draw, render
from whiflash_lab.bench.report import BenchReport
from whiflash_lab.bench.runner import Plan, Runner
from whiflash_sglang.cli.options import make_place, show_table
from whiflash_sglang.errors import ConfigError, WhiflashError
from whiflash_sglang.files.equality import Verdict
from whiflash_sglang.files.jsonl import write_output
from whiflash_sglang.files.progress import progress

QUICK_MINUTES = 4.5


@dataclass(frozen=True, slots=True)
class Scale:
    """The extent of a run. per_category: prompts of each category, None: all."""

    arms: list[str]
    per_category: int | None
    max_tokens: int
    minutes: float | None


def scale_of(
    quick: bool, arms: str | None, per_category: int | None, max_tokens: int | None, minutes: float | None
) -> Scale:
    """Return the extent of a run: the options given, completed by the defaults of `--quick` or of a full run."""
    names = [name.strip() for name in arms.split(",") if name.strip()] if arms else None
    if quick:
        minutes = QUICK_MINUTES if minutes is None else minutes
        return Scale(names or list(QUICK), per_category or 1, max_tokens or 64, minutes)
    everything = [name for name in KNOWN if name not in (NO_HINTS, *VARIANTS, *FLAGS)]
    return Scale(names or everything, per_category, max_tokens or 160, minutes)


@dataclass(frozen=True, slots=True)
class Outputs:
    """Destinations of the report. as_json: print JSON instead of tables. out, markdown: files. plots: a directory."""

    as_json: bool
    out: Path | None
    markdown: Path | None
    plots: Path | None

    def prepare(self) -> None:
        """Make the directories. Raises ConfigError if pictures cannot be drawn, or a file is a directory."""
        if self.plots is not None and find_spec("matplotlib") is None:
            raise ConfigError("--plots needs matplotlib: pip install matplotlib")
        make_place("--out", self.out)
        make_place("--markdown", self.markdown)
        make_place("--plots", self.plots and self.plots / "speedup.svg")

    def publish(self, report: BenchReport) -> None:
        """Write the files that were asked for, each whole or not at all, then print the report."""
        text, as_json = render(report), report.model_dump_json(indent=1)
        if self.out is not None:
            write_output(self.out, as_json + "\n")
        if self.markdown is not None:
            write_output(self.markdown, text)
        if self.plots is not None:
            draw(report, self.plots)
        if self.as_json:
            print(as_json)
        elif (console := Console()).is_terminal:
            for block in text.split("\n\n"):
                console.print()
                if block.startswith("| "):
                    header, _, *rows = (line[2:-2].split(" | ") for line in block.splitlines())
                    show_table(header, rows)
                else:
                    console.print(Markdown(block))
        else:
            print(text)


def run(plan: Plan, cells: Path, log_dir: Path | None, *, resume: bool) -> BenchReport:
    """Carry out `plan` and show how far it is; the servers end with it."""
    from whiflash_lab.bench.recorded import Replayer  # imports torch, which wrong options need not wait for

    with progress() as bar, fleet_of(bar, log_dir) as fleet:
        runner = Replayer if plan.recorded else Runner
        return runner(plan, fleet, Journal(cells, plan.fingerprint), bar).run(resume=resume)


def judge(report: BenchReport) -> None:
    """Raise WhiflashError if an arm could not be measured, or if an arm of WHIFLASH differs from plain decoding at a
    position where plain decoding at the same load does not differ from its reference.
    """
    ours = [arm for arm, server in report.provenance["servers"].items() if "WHIFLASH" in server["arguments"]]
    wrong = [d for d in report.differences if d["arm"] in ours and d["verdict"] == Verdict.DIFFERENT]
    wrong = [d for d in wrong if not d.get("of_plain")]
    problems = [f"{arm}: {reason}" for arm, reason in report.unavailable.items()]
    lost = report.provenance.get("unjudged")
    unjudged = f" (no tie could be judged: {lost})" if lost else ""
    for arm in dict.fromkeys(d["arm"] for d in wrong):
        first, *others = (d for d in wrong if d["arm"] == arm)
        gap = (
            ""
            if first["gap"] is None
            else f", where plain decoding's two best logits are {first['gap']:.4g} apart"
        )
        problems.append(
            f"{arm}: answers differ from plain decoding's{unjudged}, prompt {first['prompt']} under {first['load']} "
            f"from token {first['position']} on{gap}" + (f", and {len(others)} more" if others else "")
        )
    if problems:
        raise WhiflashError("; ".join(problems))
