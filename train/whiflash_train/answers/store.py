"""An append-only store of generated sequences and the target's features, safe against being killed.

Layout of a directory: `tokens.bin` (int32), `features.bin` (bf16, `[sum of lengths - 1, vectors, H]`), and
`index.jsonl`, one line per sequence, written last, when the rest is on the disk. Reopening drops sequences that are
missing in the index or incomplete in the other files, so readers and resumed writers see whole sequences only.
"""

import json
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from filelock import Timeout
from torch import Tensor

from whiflash_sglang.errors import ConfigError
from whiflash_sglang.files.disk import locked
from whiflash_sglang.files.jsonl import lines_of, read_json, read_json_file, write_whole
from whiflash_train.config import TrainConfig

logger = logging.getLogger(__name__)
META = "meta.json"


class SequenceRecord(NamedTuple):
    """One line of the index. length: of prompt and answer. looped: the answer looped. `append` fills in the offsets."""

    id: str
    category: str
    prompt_length: int
    length: int
    looped: bool
    finished: bool
    token_offset: int = 0
    feature_offset: int = 0

    @property
    def feature_length(self) -> int:
        """Number of feature rows, one less than tokens: the target never read the last token."""
        return self.length - 1


class Sequence(NamedTuple):
    """A stored sequence: `tokens` [N] int64, `features` [N - 1, vectors - 1, H], final states `final` [N - 1, H]."""

    record: SequenceRecord
    tokens: Tensor
    features: Tensor
    final: Tensor


class FeatureStore:
    """Stores sequences on disk with hidden states of size `hidden` for each token: the outputs of `layers`, then the
    final state. `vectors` counts all of them.
    """

    def __init__(self, path: Path, *, hidden: int, layers: list[int]) -> None:
        """Open or create the store; `records` has the sequences that are complete in all files.

        Raises `ValueError` if the directory was written with other layers or sizes, or its `meta.json` is damaged.
        """
        path.mkdir(parents=True, exist_ok=True)
        self.path, self.vectors, self.hidden, self.layers = path, len(layers) + 1, hidden, layers
        shape = {"vectors": self.vectors, "hidden": hidden, "layers": layers}
        if not (path / META).exists():
            write_whole(path / META, json.dumps(shape))
        elif (stored := _shape(path)) != shape:
            raise ValueError(f"{path} holds features of {stored}, this run needs {shape}; use another directory")
        self._row_bytes = self.vectors * hidden * 2
        self.records = _read_index(path / "index.jsonl")
        named = len(self.records)
        while any(end > (file.stat().st_size if file.exists() else 0) for file, end in self._ends().items()):
            self.records.pop()
        if dropped := named - len(self.records):
            logger.warning("%s: its files do not hold the last %d sequences of its index", path, dropped)

    @property
    def bytes_used(self) -> int:
        """Bytes that the tokens and features of all indexed sequences take."""
        return sum(self._ends().values())

    def truncate_to_index(self) -> None:
        """Drop incomplete sequences of a killed writer. Call once, before the first `append`."""
        for path, end in self._ends().items():
            with path.open("ab") as file:
                file.truncate(end)
        index = self.path / "index.jsonl"
        whole = "".join(json.dumps(record._asdict()) + "\n" for record in self.records)
        if index.exists() and index.read_text(encoding="utf-8") != whole:
            write_whole(index, whole)

    def append(self, record: SequenceRecord, tokens: list[int], states: Tensor) -> None:
        """Add one sequence: `states` [length - 1, vectors, H]. Offsets in `record` are filled in here.

        Raises `OSError` (no space); all earlier sequences stay intact.
        """
        record = record._replace(token_offset=self._token_end(), feature_offset=self._feature_end())
        if states.shape != (record.feature_length, self.vectors, self.hidden):
            raise ValueError(f"{record.id}: features {tuple(states.shape)} do not fit a length of {record.length}")
        payload = states.to(torch.bfloat16).contiguous().cpu().view(torch.int16).numpy()
        _append(self.path / "tokens.bin", np.asarray(tokens, dtype=np.int32).tobytes())
        _append(self.path / "features.bin", payload.tobytes())
        _append(self.path / "index.jsonl", (json.dumps(record._asdict()) + "\n").encode())
        self.records.append(record)

    def read(self, record: SequenceRecord) -> Sequence:
        """Read the sequence of `record` into memory."""
        raw = np.fromfile(
            self.path / "features.bin",
            dtype=np.int16,
            count=record.feature_length * self.vectors * self.hidden,
            offset=record.feature_offset * self._row_bytes,
        )
        states = torch.from_numpy(raw).view(torch.bfloat16).view(-1, self.vectors, self.hidden)
        return Sequence(record, self.read_tokens(record), states[:, :-1], states[:, -1])

    def read_tokens(self, record: SequenceRecord) -> Tensor:
        """Read the token ids [length] int64 of the sequence of `record`."""
        tokens = np.fromfile(
            self.path / "tokens.bin", dtype=np.int32, count=record.length, offset=record.token_offset * 4
        )
        return torch.from_numpy(tokens).long()

    def _ends(self) -> dict[Path, int]:
        tokens, features = self._token_end() * 4, self._feature_end() * self._row_bytes
        return {self.path / "tokens.bin": tokens, self.path / "features.bin": features}

    def _token_end(self) -> int:
        return self.records[-1].token_offset + self.records[-1].length if self.records else 0

    def _feature_end(self) -> int:
        return self.records[-1].feature_offset + self.records[-1].feature_length if self.records else 0


