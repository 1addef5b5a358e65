"""Every pair of features that `docs/reference/support.md` ticks for one server on a CPU: two turns of everything, or a
launch that is refused with a sentence. Two servers, or ranks: `tests/parallel/`.
"""

import itertools
import re
from pathlib import Path
from typing import Any

import psutil
import pytest
from adapters import LINEARS, make_adapter
from matrix import sampled
from model_set import Models
from server_host import Server, ServerHost

from whiflash_lab.servers import ServerError

pytestmark = pytest.mark.server

HOST = ("--enable-hierarchical-cache", "--hicache-ratio", "2")
FEATURES: dict[str, tuple[str, ...]] = {
    "adapters": ("--max-lora-rank", "8", "--lora-target-modules", *LINEARS, "--max-loras-per-batch", "3"),
    "fp8": ("--kv-cache-dtype", "fp8_e4m3"),
    "host memory": HOST,
    "llguidance": ("--grammar-backend", "llguidance"),
    "pages": ("--page-size", "64"),
    "priorities": ("--enable-priority-scheduling",),
    "processors": ("--enable-custom-logit-processor", "--return-hidden-states-mode", "full"),
    "storage": (*HOST, "--hicache-storage-backend", "file"),
    "streaming sessions": ("--enable-streaming-session",),
    "workers": ("--tokenizer-worker-num", "2"),
}
REFUSED = {"storage + streaming sessions": "--hicache-storage-backend file beside --enable-streaming-session"}
PAIRS = [" + ".join(pair) for pair in itertools.combinations(FEATURES, 2) if pair != ("host memory", "storage")]
TOKENS = {"max_new_tokens": 70, "temperature": 0, "ignore_eos": True}
PROMPT = "one two three four " * 8


def talk(server: Server, more: dict[str, Any], *, session: str | None = None, streaming: bool = False) -> None:
    """Two turns, of which the second goes on from the first; raises for one that has no answer."""
    said, rid = "", None
    for text in (PROMPT, "and five"):
        body = {"text": text if session else PROMPT + said + text, "sampling_params": TOKENS, **more}
        if session:
            body["session_params"] = {"id": session, "rid": None if streaming else rid}
        answer = server.post("/generate", body)
        said, rid = answer["text"], answer["meta_info"]["id"]
        assert answer["meta_info"]["completion_tokens"]


@pytest.mark.parametrize("pair", sampled(PAIRS, *REFUSED))
def test_two_turns_of_a_pair(host: ServerHost, models: Models, tmp_path: Path, pair: str) -> None:
    given = ["--model-path", str(models.target), "--dtype", "float32", "--speculative-algorithm", "WHIFLASH"]
    given += ["--speculative-draft-model-path", str(models.dflash), "--whiflash-eagle-draft", str(models.eagle3)]
    given += [part for name in pair.split(" + ") for part in FEATURES[name]]
    asked: list[dict[str, Any]] = [{}, {"sampling_params": {**TOKENS, "regex": "[a-z]{20}"}}]
    if "adapters" in pair:
        adapter = make_adapter(models, tmp_path, "one", seed=1, rank=4)
        given += ["--lora-paths", f"one={adapter.path}"]
        asked.append({"lora_path": "one"})
    environment = {"SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR": str(tmp_path / "storage")}
    if pair in REFUSED:
        with pytest.raises(ServerError, match=re.escape(REFUSED[pair])):
            host.start(*given, env=environment)
        return
    if HOST[0] in given and psutil.virtual_memory().available < 11 * 2**30:
        pytest.skip("SGLang leaves 10 GiB of host memory to others")
    with host.running(*given, env=environment) as server:
        for more in asked:
            talk(server, more)
            for streaming in (False, True)[: 1 + ("streaming sessions" in pair)]:
                opened = {"capacity_of_str_len": 9999, "streaming": streaming}
                talk(server, more, session=server.post("/open_session", opened), streaming=streaming)
        assert server.get("/whiflash/state")["requests"] == 0
