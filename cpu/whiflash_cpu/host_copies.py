"""Torch versions of SGLang's copies between a KV pool and its host pool (`sgl_kernel.kvcacheio`), for CPU pools."""

from collections.abc import Sequence

import torch


def transfer_kv_direct(
    src_layers: Sequence[torch.Tensor],
    dst_layers: Sequence[torch.Tensor],
    src_indices: torch.Tensor,
    dst_indices: torch.Tensor,
    page_size: int,
) -> None:
    """Copy slots `src_indices` [n] of every source layer [slots, ...] to slots `dst_indices` [n] of its target."""
    for source, target in zip(src_layers, dst_layers, strict=True):
        target[dst_indices] = source[src_indices]


def transfer_kv_per_layer_direct_pf_lf(
    src_ptrs: Sequence[torch.Tensor],
    dst_ptrs: Sequence[torch.Tensor],
    src_indices: torch.Tensor,
    dst_indices: torch.Tensor,
    layer_id: int,
    page_size: int,
) -> None:
    """Copy one layer of a host pool [pages, layers, page_size, ...] to a device layer [slots, ...], for K and V."""
    for source, target in zip(src_ptrs, dst_ptrs, strict=True):
        pages = _by_page(source, target)
        target[dst_indices] = pages[src_indices // page_size, layer_id, src_indices % page_size]


def transfer_kv_all_layer_direct_lf_pf(
    src_ptrs: Sequence[torch.Tensor],
    dst_ptrs: Sequence[torch.Tensor],
    src_indices: torch.Tensor,
    dst_indices: torch.Tensor,
    page_size: int,
) -> None:
    """Copy all device layers [slots, ...], first K's, then V's, to host pools [pages, layers, page_size, ...]."""
    layers = len(src_ptrs) // len(dst_ptrs)
    for number, source in enumerate(src_ptrs):
        pages = _by_page(dst_ptrs[number // layers], source)
        pages[dst_indices // page_size, number % layers, dst_indices % page_size] = source[src_indices]


def _by_page(pool: torch.Tensor, layer: torch.Tensor) -> torch.Tensor:
    """View a host pool as [pages, layers, page_size, ...]. One of recurrent states has no page_size axis, and therefore
    only one axis more than `layer`, a layer of the device's pool."""
    return pool if pool.dim() == layer.dim() + 2 else pool.unsqueeze(2)
