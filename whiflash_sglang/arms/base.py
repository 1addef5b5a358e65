"""The interface of a drafter to the worker."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from whiflash_kernels import Drafts, PassInputs

from whiflash_sglang.cache.backlog import FeatureRows, FeatureSlice
from whiflash_sglang.cache.tokens import DraftKV
from whiflash_sglang.device.capture import Recorder
from whiflash_sglang.device.transfers import Floats, Upload
from whiflash_sglang.drafts.candidates import Candidate, Forecast
from whiflash_sglang.formats.choice import TargetsParts
from whiflash_sglang.prices.costs import Worth
from whiflash_sglang.records.core import DraftBatch, History
from whiflash_sglang.records.request import Request


class Drafter:
    """Every arm.

    arm: its name. max_drafts: most drafts of a round; a verified block is one token wider (the bonus token). sources:
    what its drafts are taken from, if that is not its name. passes: whether a network drafts, its `model`, whose pass
    is timed at the start. features: which of the target's captured layers it reads, None: all. tail_width: columns of
    feature n-1 that a draft begins with, 0 if it reads none.
    """

    arm: str
    model: Any
    max_drafts: int
    sources: tuple[str, ...] = ()
    passes: bool = False
    features: FeatureSlice | None = None
    tail_width: int = 0

    @property
    def lengths(self) -> list[int]:
        """Drafts of the passes that are captured, ascending; the longest make `max_drafts`."""
        return [self.max_drafts]

    def captured_bytes(self, requests: int) -> int:
        """Bytes that a captured draft of so many requests takes at its peak."""
        raise NotImplementedError

    def place(self, requests: int) -> PassInputs | None:
        """Inputs that `draft` reads for so many requests, and padding after them; None: they may be anywhere."""
        return None

    def draft(self, batch: DraftBatch) -> Drafts:
        """Propose tokens for requests at their `place`. KV writes at positions >= n are provisional."""
        raise NotImplementedError

    def calibration(self, requests: Sequence[Request], worth: Worth) -> Floats:
        """Numbers that judge its drafts for these requests, uploaded with the round's plan.

        worth: what a further draft must bring.
        """
        return ()

    def observe(self, row: int, proposed: int, accepted: int, confidences: Sequence[float]) -> None:
        """`accepted` of its `proposed` drafts of a round were right, which it drafted with these `confidences`.

        Drafts that a caller ordered do not count.
        """


class KVDrafter(Drafter):
    """An arm with KV at the target's slots, which it ingests from the target's features.

    Lifecycle: `allocate` once → per request `catch_up` with the prompt's rows, then rounds of `catch_up` and
    `draft` in any order with other arms' rounds between them.

    captured_layers: target layers whose *outputs* it reads. attends_text: whether it attends over a request's text
    while it ingests: then rows have `requests`. model: the loaded checkpoint. kv: of all slots, once they are
    allocated.
    """

    model: TargetsParts
    kv: DraftKV
    captured_layers: tuple[int, ...] = ()
    attends_text: bool = False
    passes = True

    def kv_bytes_per_token(self) -> int:
        """Bytes its KV adds to one target slot."""
        raise NotImplementedError

    def allocate(self, slots: int) -> None:
        """Allocate KV for `slots` target slots."""
        raise NotImplementedError

    def capture(self, recorder: Recorder, inputs: DraftBatch) -> None:
        """Have `draft` captured for groups of up to as many requests as `inputs` has, whose memory captures read.

        Raises ConfigError where it cannot be captured.
        """
        raise NotImplementedError

    def target_written(self) -> None:
        """Copy the target's weights again where parts of them were copied: they were written in place."""

    def catch_up(self, rows: FeatureRows) -> None:
        """Ingest features KV-only: K and V are written, nothing is drafted (KV-only Prefill, arXiv 2606.07710).

        rows: with the columns of `features` only, and with their requests where it `attends_text`.
        """
        raise NotImplementedError


