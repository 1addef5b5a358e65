"""A target that takes images over HTTP; other media are a 400."""

import base64
import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from families import FAMILIES, tiny_family
from PIL import Image
from server_host import ServerHost
from tiny_models import edit, save_tokenizer, tiny_dflash, tiny_eagle3

pytestmark = pytest.mark.server

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SCHEMA = {"type": "object", "properties": {"seen": {"type": "string", "maxLength": 9}}, "required": ["seen"]}


def save_processor(target: Path) -> None:
    """Files of a published Qwen2.5-VL: a tokenizer with its tokens, and what cuts images into patches."""
    from transformers import AutoTokenizer, Qwen2VLImageProcessor, Qwen2VLVideoProcessor
    from transformers.models.qwen2_5_vl import Qwen2_5_VLProcessor

    save_tokenizer(target)
    tokenizer = AutoTokenizer.from_pretrained(target, pad_token="<|endoftext|>")
    names = ("vision_start", "image_pad", "vision_end", "video_pad")
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<|{name}|>" for name in names]})
    parts = {"image_processor": Qwen2VLImageProcessor(), "video_processor": Qwen2VLVideoProcessor()}
    Qwen2_5_VLProcessor(tokenizer=tokenizer, chat_template=TEMPLATE, **parts).save_pretrained(target)
    keys = ("vision_start_token_id", "image_token_id", "vision_end_token_id", "video_token_id")
    ids = (tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in names)
    edit(target, lambda config: config.update(zip(keys, ids, strict=True)))


def image_of(seed: int) -> str:
    """A small PNG of noise, as a data URL."""
    pixels, data = np.random.default_rng(seed).integers(0, 255, (60, 90, 3), dtype=np.uint8), io.BytesIO()
    Image.fromarray(pixels).save(data, "png")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()


def user(*parts: str | int) -> dict[str, Any]:
    """A message of texts and images."""
    content = [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image_url", "image_url": {"url": image_of(part)}}
        for part in parts
    ]
    return {"role": "user", "content": content}


def test_images_are_served_as_by_a_plain_server(tmp_path: Path, host: ServerHost) -> None:
    """With SGLang's own processor: log-probabilities, a grammar, a second turn, and images behind the same text."""
    target = tmp_path / "target"
    tiny_family(target, FAMILIES["Qwen2_5_VLForConditionalGeneration"])
    save_processor(target)
    drafts = ["--speculative-draft-model-path", str(tiny_dflash(tmp_path / "dflash", target))]
    drafts += ["--whiflash-eagle-draft", str(tiny_eagle3(tmp_path / "eagle3", target))]
    shared = ["--model-path", str(target), "--dtype", "float32", "--enable-multimodal"]
    shared += ["--served-model-name", "tiny", "--chunked-prefill-size", "32"]
    said = {"role": "assistant", "content": "a cat"}
    chats: list[dict[str, Any]] = [
        {"messages": [user("what is it?", 1)]},
        {"messages": [user("what is it?", 2)], "logprobs": True, "top_logprobs": 2},
        {"messages": [user("no image")]},
        {"messages": [user("what is it?", 1), said, user("and these?", 3, 2)]},
        {
            "messages": [user("as JSON: ", 3)],
            "response_format": {"type": "json_schema", "json_schema": {"name": "it", "schema": SCHEMA}},
        },
    ]
    common = {"model": "tiny", "temperature": 0, "max_tokens": 60}
    asked = [("/v1/chat/completions", {**chat, **common}) for chat in chats]
    prompt = {"text": "<|vision_start|><|image_pad|><|vision_end|> again", "image_data": image_of(1)}
    asked.append(("/generate", {**prompt, "sampling_params": {"temperature": 0, "max_new_tokens": 40}}))
    ours = ["--speculative-algorithm", "WHIFLASH", *drafts]
    answers = []
    for arguments in (shared, [*shared, *ours, "--whiflash-router", "random"]):
        with host.running(*arguments) as server, ThreadPoolExecutor(len(asked)) as pool:
            answers.append(list(pool.map(lambda one: texts_of(server.post(*one)), asked)))
            video = "data:video/mp4;base64,AAAA"
            content = [{"type": "video_url", "video_url": {"url": video}}]
            refused = {"/generate": {"text": "what is it?", "video_data": video}}
            refused[asked[0][0]] = {"messages": [{"role": "user", "content": content}], **common}
            for route, body in refused.items() if arguments is not shared else ():
                assert httpx.post(server.url + route, json=body, timeout=None).status_code == 400, route
            if arguments is not shared:
                assert sum(server.get("/whiflash/state")["faulty_drafts"].values()) == 0
    for plain, served in zip(*answers, strict=True):
        assert plain[:2] == served[:2]
        assert plain[2] == pytest.approx(served[2], abs=0.002)


def texts_of(answer: dict[str, Any]) -> tuple[str, list[str], list[float]]:
    """An answer's text, its tokens, and how likely they were: nearly alike, as batches pack differently."""
    if "text" in answer:
        return answer["text"], [], []
    choice = answer["choices"][0]
    tokens = (choice.get("logprobs") or {}).get("content") or []
    chances = [token["logprob"] for token in tokens]
    return choice["message"]["content"], [token["token"] for token in tokens], chances
