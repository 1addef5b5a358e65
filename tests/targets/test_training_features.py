"""What drafters are trained on is what they read in serving, of targets that SGLang alone runs."""

import asyncio
from collections.abc import Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from engine import Engine, engine
from families import FAMILIES, tiny_family
from safetensors.torch import save_file
from tiny_models import tiny_dflash, tiny_eagle3, tiny_target
from transformers import AutoTokenizer

from whiflash_sglang.compat.training.offline import Generated
from whiflash_sglang.compat.training.recorder import WANTED, Recorder
from whiflash_sglang.drafters.base import with_kv
from whiflash_sglang.errors import CheckpointError
from whiflash_sglang.models.origin import ORIGIN, ServedOrigin, vocabulary_file
from whiflash_sglang.train.answers.data import Teacher, load_target
from whiflash_sglang.train.answers.generate import Answer
from whiflash_sglang.train.answers.prompts import GrammarSpec, PromptRow, tool_call_grammar
from whiflash_sglang.train.answers.served import ServedTarget
from whiflash_sglang.train.config import Data, Hardware, Slots

CAPTURE = [0, 1, 2, 3, 4]
"""All that the tiny drafters read."""
OPTIONS: dict[str, Any] = {"disable_radix_cache": True, "chunked_prefill_size": 32}
TEXTS = [list(range(60, 130)), list(range(40, 49)), list(range(90, 200, 3))]
"""The first one is prefilled in chunks."""


