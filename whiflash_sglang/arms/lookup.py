"""The arm `lookup`: copies text, without a model or KV (prompt lookup; SuffixDecoding, arXiv 2411.04975).

While it drafts, the neural drafters do nothing: features that they miss wait in the rings and are ingested in one
batch when a drafter is chosen again.

The device copies from each request's own text (`propose_copies`), since the host may know the text a round late, and
the host learns from the results how far copies can be trusted. The host copies from other texts: predictions, and
answers of the request's group.
"""

import ctypes
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from whiflash_kernels import Drafts, propose_copies
from whiflash_kernels.cpu.compiler import available
from whiflash_kernels.cpu.copies import compiled_copies
from whiflash_kernels.cpu.texts import compiled_texts
from whiflash_kernels.dispatch import backend_for

from whiflash_sglang.arms.base import TextDrafter
from whiflash_sglang.checkpoints.manifest import Lookup
from whiflash_sglang.copying.calibration import BUCKETS, EVEN_ODDS, Agreement, MatchCalibration, RequestCalibration
from whiflash_sglang.copying.copier import Copier, teach
from whiflash_sglang.copying.groups import Groups, Member
from whiflash_sglang.copying.texts import Prediction
from whiflash_sglang.device.transfers import Floats, sent
from whiflash_sglang.drafts import arms
from whiflash_sglang.drafts.candidates import PLAIN, Candidate, Forecast
from whiflash_sglang.embedded import cache_root
from whiflash_sglang.prices.costs import Worth
from whiflash_sglang.records.core import DraftBatch, History
from whiflash_sglang.records.request import Request

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Kept:
    """The arm's state of a request.

    prediction: the answer that its caller expects. member: the request in its group; None: it has none. alone: whether
    it has no tools, prediction or grammar, so that only its own text and its group's answers are copied. copier: made
    at the first look. copies: how well it copies. promised: forecast of the device's newest known copy.
    """

    prediction: Prediction | None = None
    member: Member | None = None
    alone: bool = False
    copier: Copier | None = None
    copies: RequestCalibration = field(default_factory=RequestCalibration)
    promised: Forecast = PLAIN


