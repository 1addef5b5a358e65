"""`whiflash lab simulate`: estimates rates on a GPU from published figures."""

import json
from pathlib import Path
from typing import Annotated

import typer

from whiflash_sglang.cli.options import MOST, JsonFlag, show_table, whole_numbers
from whiflash_sglang.errors import UsageError


def simulate(
    requests: Annotated[
        str, typer.Option(help="Requests at once, with commas between them.")
    ] = "1,2,4,8,16,32,64,128,256",
    prompt: Annotated[int, typer.Option(min=1, max=MOST, help="Tokens of a prompt.")] = 512,
    answer: Annotated[int, typer.Option(min=1, max=1 << 17, help="Tokens of an answer.")] = 512,
    tools: Annotated[
        float, typer.Option(min=0, max=1, help="Share of requests that write tool calls; adds the host's time.")
    ] = 0.0,
    figures: Annotated[
        Path | None,
        typer.Option(exists=True, help="A record of tests/gpu/shaped.py: its H200 beside chains and stock plain."),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Simulate tokens a second of Qwen3-8B on an H100: an estimate, no measurement.

    Prices and acceptance lengths are published ones. The first line names what is assumed. With --figures, print the
    tables of `results/simulated-h200.md` for these requests.

    \b
    Example:
    whiflash lab simulate --requests 1,8,64 --answer 256
    """
    from whiflash_lab.cards import H100
    from whiflash_lab.chains import tables_of_chains
    from whiflash_lab.simulate import METHODS, SimulatedLoad, assumed, table

    sizes, load = whole_numbers("--requests", requests), SimulatedLoad(1, prompt=prompt, answer=answer, tools=tools)
    if figures is not None:
        if as_json or load != SimulatedLoad(1):
            raise UsageError("--figures prints Markdown of one load: leave out --json, --prompt, --answer and --tools")
        for line in tables_of_chains(figures, sizes):
            typer.echo(line)
        return
    line, results = assumed(H100, load), table(H100, sizes, load)
    if as_json:
        rates = [{"requests": r.requests, "method": r.method, "simulated": r.rate} for r in results]
        typer.echo(json.dumps({"assumed": line, "tokens_per_second": rates}))
        return
    typer.echo(line)
    found = {(result.requests, result.method): f"{result.rate:,.0f}" for result in results}
    rows = [[str(size), *(found[size, method] for method in METHODS)] for size in sizes]
    show_table(("requests", *METHODS), rows, "Simulated tokens a second (estimates)")
