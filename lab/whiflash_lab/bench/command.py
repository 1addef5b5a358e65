"""Carries out `whiflash bench` and publishes its report."""

from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.markdown import Markdown

from whiflash_lab.bench.fleet import Fleet, fleet_of
from whiflash_lab.bench.pages import render
from whiflash_lab.bench.report import BenchReport
from whiflash_lab.bench.runner import Plan, Runner
from whiflash_lab.bench.running import Visitor
from whiflash_lab.servers import Running
from whiflash_sglang.cli.options import show_table
from whiflash_sglang.errors import WhiflashError
from whiflash_sglang.files.equality import Verdict
from whiflash_sglang.files.jsonl import write_output
from whiflash_sglang.files.progress import progress


def publish(report: BenchReport, out: Path | None) -> None:
    """Print the report as a page. Write it to `out` as JSON and beside it as Markdown, each whole or not at all."""
    text = render(report)
    try:
        if out is not None:
            write_output(out, report.model_dump_json(indent=1) + "\n")
            write_output(out.with_suffix(".md"), text)
    finally:  # a full disk takes no measurement away
        if (console := Console()).is_terminal:
            for block in text.split("\n\n"):
                console.print()
                if block.startswith("| "):
                    header, _, *rows = (line[2:-2].split(" | ") for line in block.splitlines())
                    show_table(header, rows)
                else:
                    console.print(Markdown(block))
        else:
            print(text)


def run(plan: Plan, headers: Mapping[str, str]) -> BenchReport:
    """Carry out `plan` and show how far it is; servers that it starts end with it. headers: for those that run."""
    if plan.subject is None:
        with progress() as bar, Fleet(lambda url, *_: Running(*url), headers=headers) as running:
            return Visitor(plan, running, bar).run()
    from whiflash_lab.bench.recorded import Replayer  # imports torch, which wrong options need not wait for

    with progress() as bar, fleet_of(bar, None) as fleet:
        return (Replayer if plan.recorded else Runner)(plan, fleet, bar).run()


def judge(report: BenchReport) -> None:
    """Raise WhiflashError if an arm could not be measured, if the run ended early, or if an arm of WHIFLASH differs
    from plain decoding at a position where plain decoding at the same load does not differ from its reference.
    """
    ours = [arm for arm, server in report.provenance["servers"].items() if "WHIFLASH" in server.get("arguments", ())]
    wrong = [d for d in report.differences if d["arm"] in ours and d["verdict"] == Verdict.DIFFERENT]
    wrong = [d for d in wrong if not d.get("of_plain")]
    problems = [f"{arm}: {reason}" for arm, reason in report.unavailable.items()]
    problems += [f"the run {ended}"] if (ended := report.provenance.get("ended")) else []
    lost = report.provenance.get("unjudged")
    unjudged = f" (no tie could be judged: {lost})" if lost else ""
    for arm in dict.fromkeys(d["arm"] for d in wrong):
        first, *others = (d for d in wrong if d["arm"] == arm)
        gap = "" if first["gap"] is None else f", where plain decoding's two best logits are {first['gap']:.4g} apart"
        problems.append(
            f"{arm}: answers differ from plain decoding's{unjudged}, prompt {first['prompt']} under {first['load']} "
            f"from token {first['position']} on{gap}" + (f", and {len(others)} more" if others else "")
        )
    if problems:
        raise WhiflashError("; ".join(problems))
