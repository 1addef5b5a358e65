"""The interface between the worker and its drafters."""

import ctypes
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from whiflash_kernels import Drafts, PassInputs

from whiflash_sglang.cache.backlog import FeatureRows, FeatureSlice
from whiflash_sglang.cache.tokens import DraftKV
from whiflash_sglang.device.capture import Recorder
from whiflash_sglang.device.transfers import Floats
from whiflash_sglang.drafts.candidates import Candidate, Forecast
from whiflash_sglang.formats.choice import TargetsParts
from whiflash_sglang.prices.costs import Worth
from whiflash_sglang.records.core import DraftBatch, History
from whiflash_sglang.records.request import Request


class Drafter:
    """A drafter, or arm.

    arm: its name. max_drafts: most drafts of a round; a verified block is one token wider (the bonus token). passes:
    whether a network, its `model`, drafts; then its pass is timed at the start. features: which of the target's
    captured layers it reads, None: all. tail_width: columns of feature n-1 that a draft begins with, 0 if it reads
    none. fills: whether a pass returns tokens and chances beyond its count, which may fill spare rows of a graph.
    """

    arm: str
    model: Any
    max_drafts: int
    passes: bool = False
    fills: bool = False
    features: FeatureSlice | None = None
    tail_width: int = 0

    @property
    def lengths(self) -> list[int]:
        """Return the numbers of drafts to which a pass may be limited, ascending; the last is `max_drafts`."""
        return [self.max_drafts]

    def captured_bytes(self, requests: int) -> int:
        """Return the bytes that a captured pass for `requests` requests takes at its peak."""
        raise NotImplementedError

    def place(self, requests: int) -> PassInputs | None:
        """Return the memory where `draft` reads its inputs for `requests` requests and padding; None: any will do."""
        return None

    def draft(self, batch: DraftBatch) -> Drafts:
        """Propose tokens for a batch whose inputs are at `place`. KV written at positions >= n is provisional."""
        raise NotImplementedError

    def calibration(self, requests: Sequence[Request], worth: Worth) -> Floats:
        """Return the numbers by which drafts for these requests are judged; the round's plan uploads them.

        worth: accepted tokens that a further draft must bring.
        """
        return ()

    def observe(self, row: int, proposed: int, accepted: int, confidences: Sequence[float]) -> None:
        """Learn that the target accepted `accepted` of `proposed` drafts, which had these `confidences`, in a round.

        Not called for rounds whose route a client's hint decided.
        """


class KVDrafter(Drafter):
    """An arm with KV at the target's slots, which it ingests from the target's features.

    Lifecycle: `allocate` once → per request `catch_up` with the prompt's rows, then rounds of `catch_up` and
    `draft` in any order with other arms' rounds between them.

    captured_layers: target layers whose *outputs* it reads. attends_text: whether it attends over a request's text
    while it ingests; then rows have `requests`. model: the loaded checkpoint. kv: of all slots, once `allocate` has
    run; kv_dtype: dtype of its KV.
    """

    model: TargetsParts
    kv: DraftKV
    kv_dtype: torch.dtype
    captured_layers: tuple[int, ...] = ()
    attends_text: bool = False
    passes = True

    def kv_bytes_per_token(self) -> int:
        """Return the bytes that its KV adds to one target slot."""
        raise NotImplementedError

    def allocate(self, slots: int) -> None:
        """Allocate KV for `slots` target slots."""
        raise NotImplementedError

    def capture(self, recorder: Recorder, inputs: DraftBatch) -> None:
        """Capture `draft` for batches of up to as many requests as `inputs` has; captures read the memory of `inputs`.

        Raises ConfigError if it cannot be captured.
        """
        raise NotImplementedError

    def target_written(self) -> None:
        """Refresh copies of the target's weights, after these were written in place."""

    def catch_up(self, rows: FeatureRows) -> None:
        """Ingest features KV-only: K and V are written, nothing is drafted (KV-only Prefill, arXiv 2606.07710).

        rows: with the columns of `features` only, and with their requests if it `attends_text`.
        """
        raise NotImplementedError


