"""Several rounds in one step of the scheduler: when it would only be in the way.

Between two rounds the scheduler takes its mail, rebuilds the batch, copies it and streams what was committed. Plain
decoding pays less for that than a speculative round does, so rounds that draft nothing go on without it.
"""

from typing import Any

from whiflash_sglang.engine.forward import sampling


def has_mail(scheduler: Any) -> bool:
    """Whether requests, aborts or messages wait for the scheduler, or requests whose grammars are compiled, of which it
    alone notices that one is ready. True where its mailbox cannot be asked.
    """
    receiver = scheduler.request_receiver
    sockets = [
        socket for socket in (receiver.recv_from_tokenizer, receiver.recv_from_rpc) if socket is not None
    ]
    return bool(scheduler.grammar_manager.has_waiting_grammars()) or any(
        not hasattr(socket, "poll") or socket.poll(0) for socket in sockets
    )


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
