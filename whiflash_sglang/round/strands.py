"""Strands: further chains of a request, verified beside its first chain in one forward.

A strand leaves the first chain behind `fork` drafts and goes on with tokens of its own. The forward takes it for one
more request: a row of the slot table whose first entries are the path to the fork, and packed rows of its own behind
it. So attention needs no mask, and a batch without strands is what it was. At most one child of a node is the target's
own token, so at most one path of a request is accepted; `fold` hands that path on as a chain. Imports no SGLang.
"""

from collections.abc import Sequence
from itertools import accumulate, chain, pairwise, takewhile

import torch
from whiflash_kernels import MixedBlock

from whiflash_sglang.candidates import Candidate, common_prefix
from whiflash_sglang.core import Strand, Verified


def strand_of(owner: int, chain: Candidate, other: Candidate, room: int, worth: float) -> Strand | None:
    """What `other` adds to a request's first chain: the tokens behind the longest common prefix that are worth a row.

    Two candidates that disagree cannot both be right. With a and c, the chances of the two tokens at the fork given the
    path to it, the other's is right with c (1 - a) / (1 - a c): the chance that c alone is, given that not both are.

    Args:
        room: rows that are left for the request. worth: chance below which a token is not verified.

    Returns:
        None where it says what the chain says, or nothing that is worth its row.
    """
    fork = common_prefix(chain.tokens, other.tokens)
    if fork == min(len(chain.tokens), len(other.tokens)):
        return None
    before = other.alive[fork - 1] if fork else 1.0
    path = chain.alive[fork - 1] if fork else 1.0
    if not before or not path:
        return None
    here, chains = other.alive[fork] / before, chain.alive[fork] / path
    contested = path * here * (1 - chains) / max(1 - here * chains, 1e-6)
    scale = contested / other.alive[fork] if other.alive[fork] else 0.0
    paying = takewhile(lambda i: other.alive[i] * scale >= worth, range(fork, len(other.tokens)))
    kept = [other.tokens[i] for i in paying][:room]
    return Strand(owner, fork, kept, 0, contested, other.parts[0].source) if kept else None


def chosen_strands(
    possible: Sequence[Strand], widths: Sequence[int], rooms: Sequence[int], most: int, spare: int
) -> list[Strand]:
    """The likeliest strands, in the order of their requests: at most `most` of a request, and `spare` of the batch.

    Args:
        widths: rows of each request's first chain. rooms: rows that each request may verify.
    """
    taken: list[list[Strand]] = [[] for _ in widths]
    for strand in sorted(possible, key=lambda strand: -strand.chance):
        siblings = taken[strand.owner]
        first_row = widths[strand.owner] + sum(len(other.tokens) for other in siblings)
        tokens = strand.tokens[: rooms[strand.owner] - first_row]
        same = any((other.fork, other.tokens[0]) == (strand.fork, strand.tokens[0]) for other in siblings)
        if tokens and not same and len(siblings) < most and spare:
            siblings.append(strand._replace(tokens=tokens, first_row=first_row))
            spare -= 1
    return [strand for siblings in taken for strand in siblings]


