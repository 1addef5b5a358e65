"""Get a target's answers, and the features of texts, from SGLang's offline engine."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from accelerate.utils import patch_environment
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from whiflash_sglang.checkpoints.fit import TargetShape
from whiflash_sglang.drafts.rounds import loop_start
from whiflash_sglang.errors import ConfigError, WhiflashError
from whiflash_train.answers.prompts import PromptRow
from whiflash_train.answers.store import SequenceRecord
from whiflash_train.config import Data, Hardware

if TYPE_CHECKING:
    from whiflash_train.engine.offline import OfflineEngine


class GeneratedAnswer(NamedTuple):
    """A finished generation: `tokens` of prompt and answer, `states` [len(tokens) - 1, captured + 1, H]."""

    record: SequenceRecord
    tokens: list[int]
    states: Tensor


@dataclass(frozen=True)
class ServedTarget:
    """The running target during data generation: it answers prompts and computes the features of texts.

    template: Jinja text that replaces the tokenizer's. capture: layers whose outputs are the features, ascending.
    """

    engine: "OfflineEngine"
    tokenizer: PreTrainedTokenizerBase
    template: str | None
    capture: list[int]
    hidden_size: int
    dtype: torch.dtype
    settings: Data

    def answers(
        self, prompts: Iterable[PromptRow], on_skip: Callable[[PromptRow, str], None], *, keep_loops: bool = False
    ) -> Iterator[GeneratedAnswer]:
        """Yield answers as they finish. `on_skip` receives the prompts that SGLang refuses, such as too long ones.

        A repetition at an answer's end (`loop_start`) is cut off unless `keep_loops`.
        """
        requests = (self._answer(prompt, on_skip, keep_loops) for prompt in prompts)
        yield from filter(None, self.engine.completed(requests, self.settings.at_once))

    def states(self, texts: Iterable[tuple[int, list[int]]]) -> Iterator[tuple[int, Tensor]]:
        """Yield each text's key, and its features and final states [T, captured + 1, H], in the order of completion."""

        async def one(key: int, text: list[int]) -> tuple[int, Tensor]:
            try:
                return key, await self._features(text)
            except ValueError as error:
                raise WhiflashError(f"text {key}, of {len(text)} tokens: {error}") from error

        yield from self.engine.completed((one(*text) for text in texts), self.settings.at_once)

    async def _features(self, tokens: list[int]) -> Tensor:
        states = await self.engine.features(tokens, self.dtype)
        return states.view(len(tokens), len(self.capture) + 1, self.hidden_size)

    async def _answer(
        self, prompt: PromptRow, on_skip: Callable[[PromptRow, str], None], keep_loops: bool
    ) -> GeneratedAnswer | None:
        try:
            answer, finished = await self.engine.answer(
                prompt.tokens,
                temperature=self.settings.temperature,
                max_new_tokens=self.settings.max_new_tokens,
                **(prompt.grammar or {}),
            )
            # The end token after a loop would hide it, since it breaks the repetition.
            loop = loop_start(answer[:-1] if finished else answer)
            if loop is not None and not keep_loops:
                answer, finished = answer[:loop], False
            tokens = [*prompt.tokens, *answer]
            # SGLang may refuse this text: its longest prompt is a few tokens shorter than prompt and answer.
            states = await self._features(tokens[:-1])
        except WhiflashError:  # this package's errors mean a broken engine, not a refused prompt
            raise
        except ValueError as error:
            on_skip(prompt, str(error))
            return None
        record = SequenceRecord(
            prompt.id, prompt.category, len(prompt.tokens), len(tokens), looped=loop is not None, finished=finished
        )
        return GeneratedAnswer(record, tokens, states)


@contextmanager
def serve(
    path: Path,
    name: str,
    capture: list[int],
    data: Data,
    hardware: Hardware,
    *,
    work: Path,
    template: Path | None,
    seed: int,
    shard: str = "answers",
) -> Iterator[ServedTarget]:
    """Run the target at `path` in an engine as `name`. It writes the drafters' first matrices to `work/target`.

    Raises:
        ConfigError: SGLang cannot capture these layers' outputs, or the engine does not start with these settings.
    """
    from whiflash_train.engine.offline import OfflineEngine

    shape = TargetShape.read(path / "config.json")
    if capture[-1] >= shape.num_layers - 1:
        raise ConfigError(f"capture {capture}: the layers that can be captured are 0 to {shape.num_layers - 2}")
    if hardware.device == "cpu" and torch.cuda.is_available():
        raise ConfigError(
            "hardware.device 'cpu': this machine has a GPU, and SGLang computes there; give 'cuda', or hide the GPU "
            "(CUDA_VISIBLE_DEVICES=)"
        )
    threads = {"OMP_NUM_THREADS": hardware.threads} if hardware.threads else {}
    with patch_environment(**threads):  # the engine's processes inherit it
        engine = OfflineEngine(
            path,
            capture,
            (name, work / "target", work / "passing" / shard),
            data.engine,
            dtype=hardware.dtype,
            device=hardware.device,
            random_seed=seed,
        )
    try:
        remote = bool(data.engine.get("trust_remote_code"))
        yield ServedTarget(
            engine,
            AutoTokenizer.from_pretrained(path, trust_remote_code=remote),
            None if template is None else template.read_text(encoding="utf-8"),
            capture,
            shape.hidden_size,
            hardware.place["dtype"],
            data,
        )
    finally:
        engine.close()
