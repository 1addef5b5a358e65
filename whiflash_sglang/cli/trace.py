"""`whiflash trace`: shows a recorded conversation as an HTML page or in the terminal."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from whiflash_sglang.cli import LOOK
from whiflash_sglang.errors import ConfigError
from whiflash_sglang.files.disk import read_text
from whiflash_sglang.files.jsonl import NOT_AS_WRITTEN, parse_json_lines, read_json, write_output

if TYPE_CHECKING:
    from whiflash_sdk.render import Turn
    from whiflash_sdk.trace import Trace

MOST = 1e9
"""Largest number of seconds, tokens or rounds of a request; a file with more is refused."""
MOST_ROUNDS = 1 << 20
"""Most rounds of a file that it counts without listing them: each is drawn, so their number must be bounded."""


def turns_of(path: Path) -> "list[Turn]":
    """Return the turns with a trace in a file of responses: one JSON object, a list of them, or one per line.

    Raises:
        ConfigError: the file cannot be read, is not JSON, or holds no routing trace or a malformed one.
    """
    from whiflash_sdk.render import Turn
    from whiflash_sdk.trace import parse_trace, raw_traces

    text = read_text(path)
    try:
        recorded: Any = read_json(text)
    except ValueError:
        try:
            recorded = [response for _, response in parse_json_lines(text, path, may_be_torn=True)]
        except ConfigError as error:
            raise ConfigError(f"{path} is neither JSON nor JSON lines: {error}") from None
    responses = recorded if isinstance(recorded, list) else [recorded]
    turns, unlisted = [], 0
    for number, response in enumerate(responses, start=1):
        try:
            traces = list(map(parse_trace, raw_traces(response))) if isinstance(response, dict) else []
            for trace in traces:
                _check_figures(trace)
                title = f"Turn {number}" + (f", choice {trace.choice}" if len(traces) > 1 else "")
                turns.append(Turn(title, _text_of(response, trace.choice), trace, _model_of(response)))
        except NOT_AS_WRITTEN as error:
            raise ConfigError(
                f"{path}, response {number} is no answer with a trace ({type(error).__name__}: {error}): remove it"
            ) from None
        stretches = (stretch for trace in traces for stretch in trace.stretches)
        unlisted += sum(stretch.rounds for stretch in stretches if stretch.round_tokens is None)
        if unlisted > MOST_ROUNDS:
            raise ConfigError(f"{path}, response {number} has too many rounds to draw: remove it")
    if not turns:
        raise ConfigError(f'{path} holds no response with a routing trace; ask for one with the hint "trace": "full"')
    return turns


def _check_figures(trace: "Trace") -> None:
    """Raise ValueError if a number in a trace is above `MOST`, as in no real request."""
    held = [trace, *trace.stretches, *trace.arms.values(), *trace.sources.values()]
    figures = (value for holder in held for _, value in holder if isinstance(value, int | float))
    if any(abs(value) > MOST for value in figures):
        raise ValueError(f"a figure is above {MOST:.0e}, which no request comes to")


def _model_of(response: dict[str, Any]) -> str | None:
    model = response.get("model")
    return model if isinstance(model, str) else None


def _text_of(response: dict[str, Any], index: int) -> str:
    """Return the text of a choice, followed by its tool calls."""
    if isinstance(response.get("text"), str):
        return str(response["text"])
    choices = (choice for choice in response.get("choices") or () if (choice.get("index") or 0) == index)
    choice: dict[str, Any] = next(choices, {})
    message = choice.get("message") or {}
    # `output` is of OpenAI's Responses, `content` of Anthropic's Messages.
    parts = [part for item in response.get("output") or () for part in item.get("content") or [item]]
    parts += response.get("content") or ()
    calls = [call["function"] for call in message.get("tool_calls") or ()]
    calls += [part for part in parts if "name" in part]
    texts = [message.get("content") or choice.get("text"), *(part.get("text") for part in parts)]
    texts += [f"{call['name']}({call.get('arguments', call.get('input', ''))})" for call in calls]
    return "".join(text for text in texts if isinstance(text, str))


def trace(
    file: Annotated[Path, typer.Argument(help="Responses: JSON or JSON lines.")],
    html: Annotated[Path | None, typer.Option(help="Write a self-contained page to this file.")] = None,
) -> None:
    """Show which drafter wrote what in recorded responses: by colours on a terminal, else by names before the text.

    \b
    Example:
    whiflash trace answers.jsonl --html answers.html
    """
    from rich.console import Console
    from whiflash_sdk.render import conversation_html, conversation_terminal
    from whiflash_sdk.render.aligned import count

    turns = turns_of(file)
    if html is None:
        console = Console()
        in_colour = console.is_terminal and not console.no_color
        # `print`, because typer would remove colours in a pipe, also if the user asked for them (FORCE_COLOR).
        print(conversation_terminal(turns, colour=in_colour))
        return
    write_output(html, conversation_html(turns, title=file.name))
    typer.echo(f"{html}: {count(len(turns), 'turn')}")


def register(app: typer.Typer, lab: typer.Typer) -> None:
    app.command(rich_help_panel=LOOK)(trace)