class TextDrafter(Drafter):
    """An arm that drafts from the texts of requests and keeps something of each.

    Lifecycle per request: `begin` → `propose` in every round that may be its own → `end`. Between these `Request.kept`
    has what it keeps, by its name.

    proposes: whether it drafts by `propose`, before the round is planned and without a pass; else `draft` is asked.
    forbids: whether it drops of another arm's drafts what may not follow. on_device: whether the device drafts for it
    too, for all requests, where the host knows texts a round late: by `copy`.
    """

    proposes: bool = True
    forbids: bool = False
    on_device: bool = False

    def bytes_for(self, rows: int) -> int:
        """Bytes that it keeps on the device for so many rows of the request table."""
        return 0

    def begin(self, request: Request) -> None:
        """A request begins, or begins again after a retraction: then `end` was called before."""

    def serves(self, request: Request) -> bool:
        """Whether a request lets it draft at all."""
        return True

    def propose(
        self, request: Request, length: int, history: History, worth: Worth, under_way: int = 0
    ) -> Candidate | None:
        """Tokens that may follow the text of a request; None: nothing. Asked in every round that may be
        its own, whichever arm drafts then.

        The text ends where `history` does. Tokens committed since its last look, from any arm, show how right it
        would have been.

        Args:
            length: n at most. history: the request's committed tokens. worth: what a further
                draft must bring. under_way: rows that earlier rounds are expected to verify before its candidate does;
                they commit no more tokens.
        """
        return None

    def extends(self, request: Request) -> bool:
        """Whether it has looked at a request, and so knows what may follow drafts of others."""
        return False

    def extend_drafts(self, request: Request, drafts: Candidate, room: int, worth: Worth) -> Candidate:
        """`drafts` as far as they may follow the text that it looked at, and what it knows to follow them; asked if it
        `extends`.

        Args:
            room: tokens at most, all together. worth: what each of its own must bring.
        """
        return drafts

    def copy(self, batch: DraftBatch, drafts: Drafts | None = None) -> Drafts:
        """Drafts that `propose_copies` makes of every request's text, or of its text and the `drafts` after it;
        called if it drafts `on_device`.

        `batch.caps` are tokens at most, `drafts` among them.
        """
        raise NotImplementedError

    def promised(self, request: Request) -> Forecast | None:
        """Forecast of the device's newest known copy for a request: then it need not propose.

        None: it must, since it knows the whole text, or texts that the device does not copy from.
        """
        return None

    def copied(self, request: Request, copy: Candidate, committed: Sequence[int]) -> None:
        """The device made this `copy` for a request, and its round committed these tokens."""

    def end(self, request: Request) -> None:
        """A request is gone."""

    def forget(self, handle: int | None, running: Iterable[Request]) -> None:
        """Drop what was learned of the tenant with this handle, or of all. Those that run go on."""

    def host_bytes(self, running: Iterable[Request]) -> Mapping[str, int]:
        """Bytes that it keeps on the host, by scope; empty for most."""
        return {}

    def snapshot(self, running: Iterable[Request]) -> Mapping[str, Any]:
        """Its part of the server's state; empty for most."""
        return {}


def with_kv(drafters: Mapping[str, Drafter]) -> dict[str, KVDrafter]:
    """Drafters that keep KV."""
    return {arm: drafter for arm, drafter in drafters.items() if isinstance(drafter, KVDrafter)}


def of_text(drafters: Mapping[str, Drafter]) -> dict[str, TextDrafter]:
    """Drafters that read texts."""
    return {arm: drafter for arm, drafter in drafters.items() if isinstance(drafter, TextDrafter)}


def widest_of(drafters: Mapping[str, Drafter]) -> int:
    """Most drafts of a round, whoever drafts them."""
    return max((drafter.max_drafts for drafter in drafters.values()), default=0)


def side_by_side(
    candidates: Sequence[Candidate], width: int
) -> tuple[np.ndarray[Any, Any], list[int], np.ndarray[Any, Any]]:
    """As far as `width` columns hold them: tokens [N, width] int64, how many each has, and chances [N, width] float32,
    with zeros behind.
    """
    counts = [min(len(candidate.tokens), width) for candidate in candidates]
    tokens = np.zeros((len(candidates), width), dtype=np.int64)
    alive = np.zeros((len(candidates), width), dtype=np.float32)
    for number, (candidate, count) in enumerate(zip(candidates, counts, strict=True)):
        if count:
            tokens[number, :count] = candidate.tokens[:count]
            alive[number, :count] = candidate.alive[:count]
    return tokens, counts, alive


def padded(candidates: Sequence[Candidate], device: torch.device, width: int) -> Drafts:
    """The same on the device, one a request."""
    tokens, counts, alive = side_by_side(candidates, width)
    upload = Upload()
    tokens_at, counts_at = upload.ints(tokens.ravel()), upload.ints(counts)
    alive_at = upload.floats(alive.ravel())
    ints, floats = upload.send(device)
    return Drafts(
        ints[tokens_at].view(tokens.shape),
        ints[counts_at],
        alive=floats[alive_at].view(alive.shape),
        passes=0,
    )
