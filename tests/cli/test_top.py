"""`whiflash top` on recorded states: what it computes and shows, whom it complains about, how it leaves a terminal."""

import json
import os
import pty
import signal
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from chat_app import answering
from priced import priced
from rich.console import Console
from typer.testing import CliRunner

from whiflash_sglang.cli.app import app, main
from whiflash_sglang.cli.top import StateReading, WatchedServer, figures, screen, since
from whiflash_sglang.errors import ServerRefusedError
from whiflash_sglang.prices.costs import PLAIN_ROUNDS

WHIFLASH = str(Path(sys.executable).with_name("whiflash"))


COSTS = priced(lambda arm: 4, {"ar": 0.0031}, base=0.0195, row=0.0005)


def state(times: int = 1) -> dict[str, Any]:
    """A server's after so many times the same."""
    arm = {"rounds": 10, "tokens": 40, "proposed": 60, "accepted": 30, "joined": 0, "joined_accepted": 0}
    plain = {"rounds": 10, "tokens": 10, "proposed": 0, "accepted": 0, "joined": 0, "joined_accepted": 0}
    counted = {"rounds": 15, "rows": 80, "tokens": 50, "switches": 4, "round_seconds": 0.5, "timed_seconds": 0.4}
    counted |= {"timed_tokens": 50, "priced_seconds": 0.4, "priced_tokens": 50, "plain_seconds": 0.6}
    return {
        "policy": "auto",
        "arms": ["ar", "none"],
        "requests": 3,
        **{name: value * times for name, value in counted.items()},
        "by_arm": {
            "ar": {name: value * times for name, value in arm.items()},
            "none": {name: value * times for name, value in plain.items()},
        },
        "reasons": {"score": 15 * times, "pin": 5 * times, "off": 0},
        "plain_price": COSTS.plain_price() | {"rounds": PLAIN_ROUNDS},
        "costs": COSTS.snapshot(["ar"]),
        "memory": {"draft_kv": 3 << 30, "lookup_index": 2048},
    }


class Recorded:
    """A server with recorded answers, by path a status and a body.

    asked: requests so far. times: states that it sent.
    """

    def __init__(self) -> None:
        self.asked, self.times, self.key, self.url = 0, 0, "", ""
        self.answers: dict[str, tuple[int, bytes]] = {}

    def answer(self, path: str, headers: Any, _: bytes) -> tuple[int, bytes]:
        self.asked += 1
        if self.key and headers.get("Authorization") != f"Bearer {self.key}":
            return 401, b"{}"
        if (route := path.partition("?")[0]) in self.answers:
            return self.answers[route]
        if path == "/whiflash/capabilities":
            return 200, b'{"model": "tiny"}'
        self.times += 1
        return 200, json.dumps(state(self.times)).encode()


@pytest.fixture
def recorded() -> Iterator[Recorded]:
    server = Recorded()
    with answering(server.answer) as server.url:
        yield server