class TextDrafter(Drafter):
    """An arm that drafts from the texts of requests and holds state for each.

    Lifecycle per request: `begin` → `propose` in every round in which it may draft → `answered` if it finishes → `end`.
    Between these its state is in `Request.kept`, by its name.

    proposes: whether it makes candidates on the host before the round is planned: if it has a `library`, by compiled
    code at `handle`, else by `propose`. If not, it drafts by `draft`. on_device: whether the device also drafts for it,
    for all requests, by `copy`, since the host knows texts a round late. raised: errors raised while it answered
    compiled code, with the request, until they are judged.
    """

    proposes: bool = True
    on_device: bool = False
    library: ctypes.CDLL | None = None
    raised: list[tuple[Request, Exception]] = []  # noqa: RUF012 never written here

    def bytes_for(self, rows: int) -> int:
        """Return the bytes that it keeps on the device for `rows` rows of the request table."""
        return 0

    def begin(self, request: Request) -> None:
        """Make the state of a request that begins, or begins again after a retraction, which calls `end` first."""

    def serves(self, request: Request) -> bool:
        """Whether it may draft for a request at all, by the request's hints."""
        return True

    def propose(
        self, request: Request, length: int, history: History, worth: Worth, under_way: int = 0
    ) -> Candidate | None:
        """Return tokens that may follow a request's text; None if it knows of none. Called in every round in which it
        may draft, whichever arm is chosen then.

        The text ends where `history` does. It also learns here: tokens committed since its last call, by any arm, show
        whether its proposal would have been right.

        Args:
            length: largest value that n may have. history: the request's committed tokens. worth: accepted tokens that
                a further draft must bring. under_way: rows that earlier rounds are expected to verify before its
                candidate, and so the most tokens that they commit.
        """
        return None

    def handle(self, request: Request, history: History) -> int:
        """Return the address of a request's object in compiled code, which proposes and is shown the text; 0: none."""
        return 0

    def copy(self, batch: DraftBatch, drafts: Drafts | None = None) -> Drafts:
        """Draft on the device by `propose_copies`: copies after every request's text, or after its text and `drafts`.

        Called if it drafts `on_device`. `batch.caps` are the largest numbers of tokens, `drafts` included.
        """
        raise NotImplementedError

    def promised(self, request: Request) -> Forecast | None:
        """Return the forecast of the device's newest known copy for a request, which then needs no call of `propose`.

        None: `propose` must be called, since the host knows the text or other texts to copy from.
        """
        return None

    def copied(self, request: Request, copy: Callable[[], Candidate], committed: Sequence[int]) -> None:
        """Learn from the copy that the device made for a request, and the tokens that its round committed."""

    def answered(self, request: Request, answer: Sequence[int]) -> None:
        """Learn a finished request's whole answer, for other requests to copy from. `end` follows."""

    def end(self, request: Request) -> None:
        """Drop the state of a request that ends."""

    def forget(self) -> None:
        """Drop all data learned or cached from requests' texts. Running requests continue."""

    def host_bytes(self, running: Iterable[Request]) -> Mapping[str, int]:
        """Return the bytes that it keeps on the host, by purpose, such as `index`."""
        return {}


def with_kv(drafters: Mapping[str, Drafter]) -> dict[str, KVDrafter]:
    """Return the drafters that have KV."""
    return {arm: drafter for arm, drafter in drafters.items() if isinstance(drafter, KVDrafter)}


def of_text(drafters: Mapping[str, Drafter]) -> dict[str, TextDrafter]:
    """Return the drafters that read texts."""
    return {arm: drafter for arm, drafter in drafters.items() if isinstance(drafter, TextDrafter)}


def widest_of(drafters: Mapping[str, Drafter]) -> int:
    """Return the largest number of drafts of a round, over all drafters; 0 without any."""
    return max((drafter.max_drafts for drafter in drafters.values()), default=0)
