"""A bundle beside a server that drafts with it: they agree, and planted differences have their names."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from server_host import ServerHost
from tiny_models import CHAT_TEMPLATE, edit, tiny_bundle, tiny_eagle3, tiny_target
from tokenizers.normalizers import Lowercase
from transformers import AutoTokenizer

from whiflash_lab import evaluation
from whiflash_lab.evaluation import EvaluationSettings, Hardware, compare_served
from whiflash_sglang.drafts.rounds import rounds
from whiflash_sglang.files.hosts import Answer
from whiflash_train.answers.store import FeatureStore, SequenceRecord
from whiflash_train.answers.store import Sequence as Stored
from whiflash_train.origin import VocabularyMatrices
from whiflash_train.replay import Pair, PairParts, replay_drafters
from whiflash_train.target import TargetModel

CPU = {"device": torch.device("cpu"), "dtype": torch.float32}
LAYERS = range(5)
TOOLED = "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}" + CHAT_TEMPLATE.replace(
    "<|im_end|>",
    "{% for call in message.tool_calls or [] %}{{ call.function.arguments | tojson }}{% endfor %}<|im_end|>",
)
CALLS = {
    "messages": [
        {"role": "user", "content": "1 + 2?"},
        {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": '{"a":1,"b":2}'}}]},
        {"role": "tool", "tool_call_id": "c", "content": "3"},
    ],
    "tools": [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}],
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """A tiny model is slower with more, which wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle and its target, another target and drafter, prompts."""
    root = tmp_path_factory.mktemp("served")
    target = tiny_target(root / "target", seed=2, peaked=True)  # its drafter is often right
    tokenizer = AutoTokenizer.from_pretrained(target)
    tokenizer.chat_template = TOOLED
    tokenizer.save_pretrained(target)
    tiny_target(root / "other", seed=3, peaked=True)
    tiny_eagle3(root / "drafter", target, seed=21)
    tiny_bundle(root / "bundle", target, str(target))
    tiny_eagle3(root / "bundle/eagle3", target, seed=2)
    for drafter in ("drafter", "bundle/eagle3"):  # layers that have neighbours
        edit(root / drafter, lambda config: config["eagle_config"].update(eagle_aux_hidden_state_layer_ids=[1, 2, 3]))
    rows = [{"id": str(i), "messages": [{"role": "user", "content": f"Say {i * i}!"}]} for i in range(8)]
    (root / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


class Planted:
    """A server's answers, as the bundle's own but for what a test plants: its target or drafter (folders of `root`),
    its template or normalizer, layers above its own or tokens late that its drafter reads.
    """

    def __init__(self, root: Path, **planted: Any) -> None:
        self.planted = {"target": "target", "drafter": "bundle/eagle3", "above": 0, "late": 0, **planted}
        self.model = TargetModel(root / self.planted["target"], **CPU)
        self.tokenizer = AutoTokenizer.from_pretrained(root / "target")
        if "normalizer" in planted:
            self.tokenizer.backend_tokenizer.normalizer = planted["normalizer"]
        parts = PairParts({"ar": root / self.planted["drafter"]}, num_layers=6)
        self.pair = Pair.load(parts, TargetModel(root / "target", **CPU))

    def __call__(self, path: str, shape: type[Answer], body: Any = None) -> dict[str, Any]:
        return shape.model_validate(self.answer(path, body)).model_dump(exclude_unset=True)

    def answer(self, path: str, body: Any) -> dict[str, Any]:
        if body is None:
            return {"arms": ["ar"]}
        if path == "/tokenize":
            return {"tokens": self.tokenizer.encode(body["prompt"], add_special_tokens=False)}
        options = {"chat_template": self.planted.get("template"), "add_generation_prompt": True}
        prompt = list(self.tokenizer.apply_chat_template(body["messages"], return_dict=True, **options)["input_ids"])
        text = [*prompt]
        for _ in range(body["max_tokens"]):
            text.append(int(self.model.next_logits(text).argmax()))
        found, size = self.model.forward(text[:-1], LAYERS), len(text) - len(prompt)
        record = SequenceRecord("a", "chat", len(prompt), len(text), False, False)
        features = found.features.bfloat16().roll(self.planted["late"], 0)
        sequence = Stored(record, torch.tensor(text), features, found.final)
        named = [layer - self.planted["above"] for layer in LAYERS]
        accepted = replay_drafters(self.pair, sequence, named)["ar"]
        emitted = [*rounds(accepted[: size - 1].tolist())]
        sums = {"rounds": len(emitted), "tokens": size - 1, "accepted": size - 1 - len(emitted)}
        stretch = {"start": 1, "end": size, "arm": "ar", "round_tokens": emitted, **sums}
        stretch["round_proposed"] = [5] * len(emitted)
        trace = {"version": 1, "policy": "auto", "stretches": [stretch], **sums}
        choice = {"prompt_token_ids": prompt, "response_token_ids": text[len(prompt) :]}
        return {"choices": [choice], "sglext": {"whiflash": trace}}


@pytest.mark.parametrize(
    ("cause", "planted"),
    [
        (None, {}),
        ("template", {"template": CHAT_TEMPLATE.replace("<|im_end|>", "")}),
        ("reasoning prefix", {"template": CHAT_TEMPLATE.replace("assistant\n", "assistant\n<think>\n")}),
        ("tokenizer", {"normalizer": Lowercase()}),
        ("target", {"target": "other"}),
        *(("layer", {"above": above}) for above in (-1, 1)),
        *(("positions", {"late": late}) for late in (-1, 1)),
        ("drafter", {"drafter": "drafter"}),
    ],
)
def test_a_planted_difference_has_its_name(
    root: Path, monkeypatch: pytest.MonkeyPatch, cause: str | None, planted: dict[str, Any]
) -> None:
    target = TargetModel(root / "target", **CPU)

    @contextmanager
    def started(_: object, layers: list[int], __: object, work: Path) -> Iterator[tuple[Any, FeatureStore]]:
        states = SimpleNamespace(states=lambda texts: ((n, target.states(text, layers)) for n, text in texts))
        yield states, FeatureStore(work / "answers", hidden=64, layers=layers)

    matrices = VocabularyMatrices(target.embedding, target.head, 1.0)
    monkeypatch.setattr(evaluation, "started_target", started)
    monkeypatch.setattr(VocabularyMatrices, "read", lambda *_, **__: matrices)
    settings = EvaluationSettings(max_new_tokens=40, hardware=Hardware(dtype="float32"))
    found = compare_served(root / "bundle", root / "prompts.jsonl", Planted(root, **planted), "ar", settings)
    print(found["sentence"], [(row["offline"], row["served"]) for row in found["positions"]])
    assert found["cause"] == cause
    assert cause or all(row["offline"] == row["served"] for row in found["positions"])


@pytest.mark.evidence
@pytest.mark.server
def test_a_server_agrees_with_its_bundle(root: Path, host: ServerHost) -> None:
    """Its template gets the tools and calls that ours gets, too."""
    arguments = ["--model-path", root / "target", "--speculative-draft-model-path", root / "bundle"]
    arguments += ["--speculative-algorithm", "WHIFLASH", "--dtype", "float32"]
    prompts = root / "with-calls.jsonl"
    prompts.write_text((root / "prompts.jsonl").read_text() + json.dumps(CALLS) + "\n")
    with host.running(*map(str, arguments)) as server:
        options = ["--bundle", root / "bundle", "--prompts", prompts, "--served", server.url]
        options += ["--arm", "diffusion", "--dtype", "float32", "--max-new-tokens", "48", "--json"]
        options += ["--out", root / "new/figures.json", "--work", root / "new/work"]
        # An engine that is shut down kills every child of its process: here that would be the servers' host, too.
        whiflash = Path(sys.executable).with_name("whiflash")
        command = [whiflash, "lab", "evaluate", *map(str, options)]
        done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for row in json.loads(done.stdout)["positions"]:
        assert row["offline"][0] == pytest.approx(row["served"][0], abs=0.02)
