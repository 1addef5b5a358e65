"""`whiflash advise`: should a target be served with WHIFLASH, and what would it bring?"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from whiflash_sglang.cli import DECIDE
from whiflash_sglang.cli.options import AdminKeyOption, JsonFlag, for_tables, say
from whiflash_sglang.errors import UsageError

if TYPE_CHECKING:
    from whiflash_lab.advise import Advice


_CALLED = {"eagle3": "EAGLE-3", "dflash": "block drafter"}


def register(app: typer.Typer, lab: typer.Typer) -> None:
    app.command(rich_help_panel=DECIDE)(advise)


def advise(
    target: Annotated[str, typer.Argument(help="Served model: hub id, or the end of it.")],
    gpu: Annotated[str, typer.Option(help="Card: h100, h200, h20, a100 or b200.")] = "h100",
    count: Annotated[int, typer.Option(min=1, help="Cards that share the model.")] = 1,
    requests: Annotated[str, typer.Option(help="Requests at once, with commas between them.")] = "1,8,32",
    temperature: Annotated[float, typer.Option(min=0, help="Of your requests.")] = 0.0,
    tools: Annotated[float, typer.Option(min=0, max=1, help="Share of requests under a grammar.")] = 0.0,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")] = 512,
    answer: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 256,
    context: Annotated[
        str, typer.Option(help="Tokens of a request that are cached before its prompt, such as 128k.")
    ] = "0",
    recipe: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Also judge these flags, as whiflash check does."),
    ] = None,
    url: Annotated[
        str | None, typer.Option(help="Server that runs the target: its prices and acceptance are taken.")
    ] = None,
    as_json: JsonFlag = False,
    api_key: AdminKeyOption = None,
) -> None:
    """Estimate what WHIFLASH would bring for a target, cards and a load; name drafters, settings and what is lost.

    An estimate from published prices and acceptance: the first line says what is assumed.

    \b
    Examples:
    whiflash advise Qwen/Qwen3-8B --gpu h100 --requests 40 --temperature 0.6 --tools 0.3
    whiflash advise gpt-oss-120b --count 4 --requests 1,16,64
    """
    from whiflash_lab.advise import Question
    from whiflash_lab.advise import advise as answered
    from whiflash_lab.recipes.files import read

    recipes = [] if recipe is None else read(recipe)  # before minutes of simulation
    sizes = tuple(int(size) for size in requests.split(",") if size.strip().isdecimal())
    if len(sizes) != len(requests.split(",")) or min(sizes) < 1:
        raise UsageError(f"--requests takes numbers from 1 on, such as 1,8,64; got {requests!r}")
    if not (digits := context.lower().removesuffix("k")).isdecimal():
        raise UsageError(f"--context takes a number of tokens, such as 32768 or 128k; got {context!r}")
    cached = int(digits) * (1 if digits == context else 1024)
    state = None
    if url is not None:
        from whiflash_sglang.cli.running import steer

        state = steer(url.rstrip("/"), "/whiflash/state", None, api_key)
    advice = answered(Question(target, gpu, count, sizes, temperature, tools, prompt, answer, cached), state)
    if recipes:
        from whiflash_lab.recipes.judge import judge

        for launch in recipes:
            refused = judge(launch.flags, launch.environment).obstacles.values()
            advice.obstacles += [f"{launch.name}: {sentence}" for sentence in refused]
    if as_json:
        typer.echo(json.dumps(advice.as_json()))
        return
    _show(advice)


def _show(advice: "Advice") -> None:
    from rich.table import Table

    say(f"{advice.assumed}\n\n{advice.verdict}\n")
    table = Table("requests", title="Tokens a second (estimates)", title_justify="left")
    methods = list(advice.rows[0].rates) if advice.rows else []
    for method in methods:
        table.add_column(_CALLED.get(method, method), justify="right")
    for column in ("auto / plain", "by data set"):
        table.add_column(column, justify="right")
    for row in advice.rows:
        rates = (f"{row.rates[method]:,.0f}" for method in methods)
        table.add_row(str(row.requests), *rates, f"{row.ratio:.2f}", f"{row.low:.2f} to {row.high:.2f}")
    if advice.rows:
        for_tables().print(table)
    lines = {
        "Over plain, as others measured": advice.published,
        "Drafters": [
            *(f"EAGLE-3: {name}" for name in advice.eagle3),
            *(f"block: {name}" for name in advice.block),
        ],
        "Set": advice.settings,
        "You give up": advice.lost,
        "In the way": advice.obstacles,
    }
    for title, entries in lines.items():
        if entries:
            say("\n".join([f"\n{title}:", *(f"  {line}" for line in entries)]))
