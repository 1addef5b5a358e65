"""Read SGLang's groups of tensor parallelism and its vocabulary-parallel modules for this package."""

from inspect import signature
from typing import Any

import torch
from sglang.srt.layers.logits_processor import should_apply_lm_head_quant_method
from sglang.srt.layers.sampler import SYNC_TOKEN_IDS_ACROSS_TP
from sglang.srt.lora.layers import unwrap_lora_layer
from sglang.srt.managers.scheduler_components.request_receiver import SchedulerRequestReceiver
from sglang.srt.runtime_context import get_parallel
from sglang.srt.utils import broadcast_pyobj

from whiflash_sglang.device.ranks import DivergedError, Message, Ranks
from whiflash_sglang.errors import CheckpointError
from whiflash_sglang.formats.choice import Projection, Shard, SharedVocabulary


def ranks_of_model() -> Ranks:
    """Return the processes that serve the same requests: a replica's, or with DP attention those that attend together.

    Messages go through SGLang's broadcast of new requests. A process that expects a message and receives
    requests, or the reverse, raises DivergedError; with another collective it would hang.
    """
    group = get_parallel().attn_tp_group
    if group.world_size == 1:
        return Ranks()

    def send(message: Message | None) -> Any:
        received = broadcast_pyobj([message], group.rank, group.cpu_group, src=group.ranks[0])
        return received[0] if len(received) == 1 else received

    return Ranks(group.rank_in_group, group.world_size, send)


def sends_tokens(grammars: bool) -> bool:
    """Whether ranks take the first rank's tokens, by the rule of SGLang's sampler. Differing tokens end the server."""
    return get_parallel().attn_tp_group.world_size > 1 and (grammars or SYNC_TOKEN_IDS_ACROSS_TP)


def first_ranks(tokens: torch.Tensor) -> torch.Tensor:
    """Replace tokens in place by the first rank's and return them. All ranks must call it together."""
    sent: torch.Tensor = get_parallel().attn_tp_group.broadcast(tokens, src=0)
    return sent


def shared_vocabulary(model: Any, size: int) -> SharedVocabulary | None:
    """Return the target's embedding and head if they are split or quantised; None if both are plain matrices.

    model: SGLang's. size: tokens of its vocabulary.
    """
    split = get_parallel().attn_tp_group.world_size > 1
    embedding, head = input_embedding(model), output_head(model)
    if not (split or is_quantised(embedding) or is_quantised(head)):
        return None
    shard = None
    if head.tp_size > 1 and not is_shared_with_peers(head):
        begin, end = head.shard_indices.org_vocab_start_index, head.shard_indices.org_vocab_end_index
        shard = Shard(torch.arange(begin, end, device=next(head.parameters()).device), _gather)
    return SharedVocabulary(
        size,
        embedding if split or is_quantised(embedding) else None,
        shard,
        _projection(head, rows_here(head, size)) if is_quantised(head) else None,
    )


def is_shared_with_peers(head: Any) -> bool:
    """Whether ranks with requests of their own have parts of a head (DP attention without `--enable-dp-lm-head`)."""
    return bool(getattr(head, "tp_size", 1) > get_parallel().attn_tp_size)


def whole_head(head: Any, size: int) -> torch.Tensor:
    """Return the whole head [V, H] that peers share. They draft at different times, so each needs all of it.

    All ranks must call it together. Raises CheckpointError if the head is quantised.
    """
    if is_quantised(head):
        raise CheckpointError(
            "the target's output head is quantised and split over all ranks, so drafters cannot read it; give "
            "--enable-dp-lm-head, or --whiflash-drafters none"
        )
    whole: torch.Tensor = get_parallel().tp_group.all_gather(head.weight.detach(), dim=0)
    return whole[:size]


def is_quantised(module: Any) -> bool:
    """Whether an embedding or a head is quantised, by SGLang's own rule for heads.

    An embedding that is torch's own (Gemma 3's) has no such method.
    """
    method = getattr(module, "quant_method", None)
    return not hasattr(module, "weight") or should_apply_lm_head_quant_method(module, method)


def _projection(head: Any, rows: int) -> Projection:
    """Return a quantised head as SGLang's logits processor applies it, without padding rows."""
    return Projection(rows, lambda hidden: head.quant_method.apply(head, hidden)[:, :rows])


def input_embedding(model: Any) -> Any:
    """Return the module that embeds tokens, without adapters. Not every class of SGLang's has a method that returns it,
    and MiMo's method embeds tokens."""
    getter = getattr(model, "get_input_embeddings", None)
    if getter is None or signature(getter).parameters:
        return unwrap_lora_layer(model.model.embed_tokens)
    return unwrap_lora_layer(getter())


def output_head(model: Any) -> Any:
    """Return the module that projects states on tokens, without adapters, since drafters have none."""
    return unwrap_lora_layer(model.lm_head)


def rows_here(module: Any, size: int) -> int:
    """Return how many rows of a vocabulary of `size` an embedding or head has in this process, without padding."""
    if getattr(module, "tp_size", 1) == 1:
        return size
    return int(module.shard_indices.num_org_elements)


def _gather(part: torch.Tensor) -> torch.Tensor:
    """Gather [N, C] of every process → [P, N, C]."""
    group = get_parallel().attn_tp_group
    parts: torch.Tensor = group.all_gather(part, dim=0)
    return parts.view(group.world_size, *part.shape)


class RequestReceiver(SchedulerRequestReceiver):  # type: ignore[misc]
    """SGLang's receiver of requests, which raises an error once ranks no longer serve the same requests."""

    __slots__ = ()

    def _broadcast_reqs_across_ranks(self, *args: Any, **named: Any) -> Any:
        """Broadcast new requests from the first rank to the others, as SGLang does.

        Raises DivergedError if this rank receives a message of a round in place of requests.
        """
        received = super()._broadcast_reqs_across_ranks(*args, **named)
        if any(isinstance(item, Message) for item in received or ()):
            raise DivergedError(
                f"rank {get_parallel().tp_rank} of {get_parallel().tp_size} has no request that runs, rank 0 plans a "
                "round: they do not serve the same requests any more"
            )
        return received
