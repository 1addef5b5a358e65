"""Decide whether another round may follow in the same step of the scheduler.

Between two steps the scheduler reads its mail, rebuilds the batch, copies it and streams committed tokens. Plain
decoding pays less for that than a speculative round does, so rounds that draft nothing go on without it.
"""

from typing import Any

from whiflash_sglang.engine.forward import sampling


def has_mail(scheduler: Any) -> bool:
    """Whether requests, aborts or messages wait for the scheduler, or requests for the compilation of their grammars,
    whose end only the scheduler notices. True if its mailbox cannot be polled.
    """
    receiver = scheduler.request_receiver
    sockets = [
        socket for socket in (receiver.recv_from_tokenizer, receiver.recv_from_rpc) if socket is not None
    ]
    return bool(scheduler.grammar_manager.has_waiting_grammars()) or any(
        not hasattr(socket, "poll") or socket.poll(0) for socket in sockets
    )


def needs_scheduler(batch: Any) -> bool:
    """Whether a token of this batch depends on the scheduler's work on the token before it, or on its records.

    Penalties and processors follow the committed text there; log-probabilities and hidden states are collected from
    one forward of a step. The scheduler also finds stop strings and ends aborted requests.
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
