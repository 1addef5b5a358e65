"""One buffer up and one down, whatever is in them."""

from typing import Any, NamedTuple

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from whiflash_sglang.device.transfers import Download, Upload

int32 = st.integers(-(2**31), 2**31 - 1)
float32 = st.floats(width=32, allow_nan=False)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.lists(int32, max_size=5), max_size=4), st.lists(st.lists(float32, max_size=5), max_size=4))
def test_what_is_sent_arrives(ints: list[list[int]], floats: list[list[float]]) -> None:
    upload = Upload()
    at = [upload.ints(own) for own in ints], [upload.floats(own) for own in floats]
    found = upload.send(torch.device("cpu"))
    assert [found[i].tolist() for i in at[0]] == ints
    assert [found[i].tolist() for i in at[1]] == floats
    assert all(found[i].dtype == torch.int64 for i in at[0])
    begins = [part.storage_offset() * part.itemsize for part in found if len(part)]
    assert not any(begin % 16 for begin in begins), "a kernel would be compiled anew"


def test_a_download_keeps_shapes_and_kinds() -> None:
    class Record(NamedTuple):
        counts: Any
        tokens: Any
        entropy: Any
        nothing: Any
        absent: Any = None

    record = Record(
        torch.tensor([2, 1], dtype=torch.int32),
        torch.tensor([[1, 2], [3, 4]]),
        torch.tensor([0.5, float("inf")]),
        torch.zeros((2, 0)),
    )
    download = Download(record)
    wanted = Record([2, 1], [[1, 2], [3, 4]], [0.5, float("inf")], [[], []])
    assert download.read() == wanted
    assert torch.equal(download[download.at.tokens], record.tokens)
    assert download.copy_to_host(torch.clone).read() == wanted, "of the copy"
    shared = Download(record._replace(absent=record.counts))
    assert shared.read() == wanted._replace(absent=[2, 1])
    assert len(shared.packed) == len(download.packed), "what two fields share is packed once"
