"""Coordinate ranks under DP attention: they attend to requests of their own, and compute all other layers together.

Each layer then has a collective call with the rows of all ranks in it, and all must know how many each has. SGLang
counts requests of one width (`scheduler_components/dp_attn.py`); a verification's widths differ, so its rows are
counted here, between the hosts, once a round. Drafts and catch-ups, which run between two verifications, concern a
rank's own requests and wait for nobody.

SGLang decodes on no rank while another one prefills. A rank without a request joins with no row.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode
from sglang.srt.runtime_context import get_parallel
from sglang.srt.utils.common import require_mlp_tp_gather


class PackedBatch(ForwardBatch):  # type: ignore[misc]
    """A batch of a verification of any widths, whose rows have been padded already."""

    forward_mode: ForwardMode

    def prepare_mlp_sync_batch(self, model_runner: Any) -> None:
        """Prepare the rows like an extend batch's: upstream would count a verification's requests by one width."""
        mode = self.forward_mode
        self.forward_mode = ForwardMode.EXTEND
        super().prepare_mlp_sync_batch(model_runner)
        self.forward_mode = mode


class Peers:
    """The ranks that compute a forward together, and their agreement on the next one.

    Attributes:
        size: ranks with requests of their own; 1 without DP attention, where nothing is exchanged. rows: of each rank
            in the next forward. replays: whether all replay graphs of equally many rows. written: requests that wrote
            the target's weights here. on_written: called in all ranks at once when all have had such a request.
    """

    def __init__(self) -> None:
        self.size = int(get_parallel().attn_dp_size)
        self.rows: Sequence[int] = ()
        self.replays = False
        self.written, self._answered = 0, 0
        self.on_written: Callable[[], object] = int

    def agree(self, rows: int, graph: int | None) -> int:
        """Return the number of rows, padding included, to pack `rows` rows into. All ranks must call it at once.

        Args:
            graph: rows of the graph that holds them; None: they run eagerly here, and so everywhere.
        """
        if self.size == 1:
            return rows if graph is None else graph
        parallel = get_parallel()
        # Ranks that attend to the same requests take equal parts of them.
        padded = -(-rows // parallel.attn_tp_size) * parallel.attn_tp_size
        mine = torch.tensor([padded, -1 if graph is None else graph, self.written])
        every = mine.new_empty(3 * parallel.tp_size)
        torch.distributed.all_gather_into_tensor(every, mine, group=parallel.tp_group.cpu_group)
        # Ranks that attend to the same requests are next to each other and agree, so the first of each is taken.
        every = every.view(self.size, -1, 3)[:, 0]
        if (written := int(every[:, 2].min())) > self._answered:
            self._answered = written
            self.on_written()
        self.replays = bool((every[:, 1] >= 0).all())
        self.rows = [int(every[:, 1].max())] * self.size if self.replays else every[:, 0].tolist()
        return self.rows[parallel.attn_dp_rank]

    def count(self, batch: Any) -> None:
        """Give SGLang the rows, in place of the requests that it counted for this decode batch."""
        if self.size == 1:
            return
        # If no layer gathers rows, SGLang counts those of this rank only.
        rows = list(self.rows) if require_mlp_tp_gather() else [self.rows[get_parallel().attn_dp_rank]]
        batch.global_num_tokens = batch.global_num_tokens_for_logprob = rows
        batch.can_run_decode_cuda_graph = self.replays
        # With this flag SGLang does not multiply the numbers by a width, and pads no rank to another's rows.
        batch.dp_spec_prefill_coordination_applied = True
