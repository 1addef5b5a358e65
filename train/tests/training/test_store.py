"""The store survives being killed in the middle of a write."""

from pathlib import Path

import pytest
import torch

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
    store = opened(tmp_path)
    store.truncate_to_index()
    extra = torch.randn(6, 3, 4).bfloat16()
    store.append(record("s2", 7), list(range(7)), extra)
    again = opened(tmp_path)
    assert [found.id for found in again.records] == ["s0", "s1", "s2"]
    assert torch.equal(again.read(again.records[1]).features, states[1][:, :2])
    assert torch.equal(again.read(again.records[2]).final, extra[:, 2])
    assert again.read(again.records[1]).tokens.tolist() == list(range(9))


def test_another_layout_is_refused(tmp_path: Path) -> None:
    fill(tmp_path, [5])
    with pytest.raises(ValueError, match="use another directory"):
        FeatureStore(tmp_path, hidden=4, layers=[0, 2])


def test_features_of_the_wrong_length_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="do not fit a length of 5"):
        opened(tmp_path).append(record("s", 5), list(range(5)), torch.zeros(5, 3, 4))
