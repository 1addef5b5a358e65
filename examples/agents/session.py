"""Parts that every example shares: its command line, its wrapped client, and the report of what routing did."""

import argparse
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from openai import APIConnectionError, AsyncOpenAI, OpenAI
from whiflash_sdk import Trace, wrap
from whiflash_sdk.render import Turn, conversation_html, conversation_terminal


@dataclass
class Session:
    """One run of an example: its server, its model and its recorded turns."""

    base_url: str
    model: str
    page: Path | None
    api_key: str
    turns: list[Turn] = field(default_factory=list)

    @classmethod
    def from_command_line(cls, description: str | None, arguments: Sequence[str] | None = None) -> "Session":
        """Parse the command line; the model is the server's first unless named."""
        parser = argparse.ArgumentParser(description=description)
        parser.add_argument("--base-url", default="http://127.0.0.1:30000/v1", help="of the server's OpenAI routes")
        parser.add_argument("--model", help="default: the server's first")
        parser.add_argument("--api-key", default="unused", help="if the server was given one")
        parser.add_argument("--trace", type=Path, metavar="FILE.html", help="write the routing as a page")
        given = parser.parse_args(arguments)
        try:
            model = given.model or OpenAI(base_url=given.base_url, api_key=given.api_key).models.list().data[0].id
        except APIConnectionError:
            parser.exit(1, f"{given.base_url} does not answer: start a server with `whiflash serve`\n")
        return cls(given.base_url, model, given.trace, given.api_key)

    def client(self) -> OpenAI:
        """Return an OpenAI client of the server, wrapped for full traces."""
        return wrap(OpenAI(base_url=self.base_url, api_key=self.api_key, timeout=300), trace="full")

    def async_client(self) -> AsyncOpenAI:
        """Return an asynchronous OpenAI client of the server, wrapped for full traces."""
        return wrap(AsyncOpenAI(base_url=self.base_url, api_key=self.api_key, timeout=300), trace="full")

    def record(self, title: str, traces: Sequence[Trace | None], text: str = "") -> None:
        """Keep the traces of one step for the report; a server that does not route has none."""
        known = [trace for trace in traces if trace is not None]
        for number, trace in enumerate(known, 1):
            named = title if len(known) == 1 else f"{title} (model call {number} of {len(known)})"
            self.turns.append(Turn(named, text, trace))

    def report(self) -> None:
        """Print which drafter wrote what, and write the page of `--trace`."""
        if not self.turns:
            print("\nThe server sent no routing traces.")
            return
        with suppress(BrokenPipeError):
            print("\n" + conversation_terminal(self.turns))
        if self.page is not None:
            self.page.write_text(conversation_html(self.turns, title="WhiFlash: an agent's run"), "utf-8")
            print(f"wrote {self.page}")
