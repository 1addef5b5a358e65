"""Features in training are those in serving, of targets that only SGLang runs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from engine import Engine, engine
from families import FAMILIES, tiny_family
from matrix import sampled
from plain_engine import PlainEngine
from safetensors.torch import save_file
from tiny_models import tiny_pair, tiny_target
from transformers import AutoTokenizer

from whiflash_sglang.arms.base import with_kv
from whiflash_sglang.errors import CheckpointError
from whiflash_train.answers.prompts import PromptRow, tool_call_grammar
from whiflash_train.answers.served import GeneratedAnswer, ServedTarget
from whiflash_train.config import Data
from whiflash_train.engine.recorder import WANTED, FeatureRecorder
from whiflash_train.origin import ORIGIN, ServedOrigin, vocabulary_file
from whiflash_train.target import TargetModel

CAPTURE = [0, 1, 2, 3, 4]
"""All that the tiny drafters read."""
OPTIONS: dict[str, Any] = {"disable_radix_cache": True, "chunked_prefill_size": 32}
TEXTS = [list(range(60, 130)), list(range(40, 49)), list(range(90, 200, 3))]
"""The first one is prefilled in chunks."""
TARGETS = [f"{name}ForCausalLM" for name in ("Qwen3Moe", "GptOss", "DeepseekV2", "Lfm2", "Gemma4")]


class InProcess:
    """Requests of an `OfflineEngine` on a scheduler in this process, one after the other."""

    def __init__(self, e: Engine, states: Path) -> None:
        states.mkdir()
        self.e, self.states, self.count = e, states, 0
        self.recorder = FeatureRecorder(e.scheduler.tp_worker, CAPTURE, states)

    completed = PlainEngine.completed

    async def answer(self, tokens: list[int], **sampling: Any) -> tuple[list[int], bool]:
        name = self._run("answer", tokens, ignore_eos=False, **sampling)
        request = self.e.requests[name]
        reason = request.finished_reason.to_json()
        if reason["type"] == "abort":
            raise ValueError(reason["message"])
        return self.e.output(name), reason["type"] == "stop"

    async def features(self, tokens: list[int], dtype: torch.dtype) -> torch.Tensor:
        name = self._run(WANTED, tokens, max_new_tokens=1)
        return torch.from_numpy(np.fromfile(self.states / name, np.uint8)).view(dtype).view(len(tokens), -1)

    def _run(self, kind: str, tokens: list[int], **sampling: Any) -> str:
        self.count += 1
        name = f"{kind}{self.count:04d}"
        self.e.submit(name, tokens, **sampling)
        self.e.run()
        return name


def recorded(e: Engine, states: Path, texts: Sequence[list[int]]) -> list[torch.Tensor]:
    """All at once, beside an answer that nobody records: [T, (captured + 1) · H] each."""
    states.mkdir()
    FeatureRecorder(e.scheduler.tp_worker, CAPTURE, states).tell(states.parent / "origin", "tiny")
    for index, text in enumerate(texts):
        e.submit(f"{WANTED}{index}", text, max_new_tokens=1)
        e.submit(f"beside{index}", text, max_new_tokens=4)
    e.run()
    assert sorted(file.name for file in states.iterdir()) == [f"{WANTED}{i}" for i in range(len(texts))]
    files = (np.fromfile(states / f"{WANTED}{i}", np.float32) for i in range(len(texts)))
    return [torch.from_numpy(file).view(len(text), -1) for file, text in zip(files, texts, strict=True)]


@pytest.mark.parametrize("name", sampled([*TARGETS, "Qwen3VLForConditionalGeneration"], "Gemma4ForCausalLM"))
def test_features_are_those_of_serving(name: str, tmp_path: Path) -> None:
    """And the vocabulary is the one that drafters are given there."""
    target, family = tmp_path / "target", FAMILIES[name]
    model = tiny_family(target, family)
    with engine(target, **OPTIONS) as e:
        found = recorded(e, tmp_path / "states", TEXTS)
    with engine(target, whiflash={**tiny_pair(tmp_path, target), "whiflash_router": "random"}, **OPTIONS) as e:
        assert sorted({i for d in with_kv(e.worker.drafters).values() for i in d.captured_layers}) == CAPTURE
        served = [e.features(text) for text in TEXTS]
        origin = ServedOrigin.read(
            target, "tiny", tmp_path / "origin", {"intermediate_size": 96}, torch.ones(64), torch.float32
        )
        assert torch.equal(origin.embedding, e.worker.target.embedding)
        assert torch.equal(origin.head, e.worker.target.lm_head)
        assert origin.embedding_scale == e.worker.target.embedding_scale
        assert origin.intermediate_size == 96
    for text, mine, theirs in zip(TEXTS, found, served, strict=True):
        width = theirs.shape[1]
        assert mine.shape[1] > width  # the state behind the final norm
        torch.testing.assert_close(mine[:, :width], theirs, rtol=1e-4, atol=1e-4)  # other batches
        wanted = model.features(text, CAPTURE)
        torch.testing.assert_close(mine[:, :width], wanted, rtol=family.tolerance, atol=family.tolerance)
        assert torch.nn.functional.linear(mine[-1, width:], origin.head).argmax() == model.logits(text).argmax()


class Taught(NamedTuple):
    """Answers of a teacher by their prompts' ids, and why others have none."""

    answers: dict[str, GeneratedAnswer]
    skipped: list[str]

    @classmethod
    def by(cls, teacher: ServedTarget, prompts: list[PromptRow], keep_loops: bool) -> "Taught":
        skipped: list[str] = []
        found = teacher.answers(prompts, lambda row, why: skipped.append(f"{row.id}: {why}"), keep_loops=keep_loops)
        return cls({answer.record.id: answer for answer in found}, skipped)


