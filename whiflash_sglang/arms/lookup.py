"""The copying arm: no training, no forward pass, no KV (prompt lookup; SuffixDecoding, arXiv 2411.04975).

While it drafts, both neural drafters do nothing at all; what they missed waits in the rings and is ingested in one
batch when one of them is chosen again.

If the host would know a text a round late, the device copies from it (`propose_copies`). Then the host's index learns
how far copies can be trusted, and keeps what tenants share.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from whiflash_kernels import Drafts, propose_copies

from whiflash_sglang.arms.base import TextDrafter
from whiflash_sglang.checkpoints.manifest import Lookup
from whiflash_sglang.copying.calibration import (
    BUCKETS,
    EVEN_ODDS,
    Agreement,
    MatchCalibration,
    PerTenant,
    RequestCalibration,
)
from whiflash_sglang.copying.copier import SOURCES, Copier, teach
from whiflash_sglang.copying.memory import Tenant, handle_of
from whiflash_sglang.copying.predicted import Prediction
from whiflash_sglang.device.transfers import Floats, HostView, sent
from whiflash_sglang.drafts import arms
from whiflash_sglang.drafts.candidates import PLAIN, Candidate, Forecast
from whiflash_sglang.prices.costs import Worth
from whiflash_sglang.records.core import DraftBatch, History
from whiflash_sglang.spans.hints import RequestHints
from whiflash_sglang.structure.matchers import Grammar


@dataclass(slots=True)
class _Request:
    """A request's state.

    learns: chances of its tenant, or of itself alone. tenant: who shares them; None: nobody. prediction:
    what its caller expects back. alone: whether it may copy from its own text only, and nothing is known of what it
    writes. copier: made when it is looked at first. copies: how well it does. promised: by the device's newest known
    copy for it.
    """

    learns: MatchCalibration
    tenant: Tenant | None = None
    prediction: Prediction | None = None
    alone: bool = False
    copier: Copier | None = None
    copies: RequestCalibration = field(default_factory=RequestCalibration)
    promised: Forecast = PLAIN


class LookupArm(TextDrafter):
    """Proposes what followed the longest earlier occurrence of the text's end.

    Args:
        settings: widths, shortest match, chances before anything was seen.
    """

    arm = arms.LOOKUP
    sources = SOURCES

    def __init__(self, settings: Lookup, host: HostView) -> None:
        self.on_device, self._late = not host.exact, host.late
        self.max_drafts = settings.max_width
        self._calibrations = PerTenant(partial(MatchCalibration, settings.seed or EVEN_ODDS))
        self._unlearned = self._calibrations.fresh()
        self._min_match = settings.min_match
        self._requests: dict[int, _Request] = {}
        self._back: torch.Tensor | None = None
        """[request rows] int64: tokens from where a request copies to its text's end; 0 where it has not copied."""
        self._buckets: torch.Tensor | None = None

    def bytes_for(self, rows: int) -> int:
        size = rows * torch.int64.itemsize + len(BUCKETS) * torch.int32.itemsize
        return size if self.on_device else 0

    def begin(
        self,
        row: int,
        hints: RequestHints,
        tenant: Tenant | None,
        predicted: Sequence[int] | None = None,
        grammar: Grammar | None = None,
        prompt: int = 0,
    ) -> None:
        """A request begins in `row`, or begins again; `hints.lookup` says what it wants copied."""
        self.release(row)
        if self._back is not None:
            self._back[row].fill_(0)  # assigning a number copies it, for which the host would wait
        if hints.lookup == "off":
            return
        if hints.lookup == "context":
            request = _Request(self._calibrations.fresh())
        else:
            request = _Request(self._calibrations.of(tenant), tenant)
        self._requests[row] = request
        if predicted is not None:
            request.prediction = Prediction(predicted, prompt, self._calibrations.fresh())
        request.alone = not hints.tools and request.prediction is None and grammar is None

    def serves(self, row: int) -> bool:
        return row in self._requests

    def propose(
        self, row: int, length: int, history: History, worth: Worth, under_way: int = 0
    ) -> Candidate | None:
        request = self._requests.get(row)
        if request is None:
            return None
        copier = request.copier
        if copier is None:
            copier = request.copier = Copier(
                request.learns, self._min_match, request.prediction, request.copies
            )
        copier.extend(history(len(copier.text)))
        copy = copier.look(self.max_drafts + under_way, worth.least_chance)
        return copy._replace(at=len(copier.text), agreements=())

    def extends(self, row: int) -> bool:
        return self._copier(row) is not None

    def extend_drafts(self, row: int, drafts: Candidate, room: int, worth: Worth) -> Candidate:
        """`drafts`, and the copy that they lead into."""
        copier, room = self._copier(row), min(room - len(drafts.tokens), self.max_drafts)
        if copier is None or not drafts.tokens or room <= 0:
            return drafts
        copy = copier.look_beyond(drafts.tokens, drafts.alive[-1], room, worth.least_chance)
        return drafts.followed_by(copy.tokens, copy.alive, copy.parts[0].source) if copy.tokens else drafts

    def calibration(self, row_ids: Sequence[int], worth: Worth) -> Floats:
        """Starting factors of each request's copies, and its table of chances, if the device copies."""
        if not self.on_device:
            return ()
        requests = [self._requests.get(row) for row in row_ids]
        factors = [1.0 if request is None else request.copies.factor for request in requests]
        known = [self._unlearned if request is None else request.learns for request in requests]
        # Many requests share a table.
        chances = {table: np.array(table.chances, dtype=np.float32) for table in set(known)}
        values: Floats = np.concatenate(
            [np.array(factors, dtype=np.float32), *(chances[table] for table in known)]
        )
        return values

    def copy(self, batch: DraftBatch, drafts: Drafts | None = None) -> Drafts:
        behind = None
        if drafts is not None:
            assert drafts.alive is not None
            behind = drafts.counts, drafts.alive
        assert batch.text is not None
        if self._back is None or self._buckets is None:
            with torch.inference_mode(False):  # else it could not be written outside of it
                self._back = torch.zeros(len(batch.text), dtype=torch.int64, device=batch.caps.device)
                self._buckets = sent(BUCKETS, batch.caps.device).to(torch.int32)
        size = len(batch)
        return propose_copies(
            batch.text,
            batch.rows,
            batch.starts,
            self._back,
            batch.caps,
            batch.calibration[:size],
            batch.calibration[size:].view(size, len(BUCKETS), len(Agreement)),
            self._buckets,
            width=self.max_drafts,
            worth=batch.worth.least_chance,
            min_match=self._min_match,
            behind=behind,
        )

    def promised(self, row: int) -> Forecast | None:
        request = self._requests.get(row)
        if not (self.on_device and self._late) or request is None:
            return None
        return request.promised if request.alone and request.copier is None else None

    def copied(self, row: int, copy: Candidate, committed: Sequence[int]) -> None:
        request = self._requests.get(row)
        if request is not None and request.alone and request.copier is None:
            request.promised = copy.outlook()
            teach(copy, committed, request.learns, request.copies)

    def forget(self, handle: int | None) -> None:
        """Drop what is known of a tenant, or of all; its requests that run now teach nobody."""
        self._calibrations.forget(handle)
        for request in self._requests.values():
            if request.tenant is not None and handle in (None, handle_of(request.tenant)):
                request.tenant = None
                request.learns = self._calibrations.fresh()
                if request.copier is not None:
                    request.copier.calibration = request.learns

    def release(self, row: int) -> None:
        self._requests.pop(row, None)

    def host_bytes(self) -> Mapping[str, int]:
        """Bytes of the running requests' indexes."""
        return {
            "index": sum(
                request.copier.text.nbytes
                for request in self._requests.values()
                if request.copier is not None
            ),
        }

    def snapshot(self) -> Mapping[str, Any]:
        """Bytes of the running requests' indexes; tenants that something was learned of."""
        return {
            **{f"{name}_bytes": size for name, size in self.host_bytes().items()},
            "tenants": len(self._calibrations),
        }

    def _copier(self, row: int) -> Copier | None:
        request = self._requests.get(row)
        return None if request is None else request.copier
