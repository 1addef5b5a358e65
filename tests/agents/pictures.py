"""The pictures of the trace page and of `whiflash top`: `python tests/agents/pictures.py docs/pictures`.

The embedded model answers a few prompts without drafts, so that the server knows what rounds without them take and the
trace has an estimated gain; then, under `auto`, a question that forces a tool call. The page is drawn as `whiflash
trace` draws it (trace.html). Headless Chromium takes its picture down to the end of the text, with the mouse on the
longest copy, in light and dark colours (trace-light.png, trace-dark.png), and one of its timeline and text alone
(answer-light.png, answer-dark.png). Then more prompts are answered, four at a time; top.svg is a look at them. demo.svg
is what `whiflash demo` prints.
"""

import io
import json
import re
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2] / "sdk" / "tests"))

from browser import browser
from rich.console import Console
from rich.progress import Progress
from rich.terminal_theme import TerminalTheme
from server_host import Server, ServerHost
from whiflash_sdk.render import Turn, conversation_html
from whiflash_sdk.trace import routing

from whiflash_lab.demo import run, show
from whiflash_sglang.checkpoints.manifest import embedded_bundle
from whiflash_sglang.cli.top import LiveView, WatchedServer, screen
from whiflash_sglang.embedded import COMPACT_JSON, STRICT_TOOLS, TARGET_NAME, ensure_target

PROMPTS = Path(__file__).parents[1] / "data" / "prompts.jsonl"
QUESTION = "Find a flight from Paris to Rome on 2026-05-01 for two passengers."
TOOL = {
    "name": "find_flights",
    "description": "Flights between two cities on a day.",
    "parameters": {
        "type": "object",
        "properties": {
            "origin": {"type": "string"},
            "destination": {"type": "string"},
            "date": {"type": "string"},
            "passengers": {"type": "integer"},
        },
        "required": ["origin", "destination", "date", "passengers"],
    },
}
_RED, _GREEN, _ORANGE, _BLUE = (255, 123, 114), (86, 211, 100), (240, 160, 75), (108, 171, 255)
_PINK, _CYAN, _GREY, _WHITE = (247, 120, 186), (88, 209, 235), (154, 164, 175), (233, 237, 241)
_COLOURS = [_RED, _GREEN, _ORANGE, _BLUE, _PINK, _CYAN, _WHITE]
THEME = TerminalTheme((13, 17, 23), _WHITE, [(43, 49, 56), *_COLOURS], [_GREY, *_COLOURS])
"""The trace page's dark colours, in a terminal's order."""
FONTS = "ui-monospace, Menlo, Consolas, 'DejaVu Sans Mono', monospace"
WITHOUT_TABLES = """
document.querySelectorAll('section .table, section details').forEach(e => e.remove());
document.querySelector('main').style.paddingBottom = '1rem'
"""


TIMELINE_AND_TEXT = """
document.querySelectorAll('.hint, .tip, .zoom').forEach(e => e.remove());
document.querySelector('main').replaceChildren(...document.querySelectorAll('.legend, .timeline, .answer'))
"""


def prompts(tokens: int) -> list[dict[str, Any]]:
    lines = PROMPTS.read_text("utf-8").splitlines()
    body = {"model": TARGET_NAME, "temperature": 0, "max_tokens": tokens}
    return [{**body, "messages": json.loads(line)["messages"]} for line in lines]


def ask(server: Server) -> Turn:
    """The question's answer with its full trace, once plain rounds were timed."""
    for router in ("none", "auto"):
        server.post("/whiflash/policy", {"router": router})
        for warm in prompts(48)[:6]:
            server.post("/v1/chat/completions", warm)
    body = {
        "model": TARGET_NAME,
        "messages": [{"role": "user", "content": QUESTION}],
        "tools": [{"type": "function", "function": TOOL}],
        "tool_choice": "required",
        "max_tokens": 84,
        "temperature": 0,
        "custom_params": {"whiflash": json.dumps({"trace": "full"})},
    }
    answer = server.post("/v1/chat/completions", body)
    trace = routing(answer)
    assert trace is not None
    assert trace.gain is not None
    print(trace)
    return Turn(QUESTION, trace.text or "", trace, TARGET_NAME)


def look(server: Server, path: Path) -> None:
    """Screen of `whiflash top` for some seconds in the middle of a load, as it is after its first interval."""
    with ThreadPoolExecutor(4) as users, httpx.Client(timeout=None) as client:
        view = LiveView([WatchedServer(server.url, client)])
        answers = [users.submit(server.post, "/v1/chat/completions", body) for body in prompts(96)[:16]]
        answers[3].result()
        view.look()
        time.sleep(3)
        console = Console(file=io.StringIO(), record=True, width=112, force_terminal=True, color_system="truecolor")
        console.print(screen(view.look()))
        for answer in answers:
            answer.cancel()
    draw(console, "whiflash top", path)


def demonstrate(path: Path) -> None:
    """Screen of `whiflash demo`."""
    console = Console(file=io.StringIO(), record=True, width=118, force_terminal=True, color_system="standard")
    show(run("auto", None, Progress(disable=True)), console)
    draw(console, "whiflash demo", path)


def draw(console: Console, title: str, path: Path) -> None:
    """Write the output that `console` recorded as a picture."""
    drawn = console.export_svg(title=title, unique_id=path.stem, theme=THEME)
    # Rich names a font from the web, which pages that show pictures do not let them load.
    drawn = re.sub(r"@font-face \{.*?\}", "", drawn, flags=re.DOTALL)
    path.write_text(drawn.replace("Fira Code, monospace", FONTS), encoding="utf-8")


def main() -> None:
    to = Path(sys.argv[1])
    arguments = ("--model-path", str(ensure_target()), "--served-model-name", TARGET_NAME, COMPACT_JSON)
    ours = ("--speculative-algorithm", "WHIFLASH", "--speculative-draft-model-path", str(embedded_bundle()))
    with (
        tempfile.TemporaryDirectory() as folder,
        ServerHost() as host,
        host.running(*arguments, *ours, "--dtype", "bfloat16", env=STRICT_TOOLS, threads=2) as server,
    ):
        page = to.resolve() / "trace.html"
        page.write_text(conversation_html([ask(server)], title="A tool call"), "utf-8")
        with browser(Path(folder) / "profile") as chromium:
            for scheme in ("light", "dark"):
                chromium.show(page, width=970, height=1400, dark=scheme == "dark")
                chromium.ask(WITHOUT_TABLES)
                chromium.point("section .band.arm-lookup", scroll=False)
                chromium.shoot(to / f"trace-{scheme}.png", to_end_of="main", scale=1.5)
                chromium.ask(TIMELINE_AND_TEXT)
                chromium.shoot(to / f"answer-{scheme}.png", to_end_of="main", scale=1.5)
        look(server, to / "top.svg")
    demonstrate(to / "demo.svg")


if __name__ == "__main__":
    main()
