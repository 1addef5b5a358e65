"""Transfers between host and device in a round: one buffer up, one down. Imports no SGLang."""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch

Ints = Sequence[int] | np.ndarray[Any, Any]
Floats = Sequence[float] | np.ndarray[Any, Any]
RecordT = TypeVar("RecordT", bound=NamedTuple)


class Upload:
    """Collects lists of numbers on the host and sends them to the device in one transfer.

    Fill it with `ints` and `floats`, which return the index of their list in the result, and `then`; at last `send`.
    """

    def __init__(self) -> None:
        self._lists: list[tuple[Ints | Floats, bool]] = []
        """Lists to send, and whether each is of floats."""
        self._then: list[tuple[int, Callable[[torch.Tensor], object]]] = []

    def ints(self, values: Ints) -> int:
        """Add integers; return the index of their int64 list in the result of `send`."""
        self._lists.append((values, False))
        return len(self._lists) - 1

    def floats(self, values: Floats) -> int:
        """Add floats; return the index of their float32 list in the result of `send`."""
        self._lists.append((values, True))
        return len(self._lists) - 1

    def then(self, at: int, use: Callable[[torch.Tensor], object]) -> None:
        """Have `send` call `use` with the list at this index on the device, in the order of these calls."""
        self._then.append((at, use))

    def send(self, device: torch.device) -> list[torch.Tensor]:
        """Send all lists to `device`; return them as views of one buffer there.

        On CUDA this is one transfer from pinned memory, in the order of the current stream, and the host does not wait
        for it: the allocator of pinned memory keeps the buffer until the transfer is done.
        """
        begins, end = list[int](), 0
        for values, are_floats in self._lists:
            # Every list begins at a multiple of 16 bytes: Triton compiles a kernel again for an unaligned pointer.
            begins.append(end)
            end += -(-len(values) // (4 if are_floats else 2)) * 2
        # Indices must be int64. They are sent as such, because a conversion on the device would be a launch.
        packed = torch.empty(end, dtype=torch.int64, pin_memory=device.type == "cuda")
        ints = packed.numpy()
        floats = ints.view(np.float32)
        for (values, are_floats), begin in zip(self._lists, begins, strict=True):
            if are_floats:
                floats[2 * begin : 2 * begin + len(values)] = values
            else:
                ints[begin : begin + len(values)] = values
        there = packed.to(device, non_blocking=True)
        halves = there.view(torch.float32)
        on_device = [
            halves.narrow(0, 2 * begin, len(values)) if are_floats else there.narrow(0, begin, len(values))
            for (values, are_floats), begin in zip(self._lists, begins, strict=True)
        ]
        for at, use in self._then:
            use(on_device[at])
        return on_device


def sent(values: Ints, device: torch.device) -> torch.Tensor:
    """Send `values` to `device` as [N] int64, in one transfer that the host does not wait for."""
    upload = Upload()
    upload.ints(values)
    return upload.send(device)[0]


def masks_of_places(rows: int, words: int) -> int:
    """Return the number of masks of `words` int32 each that take as much memory as `mask_places` of `rows` rows."""
    return -(-2 * rows // words)


def mask_places(masks: torch.Tensor, rows: int) -> torch.Tensor:
    """Return the index of each packed row's mask, [rows] int64, as a view of the first bytes of `masks`.

    masks: [M, words] int32, contiguous. It begins with the indices in place of masks, so one transfer brings both.
    """
    return masks.view(-1)[: 2 * rows].view(torch.int64)


class Download(Generic[RecordT]):
    """Packs a record of device tensors into one new buffer for the copy to the host; no later round writes to it.

    It is SGLang's `DeviceAuxiliaryOutput` and, after the copy, its `HostAuxiliaryOutput`.

    packed: [N] int32 on the device, every tensor as int32, int64 or float32. at: each field's slice, dtype and shape.
    learn: called with the record on the host and the tokens that the scheduler kept of each request; set by the code
    that lets SGLang carry the results. record: tensors of int64, of other ints that fit into int32, of floats; or None.
    """

    def __init__(self, record: RecordT) -> None:
        fields = {name: field for name, field in record._asdict().items() if field is not None}
        # Fields of 64 bits come first, because they must start at an even int32. A tensor in several fields is packed
        # once.
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
        """Copy the buffer; SGLang calls this on another stream. `packed` stays alive: the copy may still read it."""
        self._copy = copy(self.packed)
        return self

    def consume(self, batch: Any, commits: Sequence[Any]) -> None:
        """Call `learn`; SGLang calls this after the copy, with the tokens in the requests and not yet streamed."""
        learn, self.learn = self.learn, None  # frees the round's tensors
        assert learn is not None
        kept = [() if commit is None else commit.token_ids for commit in commits]
        learn(self.read(), kept)

    def __getitem__(self, at: tuple[slice, torch.dtype, tuple[int, ...]]) -> torch.Tensor:
        """Return the field that an entry of `self.at` locates, on the host if the copy began, else on the device."""
        place, dtype, shape = at
        return (self.packed if self._copy is None else self._copy)[place].view(dtype).view(shape)

    def read(self) -> RecordT:
        """Return the transferred record, tensors as nested lists. Waits for the device if the copy was not begun."""
        flat = (self.packed if self._copy is None else self._copy).numpy(force=True)
        return self.at._make(
            None if at is None else flat[at[0]].view(_NUMPY[at[1]]).reshape(at[2]).tolist() for at in self.at
        )


_NUMPY = {torch.int64: np.int64, torch.int32: np.int32, torch.float32: np.float32}


def _sent(dtype: torch.dtype) -> torch.dtype:
    """Return float32 for floats, int64 for int64, else int32: the dtype in which such a tensor is sent."""
    if dtype.is_floating_point:
        return torch.float32
    return torch.int64 if dtype == torch.int64 else torch.int32
