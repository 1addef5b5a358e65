"""`whiflash trace`: a recorded conversation as a page or in the terminal."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from whiflash_sdk.render import Turn, conversation_html, conversation_terminal
from whiflash_sdk.trace import routing

from whiflash_sglang.errors import ConfigError


def turns_of(path: Path) -> list[Turn]:
    """Turns with a trace, from a file of responses: one JSON object, a list of them, or one per line.

    Raises:
        ConfigError: the file cannot be read, is not JSON, or holds no response with a routing trace.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    try:
        recorded: Any = json.loads(text)
    except json.JSONDecodeError:
        try:
            recorded = [json.loads(line) for line in text.splitlines() if line.strip()]
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path} is neither JSON nor JSON lines: {error}") from None
    responses = recorded if isinstance(recorded, list) else [recorded]
    turns = []
    for number, response in enumerate(responses, start=1):
        trace = routing(response) if isinstance(response, dict) else None
        if trace is not None:
            turns.append(Turn(f"Turn {number}", _text_of(response), trace))
    if not turns:
        raise ConfigError(
            f'{path} holds no response with a routing trace; ask for one with the hint "trace": true'
        )
    return turns


def _text_of(response: dict[str, Any]) -> str:
    if "text" in response:
        return str(response["text"])
    choice = (response.get("choices") or [{}])[0]
    message = choice.get("message") or {}
    calls = message.get("tool_calls") or ()
    called = "".join(f"{c['function']['name']}({c['function']['arguments']})" for c in calls)
    return f"{message.get('content') or choice.get('text') or ''}{called}"


def register(app: typer.Typer) -> None:
    @app.command()
    def trace(
        file: Annotated[Path, typer.Argument(help="Responses: JSON, or JSON lines.")],
        html: Annotated[Path | None, typer.Option(help="Write a self-contained page here.")] = None,
        colour: Annotated[bool, typer.Option(help="Colour in the terminal.")] = True,
    ) -> None:
        """Show which drafter wrote what in recorded responses.

        Example: whiflash trace answers.jsonl --html answers.html
        """
        turns = turns_of(file)
        if html is None:
            typer.echo(conversation_terminal(turns, colour=colour))
            return
        page = html.with_suffix(html.suffix + ".part")
        page.write_text(conversation_html(turns, title=file.name), encoding="utf-8")
        page.replace(html)
        typer.echo(f"{html}: {len(turns)} turns")
