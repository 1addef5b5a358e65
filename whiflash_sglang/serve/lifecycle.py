"""The beginning and the end of requests, for every part that keeps state per row of the request table."""

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

from whiflash_sglang.arms.base import TextDrafter
from whiflash_sglang.cache.penalties import PenaltyRows
from whiflash_sglang.cache.tokens import SamplingRows, StopTable, TokenTable
from whiflash_sglang.copying.tenants import Tenant, handle_of, tenant_of
from whiflash_sglang.device.transfers import Upload
from whiflash_sglang.engine.forward import sampling
from whiflash_sglang.engine.scheduler.grammars import grammar_of
from whiflash_sglang.engine.scheduler.streamer import cached_of, recording_of, urgency
from whiflash_sglang.records.core import readable
from whiflash_sglang.records.request import Request
from whiflash_sglang.round.catch_up import DraftSync
from whiflash_sglang.round.forcing import Forcing
from whiflash_sglang.round.quarantine import Quarantine
from whiflash_sglang.routing.controller import Controller
from whiflash_sglang.serve.metrics import Publisher
from whiflash_sglang.spans.hints import HintError, RequestHints, parse_hints
from whiflash_sglang.spans.prediction import ReadPrediction
from whiflash_sglang.telemetry.samples import Spool
from whiflash_sglang.telemetry.tally import ArmCounts, Tally

logger = logging.getLogger(__name__)

MALFORMED = RequestHints(lookup="context")
"""Takes the place of hints that could not be read. They may have said that nothing of the answer is kept."""

FINISHED = ("stop", "length")
"""SGLang's reasons for an end that leave a whole answer: neither aborted nor left by the client."""