@pytest.fixture(autouse=True)
def whole_states(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in `test_targets.py`: states of convolutions are not rounded between chunks."""
    monkeypatch.setenv("SGLANG_MAMBA_CONV_DTYPE", "float32")


class InProcess:
    """Requests of an `OfflineEngine` on a scheduler in this process, one after the other."""

    def __init__(self, e: Engine, states: Path) -> None:
        states.mkdir()
        self.e, self.states, self.count = e, states, 0
        self.recorder = Recorder(e.scheduler.tp_worker, CAPTURE, states)

    def completed(self, requests: Iterator[Coroutine[Any, Any, Any]], at_once: int) -> Iterator[Any]:
        for request in requests:
            yield asyncio.run(request)

    async def answer(self, tokens: list[int], **sampling: Any) -> Generated:
        name = self._run("answer", tokens, ignore_eos=False, **sampling)
        request = self.e.requests[name]
        reason = request.finished_reason.to_json()
        if reason["type"] == "abort":
            raise ValueError(reason["message"])
        return Generated(self.e.output(name), reason["type"] == "stop")

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
    Recorder(e.scheduler.tp_worker, CAPTURE, states).tell(states.parent / "origin", "tiny")
    for index, text in enumerate(texts):
        e.submit(f"{WANTED}{index}", text, max_new_tokens=1)
        e.submit(f"beside{index}", text, max_new_tokens=4)
    e.run()
    assert sorted(file.name for file in states.iterdir()) == [f"{WANTED}{i}" for i in range(len(texts))]
    files = (np.fromfile(states / f"{WANTED}{i}", np.float32) for i in range(len(texts)))
    return [torch.from_numpy(file).view(len(text), -1) for file, text in zip(files, texts, strict=True)]


def in_serving(e: Engine, text: list[int]) -> torch.Tensor:
    """What the worker's drafters get of a prompt."""
    prefill, seen = e.worker.target.prefill, []

    def watched(batch: object) -> object:
        found = prefill(batch)
        seen.append(found[1].clone())
        return found

    e.worker.target.prefill = watched
    e.generate([text], max_new_tokens=1)
    del e.worker.target.prefill
    return torch.cat(seen)


@pytest.mark.parametrize(
    "name",
    [
        "Qwen3MoeForCausalLM",
        "GptOssForCausalLM",
        "DeepseekV2ForCausalLM",
        "Lfm2ForCausalLM",
        "Gemma4ForCausalLM",
        "Qwen3VLForConditionalGeneration",
    ],
)
def test_features_are_those_of_serving(name: str, tmp_path: Path) -> None:
    """And the vocabulary is the one that drafters are given there."""
    target, family = tmp_path / "target", FAMILIES[name]
    model = tiny_family(target, family)
    eagle3, dflash = tiny_eagle3(tmp_path / "eagle3", target), tiny_dflash(tmp_path / "dflash", target)
    with engine(target, **OPTIONS) as e:
        found = recorded(e, tmp_path / "states", TEXTS)
    flags = {"draft": dflash, "whiflash_eagle_draft": str(eagle3), "whiflash_router": "random"}
    with engine(target, whiflash=flags, **OPTIONS) as e:
        assert sorted({i for d in with_kv(e.worker.drafters).values() for i in d.captured_layers}) == CAPTURE
        served = [in_serving(e, text) for text in TEXTS]
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
        final = torch.nn.functional.linear(mine[-1, width:], origin.head)
        assert final.argmax() == model.logits(text).argmax()


class Taught(NamedTuple):
    """Answers of a teacher by their prompts' ids, and why others have none."""

    answers: dict[str, Answer]
    skipped: list[str]

    @classmethod
    def by(cls, teacher: Teacher, data: Data, prompts: list[PromptRow], keep_loops: bool) -> "Taught":
        skipped: list[str] = []
        generator = teacher.generator(data, seed=0, keep_loops=keep_loops)
        found = generator.run(iter(prompts), lambda row, why: skipped.append(f"{row.id}: {why}"))
        return cls({answer.prompt.id: answer for answer in found}, skipped)


def test_a_served_target_teaches_what_the_own_generator_does(tmp_path: Path) -> None:
    """Answers, looped and constrained ones too, and features of a target that both know."""
    path = tiny_target(tmp_path / "target", peaked=True)
    own = load_target(str(path), None, CAPTURE, Hardware(dtype="float32"))
    slots = [Slots(rows=3, capacity=140)]
    data = Data(prompts=[], max_new_tokens=60, slots=slots)
    schema = '{"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}'
    grammar = GrammarSpec("json", schema), tool_call_grammar([{"function": {"name": "f", "parameters": {}}}])
    prompts = [PromptRow(f"p{i}", "chat", text, None) for i, text in enumerate(TEXTS)]
    prompts += [PromptRow(f"g{i}", "json", TEXTS[1], spec) for i, spec in enumerate(grammar)]
    prompts.append(PromptRow("long", "chat", [65] * 81, None))
    with engine(path, skip_tokenizer_init=False, **OPTIONS) as e:
        inside = InProcess(e, tmp_path / "states")
        tokenizer = AutoTokenizer.from_pretrained(path)
        served = ServedTarget(inside, tokenizer, None, CAPTURE, own.hidden_size, torch.float32, slots)
        for keep_loops in (False, True):
            mine, theirs = (Taught.by(teacher, data, prompts, keep_loops) for teacher in (own, served))
            assert mine.skipped == theirs.skipped == ["long: 81 prompt tokens leave no room for 60 new ones"]
            assert mine.answers.keys() == theirs.answers.keys() == {"p0", "p1", "p2", "g0", "g1"}
            for name, answer in theirs.answers.items():
                assert answer._replace(states=None) == mine.answers[name]._replace(states=None)
                torch.testing.assert_close(answer.states, mine.answers[name].states, rtol=1e-4, atol=1e-4)
            assert any(answer.looped for answer in theirs.answers.values())
        texts = list(enumerate(TEXTS))
        for (key, wanted), (other, found) in zip(own.states(texts), served.states(texts), strict=True):
            assert key == other
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
        inside.recorder.tell(tmp_path / "origin", "tiny")
    told = ServedOrigin.read(path, "tiny", tmp_path / "origin", {}, own.model.final_norm, torch.float32)
    for name in ("embedding", "head"):
        assert torch.equal(getattr(told, name), getattr(own.model, name))
    for name in ("attention_shape", "intermediate_size", "rope", "max_positions", "eps", "num_layers"):
        assert getattr(told, name) == getattr(own.model, name)


def test_another_targets_vocabulary_is_refused(tmp_path: Path) -> None:
    small, large = (tiny_target(tmp_path / str(size), vocab_size=size) for size in (320, 384))
    origin = tmp_path / "origin"
    with pytest.raises(CheckpointError, match="is missing: run `whiflash train data`"):
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