def test_answers_and_features_are_the_targets(tmp_path: Path) -> None:
    """Looped and constrained answers, too; SGLang's refusals are reported."""
    path = tiny_target(tmp_path / "target", peaked=True)
    target = TargetModel(path, device=torch.device("cpu"), dtype=torch.float32)
    schema = '{"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}'
    grammars = {
        "{": {"json_schema": schema},
        "<tool_call>": tool_call_grammar([{"function": {"name": "f", "parameters": {}}}]),
    }
    free = [PromptRow(f"p{i}", "chat", text, None) for i, text in enumerate(TEXTS)]
    constrained = [PromptRow(begins, "json", TEXTS[1], spec) for begins, spec in grammars.items()]
    broken = PromptRow("broken", "json", [65] * 5, {"json_schema": '{"type": "nonsense"}'})
    long = PromptRow("long", "chat", [65] * target.max_positions, None)
    tokenizer = AutoTokenizer.from_pretrained(path)
    with engine(path, skip_tokenizer_init=False, **OPTIONS) as e:
        inside = InProcess(e, tmp_path / "states")
        data = Data(prompts=[], max_new_tokens=50, at_once=3)
        served = ServedTarget(inside, tokenizer, None, CAPTURE, target.hidden_size, torch.float32, data)
        kept, cut = (Taught.by(served, [*free, *constrained, broken, long], keep_loops) for keep_loops in (True, False))
        for key, states in served.states(enumerate(TEXTS)):
            torch.testing.assert_close(states, target.states(TEXTS[key], CAPTURE), rtol=1e-4, atol=1e-4)
        inside.recorder.tell(tmp_path / "origin", "tiny")
    for taught in (kept, cut):
        assert [line.split(":")[0] for line in taught.skipped] == ["broken", "long"]
        assert taught.answers.keys() == {"p0", "p1", "p2", *grammars}
        for answer in taught.answers.values():
            wanted = target.states(answer.tokens[:-1], CAPTURE)
            torch.testing.assert_close(answer.states, wanted, rtol=1e-4, atol=1e-4)
    for prompt in free:
        answer, start = kept.answers[prompt.id], len(prompt.tokens)
        final = target.forward(answer.tokens[:-1]).final[start - 1 :]
        assert torch.nn.functional.linear(final, target.head).argmax(-1).tolist() == answer.tokens[start:]
    for begins in grammars:
        assert tokenizer.decode(kept.answers[begins].tokens[len(TEXTS[1]) :]).startswith(begins)
    looped = [name for name, answer in cut.answers.items() if answer.record.looped]
    assert looped
    for name, answer in cut.answers.items():
        whole = kept.answers[name].tokens
        assert answer.tokens == whole[: len(answer.tokens)]
        assert (answer.tokens != whole) == (name in looped)
    origin = ServedOrigin.read(path, "tiny", tmp_path / "origin", {}, target.final_norm, torch.float32)
    for name in ("embedding", "head"):
        assert torch.equal(getattr(origin, name), getattr(target, name))
    for name in ("attention_shape", "intermediate_size", "rope", "max_positions", "eps", "num_layers"):
        assert getattr(origin, name) == getattr(target, name)


def test_another_targets_vocabulary_is_refused(tmp_path: Path) -> None:
    small, large = (tiny_target(tmp_path / str(size), vocab_size=size) for size in (320, 384))
    origin = tmp_path / "origin"
    with pytest.raises(CheckpointError, match="is missing: run `whiflash train --step data`"):
        ServedOrigin.read(small, "small", origin, {}, torch.ones(64), torch.float32)
    origin.mkdir()
    (origin / ORIGIN).write_text('{"target": "small", "ranks": 2, "embedding_scale": 1.0}')
    for rank in range(2):
        rows = {name: torch.full((160, 64), float(rank)) for name in ("embedding", "head")}
        save_file(rows, vocabulary_file(origin, rank))
    read = ServedOrigin.read(small, "small", origin, {}, torch.ones(64), torch.float32)
    assert read.head[:, 0].tolist() == [0.0] * 160 + [1.0] * 160
    with pytest.raises(CheckpointError, match=r"embedding of \[320, 64\].* says \[384, 64\]"):
        ServedOrigin.read(large, "small", origin, {}, torch.ones(64), torch.float32)
    with pytest.raises(CheckpointError, match="for small begin with, not for its fine-tune"):
        ServedOrigin.read(small, "its fine-tune", origin, {}, torch.ones(64), torch.float32)
