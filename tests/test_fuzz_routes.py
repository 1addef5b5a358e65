"""What `scripts/fuzz_routes.py` makes of Schemathesis' record."""

import base64
import json
from typing import Any

import pytest
from loaded_scripts import load_script

script = load_script("fuzz_routes")


def content(text: str) -> dict[str, str]:
    return {"$base64": base64.b64encode(text.encode()).decode()}


def scenario(label: str, *statuses: int | None) -> str:
    """A line of the record: requests of one route, each with its answer's status, or none."""
    request = {"method": "POST", "body": content('{"n": -1}')}
    asked: dict[str, dict[str, Any]] = {
        str(i): {"request": request, "timestamp": i} for i in range(len(statuses))
    }
    for one, status in zip(asked.values(), statuses, strict=True):
        if status is not None:
            one["response"] = {"status_code": status, "content": content(f"a | b {status}")}
    return json.dumps({"ScenarioFinished": {"recorder": {"label": label, "interactions": asked}}})


def fuzzed(*lines: str) -> Any:
    found = script.Fuzzed()
    found.add(script.interactions(list(lines)))
    return found


OTHER = json.dumps({"PhaseFinished": {"status": "success"}})


def test_every_request_is_counted_by_its_status() -> None:
    found = fuzzed(OTHER, scenario("POST /a", 200, 500, None), scenario("POST /a", 422, 500))
    assert found.sums() == {"2xx": 1, "4xx": 1, "5xx": 2, script.NONE: 1}
    assert found.failures() == {("POST /a", "500"): 2, ("POST /a", script.NONE): 1}
    assert script.body(found.first["POST /a", "500"].answer) == "a | b 500"
    assert "| WHIFLASH | 5 | 1 | 0 | 1 | 2 | 1 |" in script.table({"WHIFLASH": found})


def test_only_what_a_plain_server_answers_is_a_complaint() -> None:
    plain = fuzzed(scenario("POST /a", 500, 500), scenario("POST /b", 200))
    ours = fuzzed(scenario("POST /a", 500, None), scenario("POST /b", 503))
    own = fuzzed(scenario("GET /whiflash/state", 200, 504), scenario("POST /whiflash/forget", 500))
    assert script.complaints(plain, plain, script.Fuzzed()) == []
    assert script.complaints(plain, ours, own) == [
        f"POST /a gives {script.NONE} with WHIFLASH alone",
        "POST /b gives 503 with WHIFLASH alone",
        "POST /whiflash/forget gives 500",
    ]


def test_what_failed_is_told_beside_the_plain_servers_failures() -> None:
    plain, ours = fuzzed(scenario("POST /a", 500, 500)), fuzzed(scenario("POST /a", 500, None))
    lines = script.failures(plain, ours).splitlines()[2:]
    assert lines == [
        '| `POST /a` | 500 | 2 | 1 | `a \\| b 500 to {"n": -1}` |',
        f'| `POST /a` | {script.NONE} | 0 | 1 | `to {{"n": -1}}` |',
    ]
    assert script.failures(script.Fuzzed(), script.Fuzzed()) == "None."


class Ending:
    """A server that one request ends, and one that lives."""

    def __init__(self) -> None:
        self.lives, self.server = True, None


def test_a_path_that_ends_the_server_is_left_there_and_the_others_are_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    renewed, asked = Ending(), []

    def schemathesis(server: object, chosen: list[str], *_: object, **__: object) -> Any:
        asked.append(chosen)
        renewed.lives = len(asked) > 1
        first = {"/a": (200,), "/b": (422, None), "/c": (None,)}
        lines = [scenario(f"POST {path}", *(first[path] if len(asked) == 1 else (200,))) for path in chosen]
        return [one for line in lines for one in script.interactions([line])]

    monkeypatch.setattr(script, "paths", lambda *_: ["/a", "/b", "/c"])
    monkeypatch.setattr(script, "schemathesis", schemathesis)
    found = script.fuzz(renewed, None, None)
    assert asked == [["/a", "/b", "/c"], ["/c"]]
    assert dict(found.counts) == {
        ("POST /a", "200"): 1,
        ("POST /b", "422"): 1,
        ("POST /b", script.DEAD): 1,
        ("POST /c", "200"): 1,
    }
