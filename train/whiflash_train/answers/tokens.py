"""Generated token ids in one small file, and features computed again from them.

Features take 7 KB a token and are cheap to recompute (one forward over a whole sequence); the token ids take two
bytes and were expensive to generate, so they are what is kept.

Two shards may have answered one prompt. A shard answers with continuous batching, so the shapes of its products depend
on what else it answers, and bf16 rounds them differently: where two tokens are nearly as good, greedy answers part.
"""

from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from whiflash_sglang.errors import ConfigError
from whiflash_sglang.files.jsonl import staged
from whiflash_sglang.files.progress import progress
from whiflash_train.answers.served import ServedTarget
from whiflash_train.answers.store import FeatureStore, SequenceRecord, unique_answers

_SMALL_VOCABULARY = 2**16


def export_tokens(stores: Sequence[FeatureStore], path: Path) -> int:
    """Write every stored sequence, one a prompt, to a compressed .npz; returns the number of tokens.

    Arrays: `tokens` (uint16 where the ids fit, else int32), `lengths`, `prompt_lengths`, `looped`, `finished`,
    `ids` and `categories`, one entry a sequence.
    """
    records = unique_answers(stores)
    tokens = torch.cat([store.read_tokens(record) for store, record in records]).numpy()
    small = int(tokens.max()) < _SMALL_VOCABULARY
    with staged(path) as place, place.open("wb") as file:
        np.savez_compressed(
            file,
            tokens=tokens.astype(np.uint16 if small else np.int32),
            lengths=np.array([record.length for _, record in records], dtype=np.int32),
            prompt_lengths=np.array([record.prompt_length for _, record in records], dtype=np.int32),
            looped=np.array([record.looped for _, record in records]),
            finished=np.array([record.finished for _, record in records]),
            ids=np.array([record.id for _, record in records]),
            categories=np.array([record.category for _, record in records]),
        )
    return len(tokens)


class Exported:
    """An `export_tokens` file: entry i of `columns` ("tokens" apart) and `tokens(i)` [N] int64 are a sequence.

    Raises ConfigError where the file is missing or is no such file.
    """

    def __init__(self, path: Path) -> None:
        try:
            with np.load(path) as file:
                self.columns = {name: file[name] for name in file.files}
            self.ids: list[str] = self.columns["ids"].tolist()
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(
                f"{path} holds no answers' token ids ({error}): give a file that `whiflash lab export` wrote"
            ) from None
        self._ends = np.cumsum(self.columns["lengths"], dtype=np.int64)

    def tokens(self, index: int) -> Tensor:
        """Prompt and answer."""
        end = int(self._ends[index])
        ids = self.columns["tokens"][end - int(self.columns["lengths"][index]) : end]
        return torch.from_numpy(ids.astype(np.int64))

    def copies(self) -> dict[str, list[int]]:
        """Sequences of every prompt, in their order. More than one where shards answered the same prompt."""
        places: dict[str, list[int]] = {}
        for index, name in enumerate(self.ids):
            places.setdefault(name, []).append(index)
        return places


def rebuild_features(
    path: Path, target: ServedTarget, store: FeatureStore, prompts: Collection[str] | None = None
) -> int:
    """Run the target over the sequences of an `export_tokens` file and append what `store` lacks; returns how many.

    Resumable: sequences that the store holds are passed over. The first of several answers to a prompt counts.

    Args:
        prompts: ids of those to take; None for all.
    """
    exported = Exported(path)
    columns = exported.columns
    stored = {record.id for record in store.records}
    missing = [
        indices[0]
        for name, indices in exported.copies().items()
        if name not in stored and (prompts is None or name in prompts)
    ]
    # All but the last token, which the target was never fed.
    texts = ((index, exported.tokens(index)[:-1].tolist()) for index in missing)
    with progress() as bar:
        task = bar.add_task("recomputing features", total=len(missing))
        for index, states in target.states(texts):
            tokens = exported.tokens(index)
            record = SequenceRecord(
                id=str(columns["ids"][index]),
                category=str(columns["categories"][index]),
                prompt_length=int(columns["prompt_lengths"][index]),
                length=len(tokens),
                looped=bool(columns["looped"][index]),
                finished=bool(columns["finished"][index]),
            )
            store.append(record, tokens.tolist(), states)
            bar.advance(task)
    return len(missing)
