"""Generated token ids in one small file, and features computed anew from them.

Features take 7 KB a token and are cheap to recompute (one forward over a whole sequence); the token ids take two
bytes and were expensive to generate, so they are what is kept.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from rich.progress import track
from torch import Tensor

from whiflash_sglang.models.target import TargetModel, causal_attention
from whiflash_sglang.train.store import FeatureStore, SequenceRecord

_SMALL_VOCABULARY = 2**16


def export_tokens(stores: Sequence[FeatureStore], path: Path) -> int:
    """Write every stored sequence to a compressed .npz; returns the number of tokens.

    Arrays: `tokens` (uint16 where the ids fit, else int32), `lengths`, `prompt_lengths`, `looped`, `finished`,
    `ids` and `categories`, one entry a sequence.
    """
    records = [(store, record) for store in stores for record in store.records]
    tokens = torch.cat([store.read_tokens(record) for store, record in records]).numpy()
    small = int(tokens.max()) < _SMALL_VOCABULARY
    staged = path.with_suffix(".partial.npz")
    np.savez_compressed(
        staged,
        tokens=tokens.astype(np.uint16 if small else np.int32),
        lengths=np.array([record.length for _, record in records], dtype=np.int32),
        prompt_lengths=np.array([record.prompt_length for _, record in records], dtype=np.int32),
        looped=np.array([record.looped for _, record in records]),
        finished=np.array([record.finished for _, record in records]),
        ids=np.array([record.id for _, record in records]),
        categories=np.array([record.category for _, record in records]),
    )
    os.replace(staged, path)
    return len(tokens)


def rebuild_features(path: Path, target: TargetModel, store: FeatureStore, capture: Sequence[int]) -> int:
    """Run the target over the sequences of an `export_tokens` file and append what `store` lacks; returns how many.

    Resumable: sequences that the store holds are passed over.
    """
    with np.load(path) as file:
        columns = {name: file[name] for name in file.files}
    known = {record.id for record in store.records}
    starts = np.concatenate([[0], np.cumsum(columns["lengths"])[:-1]])
    missing = [index for index, name in enumerate(columns["ids"].tolist()) if name not in known]
    for index in track(missing, description="recomputing features"):
        start, length = int(starts[index]), int(columns["lengths"][index])
        tokens = torch.from_numpy(columns["tokens"][start : start + length].astype(np.int64))
        record = SequenceRecord(
            id=str(columns["ids"][index]),
            category=str(columns["categories"][index]),
            prompt_length=int(columns["prompt_lengths"][index]),
            length=length,
            looped=bool(columns["looped"][index]),
            finished=bool(columns["finished"][index]),
            token_offset=0,
            feature_offset=0,
        )
        store.append(record, tokens.tolist(), _states(target, tokens[:-1], capture))
    return len(missing)


def _states(target: TargetModel, tokens: Tensor, capture: Sequence[int]) -> Tensor:
    """Captured features and final states of one sequence, [T, captured + 1, H]."""
    tokens = tokens.to(target.device)
    attend = causal_attention(len(tokens), target.device, target.dtype)
    output = target.forward(tokens, torch.arange(len(tokens), device=tokens.device), attend, capture)
    return torch.cat([output.features, output.final[:, None]], dim=1)
