"""Contents of the radix tree, and a check that both drafters' KV at its slots is that of one pass over the text."""

from array import array
from collections.abc import Mapping, Sequence

import torch
from engine import Engine
from model_set import Models
from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType

TOLERANCE = 1e-4
"""Tolerance as a share of a KV tensor's largest value: the engine's forwards have other shapes than the one pass."""


def sequences(e: Engine) -> list[list[int]]:
    """Every text that the engine has seen: prompts with what was generated after them."""
    return [[*req.origin_input_ids, *req.output_ids] for req in e.requests.values()]


def matched_slots(e: Engine, tokens: Sequence[int], extra_key: str | None = None) -> torch.Tensor:
    """KV slots [h] that the tree would hand to a prompt beginning with `tokens`, of a request with this key.

    If windowed layers have a pool of their own, also slots that miss the window before them."""
    tree = e.scheduler.tree_cache
    key = RadixKey(array("q", tokens), extra_key=extra_key, is_bigram=tree.tree_core.is_eagle)
    if ComponentType.SWA in tree.components:
        length, node, _ = tree.tree_core.match_full_device_prefix(key)
    else:
        match = tree.match_prefix(MatchPrefixParams(key=key))
        length, node = match.device_prefix_len, match.last_device_node
    slots: torch.Tensor = tree.path_device_indices(node)[:length]
    return slots.long()


def tree_slots(e: Engine) -> set[int]:
    """Every KV slot that the tree owns."""
    return set(e.scheduler.tree_cache.all_values_flatten().tolist())


def assert_tree_is_true(e: Engine, models: Models, adapted: Mapping[str | None, Models] | None = None) -> int:
    """Compare drafters' KV at every slot of the tree; returns how many slots there are.

    adapted: models of the requests with an adapter, by its id.
    """
    checked: set[int] = set()
    for req, tokens in zip(e.requests.values(), sequences(e), strict=True):
        slots = matched_slots(e, tokens, req.extra_key)
        if len(slots) == 0:
            continue
        reference = (adapted or {}).get(req.lora_id, models).reference.keys_values(tokens)
        for arm, expected in reference.items():
            if arm not in e.worker.drafters:
                continue
            kv = e.worker.drafters[arm].kv
            for name, found, wanted in (("k", kv.k, expected.k), ("v", kv.v, expected.v)):
                close(found[:, slots], wanted[:, : len(slots)], f"{name} of {arm} after {tokens[:8]}…")
        checked.update(slots.tolist())
    assert checked == tree_slots(e), "the tree holds slots of a text that nobody sent"
    return len(checked)


def close(found: torch.Tensor, wanted: torch.Tensor, what: str) -> None:
    error = (found - wanted).abs().amax(dim=(0, 2, 3))
    worst = int(error.argmax())
    limit = TOLERANCE * float(wanted.abs().max())
    assert float(error[worst]) <= limit, (
        f"{what}: position {worst} of {len(error)} is off by {float(error[worst]):.2e} (limit {limit:.2e}); "
        f"{int((error > limit).sum())} positions are wrong"
    )