class LookupArm(TextDrafter):
    """Proposes the tokens that followed the longest earlier occurrence of the text's end.

    Args:
        settings: widths, shortest match, initial chances. late: whether the host knows a round's tokens only when the
            next round has begun (overlap scheduling).
    """

    arm = arms.LOOKUP
    on_device = True

    def __init__(self, settings: Lookup, late: bool) -> None:
        self._late = late
        self.max_drafts = settings.max_width
        self._seed = settings.seed or EVEN_ODDS
        self._calibration = MatchCalibration(self._seed)
        self._min_match = settings.min_match
        self._compiled = available("search for copies", compiled_copies, cache_root() / "compiled")
        self._groups: Groups | None = None
        try:
            self.library = compiled_texts(cache_root() / "compiled")
            self._groups = Groups(self.library, self._seed)
        except OSError as error:
            logger.warning("WHIFLASH: neither predictions nor other answers of a task are copied: %s", error)
        self._answers = settings.answers
        self._back: torch.Tensor | None = None
        """[request rows] int64: distance from a request's place of copying to its text's end; 0 if it does not copy."""
        self._buckets: torch.Tensor | None = None

    def bytes_for(self, rows: int) -> int:
        return rows * torch.int64.itemsize + len(BUCKETS) * torch.int32.itemsize

    def begin(self, request: Request) -> None:
        """Make the request's state, unless its hints turn copying off."""
        if self._back is not None:
            self._back[request.row].fill_(0)  # an assignment would upload the number, and the host wait
        hints, prediction = request.hints, request.prediction
        if hints.lookup == "off":
            return
        kept = request.kept[self.arm] = _Kept()
        if self.library is None or self._groups is None:
            kept.alone = True
            return
        if prediction is not None:
            judge = MatchCalibration(self._seed)
            kept.prediction = Prediction(self.library, prediction, request.prompt, judge)
        kept.alone = not hints.tools and kept.prediction is None and request.grammar is None
        named = hints.task or self._answers == "tenant"
        if named and self._answers != "off" and hints.lookup == "on":
            kept.member = self._groups.join(request.tenant, hints.task or "", request.rid, request.prompt)
        if not kept.alone:
            kept.copier = self._copier(self.library, request, kept)
            kept.copier.read(request.read())  # here, so that no round does

    def _copier(self, library: ctypes.CDLL, request: Request, kept: _Kept) -> Copier:
        judge, least, stops = self._calibration, self._min_match, request.stops
        return Copier(library, judge, least, kept.prediction, kept.copies, stops, kept.member)

    def serves(self, request: Request) -> bool:
        return self.arm in request.kept

    def handle(self, request: Request, history: History) -> int:
        kept: _Kept | None = request.kept.get(self.arm)
        if kept is None or self.library is None:
            return 0
        if (copier := kept.copier) is None:
            copier = kept.copier = self._copier(self.library, request, kept)
        known = request.known or request.prompt
        if kept.member is not None or len(copier) < known:
            copier.read(history(len(copier)))
        copier.join_group()
        return int(copier.at)

    def calibration(self, requests: Sequence[Request], worth: Worth) -> Floats:
        """Return one array: a factor for each request's copies, then a table of chances for each request."""
        size, chances = len(requests), self._calibration.chances
        own: list[_Kept | None] = [request.kept.get(self.arm) for request in requests]
        numbers = np.empty(size + size * len(chances), np.float32)
        numbers[:size] = [1.0 if kept is None else kept.copies.factor for kept in own]
        numbers[size:].reshape(size, -1)[:] = chances
        return numbers

    def copy(self, batch: DraftBatch, drafts: Drafts | None = None) -> Drafts:
        behind = None
        if drafts is not None:
            assert drafts.alive is not None
            behind = drafts.counts, drafts.alive
        assert batch.text is not None
        if self._back is None or self._buckets is None:
            with torch.inference_mode(False):  # an inference tensor could not be written elsewhere
                self._back = torch.zeros(len(batch.text), dtype=torch.int64, device=batch.caps.device)
                self._buckets = sent(BUCKETS, batch.caps.device).to(torch.int32)
        size = len(batch)
        on_host = batch.text.device.type == "cpu" and backend_for(batch.text) == "torch"
        propose = (self._compiled if on_host else None) or propose_copies
        return propose(
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

    def promised(self, request: Request) -> Forecast | None:
        kept: _Kept | None = request.kept.get(self.arm)
        if kept is None or not kept.alone or not (self._late or self.library is None):
            return None
        if kept.member is not None and kept.member.has_others:
            return None
        kept.copier = None  # the device copies alone while the group has no other answers
        return kept.promised

    def copied(self, request: Request, copy: Callable[[], Candidate], committed: Sequence[int]) -> None:
        kept: _Kept | None = request.kept.get(self.arm)
        if kept is not None and kept.alone and kept.copier is None:
            kept.promised = (made := copy()).until(request.stops).outlook()
            teach(made, committed, self._calibration, kept.copies)

    def answered(self, request: Request, answer: Sequence[int]) -> None:
        kept: _Kept | None = request.kept.get(self.arm)
        if kept is not None and kept.member is not None:
            assert self._groups is not None
            self._groups.keep(kept.member, answer)

    def end(self, request: Request) -> None:
        kept: _Kept | None = request.kept.get(self.arm)
        if kept is not None and kept.member is not None:
            assert self._groups is not None
            self._groups.leave(kept.member)

    def forget(self) -> None:
        self._calibration = MatchCalibration(self._seed)
        if self._groups is not None:
            self._groups.forget()

    def host_bytes(self, running: Iterable[Request]) -> Mapping[str, int]:
        """Return the bytes of the running requests' indexes, and of the answers of groups."""
        copiers = (request.kept[self.arm].copier for request in running if self.arm in request.kept)
        own = sum(copier.nbytes for copier in copiers if copier is not None)
        return {"index": own, "groups": 0 if self._groups is None else self._groups.nbytes}
