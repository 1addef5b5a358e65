"""Transfers between host and device in a round: one buffer up, one down. Imports no SGLang."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch

Ints = Sequence[int] | np.ndarray[Any, Any]
Floats = Sequence[float] | np.ndarray[Any, Any]
RecordT = TypeVar("RecordT", bound=NamedTuple)


class Upload:
    """Numbers of the host on their way to the device, all in one transfer.

    Fill it with `ints` and `floats`, each of which says where its numbers will be, and with `then`; at last `send`.
    """

    def __init__(self) -> None:
        self._ints: list[Ints] = []
        self._floats: list[Floats] = []
        self._then: list[tuple[int, int, Callable[[torch.Tensor], object]]] = []  # list, index in it, use

    def ints(self, values: Ints) -> int:
        """Returns their index in the first list of `send`."""
        self._ints.append(values)
        return len(self._ints) - 1

    def floats(self, values: Floats) -> int:
        """Returns their index in the second list of `send`."""
        self._floats.append(values)
        return len(self._floats) - 1

    def then(self, values: Ints, use: Callable[[torch.Tensor], object]) -> None:
        """`use` is called with `values` on the device when they are sent, in the order of these calls."""
        self._then.append((0, self.ints(values), use))

    def then_floats(self, values: Floats, use: Callable[[torch.Tensor], object]) -> None:
        """As `then`, of floats."""
        self._then.append((1, self.floats(values), use))

    def send(self, device: torch.device) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The numbers on `device`: int64 and float32 views of one buffer.

        One transfer from pinned memory on CUDA, in the order of the current stream, which the host does not wait for:
        the allocator of pinned memory keeps the buffer until it is done.
        """
        # Every list begins at a multiple of 16 bytes: a kernel is compiled again for a pointer that does not.
        lists: tuple[tuple[Sequence[Ints | Floats], int], ...] = ((self._ints, 2), (self._floats, 4))
        sizes = [[-(-len(part) // step) * step for part in parts] for parts, step in lists]
        ints, floats = (sum(part) for part in sizes)
        # Indices must be int64, and are so from the start: a conversion would be a launch.
        # One number at least: what is empty cannot be viewed as another type.
        pinned = device.type == "cuda"
        packed = torch.empty(max(ints + (floats + 1) // 2, 1), dtype=torch.int64, pin_memory=pinned)
        host = packed.numpy()
        _fill(host, self._ints, sizes[0])
        _fill(host[ints:].view(np.float32), self._floats, sizes[1])
        packed = packed.to(device, non_blocking=True)
        *as_ints, rest = _firsts(packed, self._ints, sizes[0])
        on_device = as_ints, _firsts(rest.view(torch.float32), self._floats, sizes[1])[:-1]
        for kind, at, use in self._then:
            use(on_device[kind][at])
        return on_device


def _fill(place: np.ndarray[Any, Any], parts: Sequence[Ints | Floats], sizes: Sequence[int]) -> None:
    """Put `parts` into `place`, `sizes` apart."""
    begin = 0
    for part, size in zip(parts, sizes, strict=True):
        place[begin : begin + len(part)] = part
        begin += size


def _firsts(packed: torch.Tensor, parts: Sequence[Ints | Floats], sizes: Sequence[int]) -> list[torch.Tensor]:
    """Contents of `packed` for each of `parts`, whose beginnings are `sizes` apart, and what comes after them."""
    lengths = [n for part, size in zip(parts, sizes, strict=True) for n in (len(part), size - len(part))]
    return list(torch.split_with_sizes(packed, [*lengths, len(packed) - sum(sizes)])[::2])


def sent(values: Ints, device: torch.device) -> torch.Tensor:
    """`values` on `device`, [N] int64: an `Upload` of their own, which the host does not wait for."""
    upload = Upload()
    upload.ints(values)
    return upload.send(device)[0][0]


def masks_of_places(rows: int, words: int) -> int:
    """Masks of so many words in whose place `mask_places` of so many rows are."""
    return -(-2 * rows // words)


def mask_places(masks: torch.Tensor, rows: int) -> torch.Tensor:
    """[rows] int64 at the beginning of masks [M, words] int32, contiguous: which of them each packed row has. So one
    transfer brings both.
    """
    return masks.view(-1)[: 2 * rows].view(torch.int64)


class Download(Generic[RecordT]):
    """Tensors of the device on their way to the host, packed into one buffer of its own: no later round writes to it.

    It is SGLang's `DeviceAuxiliaryOutput` and, when the copy has come, its `HostAuxiliaryOutput`.

    packed: [N] int32 on the device, with every tensor as an int of 32 or 64 bits or a float of 32. at: each field's
    place. learn: takes what is read, and what the scheduler kept of each request's tokens; set by whoever lets SGLang
    carry the results. record: tensors of 64-bit ints, of other ints whose values fit into 32, or of floats, or None.
    """

    def __init__(self, record: RecordT) -> None:
        fields = {name: field for name, field in record._asdict().items() if field is not None}
        # Fields of 64 bits come first: they must start at an even place. A tensor of several fields is packed once.
        every = {id(field): field for field in fields.values()}
        ordered = sorted(every.values(), key=lambda field: field.dtype != torch.int64)
        parts = [field.reshape(-1).to(_sent(field.dtype)).view(torch.int32) for field in ordered]
        ends = list(accumulate(part.numel() for part in parts))
        places = {
            id(field): (slice(begin, end), _sent(field.dtype), tuple(field.shape))
            for field, begin, end in zip(ordered, [0, *ends], ends, strict=False)
        }
        self.at = record._replace(**{name: places[id(field)] for name, field in fields.items()})
        self.packed = torch.cat(parts)
        self.learn: Callable[[RecordT, Sequence[Sequence[int]]], object] | None = None
        self._copy: torch.Tensor | None = None

    def copy_to_host(self, copy: Callable[[torch.Tensor], torch.Tensor]) -> "Download[RecordT]":
        """Called by SGLang, on another stream. `packed` is kept: the copy may still read it."""
        self._copy = copy(self.packed)
        return self

    def consume(self, batch: Any, commits: Sequence[Any]) -> None:
        """Called by SGLang when the copy has come and the tokens are in the requests, before they are streamed."""
        learn, self.learn = self.learn, None  # it holds the round's tensors
        assert learn is not None
        kept = [() if commit is None else commit.token_ids for commit in commits]
        learn(self.read(), kept)

    def __getitem__(self, at: tuple[slice, torch.dtype, tuple[int, ...]]) -> torch.Tensor:
        """Field at one of `Download.at` of the host's copy, once it is on its way."""
        place, dtype, shape = at
        return (self.packed if self._copy is None else self._copy)[place].view(dtype).view(shape)

    def read(self) -> RecordT:
        """The record with nested lists. Before it was copied to the host this waits for the device."""
        flat = (self.packed if self._copy is None else self._copy).numpy(force=True)
        return self.at._make(
            None if at is None else flat[at[0]].view(_NUMPY[at[1]]).reshape(at[2]).tolist() for at in self.at
        )


_NUMPY = {torch.int64: np.int64, torch.int32: np.int32, torch.float32: np.float32}


def _sent(dtype: torch.dtype) -> torch.dtype:
    """As what a tensor of `dtype` is sent."""
    if dtype.is_floating_point:
        return torch.float32
    return torch.int64 if dtype == torch.int64 else torch.int32


@dataclass(frozen=True, slots=True)
class HostView:
    """Whether the host may read the device's values at any time.

    exact: reading costs nothing (a CPU), so everything has the size that it needs. If not, reading would wait for the
    device: sizes are bounds that the host knows, and work is padded to them. late: a round is planned before the
    results of the last one are known.
    """

    exact: bool
    late: bool = False

    @classmethod
    def of(cls, device: torch.device, *, late: bool = False) -> "HostView":
        """As `device` allows. `WHIFLASH_DEVICE_RESIDENT=1` treats a CPU as if it were one that must not be read."""
        resident = os.environ.get("WHIFLASH_DEVICE_RESIDENT") == "1"
        return cls(device.type == "cpu" and not resident, late)


EXACT = HostView(exact=True)
