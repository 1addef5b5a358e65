"""Cache-switch kernels of WhiFlash: the device side of switching between speculative drafters.

Every public op is its torch reference; `dispatch.op` runs Triton instead on CUDA. The environment variable
``WHIFLASH_KERNELS`` (``auto``, ``torch`` or ``triton``) forces either; ``triton`` on CPU tensors works only
under Triton's interpreter (``TRITON_INTERPRET=1``).

Unless a docstring says that something is written in place, no argument is written, and nothing that is returned
shares memory with an argument. Index tensors may be strided; what must be contiguous says so.
"""

from whiflash_kernels.attention import draft_attention
from whiflash_kernels.backlog import claim_backlogs, park, unpark
from whiflash_kernels.block import accept_and_commit, fill_slots, prepare_mixed_block
from whiflash_kernels.catch_up import dflash_catch_up, eagle3_catch_up
from whiflash_kernels.copies import propose_copies
from whiflash_kernels.drafts import choose_drafts, cut_drafts, lay_drafts
from whiflash_kernels.passes import draft_inputs, pass_rows
from whiflash_kernels.router import router_mlp
from whiflash_kernels.routing import routing_stats
from whiflash_kernels.sampling import penalise_rows, sample_rows
from whiflash_kernels.structs import (
    BacklogRings,
    Chosen,
    Claims,
    Committed,
    DFlashWeights,
    Drafts,
    Eagle3Weights,
    GraphSlots,
    KVPools,
    MixedBlock,
    PassInputs,
    PenaltyTable,
    SamplingTable,
)
from whiflash_kernels.verify import verify_attention

__version__ = "0.1.0"

__all__ = [
    "BacklogRings",
    "Chosen",
    "Claims",
    "Committed",
    "DFlashWeights",
    "Drafts",
    "Eagle3Weights",
    "GraphSlots",
    "KVPools",
    "MixedBlock",
    "PassInputs",
    "PenaltyTable",
    "SamplingTable",
    "accept_and_commit",
    "choose_drafts",
    "claim_backlogs",
    "cut_drafts",
    "dflash_catch_up",
    "draft_attention",
    "draft_inputs",
    "eagle3_catch_up",
    "fill_slots",
    "lay_drafts",
    "park",
    "pass_rows",
    "penalise_rows",
    "prepare_mixed_block",
    "propose_copies",
    "router_mlp",
    "routing_stats",
    "sample_rows",
    "unpark",
    "verify_attention",
]
