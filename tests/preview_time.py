"""Times previews on a CPU: what a session's next turn gains, and what others lose. `python tests/preview_time.py`.

The embedded target and bundle serve, with and without previews by turns, on one server. Print on a quiet machine:

- of a next turn that brings a tool's result: seconds to its first token, and of its next five rounds with the tokens of
  these, as medians. With previews all but the end of the result was prefilled before.
- tokens a second of eight requests, with always a preview of `BESIDE` lines that waits, and without. This is by the
  totals of all windows: a median would hide what comes once in a while. `--rows 8` leaves no row for a preview.

Brackets are 95 % bootstrap intervals of the ratio over pairs.
"""

import argparse
import json
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from statistics import fmean, median
from typing import Any

import httpx

from whiflash_lab.servers import Server
from whiflash_sglang.cli.serve import server_arguments
from whiflash_sglang.embedded import TARGET_NAME

LINES, BESIDE, OTHERS, TOKENS, MARKER = 24, 4, 8, 192, "PreviewEnd"


def log(lines: int) -> str:
    """Return a tool's result that no request has brought before, some 25 tokens a line."""
    said = "step {} of job {} took {} ms and read {} rows\n"
    return "".join(said.format(*random.sample(range(10_000), 4)) for _ in range(lines))


def chat(url: str, session: str, texts: Sequence[str], **fields: Any) -> dict[str, Any]:
    """Return what httpx needs for a chat completion. texts: the user's and the assistant's by turns."""
    messages = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]
    body = {"model": TARGET_NAME, "temperature": 0, "session_id": session, "messages": messages, **fields}
    return {"method": "POST", "url": f"{url}/v1/chat/completions", "json": body, "timeout": None}


def preview(url: str, session: str, *texts: str) -> None:
    """Send a preview and wait until the server has prefilled or dropped it."""
    params = {"whiflash": json.dumps({"preview": MARKER})}
    httpx.request(**chat(url, session, [*texts[:-1], f"{texts[-1]} {MARKER}"], custom_params=params))


def next_turn(url: str, number: int, ahead: bool) -> list[float]:
    """Return seconds to the first token, seconds of the next five rounds, and these rounds' tokens."""
    session, asked = f"line:{number}", f"Job {random.random()}: read the log and say which step was slow."
    answer = httpx.request(**chat(url, session, [asked], max_tokens=24)).raise_for_status().json()
    texts = [asked, answer["choices"][0]["message"]["content"], log(LINES)]
    if ahead:
        preview(url, session, *texts)
    stream = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    started, seen = time.perf_counter(), list[tuple[float, int]]()
    with httpx.stream(**chat(url, session, texts, max_tokens=64, ignore_eos=True, **stream)) as response:
        for line in response.raise_for_status().iter_lines():
            chunk = json.loads(line[6:]) if line.startswith("data: {") else {"choices": []}
            if any(choice["delta"].get("content") for choice in chunk["choices"]):
                seen.append((time.perf_counter() - started, chunk["usage"]["completion_tokens"]))
    (first, begun), (sixth, tokens) = seen[0], seen[5]
    return [first, sixth - first, tokens - begun]


def others(url: str, number: int, ahead: bool) -> list[float]:
    """Return the seconds of `OTHERS` requests, which write the same texts in every window."""
    over, sessions = threading.Event(), list[str]()

    def previews() -> None:
        while ahead and not over.is_set():
            sessions.append(f"line:{number}-{len(sessions)}")
            preview(url, sessions[-1], log(BESIDE))

    def ask(request: int) -> None:
        params = {"temperature": 0, "max_new_tokens": TOKENS, "ignore_eos": True}
        body = {"text": f"{request + 1} things that every engineer should know:\n1.", "sampling_params": params}
        httpx.post(f"{url}/generate", json=body, timeout=None).raise_for_status()

    started, sending = time.perf_counter(), threading.Thread(target=previews)
    running = [threading.Thread(target=ask, args=(n,)) for n in range(OTHERS)]
    for thread in (sending, *running):
        thread.start()
    for thread in running:
        thread.join()
    seconds = time.perf_counter() - started
    over.set()
    while sending.is_alive():  # it waits for a preview, which ends with its session
        httpx.post(f"{url}/close_session", json={"session_id": sessions[-1]}, timeout=None)
        time.sleep(0.05)
    return [seconds]


def ratio(pairs: Sequence[Sequence[float]], of: Callable[[list[float]], float]) -> str:
    """Say a figure without and with previews, and their ratio with its interval over pairs."""

    draws = [pairs, *(random.choices(pairs, k=len(pairs)) for _ in range(2000))]
    (without, with_), *drawn = [[of(list(values)) for values in zip(*draw, strict=True)] for draw in draws]
    ratios = sorted(b / a for a, b in drawn)
    return f"{without:.4g} without, {with_:.4g} with: {with_ / without:.3f} [{ratios[50]:.3f}, {ratios[1949]:.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=OTHERS + 2, help="most requests that run at a time")
    parser.add_argument("--pairs", type=int, default=6, help="pairs of windows, and half the pairs of turns")
    said = parser.parse_args()
    arguments = server_arguments(
        ["--device", "cpu", "--enable-session-radix-cache", "--max-running-requests", str(said.rows)]
    )
    turn = dict.fromkeys(("seconds to the first token", "seconds of five rounds", "tokens of five rounds"), median)
    rate = {f"tokens a second of {OTHERS} others": lambda seconds: OTHERS * TOKENS / fmean(seconds)}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server ends, too
    with Server(arguments) as server:
        for run, count, printed in ((next_turn, 2 * said.pairs, turn), (others, said.pairs, rate)):
            pairs = [[run(server.url, 2 * pair + mode, bool(mode)) for mode in (0, 1)] for pair in range(1 + count)]
            print(httpx.get(f"{server.url}/whiflash/state", timeout=None).json()["previews"], flush=True)
            for place, (name, of) in enumerate(printed.items()):  # the first pair warms up
                print(f"{name}: {ratio([(a[place], b[place]) for a, b in pairs[1:]], of)}", flush=True)


if __name__ == "__main__":
    main()
