"""What a drafter is to the worker."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from whiflash_sglang.cache.backlog import FeatureRows, FeatureSlice
from whiflash_sglang.core import DraftBatch, Drafts, Grown, History, PassInput, Voice
from whiflash_sglang.device.capture import Recorder
from whiflash_sglang.device.transfers import Upload
from whiflash_sglang.lookup.memory import Tenant
from whiflash_sglang.routing.costs import Worth
from whiflash_sglang.routing.signals import Forecast
from whiflash_sglang.spans.hints import RequestHints
from whiflash_sglang.structure.matchers import Grammar


class Drafter(ABC):
    """One arm.

    Lifecycle: `allocate` once → per request `catch_up` with the prompt's rows, then rounds of `catch_up` and
    `draft` in any order with other arms' rounds between them → `release`.

    arm: its name. max_drafts: most drafts of a round; a verified block is one token wider (the bonus token).
    captured_layers: target layers whose *outputs* it reads; empty for a drafter that needs no features. features:
    where these lie in what the target captures, None: they are all of it. tail_width: columns of feature n-1 that a
    draft begins with, 0 where it reads none. keeps_kv: whether it has KV that must stay synchronised with the target's
    slots. attends_text: whether it attends over a request's text while it ingests: then rows must say whose they are.
    judges: whether its drafts say how likely they are (`Drafts.alive`); only such are prolonged. prolongs: whether it
    can go on where another arm's drafts end. forbids: whether it drops of them what may not follow. late:
    whether the host knows what it expects of a round too late where it may not read the device; then it drafts for all
    requests, and the device decides who takes its drafts.
    """

    arm: str
    max_drafts: int
    captured_layers: tuple[int, ...] = ()
    features: FeatureSlice | None = None
    tail_width: int = 0
    keeps_kv: bool = False
    attends_text: bool = False
    judges: bool = False
    prolongs: bool = False
    forbids: bool = False
    late: bool = False

    def kv_bytes_per_token(self) -> int:
        """Bytes its KV adds to one target slot."""
        return 0

    def bytes_for(self, rows: int) -> int:
        """What it keeps for so many rows of the request table, beside its KV."""
        return 0

    def captured_bytes(self, requests: int) -> int:
        """What a captured draft of so many requests takes at its peak."""
        return 0

    def allocate(self, slots: int) -> None:  # noqa: B027 - a drafter without KV has nothing to do
        """Allocate KV for `slots` target slots."""

    def capture(  # noqa: B027 - a drafter without a model has no pass to capture
        self, recorder: Recorder, given: PassInput
    ) -> None:
        """Have `draft` captured for groups of up to as many requests as `given` has, whose memory captures read.

        Raises ConfigError where it cannot be captured.
        """

    def catch_up(self, rows: FeatureRows) -> None:  # noqa: B027 - a drafter without KV has nothing to do
        """Ingest features KV-only: K and V are written, nothing is drafted (KV-only Prefill, arXiv 2606.07710).

        rows: with the columns of `features` only, and with their owners where it `attends_text`.
        """

    def forecast(self, row: int, length: int, history: History, worth: Worth) -> Forecast | None:
        """What it says of the next round, asked in every round that may be its own, whoever drafts it then.

        None: it cannot say before it drafts. Who says it has looked by then: `draft` takes no pass and no time to speak
        of, and what was committed since its last look, whoever drafted that, shows how right it would have been.

        Args:
            row: of the request table. length: n. history: the request's committed tokens. worth: what a further draft
                must bring.
        """
        return None

    def begin(
        self,
        row: int,
        hints: RequestHints,
        tenant: Tenant | None,
        predicted: Sequence[int] | None = None,
        grammar: Grammar | None = None,
        prompt: int = 0,
    ) -> None:
        """A request begins in `row`, or begins again after a retraction.

        Args:
            tenant: who may share text with it. predicted: tokens of the answer that its caller expects. grammar: what
                constrains it. prompt: tokens of its text before the answer.
        """
        self.release(row)

    def serves(self, row: int) -> bool:
        """Whether the request in `row` lets it draft at all."""
        return True

    @abstractmethod
    def draft(self, batch: DraftBatch) -> Drafts:
        """Propose tokens. KV writes at positions >= n are provisional."""

    def prolong(self, grown: Grown) -> Drafts | None:
        """Tokens to verify behind another arm's drafts, at no pass of a model; asked if it `prolongs`. None: none, and
        those stay as they are.
        """
        return None

    def voice(self, row: int, length: int, limit: int, worth: Worth) -> Voice | None:
        """Tokens that it would draft behind the text of the request in `row`, by its look in this round, at no pass of
        a model; asked if it `prolongs`, whoever else drafts. None: it has not looked, or there are none.

        Args:
            length: n. limit: tokens at most. worth: what each must bring.
        """
        return None

    def calibration(self, row_ids: Sequence[int]) -> Sequence[float]:
        """What its drafts for the requests in `row_ids` are judged by, uploaded with the round's plan."""
        return ()

    def source(self, row: int) -> str:
        """What its newest drafts for the request in `row` were taken from, as traces call it."""
        return self.arm

    def observe(  # noqa: B027 - most learn nothing online
        self, row: int, proposed: int, accepted: int, confidences: Sequence[float]
    ) -> None:
        """`accepted` of its `proposed` drafts of a round were right, which it drafted with these `confidences`.

        What a caller ordered is not told.
        """

    def finish(self, row: int, output: Sequence[int]) -> None:  # noqa: B027 - most keep no text
        """The request in `row` ended with `output`; `release` follows."""

    def forget(self, handle: int | None) -> None:  # noqa: B027 - most keep no text
        """Drop text kept across requests: of the tenant, or of the scope in it, with this handle, or of all."""

    def host_bytes(self) -> Mapping[str, int]:
        """What it keeps on the host, by scope; empty for most."""
        return {}

    def snapshot(self) -> Mapping[str, Any]:
        """Its part of the server's state; empty for most."""
        return {}

    def release(self, row: int) -> None:  # noqa: B027 - most keep nothing per request
        """The request in `row` is gone, or another begins there."""


def widest_of(drafters: Mapping[str, Drafter]) -> int:
    """Most drafts of a round, whoever drafts them."""
    return max((drafter.max_drafts for drafter in drafters.values()), default=0)


def padded(tokens: Sequence[Sequence[int]], alive: Sequence[Sequence[float]], device: torch.device) -> Drafts:
    """Drafts of different lengths side by side, for which no model ran.

    Args:
        tokens: per request. alive: the chance that each of them and all before it are right.
    """
    counts = [len(own) for own in tokens]
    widest = max(counts, default=0)

    def laid(values: Sequence[Sequence[Any]]) -> list[Any]:
        return [value for own in values for value in (*own, *[0] * (widest - len(own)))]

    upload = Upload()
    tokens_at, counts_at = upload.ints(laid(tokens)), upload.ints(counts)
    alive_at = upload.floats(laid(alive))
    ints, floats = upload.send(device)
    size = (len(counts), widest)
    return Drafts(ints[tokens_at].view(size), ints[counts_at], alive=floats[alive_at].view(size), passes=0)
