"""Answers and features of a target that SGLang runs and captures."""

from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from whiflash_sglang.checkpoints.fit import TargetShape
from whiflash_sglang.compat.forward.captured import may_capture
from whiflash_sglang.compat.training.offline import OfflineEngine, Place
from whiflash_sglang.errors import ConfigError, WhiflashError
from whiflash_sglang.models.config_json import read_json_config
from whiflash_sglang.train.answers.generate import LOOP_CHECK_EVERY, Answer
from whiflash_sglang.train.answers.prompts import GrammarSpec, PromptRow, server_parameter
from whiflash_sglang.train.config import Data, Slots, TrainConfig
from whiflash_sglang.train.rounds import first_loop


@dataclass(frozen=True)
class ServedTarget:
    """A target in SGLang's offline engine, with what `LoadedTarget` has."""

    engine: OfflineEngine
    tokenizer: PreTrainedTokenizerBase
    template: str | None
    capture: list[int]
    hidden_size: int
    dtype: torch.dtype
    slots: Sequence[Slots]

    def generator(self, settings: Data, *, seed: int, keep_loops: bool) -> "ServedGenerator":
        """What answers prompts. The engine was started with its seed."""
        return ServedGenerator(self, settings, keep_loops)

    def states(self, texts: Iterable[tuple[int, list[int]]]) -> Iterator[tuple[int, Tensor]]:
        """Features and final states [T, captured + 1, H] of texts, with their keys, as they are done."""

        async def one(key: int, text: list[int]) -> tuple[int, Tensor]:
            try:
                return key, await self.features(text)
            except ValueError as error:
                raise WhiflashError(f"text {key}, of {len(text)} tokens: {error}") from error

        yield from self.engine.completed((one(*text) for text in texts), self.at_once)

    @property
    def at_once(self) -> int:
        """Requests under way."""
        return sum(slot.rows for slot in self.slots)

    async def features(self, tokens: list[int]) -> Tensor:
        """[T, captured + 1, H] of one text."""
        found = await self.engine.features(tokens, self.dtype)
        return found.view(len(tokens), len(self.capture) + 1, self.hidden_size)

    def close(self) -> None:
        """End the engine."""
        self.engine.close()


def start(config: TrainConfig, path: Path, shard: str) -> ServedTarget:
    """The target at `path` in an engine. What drafters take over from it goes to `<work>/target`.

    Raises:
        ConfigError: SGLang does not know its layers' outputs, or the engine cannot be started so.
    """
    architecture = (read_json_config(path).get("architectures") or ["?"])[0]
    shape = TargetShape.read(path / "config.json")
    if not may_capture(architecture):
        raise ConfigError(
            f"{path} is a {architecture}, whose layers' outputs SGLang cannot capture: no drafter can be trained for it"
        )
    if config.capture[-1] >= shape.num_layers - 1:
        raise ConfigError(
            f"capture {config.capture}: the layers that can be captured are 0 to {shape.num_layers - 2}"
        )
    engine = OfflineEngine(
        path,
        config.capture,
        Place(config.target, config.origin, config.work / "passing" / shard),
        config.data.engine,
        dtype=config.hardware.dtype,
        device=config.hardware.device,
        random_seed=config.seed,
    )
    template, remote = config.chat_template, bool(config.data.engine.get("trust_remote_code"))
    return ServedTarget(
        engine,
        AutoTokenizer.from_pretrained(path, trust_remote_code=remote),
        None if template is None else template.read_text(encoding="utf-8"),
        config.capture,
        shape.hidden_size,
        config.hardware.torch_dtype,
        config.data.slots,
    )


@dataclass(frozen=True)
class _Skipped:
    prompt: PromptRow
    reason: str


class ServedGenerator:
    """Answers a stream of prompts as `Generator` does, `data.slots` rows at once and no longer than the longest."""

    def __init__(self, target: ServedTarget, settings: Data, keep_loops: bool) -> None:
        """A row that falls into a loop is cut there, as far as the own generator would have gone on."""
        self._target, self._settings, self._keep_loops = target, settings, keep_loops
        self._capacity = max(slot.capacity for slot in target.slots)

    def run(
        self, prompts: Iterator[PromptRow], on_skip: Callable[[PromptRow, str], None]
    ) -> Iterator[Answer]:
        """Yield answers as they finish. Prompts that are too long, or that SGLang refuses, go to `on_skip`."""
        new = self._settings.max_new_tokens

        def fitting() -> Iterator[Coroutine[Any, Any, Answer | _Skipped]]:
            for prompt in prompts:
                length = len(prompt.tokens)
                if length + new <= self._capacity:
                    yield self._answer(prompt)
                else:
                    on_skip(prompt, f"{length} prompt tokens leave no room for {new} new ones")

        for found in self._target.engine.completed(fitting(), self._target.at_once):
            if isinstance(found, _Skipped):
                on_skip(found.prompt, found.reason)
            else:
                yield found

    async def _answer(self, prompt: PromptRow) -> Answer | _Skipped:
        try:
            answer, finished = await self._target.engine.answer(
                prompt.tokens, **self._sampling(prompt.grammar)
            )
            loop = first_loop(answer, LOOP_CHECK_EVERY, ended=finished)
            if loop is not None:
                finished = finished and loop.seen == len(answer)
                answer = answer[: loop.seen if self._keep_loops else loop.start]
            tokens = [*prompt.tokens, *answer]
            # SGLang takes prompts that are a few tokens shorter than what an answer may fill.
            states = await self._target.features(tokens[:-1])
        except WhiflashError:  # of this package: no refusal of SGLang's
            raise
        except ValueError as error:
            return _Skipped(prompt, str(error))
        return Answer(prompt, tokens, states, looped=loop is not None, finished=finished)

    def _sampling(self, grammar: GrammarSpec | None) -> dict[str, Any]:
        settings = self._settings
        chosen = {"temperature": settings.temperature, "max_new_tokens": settings.max_new_tokens}
        return chosen | ({} if grammar is None else server_parameter(grammar))