def top(*arguments: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """The command in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", ["whiflash", "top", *arguments])
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def shown(*records: dict[str, Any], width: int = 80) -> str:
    console = Console(width=width, color_system=None)
    with console.capture() as captured:
        console.print(screen(records))
    return captured.get()


def test_figures_are_of_what_happened_in_between() -> None:
    found = since(StateReading(10.0, state(1)), StateReading(12.0, state(3)))
    assert found is not None
    assert (found["seconds"], found["tokens_per_second"], found["switches_per_second"]) == (2.0, 50.0, 4.0)
    assert found["acceptance_length"] == 2.5
    assert found["gain"] == pytest.approx(1.5)
    assert found["arms"]["ar"] == {"share": 0.8, "acceptance_length": 4.0, "drafts_accepted": 0.5}
    assert found["arms"]["none"] == {"share": 0.2, "acceptance_length": 1.0, "drafts_accepted": None}
    assert found["reasons"] == {"score": 0.75, "pin": 0.25, "off": 0.0}


def test_a_server_that_began_anew_has_no_past() -> None:
    assert since(StateReading(10.0, state(3)), StateReading(12.0, state(1))) is None
    assert since(None, StateReading(12.0, state(1))) is None


def test_another_model_at_the_same_address_is_named(recorded: Recorded) -> None:
    with httpx.Client() as client:
        watched = WatchedServer(recorded.url, client)
        watched.read()
        recorded.answers["/whiflash/state"] = 503, b"{}"
        with pytest.raises(ServerRefusedError):
            watched.read()
        recorded.answers = {"/whiflash/capabilities": (200, b'{"model": "other"}')}
        watched.read()
    assert watched.model == "other"


def test_a_busy_server_is_not_called_unreachable() -> None:
    def slow(request: httpx.Request) -> httpx.Response:
        raise httpx.ReadTimeout("timed out", request=request)

    with (
        httpx.Client(transport=httpx.MockTransport(slow)) as client,
        pytest.raises(ServerRefusedError, match="busy with a long step"),
    ):
        WatchedServer("http://a", client).read()


def test_an_idle_server_has_no_rates_of_rounds() -> None:
    found = since(StateReading(10.0, state(1)), StateReading(12.0, state(1)))
    assert found is not None
    assert (found["tokens_per_second"], found["acceptance_length"], found["gain"]) == (0.0, None, None)
    assert found["arms"]["ar"] == {"share": None, "acceptance_length": None, "drafts_accepted": None}


SCREEN = """\
╭─ tiny http://a ──────────────────────────────────────────────────────────────╮
│ policy  running  tokens a second  tokens a round  gain           tokens      │
│ auto    3        50.0 (100.0)     2.50 (2.50)     1.50× (1.50×)  150         │
│                                                                              │
│ drafter      share            tokens a round  drafts accepted    costs       │
│ ar       80% (80%)  ████████     4.00 (4.00)        50% (50%)  3.10 ms       │
│ none     20% (20%)  ██           1.00 (1.00)                –                │
│                                                                              │
│ switches 4.0 (8.0) a second                                                  │
│ out      diffusion is quarantined: raised IndexError                         │
│ reasons  score 75% · pin 25%                                                 │
│ costs    20.00 ms a plain round of one request · 0.50 ms one more row        │
│          verified                                                            │
│ memory   draft kv 3.0 GiB · lookup index 2 KiB                               │
│ replicas 0: 1 running, 20 tokens · ␛]0;owned␇[red]x: 2 running, 30 tokens    │
╰──────────────────────────────────────────────────────────────────────────────╯
╭─ ␛]0;owned␇[red]x http://b ──────────────────────────────────────────────────╮
│ policy  running  tokens a second  tokens a round  gain  tokens               │
│ auto    3        –                –               –     50                   │
╰──────────────────────────────────────────────────────────────────────────────╯
╭─ http://c ───────────────────────────────────────────────────────────────────╮
│ http://c does not answer: gone                                               │
╰──────────────────────────────────────────────────────────────────────────────╯
"""


def test_a_screen_has_every_figure() -> None:
    """One server has all, one none of rounds, one is silent; a server's text is no command to the terminal."""
    hostile = "\x1b]0;owned\x07[red]x"
    after = state(3) | {
        "quarantined": {"diffusion": "raised IndexError"},
        "replicas": [{"replica": 0, "requests": 1, "tokens": 20}, {"replica": hostile, "requests": 2, "tokens": 30}],
    }
    told = {name: value for name, value in state().items() if name in ("policy", "requests", "tokens")}
    now = since(StateReading(10.0, state(1)), StateReading(12.0, after))
    whole = {"url": "http://a", "model": "tiny", "state": after, "now": now, "total": figures(after, 1.5)}
    bare = {"url": "http://b", "model": hostile, "state": told, "now": None, "total": {}}
    page = shown(whole, bare, {"url": "http://c", "error": "http://c does not answer: gone"})
    assert [line.rstrip() for line in page.splitlines()] == SCREEN.splitlines()
    assert all(len(line) <= 60 for line in shown(*[{"url": "u", "error": "e"}], width=60).splitlines())


