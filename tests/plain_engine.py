"""Stands for SGLang's offline engine where a test is of training: answers of tiny dense targets, a token at a time."""

import asyncio
import json
import sys
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from whiflash_train.origin import ORIGIN, vocabulary_file
from whiflash_train.target import TargetModel

OFFLINE = "whiflash_train.engine.offline"


class PlainEngine:
    """As `offline.OfflineEngine`, without grammars."""

    def __init__(
        self, model: Path, layers: list[int], place: tuple[str, Path, Path], arguments: dict[str, Any], **chosen: Any
    ) -> None:
        self.target, self.layers = _target(model, chosen["dtype"]), layers
        name, origin, _ = place
        origin.mkdir(parents=True, exist_ok=True)
        (origin / ORIGIN).write_text(json.dumps({"target": name, "ranks": 1, "embedding_scale": 1.0}))
        rows = {"embedding": self.target.embedding.clone(), "head": self.target.head.clone()}
        save_file(rows, vocabulary_file(origin, 0))

    async def answer(
        self, tokens: list[int], *, temperature: float, max_new_tokens: int, **_: Any
    ) -> tuple[list[int], bool]:
        if len(tokens) + max_new_tokens > self.target.max_positions:
            raise ValueError(f"{len(tokens)} and {max_new_tokens} tokens exceed the context")
        answer = _answer(self.target, tuple(tokens), temperature, max_new_tokens)
        return list(answer), answer[-1] == self.target.config["eos_token_id"]

    async def features(self, tokens: list[int], dtype: torch.dtype) -> torch.Tensor:
        return self.target.states(tokens, self.layers).flatten(1)

    def completed(self, requests: Iterator[Coroutine[Any, Any, Any]], at_once: int) -> Iterator[Any]:
        for request in requests:
            yield asyncio.run(request)

    def close(self) -> None:
        pass


@cache
def _target(model: Path, dtype: str) -> TargetModel:
    return TargetModel(model, device=torch.device("cpu"), dtype=getattr(torch, dtype))


@cache
def _answer(target: TargetModel, prompt: tuple[int, ...], temperature: float, longest: int) -> list[int]:
    random, answer = torch.Generator().manual_seed(0), list[int]()
    while len(answer) < longest and answer[-1:] != [target.config["eos_token_id"]]:
        logits = target.next_logits([*prompt, *answer])
        chances = (logits / temperature).softmax(-1) if temperature else logits == logits.max()
        answer.append(int(torch.multinomial(chances.float(), 1, generator=random)))
    return answer


@contextmanager
def plain_engine() -> Iterator[None]:
    """Training's engine is a `PlainEngine`; SGLang is not imported for it."""
    module = ModuleType(OFFLINE)
    vars(module).update(OfflineEngine=PlainEngine)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, OFFLINE, module)
        yield
