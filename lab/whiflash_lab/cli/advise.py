"""`whiflash advise`: estimates the fastest way to serve a target."""

import json
import re
from typing import TYPE_CHECKING, Annotated

import typer

from whiflash_sglang.cli import DECIDE
from whiflash_sglang.cli.options import MOST, JsonFlag, say, say_prose, show_table, whole_numbers
from whiflash_sglang.errors import UsageError

if TYPE_CHECKING:
    from whiflash_lab.advise import Advice


def register(app: typer.Typer, lab: typer.Typer) -> None:
    app.command(rich_help_panel=DECIDE)(advise)


def advise(
    target: Annotated[str, typer.Argument(help="Served model: hub id or directory, or the end of it.")],
    gpu: Annotated[str, typer.Option(help="GPU, such as h100, l40s or the name that nvidia-smi prints.")] = "h100",
    count: Annotated[int, typer.Option(min=1, max=4096, help="GPUs.")] = 1,
    requests: Annotated[str, typer.Option(help="Requests at once, with commas between them.")] = "1,8,32",
    tools: Annotated[
        float,
        typer.Option(
            min=0, max=1, help="Share of requests under a grammar: strict tools, tool_choice required, or a schema."
        ),
    ] = 0.0,
    prompt: Annotated[int, typer.Option(min=1, max=MOST, help="Tokens of a prompt.")] = 512,
    answer: Annotated[int, typer.Option(min=1, max=1 << 17, help="Tokens of an answer.")] = 256,
    acceptance: Annotated[
        float | None, typer.Option(min=1, max=6, help="Tokens a round of your drafters. Default: published ones.")
    ] = None,
    context: Annotated[
        str, typer.Option(help="Tokens of a request that are cached before its prompt, such as 128k.")
    ] = "0",
    as_json: JsonFlag = False,
) -> None:
    """Estimate what serves a target best on your GPUs: plain decoding, EAGLE3, a block drafter, NGRAM or WHIFLASH.

    From published prices and acceptance. The answer comes first, then what it assumes, drafters, settings and what
    WHIFLASH costs. Several GPUs serve replicas if that is faster. Any directory with a config.json is a target.

    \b
    Examples:
    whiflash advise Qwen/Qwen3-8B --gpu h100 --requests 40 --tools 0.3
    whiflash advise gpt-oss-120b --count 4 --requests 1,16,64
    """
    from whiflash_lab.advise import Question
    from whiflash_lab.advise import advise as answered

    sizes = whole_numbers("--requests", requests)
    digits = context.lower().removesuffix("k")
    cached = int(digits) * (1 if digits == context else 1024) if re.fullmatch("[0-9]{1,9}", digits) else -1
    if not 0 <= cached <= MOST:
        raise UsageError(f"--context is a number from 0 to {MOST}, or one with k, such as 128k; got {context[:32]!r}")
    advice = answered(Question(target, gpu, count, sizes, tools, prompt, answer, cached, acceptance))
    if as_json:
        typer.echo(json.dumps(advice.as_json()))
        return
    _show(advice)


def _show(advice: "Advice") -> None:
    from whiflash_lab.advise import OURS, PLAIN

    for line in (*advice.verdict.split("\n"), *advice.obstacles):
        say_prose(line)
    if not advice.rows:
        return
    ways = list(advice.rows[-1].rates)
    lines = [[row.load, *(f"{row.rates[way]:,.0f}" for way in ways), row.over_plain] for row in advice.rows]
    typer.echo()
    show_table(["", *ways, "over plain"], lines, f"Tokens a second, estimated; {OURS} over plain, and by text")
    row, lines = advice.rows[-1], []
    for each in row.returning:
        rates, over = (f"{each.rates[way]:,.0f}" for way in ways), each.rates[OURS] / each.rates[PLAIN]
        lines.append([f"{each.pays}: {each.seconds:.1f} s", *rates, f"{over:.2f}"])
    if lines:
        typer.echo()
        title = f"An agent that returns pays, at {row.load}: tokens a second, estimated"
        show_table(["", *ways, "over plain"], lines, title)
    lists = {
        "Assumed": advice.assumed.split("\n"),
        "Not in the rows: tokens a round by copies and forced text": advice.copies,
        "As measured on GPUs, and how far an estimate of the same is off": advice.published,
        "Drafters (read their licences; some have none)": [f"EAGLE-3: {name}" for name in advice.eagle3]
        + [f"block: {name}" for name in advice.block],
        "Set": advice.settings,
        "You give up with WHIFLASH": advice.lost,
    }
    for title, entries in lists.items():
        if entries:
            typer.echo(f"\n{title}:")
        for entry in entries:
            say(f"  {entry}") if title == "Set" else say_prose(entry, "  ")