DEAD = "http://127.0.0.1:1"


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        ({"/whiflash/capabilities": (404, b"")}, "it is no SGLang server with --speculative-algorithm WHIFLASH"),
        ({"/whiflash/state": (500, b"{}")}, "/whiflash/state answered 500 without the expected JSON"),
        ({"/whiflash/state": (400, b'{"object": "error", "message": "too long"}')}, "answered 400: too long"),
        ({"/whiflash/state": (504, b'{"error": {"message": "replica 1 is silent"}}')}, "replica 1 is silent"),
    ],
)
def test_what_is_no_whiflash_server_is_named(
    recorded: Recorded,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    answers: dict[str, tuple[int, bytes]],
    said: str,
) -> None:
    recorded.answers = answers
    assert top("--url", recorded.url, monkeypatch=monkeypatch) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"whiflash: error: {recorded.url}")
    assert said in error


def test_a_dead_server_does_not_hide_another(
    recorded: Recorded, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert top("--once", "--url", f"{recorded.url}/v1/", "--url", DEAD, monkeypatch=monkeypatch) == 1
    said = capsys.readouterr()
    assert "100.0" in said.out
    assert f"error: {DEAD} does not answer" in said.err
    assert top("--once", "--json", "--url", recorded.url, "--url", DEAD, monkeypatch=monkeypatch) == 1
    assert ["error" in one for one in json.loads(capsys.readouterr().out)] == [False, True]


def test_a_key_opens_and_is_shown_nowhere(
    recorded: Recorded, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recorded.key = "the-admin's"
    assert top("--once", "--url", recorded.url, monkeypatch=monkeypatch) == 1
    assert "WHIFLASH_API_KEY" in capsys.readouterr().err
    monkeypatch.setenv("WHIFLASH_API_KEY", recorded.key)
    assert top("--once", "--json", "--url", recorded.url, monkeypatch=monkeypatch) == 0
    said = capsys.readouterr()
    assert recorded.key not in said.out + said.err


def test_ctrl_c_leaves_the_terminal_as_it_was(recorded: Recorded) -> None:
    ours, theirs = pty.openpty()
    before = termios.tcgetattr(theirs)
    command = [WHIFLASH, "top", "--interval", "0.1", "--url", recorded.url]
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env={**os.environ, "TERM": "xterm-256color"}
    )
    said = bytearray()

    def shows(words: bytes) -> None:
        """Read until the screen shows `words`; fail with what it shows if ten readings do not bring them."""
        last = recorded.asked + 20
        while words not in said:
            if recorded.asked > last:
                process.kill()
                pytest.fail(f"{words!r} is not on the screen: {bytes(said[-2000:])!r}")
            said.extend(os.read(ours, 65536))

    shows(b"(100.0)")
    recorded.answers["/whiflash/state"] = (500, b"")  # a server that is lost meanwhile ends nothing
    shows(b"answered 500")
    process.send_signal(signal.SIGINT)
    shows(b"\x1b[?1049l")
    assert process.wait() == 130
    assert termios.tcgetattr(theirs) == before
    os.close(theirs)
    try:
        while part := os.read(ours, 65536):
            said += part
    except OSError:  # the other end is closed
        pass
    os.close(ours)
    assert said.count(b"\x1b[?1049h") == 1, "a screen of its own"
    assert said.rindex(b"\x1b[?25h") > said.rindex(b"\x1b[?25l"), "the cursor is back"
    assert b"Traceback" not in said


def test_a_gain_that_rests_on_a_guess_is_not_shown(recorded: Recorded) -> None:
    """By `report` and `top`, to people and as JSON."""
    few = COSTS.plain_price() | {"rounds": 3}
    unpriced = {"priced_seconds": 0.0, "priced_tokens": 0, "plain_seconds": 0.0, "plain_price": few}

    def shown(*words: str) -> str:
        return CliRunner().invoke(app, [*words, "--url", recorded.url]).stdout

    assert "1.50 times" in shown("report")
    recorded.answers["/whiflash/state"] = 200, json.dumps(state() | unpriced).encode()
    assert "50 tokens, 125.0 a second; the gain is not known yet (3 of 8 rounds)" in shown("report")
    assert "not known yet (3 of 8 rounds)" in shown("top", "--once")
    (told,) = json.loads(shown("report", "--json")).values()
    assert (told["gain"], told["plain_price"]) == (None, few)
    (told,) = json.loads(shown("top", "--once", "--json"))
    assert (told["total"]["gain"], told["state"]["plain_price"]) == (None, few)
