"""`whiflash simulate`: what rounds would cost on a card, from published figures."""

import json
from typing import TYPE_CHECKING, Annotated

import typer

from whiflash_sglang.cli.options import JsonFlag, for_tables
from whiflash_sglang.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from whiflash_sglang.lab.published import Check
    from whiflash_sglang.lab.simulate import Result


def register(app: typer.Typer) -> None:
    @app.command("simulate")
    def command(
        requests: Annotated[
            str, typer.Option(help="Requests at once, with commas between them.")
        ] = "1,2,4,8,16,32,64,128,256",
        rate: Annotated[
            float | None,
            typer.Option(min=1e-3, help="Arrivals a second. Without it, the next request follows the last."),
        ] = None,
        prompt: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")] = 512,
        answer: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 512,
        as_json: JsonFlag = False,
    ) -> None:
        """Simulate tokens a second of Qwen3-8B on an H100: an estimate, no measurement.

        Prices and acceptance lengths are published ones. The first line names what is assumed; the first table shows
        how far the simulator is from published figures.

        \b
        Example:
        whiflash simulate --requests 1,8,64 --answer 256
        """
        from whiflash_sglang.lab.published import checks
        from whiflash_sglang.lab.simulate import H100, Load, assumed, table

        try:
            sizes = [int(size) for size in requests.split(",")]
        except ValueError:
            sizes = []
        if not sizes or min(sizes) < 1:
            raise UsageError(f"--requests takes numbers from 1 on, such as 1,8,64; got {requests!r}")
        load = Load(1, rate=rate, prompt=prompt, answer=answer)
        line, tried, results = assumed(H100, load), checks(), table(H100, sizes, load)
        if as_json:
            found = [one._asdict() for one in tried]
            rates = [{"requests": r.requests, "method": r.method, "simulated": r.rate} for r in results]
            typer.echo(json.dumps({"assumed": line, "checks": found, "tokens_per_second": rates}))
            return
        typer.echo(line)
        for shown in (_checked(tried), _rates(results)):
            for_tables().print(shown)


def _checked(tried: "Sequence[Check]") -> "Table":
    from rich.table import Table

    shown = Table("published figures", "a price was fitted to them", title="Errors of the simulator")
    for column in ("cells", "mean error", "worst error"):
        shown.add_column(column, justify="right")
    for one in tried:
        shown.add_row(one.name, one.fitted, str(one.cells), f"{one.mean:.1%}", f"{one.worst:.1%}")
    return shown


def _rates(results: "Sequence[Result]") -> "Table":
    """Tokens a second: a line for every number of requests, a column for every method."""
    from rich.table import Table

    methods = list(dict.fromkeys(result.method for result in results))
    shown = Table("requests", title="Simulated tokens a second (estimates)")
    for method in methods:
        shown.add_column(method, justify="right")
    for begin in range(0, len(results), len(methods)):
        line = results[begin : begin + len(methods)]
        shown.add_row(str(line[0].requests), *(f"{result.rate:,.0f}" for result in line))
    return shown
