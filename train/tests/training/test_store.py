"""The store survives being killed in the middle of a write."""

import os
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from whiflash_sglang.errors import ConfigError
from whiflash_train.answers.store import FeatureStore, SequenceRecord


def record(name: str, length: int) -> SequenceRecord:
    return SequenceRecord(name, "chat", 3, length, False, True, 0, 0)


def opened(path: Path) -> FeatureStore:
    return FeatureStore(path, hidden=4, layers=[0, 1])


def fill(path: Path, lengths: list[int]) -> list[torch.Tensor]:
    store = opened(path)
    states = [torch.randn(length - 1, 3, 4).bfloat16() for length in lengths]
    for index, (length, state) in enumerate(zip(lengths, states, strict=True)):
        store.append(record(f"s{index}", length), list(range(length)), state)
    return states


def test_a_half_written_sequence_disappears_and_writing_goes_on(tmp_path: Path) -> None:
    states = fill(tmp_path, [5, 9])
    for name in ("tokens.bin", "features.bin"):
        with (tmp_path / name).open("ab") as file:
            file.write(b"\x01" * 37)
    with (tmp_path / "index.jsonl").open("ab") as file:
        file.write(b'{"id": "s2", "categ')
    store, index = opened(tmp_path), tmp_path / "index.jsonl"
    files = [index.stat().st_ino]
    for _ in range(2):
        store.truncate_to_index()
        files.append(index.stat().st_ino)
    assert files[0] != files[1] == files[2], "it is replaced if it is torn, and never written over"
    extra = torch.randn(6, 3, 4).bfloat16()
    store.append(record("s2", 7), list(range(7)), extra)
    again = opened(tmp_path)
    assert [found.id for found in again.records] == ["s0", "s1", "s2"]
    assert torch.equal(again.read(again.records[1]).features, states[1][:, :2])
    assert torch.equal(again.read(again.records[2]).final, extra[:, 2])
    assert again.read(again.records[1]).tokens.tolist() == list(range(9))


@pytest.mark.parametrize("name", ["tokens.bin", "features.bin"])
def test_a_sequence_that_is_not_there_whole_is_dropped(tmp_path: Path, name: str) -> None:
    states = fill(tmp_path, [5, 9, 7])
    os.truncate(tmp_path / name, (tmp_path / name).stat().st_size // 2)
    store = opened(tmp_path)
    assert [found.id for found in store.records] == ["s0"]
    store.truncate_to_index()
    store.append(record("s3", 5), list(range(5)), states[0])
    again = opened(tmp_path)
    assert [again.read(found).final.tolist() for found in again.records] == [states[0][:, 2].tolist()] * 2


def test_the_index_names_what_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, synced = opened(tmp_path), []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(Path(f"/proc/self/fd/{file}").readlink().name))
    store.append(record("s", 5), list(range(5)), torch.zeros(4, 3, 4))
    assert synced == ["tokens.bin", "features.bin", "index.jsonl"]


def test_a_layout_is_written_whole_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    with patch.object(Path, "replace", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        opened(tmp_path)
    assert not (tmp_path / "meta.json").exists()
    for text in ("", "{}", "[1]"):
        (tmp_path / "meta.json").write_text(text)
        with pytest.raises(ConfigError, match=r"meta\.json is damaged"):
            opened(tmp_path)


def test_another_layout_is_refused(tmp_path: Path) -> None:
    fill(tmp_path, [5])
    with pytest.raises(ValueError, match="use another directory"):
        FeatureStore(tmp_path, hidden=4, layers=[0, 2])


def test_features_of_the_wrong_length_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="do not fit a length of 5"):
        opened(tmp_path).append(record("s", 5), list(range(5)), torch.zeros(5, 3, 4))
