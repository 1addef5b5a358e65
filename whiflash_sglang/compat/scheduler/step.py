"""Several rounds in one step of the scheduler: when it would only be in the way.

Between two rounds the scheduler takes its mail, rebuilds the batch, copies it and streams what was committed. Plain
decoding pays less for that than a speculative round does, so rounds that draft nothing go on without it.
"""

from typing import Any

from sglang.srt.constrained.grammar_manager import GrammarManager
from sglang.srt.managers.scheduler_components.request_receiver import SchedulerRequestReceiver

from whiflash_sglang.compat.forward import sampling
from whiflash_sglang.compat.patching import around, replace

_sockets: tuple[Any, ...] = ()
"""Where this process's scheduler gets its mail, known from its first look; empty without a scheduler's loop."""

_compiling = False
"""Whether requests waited for their grammars when the scheduler looked last: it alone notices that one is ready."""


def install() -> None:
    """Idempotent."""
    replace(SchedulerRequestReceiver, "_pull_raw_reqs", _noting_sockets)
    replace(GrammarManager, "has_waiting_grammars", _noting_grammars)


def has_mail() -> bool:
    """Whether requests, aborts or messages wait for the scheduler. True where its mailbox cannot be asked."""
    return _compiling or any(not hasattr(socket, "poll") or socket.poll(0) for socket in _sockets)


def needs_scheduler(batch: Any) -> bool:
    """Whether a token of this batch depends on what the scheduler does with the one before it, or on its records.

    Penalties and processors follow the committed text there; log-probabilities and hidden states are collected from
    one forward of a step. A stop string is found there, and what was aborted ends there.
    """
    return bool(
        batch.return_logprob
        or batch.return_hidden_states
        or batch.sampling_info.has_custom_logit_processor
        or any(sampling.is_penalised(req) or _may_end_anywhere(req) for req in batch.reqs)
    )


def _may_end_anywhere(req: Any) -> bool:
    params = req.sampling_params
    return bool(params.stop_strs or params.stop_regex_strs) or req.to_finish is not None


@around
def _noting_sockets(original: Any, self: SchedulerRequestReceiver) -> Any:
    global _sockets
    _sockets = tuple(s for s in (self.recv_from_tokenizer, self.recv_from_rpc) if s is not None)
    return original(self)


@around
def _noting_grammars(original: Any, self: GrammarManager) -> bool:
    global _compiling
    _compiling = bool(original(self))
    return _compiling
