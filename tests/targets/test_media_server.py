"""A target that takes images, served for text over HTTP: media are a 400, and who is served beside goes on."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from families import FAMILIES, tiny_family
from server_host import ServerHost
from tiny_models import save_tokenizer, tiny_dflash

pytestmark = pytest.mark.server

IMAGE = "data:image/png;base64,iVBORw0KGgo="
PROMPT = list(range(60, 90))


def test_an_image_is_a_400_beside_a_neighbour_who_is_served(tmp_path: Path, host: ServerHost) -> None:
    """Alone and in between, the neighbour's text is the same."""
    target = tmp_path / "target"
    tiny_family(target, FAMILIES["Qwen2_5_VLForConditionalGeneration"])
    save_tokenizer(target)
    drafts = tiny_dflash(tmp_path / "dflash", target)
    arguments = ("--model-path", target, "--dtype", "float32", "--speculative-algorithm", "WHIFLASH")
    arguments += ("--speculative-draft-model-path", drafts, "--served-model-name", "tiny")
    content = [{"type": "image_url", "image_url": {"url": IMAGE}}]
    asked: dict[str, dict[str, Any]] = {
        "/generate": {"text": "what is it?", "image_data": IMAGE},
        "/v1/chat/completions": {"model": "tiny", "messages": [{"role": "user", "content": content}]},
    }
    with host.running(*map(str, arguments)) as server, ThreadPoolExecutor(1) as pool:
        served = {"input_ids": PROMPT, "sampling_params": {"max_new_tokens": 200}}
        alone = server.generate(**served)["output_ids"]
        neighbour = pool.submit(lambda: server.generate(**served))
        refused = 0
        while not neighbour.done() or refused < len(asked):
            for route, body in asked.items():
                answer = httpx.post(server.url + route, json=body, timeout=None)
                assert answer.status_code == 400, answer.text
                refused += 1
        assert neighbour.result()["output_ids"] == alone
