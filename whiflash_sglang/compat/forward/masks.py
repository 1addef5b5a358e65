"""What grammars allow at every verified row, as bit masks for SGLang's sampler."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from sglang.srt.constrained.base_grammar_backend import GrammarMask
from sglang.srt.speculative.spec_utils import GrammarTree
from whiflash_kernels import MixedBlock

from whiflash_sglang.core import Strand
from whiflash_sglang.structure.spending import Spending


@dataclass(slots=True)
class Masks:
    """What grammars allow at a round's packed rows; the drafts are trees of their requests."""

    # Filled by `grammar_trees`, before the target's forward.
    tree: GrammarTree
    rows: torch.Tensor  # [T] int64, the place in the trees of every packed row
    behind: int  # nodes before the first of them, of text that the grammars have not seen

    # Filled by `build`.
    bits: GrammarMask | None = None
    rejected: Sequence[
        int
    ] = ()  # packed rows of drafts that there was no time to mask, which must not be accepted

    def build(self, batch: Any, spending: Spending) -> bool:
        """Make what SGLang's `build_grammar_vocab_mask` makes, timed by request. False: no request has a grammar.

        Each request's first row has its mask however long that takes. Drafts that there is no time for are rejected.
        """
        batch.sampling_info.grammar_mask = None  # the prefill's
        reqs, vocabulary = batch.reqs, batch.sampling_info.vocab_size
        next_token, sibling, ids = (part.tolist() for part in self.tree.resolve())
        grammars = {i: req.grammar for i, req in enumerate(reqs) if req.grammar is not None}
        if not grammars:
            return False
        *_, last = grammars.values()
        widest = len(ids[0])
        bits = last.allocate_vocab_mask(vocab_size=vocabulary, batch_size=len(ids) * widest, device="cpu")
        cut: list[int] = []
        for i, grammar in grammars.items():
            walk = _Walk(grammar, next_token[i], sibling[i], ids[i], vocabulary, self.behind, spending)
            spending.on(reqs[i].rid, partial(walk.fill, bits[i * widest : (i + 1) * widest]))
            cut += [i * widest + node for node in walk.cut]
        places = self.rows.tolist() if cut else []
        self.bits = GrammarMask(last, bits.to(self.rows.device, non_blocking=True))
        self.rejected = [places.index(place) for place in cut]
        return True

    def of(self, rows: slice) -> GrammarMask:
        """Those of these packed rows."""
        assert self.bits is not None
        return GrammarMask(self.bits.grammar, self.bits.vocab_mask[self.rows[rows]])


def grammar_trees(
    block: MixedBlock,
    widths: Sequence[int],
    ahead: Sequence[Sequence[int]],
    strands: Sequence[Strand] = (),
) -> Masks:
    """One tree a request, padded to the widest; start it before the target forward.

    Args:
        block: whose rows say which request of the batch they belong to. widths: rows of each first chain.
        ahead: per request, equally many tokens that were committed and that its grammar has not seen, the bonus
            token last; they go before its rows. strands: whose rows are behind those of the first chains.
    """
    behind, size, device = len(ahead[0]), len(widths), block.input_ids.device
    nodes = list(widths)
    for strand in strands:
        nodes[strand.owner] = strand.first_row + len(strand.tokens)
    widest = behind + max(nodes)
    columns = torch.arange(widest)
    last = torch.tensor(widths)[:, None] + behind - 1
    next_token = torch.where(columns[None, :] < last, columns[None, :] + 1, -1)
    sibling = torch.full((size, widest), -1, dtype=torch.int64)
    places = [torch.arange(width) for width in widths]
    for strand in strands:
        first, count = behind + strand.first_row, len(strand.tokens)
        chain = next_token[strand.owner]
        chain[first : first + count - 1] = torch.arange(first + 1, first + count)
        parent = behind + strand.fork
        if chain[parent] < 0:
            chain[parent] = first
        else:
            _last_sibling(sibling[strand.owner], int(chain[parent]), first)
        places.append(torch.arange(strand.first_row, strand.first_row + count))
    ids = torch.zeros((size, widest), dtype=torch.int64, device=device)
    ids[:, 1 : behind + 1] = torch.tensor(ahead, dtype=torch.int64, device=device).view(size, behind)
    column = torch.cat(places).to(device) + behind
    total = len(column)  # what is behind these rows is padding, to which any mask will do
    owner = block.request_of_row[:total]
    ids[owner, column] = block.input_ids[:total]
    tree = GrammarTree.from_device(next_token, sibling, ids)
    rows = torch.zeros_like(block.request_of_row)
    rows[:total] = owner * widest + column
    return Masks(tree, rows, behind)


def _last_sibling(sibling: torch.Tensor, node: int, added: int) -> None:
    """Put `added` behind the last sibling of `node`."""
    while sibling[node] >= 0:
        node = int(sibling[node])
    sibling[node] = added


class _Walk:
    """Through one request's tree, from its root, with its grammar; afterwards the grammar is as it was.

    cut: drafts that there was no time for; their parents have masks.
    """

    def __init__(
        self,
        grammar: Any,
        next_token: Sequence[int],
        sibling: Sequence[int],
        ids: Sequence[int],
        vocabulary: int,
        behind: int,
        spending: Spending,
    ) -> None:
        self._grammar, self._ids, self._vocabulary = grammar, ids, vocabulary
        self._next, self._sibling, self._behind, self._spending = next_token, sibling, behind, spending
        self.cut: list[int] = []

    def fill(self, bits: torch.Tensor, node: int = 0, parent: int = -1) -> None:
        """Write the masks behind `node`, behind its siblings, and behind what follows them. bits: [nodes, words]."""
        while node >= 0:
            if not node or self._allows(bits[parent], self._ids[node]):
                if node > self._behind and self._spending.exhausted():
                    self.cut.append(node)
                else:
                    self._visit(bits, node)
            node = self._sibling[node]

    def _visit(self, bits: torch.Tensor, node: int) -> None:
        if node:
            self._grammar.accept_token(self._ids[node])
        if not self._grammar.is_terminated():
            self._grammar.fill_vocab_mask(bits, node)
            self.fill(bits, self._next[node], node)
        if node:
            self._grammar.rollback(1)

    def _allows(self, mask: torch.Tensor, token: int) -> bool:
        return token < self._vocabulary and bool(int(mask[token // 32]) >> (token % 32) & 1)