Requests = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""The R requests that a forward verifies, as `prepare_mixed_block` takes them: bonus tokens [R] int64, drafts [R, W]
int64, widths [R] int32, starts [R] int64, rows of the slot table [R] int64.
"""


def pack(
    requests: Requests,
    lengths: Sequence[int],
    strands: Sequence[Strand],
    spare: Sequence[int],
    slot_table: torch.Tensor,
) -> tuple[Requests, torch.Tensor]:
    """The B `requests` of a batch with its strands behind them, whose rows of the slot table are written; and the
    request of each, [R] int64.

    A strand's KV slots are its request's, from `first_row` behind n: the scheduler keeps slots for the widest block
    there.

    Args:
        lengths: n of each request, on the host. spare: rows of `slot_table` [rows, ctx] int32 that nobody has.
    """
    bonus, drafts, widths, starts, rows = requests
    spare, begins = list(spare[: len(strands)]), []
    for strand, row in zip(strands, spare, strict=True):
        n = lengths[strand.owner]
        begin, slots = n + 1 + strand.fork, slot_table[rows[strand.owner]]
        slot_table[row, :begin] = slots[:begin]
        free = slots[n + strand.first_row : n + strand.first_row + len(strand.tokens)]
        slot_table[row, begin : begin + len(strand.tokens)] = free
        begins.append(begin)
    width = max(drafts.shape[1], *(len(strand.tokens) - 1 for strand in strands))
    wide = drafts.new_zeros((len(rows) + len(strands), width))
    wide[: len(rows), : drafts.shape[1]] = drafts
    for index, strand in enumerate(strands, len(rows)):
        wide[index, : len(strand.tokens) - 1] = torch.tensor(strand.tokens[1:], dtype=torch.int64)

    def behind(first: torch.Tensor, more: Sequence[int]) -> torch.Tensor:
        return torch.cat([first, torch.tensor(more, dtype=first.dtype, device=first.device)])

    whole = (
        behind(bonus, [strand.tokens[0] for strand in strands]),
        wide,
        behind(widths, [len(strand.tokens) for strand in strands]),
        behind(starts, begins),
        behind(rows, spare),
    )
    return whole, behind(torch.arange(len(rows), device=rows.device), [strand.owner for strand in strands])


Accepted = Sequence[tuple[Strand, int]]
"""Strands, each with how many of its tokens were right: 0 where it lost."""


def fold(
    block: MixedBlock, predictions: torch.Tensor, size: int, strands: Sequence[Strand]
) -> tuple[torch.Tensor | None, torch.Tensor, Accepted]:
    """Fold a verification of `size` requests and their strands to one chain a request, which was accepted furthest.

    Args:
        predictions: [T] int64, the target's token at each row of `block`.

    Returns:
        [T'] int64, the packed rows of the chains, request after request; None: those of the first chains. [B + 1]
        int32, where each begins. And what was right of every strand.
    """
    ends, ids, expected = block.qo_indptr.tolist(), block.input_ids.tolist(), predictions.tolist()

    def right(first: int, end: int) -> int:
        """Rows behind `first` that hold what the target predicted before them."""
        row = first
        while row + 1 < end and ids[row + 1] == expected[row]:
            row += 1
        return row - first

    paths: list[Sequence[int]] = [range(*pair) for pair in pairwise(ends[: size + 1])]
    first, judged = [right(path[0], path[-1] + 1) for path in paths], []
    for strand, (begin, end) in zip(strands, pairwise(ends[size:]), strict=True):
        path, count = paths[strand.owner], 0
        if first[strand.owner] == strand.fork and expected[path[strand.fork]] == ids[begin]:
            count = 1 + right(begin, end)
            paths[strand.owner] = [*path[: strand.fork + 1], *range(begin, end)]
        judged.append((strand, count))
    indptr = block.qo_indptr[: size + 1]
    if not any(count for _, count in judged):
        return None, indptr, judged
    indptr = torch.tensor(
        list(accumulate(map(len, paths), initial=0)), dtype=indptr.dtype, device=indptr.device
    )
    kept = torch.tensor(list(chain.from_iterable(paths)), device=indptr.device)
    return kept, indptr, judged


def moves(
    accepted: Accepted, row_ids: Sequence[int], lengths: Sequence[int], slot_table: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """KV slots to copy to and from, [M] int64 each: what was right of a strand that won goes behind its fork.

    Args:
        row_ids: of each request in `slot_table`. lengths: n of each.
    """
    targets, sources = [], []
    for strand, right in accepted:
        slots, n = slot_table[row_ids[strand.owner]].to(torch.int64), lengths[strand.owner]
        targets.append(slots[n + 1 + strand.fork :][:right])
        sources.append(slots[n + strand.first_row :][:right])
    return torch.cat(targets), torch.cat(sources)


def accepted_rows(verified: Verified, kept: torch.Tensor | None, indptr: torch.Tensor) -> Verified:
    """`verified` of the accepted paths alone, as of `fold`; SGLang's record is left as it is."""
    index = slice(int(indptr[-1])) if kept is None else kept
    final, predictions = verified.final_hidden, verified.predictions
    assert predictions is not None
    return verified._replace(
        logits=verified.logits[index],
        features=verified.features[index],
        final_hidden=None if final is None else final[index],
        input_ids=verified.input_ids[index],
        indptr=indptr,
        predictions=predictions[index],
    )
