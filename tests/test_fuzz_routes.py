"""What `scripts/fuzz_routes.py` makes of Schemathesis' record."""

import base64
import json
from typing import Any

from loaded_scripts import load_script

script = load_script("fuzz_routes")


def content(text: str) -> dict[str, str]:
    return {"$base64": base64.b64encode(text.encode()).decode()}


def scenario(label: str, *statuses: int | None) -> str:
    """A line of the record: requests of one route, each with its answer's status, or none."""
    request = {"method": "POST", "body": content('{"n": -1}')}
    asked: dict[str, dict[str, Any]] = {str(i): {"request": request} for i in range(len(statuses))}
    for one, status in zip(asked.values(), statuses, strict=True):
        if status is not None:
            one["response"] = {"status_code": status, "content": content(f"a | b {status}")}
    return json.dumps({"ScenarioFinished": {"recorder": {"label": label, "interactions": asked}}})


OTHER = json.dumps({"PhaseFinished": {"status": "success"}})


def test_every_request_is_counted_by_its_status() -> None:
    found = script.read([OTHER, scenario("POST /a", 200, 500, None), scenario("POST /a", 422, 500)])
    assert found.sums() == {"2xx": 1, "4xx": 1, "5xx": 2, script.NONE: 1}
    assert found.failures() == {("POST /a", "500"): 2, ("POST /a", script.NONE): 1}
    assert found.said["POST /a", "500"] == 'a | b 500 to {"n": -1}'
    assert "| WHIFLASH | 5 | 1 | 0 | 1 | 2 | 1 |" in script.table({"WHIFLASH": found})


def test_only_what_a_plain_server_answers_is_a_complaint() -> None:
    plain = script.read([scenario("POST /a", 500, 500), scenario("POST /b", 200)])
    ours = script.read([scenario("POST /a", 500, None), scenario("POST /b", 503)])
    own = script.read([scenario("GET /whiflash/state", 200, 504), scenario("POST /whiflash/forget", 500)])
    assert script.complaints(plain, plain, script.Fuzzed()) == []
    assert script.complaints(plain, ours, own) == [
        f"POST /a gives {script.NONE} with WHIFLASH alone",
        "POST /b gives 503 with WHIFLASH alone",
        "POST /whiflash/forget gives 500",
    ]


def test_what_failed_is_told_beside_the_plain_servers_failures() -> None:
    plain, ours = script.read([scenario("POST /a", 500, 500)]), script.read([scenario("POST /a", 500, None)])
    lines = script.failures(plain, ours).splitlines()[2:]
    assert lines == [
        '| `POST /a` | 500 | 2 | 1 | `a \\| b 500 to {"n": -1}` |',
        f'| `POST /a` | {script.NONE} | 0 | 1 | `to {{"n": -1}}` |',
    ]
    assert script.failures(script.Fuzzed(), script.Fuzzed()) == "None."
