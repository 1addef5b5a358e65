"""Keys and salts of a served model stay out of its log and out of its answers."""

from collections.abc import Iterator

import httpx
import pytest
from model_set import Models
from server_host import Server, ServerHost

pytestmark = pytest.mark.server

KEY, ADMIN, WRONG, SALT = ("key-of-clients-41", "key-of-operators-42", "key-of-nobody-43", "salt-of-a-tenant-44")


@pytest.fixture(scope="module")
def server(models: Models, host: ServerHost) -> Iterator[Server]:
    arguments = ["--model-path", str(models.target), "--dtype", "float32", "--log-level", "debug"]
    arguments += ["--speculative-algorithm", "WHIFLASH", "--speculative-draft-model-path", str(models.dflash)]
    arguments += ["--api-key", KEY, "--admin-api-key", ADMIN]
    with host.running(*arguments) as running:
        yield running


def test_keys_are_in_no_answer_and_no_log(server: Server) -> None:
    asked = {"text": "one two", "sampling_params": {"max_new_tokens": 4}, "cache_salt": SALT}
    sent: dict[str | None, list[httpx.Response]] = {}
    for key in (KEY, ADMIN, WRONG, None):
        with httpx.Client(
            base_url=server.url, timeout=None, headers={} if key is None else {"Authorization": f"Bearer {key}"}
        ) as client:
            sent[key] = [
                client.post("/generate", json=asked),
                client.get("/server_info"),
                client.get("/get_server_info"),
                client.get("/model_info"),
                client.get("/whiflash/capabilities"),
                client.get("/whiflash/state"),
                client.post("/whiflash/policy", json={"router": "none"}),
                client.post("/whiflash/forget", json={"cache_salt": SALT}),
            ]
    statuses = {key: [answer.status_code for answer in answers] for key, answers in sent.items()}
    assert statuses[KEY][:6] == [200, 200, 200, 200, 200, 401]
    assert statuses[ADMIN][:6] == [401, 401, 401, 401, 401, 200]
    assert set(statuses[WRONG]) == set(statuses[None]) == {401}
    info = sent[KEY][1].json()
    assert (info["api_key"], info["admin_api_key"]) == ("<redacted>", "<redacted>")
    for answers in sent.values():
        for answer in answers:
            assert ADMIN not in answer.text, answer.url
            assert SALT not in answer.text, answer.url
    log = server.log.read_text(errors="replace")
    assert "server_args=" in log
    assert "control: policy" in log
    for secret in (KEY, ADMIN, WRONG, SALT):
        lines = [line for line in log.splitlines() if secret in line]
        assert lines == [], secret