def has_answers(path: Path) -> bool:
    """Whether there are sequences in a directory, which need not exist."""
    return bool(_read_index(path / "index.jsonl"))


def unique_answers(stores: Iterable[FeatureStore]) -> list[tuple[FeatureStore, SequenceRecord]]:
    """Return the answers of `stores`, one per prompt; if several shards answered it, the first shard's answer.

    Two answers to a prompt differ only by rounding; with both, the prompt would count twice.
    """
    first_answers: dict[str, tuple[FeatureStore, SequenceRecord]] = {}
    for store in stores:
        for record in store.records:
            first_answers.setdefault(record.id, (store, record))
    return list(first_answers.values())


@contextmanager
def alone(directory: Path, name: str = ".lock") -> Iterator[None]:
    """Lock a directory by its file `name`; makes it if missing. Raises ConfigError if another run has the lock."""
    directory.mkdir(parents=True, exist_ok=True)
    try:
        lock = locked(directory, name).acquire(blocking=False)
    except Timeout:
        raise ConfigError(
            f"another run works in {directory}: two would mix what they write; wait for it, or end it"
        ) from None
    with lock:
        yield


def _append(path: Path, data: bytes) -> None:
    with path.open("ab") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _shape(directory: Path) -> dict[str, Any]:
    """Read a store's `META`, with all of its keys. Raises ConfigError if it is damaged."""
    try:
        stored = read_json_file(directory / META)
        return {"vectors": stored["vectors"], "hidden": int(stored["hidden"]), "layers": stored["layers"]}
    except (ValueError, TypeError, LookupError) as error:
        raise ConfigError(
            f"{directory / META} is damaged ({error}): remove it; the command that writes {directory.name} restores it"
        ) from None


def _read_index(path: Path) -> list[SequenceRecord]:
    if not path.exists():
        return []
    records = []
    for _, line in lines_of(path.read_text(encoding="utf-8")):
        try:
            records.append(SequenceRecord(**read_json(line)))
        except (ValueError, TypeError):
            break  # a half-written last line of a killed run
    return records


def open_stores(config: TrainConfig) -> list[FeatureStore]:
    """Open every shard that `whiflash train --step data` has written so far under the work directory.

    Raises `ValueError` if a shard has other layers than the configuration captures.
    """
    return [
        FeatureStore(path, hidden=_shape(path)["hidden"], layers=config.capture)
        for path in sorted((config.work / "data").glob("shard*"))
    ]
