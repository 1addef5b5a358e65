"""A server's streams: byte for byte, but for names, clocks and cuts, which no two answers share, and whole traces."""

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
from whiflash_sdk import Trace

PROMPT = "one two three four one two three four one two"
MESSAGES: Any = [{"role": "user", "content": PROMPT}]
ASKED: dict[str, Any] = {"model": "tiny", "temperature": 0, "max_tokens": 24, "extra_body": {"ignore_eos": True}}
TOOL: Any = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
ROUTES = ("/v1/chat/completions", "/v1/completions", "/generate")

_IDENTITIES = ((re.compile(r'"id": ?"[^"]*"'), '"id":"…"'), (re.compile(r'"created": ?\d+'), '"created":0'))


def ask(url: str, route: str, body: dict[str, Any]) -> str:
    """The body of the answer to a plain request, as it was sent."""
    answer = httpx.post(url + route, json=body, timeout=None)
    assert answer.status_code == 200, answer.text
    return answer.text


def comparable(sent: str, *, spec: bool = True) -> dict[Any, tuple[list[str], str]]:
    """Answers by choice: its lines without their text, equal neighbours once, and its whole text, wherever it was cut.

    spec: keep what every speculative algorithm of SGLang adds to `meta_info`.
    """
    found: dict[Any, tuple[list[str], str]] = {}
    for line in sent.split("\n"):
        if not line:
            continue  # it only ends an event; how many there are depends on how a text is cut
        for choice, shape, text in _parts(line, spec):
            shapes, before = found.get(choice, ([], ""))
            found[choice] = (shapes if shapes[-1:] == [shape] else [*shapes, shape], before + text)
    return found


def _parts(line: str, spec: bool) -> Iterator[tuple[Any, str, str]]:
    """Choice, the line without its text, and the text."""
    for pattern, placeholder in _IDENTITIES:
        line = pattern.sub(placeholder, line)
    event, data = line[:6] if line.startswith("data: ") else "", line.removeprefix("data: ")
    if not data.startswith(("{", "[{")):
        yield None, line, ""
        return
    parsed = json.loads(data)
    for item in parsed if isinstance(parsed, list) else [parsed]:
        if "meta_info" in item:
            yield _native(event, item, spec)
            continue
        texts = [_cut_text(choice) for choice in item.get("choices", ())]
        index = item["choices"][0].get("index") if event and texts else None
        yield index, event + json.dumps(item, ensure_ascii=False), "".join(texts)


def _cut_text(choice: dict[str, Any]) -> str:
    holder = choice.get("delta") or choice.get("message") or choice
    name = "text" if "text" in holder else "content"
    text, holder[name] = holder.get(name) or "", "…"
    return str(text)


def _native(event: str, item: dict[str, Any], spec: bool) -> tuple[Any, str, str]:
    """Native streams repeat the text so far: of an unfinished line only the names of its fields are kept."""
    meta = {
        key: None if re.search(r"_latency$|_ts$|_time$|_throughput$|^cached_tokens|^id$", key) else value
        for key, value in item["meta_info"].items()
        if spec or not key.startswith("spec_")
    }
    text, index = "", item.get("index")
    if meta["finish_reason"] is None:
        item = dict.fromkeys(item)
        meta = dict.fromkeys(meta)
    else:
        text, item["text"] = item["text"], "…"
    shape = json.dumps({**item, "meta_info": meta}, ensure_ascii=False)
    return index, event + shape, text


def check(trace: Trace | None, tokens: int, text: str | None = None) -> Trace:
    """A whole trace, full: stretches adjoin, from the token after the prefill's to the last, and the sums agree."""
    assert trace is not None
    assert trace.stretches[0].start == 1
    assert trace.stretches[-1].end == tokens
    assert [s.end for s in trace.stretches[:-1]] == [s.start for s in trace.stretches[1:]]
    assert trace.tokens == tokens - 1 == sum(arm.tokens for arm in trace.arms.values())
    assert trace.rounds == sum(s.rounds for s in trace.stretches) == sum(trace.reasons.values())
    for stretch in trace.stretches:
        assert stretch.round_tokens is not None
        assert sum(stretch.round_tokens) == stretch.tokens
    for name, arm in trace.arms.items():
        own = [s for s in trace.stretches if s.arm == name]
        assert (arm.rounds, arm.accepted) == (sum(s.rounds for s in own), arm.tokens - arm.rounds)
        assert arm.proposed == sum(s.proposed or 0 for s in own)
        assert arm.accepted <= arm.proposed
    if text is not None:
        check_text(trace, text)
    return trace


def check_text(trace: Trace, text: str) -> None:
    """The stretches' texts adjoin, behind that of the prefill's token, to the end."""
    assert trace.text == text
    places = [s.chars or (-1, -1) for s in trace.stretches]
    assert 0 <= places[0][0] <= 1
    assert [end for _, end in places[:-1]] == [begin for begin, _ in places[1:]]
    assert places[-1][1] == len(text)