class Lifecycle:
    """Opens and closes a request's state in drafters, backlog, controller and tables. It calls arms in `quarantine`
    only to drop their state.
    """

    def __init__(
        self,
        drafters: Mapping[str, TextDrafter],
        sync: DraftSync,
        controller: Controller,
        tokens: TokenTable,
        stops: StopTable,
        sampling_rows: SamplingRows,
        penalties: PenaltyRows,
        read_prediction: ReadPrediction,
        forcing: Forcing | None,
        quarantine: Quarantine,
        tally: Tally,
        publisher: Publisher,
        spool: Spool | None,
    ) -> None:
        self._drafters, self._sync, self._controller = drafters, sync, controller
        self._tokens, self._stops, self._sampling_rows, self._penalties = tokens, stops, sampling_rows, penalties
        self._read_prediction, self._forcing = read_prediction, forcing
        self._quarantine, self._tally, self._publisher, self._spool = quarantine, tally, publisher, spool
        self._handles: WeakKeyDictionary[Any, tuple[int, ...] | None] = WeakKeyDictionary()
        """By session, or by request if it has none: handles of the tenants of its turns so far, as in `Sample`; None if
        it is no sample, since a turn did not consent or text was forgotten since its first turn arrived."""
        self._ended = list[tuple[dict[str, ArmCounts], dict[str, int]]]()
        """Counts and cached tokens of requests that were released, until they enter the tally."""

    def arrived(self, req: Any) -> None:
        """Note whether a request may be learned from. Its tenant may have it forgotten while it waits to begin."""
        if self._spool is not None:
            whole = req.session or req
            known, handles = self._handles.get(whole, ()), _handles_of(req)
            both = None if known is None or handles is None else (*known, *handles)
            self._handles[whole] = both and tuple(dict.fromkeys(both))

    def begin(self, row: int, req: Any, upload: Upload) -> None:
        """Open a request that is prefilled into `row`. A further chunk of its prefill changes nothing. `upload` carries
        the device's part of its state."""
        former = self._controller.states.get(row)
        if former is not None:
            if former.rid == req.rid:
                return
            self._drop(former)
        hints, tenant = _hints_of(req), _tenant_of(req)
        if not req.retracted_stain and req.sampling_params.max_new_tokens:  # 0: it warms up for `n` answers
            self._tally.requests["malformed" if hints is MALFORMED else hints.source] += 1
        recording = recording_of(req, hints.trace)
        if recording is not None:
            recording.agent = hints.agent
            recording.tenant = None if tenant is None else f"{handle_of(tenant):016x}"
        stops = sampling.ending_ids(req)
        request = Request(
            req.rid,
            hints,
            row,
            tenant,
            self._predicted(req),
            grammar_of(req),
            len(req.origin_input_ids),
            partial(readable, req.origin_input_ids),
            stops,
            urgency(req),
            recording=recording,
            adapter=req.lora_id,
        )
        self._controller.open(request, req.output_ids)
        for arm, drafter in self._drafters.items():
            if self._quarantine.serves(arm, request):
                with self._quarantine.guard(arm, request):
                    drafter.begin(request)
        self._tokens.begin(upload, row, readable(req.origin_input_ids), req.output_ids)
        self._stops.begin(upload, row, stops)
        self._sampling_rows.begin(upload, row, sampling.parameters(req))
        self._penalties.begin(upload, row, sampling.penalties_of(req))
        if self._forcing is not None:
            self._forcing.begin(upload, row, req)

    def forget_text(self, handle: int | None) -> None:
        """Drop samples of the tenant with this handle, or of all (None), and all that drafters learned or cached of
        text. Requests that have begun leave no sample.
        """
        for whole in list(self._handles):
            self._handles[whole] = None
        for drafter in self._drafters.values():
            drafter.forget()
        if self._spool is not None:
            self._spool.forget(handle)

    def released(self, req: Any, *, kept: bool) -> None:
        """Close a request that gives its slots up. kept: whether the tree, a session or the host keeps them; then
        `DraftSync.flush` must follow."""
        request = self._controller.states.get(req.kv.req_pool_idx)  # without a row it was released before
        if request is None or request.rid != req.rid:
            return
        if kept:
            self._sync.leave(request.row, req.owned_kv_len())
        finished = kept and req.finished()
        if self._spool is not None and finished:
            self._sample(self._spool, req)
        counts = finished and req.sampling_params.max_new_tokens  # 0: a preview, or a warm-up for `n` answers
        self._ended.append((request.counts, cached_of(req) if counts else {}))
        if finished and req.finished_reason.to_json()["type"] in FINISHED:
            for arm, drafter in self._drafters.items():
                with self._quarantine.guard(arm, request):
                    drafter.answered(request, req.output_ids_through_stop)
        self._drop(request)

    def settle(self) -> None:
        """Count the requests that were released. Under overlap a last round is learned after its request's release."""
        for counts, cached in self._ended:
            self._tally.ended(counts, cached)
        if self._ended and not self._controller.states:
            self._publisher.flush()
        self._ended.clear()

    def leaks(self) -> dict[str, list[int]]:
        """Return the rows of the request table that hold state, by holder; it must be empty while no request runs."""
        holders = {"requests": self._controller.states.keys(), "backlogs": self._sync.rows}
        return {holder: sorted(rows) for holder, rows in holders.items() if rows}

    def check_integrity(self) -> None:
        """Log an error for each row that is still held. Called when no request runs."""
        for holder, rows in self.leaks().items():
            logger.error("WHIFLASH: nothing runs, but %s are kept in rows %s; report the log so far.", holder, rows)

    def forget_all(self) -> None:
        """Drop the state of all requests, since every KV slot was freed."""
        for request in list(self._controller.states.values()):
            self._drop(request)

    def _sample(self, spool: Spool, req: Any) -> None:
        """Offer a finished request to the learner, if it consents and the target read nothing but tokens.

        A turn's prompt holds the turns before it, so all of them have to consent.
        """
        text = req.multimodal_inputs is None and req.input_embeds is None
        handles = self._handles.get(req.session or req)
        finished = req.finished_reason.to_json()["type"] in FINISHED
        answer = req.output_ids_through_stop
        if handles is None or not (text and finished and answer) or self._forcing:
            spool.counts["declined"] += 1
            return
        spool.offer(req.origin_input_ids, answer, handles)

    def _predicted(self, req: Any) -> Sequence[int] | None:
        """Return the answer's tokens that the request's caller expects; a malformed prediction is ignored."""
        try:
            read = self._read_prediction(req.sampling_params.custom_params)
        except HintError as error:
            logger.warning("request %.64r: a malformed prediction is ignored (%s)", req.rid, error)
            return None
        return read[0] if read is not None and read[0] else None

    def _drop(self, request: Request) -> None:
        """Drop all state of a request."""
        self._sync.forget(request.row)
        self._penalties.end(request.row)
        for arm, drafter in self._drafters.items():
            with self._quarantine.guard(arm, request):
                drafter.end(request)
        self._controller.close(request)
        self._quarantine.end(request)


def _hints_of(req: Any) -> RequestHints:
    """Read the request's hints. HTTP refuses malformed ones, but an embedded engine has no HTTP: ignore them."""
    try:
        return parse_hints(req.sampling_params.custom_params)
    except HintError as error:
        logger.warning("request %.64r: malformed hints are ignored (%s)", req.rid, error)
        return MALFORMED


def _tenant_of(req: Any) -> Tenant | None:
    """Return the tenant that `cache_salt` and `extra_key` name; SGLang's adapter id is cut off from `extra_key`."""
    return tenant_of((req.extra_key or "").removesuffix(req.lora_id or ""), req.cache_salt)


def _handles_of(req: Any) -> Sequence[int] | None:
    """Return the handles by which a request's sample can be forgotten; None if it may not be learned from.

    `lookup: context` means that nothing is kept, and malformed hints may have said so. Text of an adapter is excluded,
    since the drafters serve every adapter.
    """
    hints, tenant = _hints_of(req), _tenant_of(req)
    agrees = hints is not MALFORMED and hints.learn and hints.lookup == "on" and req.lora_id is None
    if not agrees:
        return None
    return () if tenant is None else (handle_of(tenant),)
