"""The noise of seeded sampling: MurmurHash3 in torch against the algorithm on bytes."""

import struct

import torch

from whiflash_cpu.spec_ops import murmur_hash32

LOW = 0xFFFFFFFF


def rotate(x: int, bits: int) -> int:
    return ((x << bits) | (x >> (32 - bits))) & LOW


def murmur3(data: bytes) -> int:
    """MurmurHash3_x86_32 with seed 0, for lengths divisible by 4."""
    h = 0
    for (k,) in struct.iter_unpack("<I", data):
        k = rotate(k * 0xCC9E2D51 & LOW, 15) * 0x1B873593 & LOW
        h = (rotate(h ^ k, 13) * 5 + 0xE6546B64) & LOW
    h ^= len(data)
    h = (h ^ (h >> 16)) * 0x85EBCA6B & LOW
    h = (h ^ (h >> 13)) * 0xC2B2AE35 & LOW
    return h ^ (h >> 16)


def test_published_vector() -> None:
    assert murmur3(b"test") == 0xBA6BD213


def test_every_seed_position_and_column() -> None:
    seeds, positions, columns = [0, 1, 42, 2**40 + 7, 2**64 - 1], [0, 3, 100, 2047, 31], [0, 1, 319, 49151]
    found = murmur_hash32(torch.tensor(seeds, dtype=torch.uint64), torch.tensor(positions), torch.tensor(columns))
    assert found.dtype == torch.uint32
    assert found.tolist() == [
        [murmur3(struct.pack("<QII", seed, position, column)) for column in columns]
        for seed, position in zip(seeds, positions, strict=True)
    ]
