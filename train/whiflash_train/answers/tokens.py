"""Export generated token ids to one small file, and recompute their features.

Features take 7 KB per token and are cheap to recompute (one forward over a whole sequence). Token ids take two bytes
and are expensive to generate, so the file holds only them.

Two shards may have answered the same prompt differently. The shapes of a shard's products depend on its
other requests (continuous batching), and bf16 rounds differently: greedy answers diverge where two tokens are nearly
equally likely.
"""

import zlib
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from whiflash_sglang.errors import ConfigError
from whiflash_sglang.files.jsonl import NOT_AS_WRITTEN, staged
from whiflash_sglang.files.progress import progress
from whiflash_train.answers.served import ServedTarget
from whiflash_train.answers.store import FeatureStore, SequenceRecord, unique_answers

_SMALL_VOCABULARY = 2**16
_FIELDS = {"lengths": "length", "prompt_lengths": "prompt_length", "ids": "id", "categories": "category"}
_FIELDS |= {"looped": "looped", "finished": "finished"}
"""Array of a file, with one entry per sequence → the field of `SequenceRecord` that it holds."""


def export_tokens(stores: Sequence[FeatureStore], path: Path) -> int:
    """Write the stored sequences, one for each prompt, to a compressed .npz; returns the number of tokens.

    Arrays: `tokens` (uint16 if the ids fit, else int32), and the keys of `_FIELDS`.
    """
    records = unique_answers(stores)
    columns: dict[str, Any] = {
        name: np.array([getattr(record, field) for _, record in records]) for name, field in _FIELDS.items()
    }
    tokens = torch.cat([store.read_tokens(record) for store, record in records]).numpy()
    small = int(tokens.max()) < _SMALL_VOCABULARY
    with staged(path) as place, place.open("wb") as file:
        np.savez_compressed(file, tokens=tokens.astype(np.uint16 if small else np.int32), **columns)
    return len(tokens)


class Exported:
    """Reads a file of `export_tokens`. Sequence i is entry i of `columns` (except "tokens") and `tokens(i)` [N] int64.

    Raises ConfigError if the file is missing or has another content.
    """

    def __init__(self, path: Path, columns: Iterable[str] = ("lengths", "prompt_lengths", "ids")) -> None:
        try:
            with np.load(path) as file:
                self.columns = {name: file[name] for name in ("tokens", *columns)}
            self.ids: list[str] = self.columns["ids"].tolist()
            self._ends = np.cumsum(self.columns["lengths"], dtype=np.int64)
        except (*NOT_AS_WRITTEN, EOFError, BadZipFile, zlib.error) as error:
            raise ConfigError(
                f"{path} holds no answers' token ids ({error}): give a file that `whiflash lab export` wrote"
            ) from None

    def tokens(self, index: int) -> Tensor:
        """Return the token ids [N] int64 of sequence `index`, prompt and answer."""
        end = int(self._ends[index])
        ids = self.columns["tokens"][end - int(self.columns["lengths"][index]) : end]
        return torch.from_numpy(ids.astype(np.int64))

    def firsts(self) -> list[int]:
        """Return the index of each prompt's first sequence, ascending. Shards may have answered the same prompt."""
        return sorted(np.unique(self.columns["ids"], return_index=True)[1].tolist())


def rebuild_features(
    path: Path, target: ServedTarget, store: FeatureStore, prompts: Collection[str] | None = None
) -> int:
    """Run the target over the sequences of an `export_tokens` file, and append those that `store` lacks.

    Returns the number of appended sequences. A rerun skips stored sequences. Each prompt's first answer is used.

    Args:
        prompts: ids of the prompts to use; None for all.
    """
    exported = Exported(path, _FIELDS)
    stored = {record.id for record in store.records}
    wanted = {name for name in exported.ids if name not in stored and (prompts is None or name in prompts)}
    missing = [index for index in exported.firsts() if exported.ids[index] in wanted]
    # The last token is left out, because the target never read it when it generated the answer.
    texts = ((index, exported.tokens(index)[:-1].tolist()) for index in missing)
    with progress() as bar:
        task = bar.add_task("recomputing features", total=len(missing))
        for index, states in target.states(texts):
            tokens = exported.tokens(index)
            fields = {field: exported.columns[name][index].item() for name, field in _FIELDS.items()}
            store.append(SequenceRecord(**fields), tokens.tolist(), states)
            bar.advance(task)
    return len(missing)
