"""`whiflash profile`: where a round's time goes in a running server."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from whiflash_sglang.cli.options import JsonFlag, for_tables
from whiflash_sglang.errors import WhiflashError

if TYPE_CHECKING:
    from rich.table import Table

    from whiflash_sglang.lab.bench.profile import Profile


def register(app: typer.Typer) -> None:
    @app.command("profile")
    def command(
        server: Annotated[
            str, typer.Option(help="WHIFLASH server on this machine.")
        ] = "http://127.0.0.1:30000",
        prompts: Annotated[str | None, typer.Option(help="JSONL file or data set of the hub.")] = None,
        per_category: Annotated[int, typer.Option(min=1, help="Prompts of each category.")] = 1,
        max_tokens: Annotated[int, typer.Option(min=2, help="Longest answer, in tokens.")] = 32,
        at_once: Annotated[int, typer.Option(min=1, help="Prompts in flight.")] = 1,
        top: Annotated[int, typer.Option(min=1, help="Operators to show.")] = 15,
        keep: Annotated[Path | None, typer.Option(help="Keep the trace in this directory.")] = None,
        as_json: JsonFlag = False,
    ) -> None:
        """Profile the rounds of a running server by kind and operator.

        The server answers a few prompts under torch's profiler, which slows it down: compare shares, not milliseconds.

        \b
        Example:
        whiflash profile --server http://127.0.0.1:30000 --keep traces
        """
        import httpx

        from whiflash_sglang.lab.bench.load import ANSWER_SECONDS
        from whiflash_sglang.lab.bench.profile import profile
        from whiflash_sglang.lab.bench.prompts import load_prompts, sample, shipped
        from whiflash_sglang.progress import progress

        if keep is not None:
            keep.mkdir(parents=True, exist_ok=True)
        chosen = sample(load_prompts(prompts or str(shipped())), per_category)
        fixed = {"model": "default", "max_tokens": max_tokens, "temperature": 0}
        requests = [{**prompt.request(), **fixed} for prompt in chosen]
        try:
            with httpx.Client(base_url=server, timeout=ANSWER_SECONDS) as client, progress() as bar:
                task = bar.add_task("asking, then asking under the profiler", total=2 * len(requests))
                found = profile(
                    client,
                    requests,
                    keep and keep.resolve(),
                    at_once=at_once,
                    on_answer=lambda: bar.advance(task),
                )
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise WhiflashError(f"{server} does not answer: {error}") from None
        if as_json:
            typer.echo(found.model_dump_json(indent=1))
        else:
            for_tables().print(table(found, top))


def table(found: "Profile", top: int) -> "Table":
    """The `top` operators, by round, what is not among them, and kinds of operators."""
    from rich.table import Table

    whole = sum(operator.ms for operator in found.operators) + found.elsewhere_ms
    shown = Table(title=f"{found.rounds} rounds of {found.round_ms:.1f} ms (mean) under the profiler")
    shown.add_column("operator")
    for column in ("ms of its own", "share", "calls"):
        shown.add_column(column, justify="right")
    for operator in found.operators[:top]:
        shown.add_row(
            operator.name, f"{operator.ms:.2f}", f"{operator.ms / whole:.1%}", f"{operator.calls:.1f}"
        )
    rest = sum(operator.ms for operator in found.operators[top:])
    shown.add_row(f"{max(len(found.operators) - top, 0)} more", f"{rest:.2f}", f"{rest / whole:.1%}", "")
    shown.add_section()
    for kind, ms in (*found.kinds.items(), ("Python and waiting", found.elsewhere_ms)):
        shown.add_row(kind, f"{ms:.2f}", f"{ms / whole:.1%}", "")
    return shown
