"""Launches of a steady round whose verification, drafters' passes and catch-ups are graphs."""

from collections import Counter
from typing import Any
from unittest.mock import patch

import pytest
import torch
from emulated import emulated_graphs
from engine import engine
from model_set import Models
from op_tape import Tape
from test_host_reads import serve, steady

SMALL: dict[str, Any] = {"max_running_requests": 5, "context_length": 96, "max_total_tokens": 1024}

MOST_BETWEEN, MOST_KERNELS, MOST_GRAPHS = 1, 8, 5
"""Operators of torch between kernels, models and graphs; kernels of ours; and graphs, of a round with all four routes.

A ratchet, to be lowered and never raised. Copies to the inputs of the target's graph are not counted: they are in
`tests/phantom/test_server.py`, with all of SGLang's.
"""

UNCOUNTED = ("_draft_attention", "fill_slots")

BEHIND = 4
"""Launches that a round adds if its verification's graph must not commit: the most likely tokens, accepting, parking,
and the entropy.
"""


@pytest.mark.parametrize("commits", [True, False], ids=["in the graph", "behind it"])
def test_what_a_steady_round_issues_beside_its_graphs(
    models: Models, monkeypatch: pytest.MonkeyPatch, commits: bool
) -> None:
    monkeypatch.setenv("WHIFLASH_DEVICE_RESIDENT", "1")
    replay, graphs = Tape.replay, Counter[int]()
    with (
        engine(models.target, whiflash=models.whiflash("auto"), **SMALL) as e,
        emulated_graphs(e) as captured,
    ):
        watched = steady(e, monkeypatch)

        def counted(self: Tape) -> None:
            """A graph is one launch, whatever is in it."""
            before = Counter(watched.kernels)
            with torch.utils._python_dispatch._disable_current_modes(), torch._C.DisableTorchFunction():
                replay(self)
            watched.kernels.clear()
            watched.kernels.update(before)
            graphs[id(self)] += watched.watching

        if not commits:
            monkeypatch.setattr(e.worker.stages.epilogue, "let_graphs_commit", lambda *_: None)
        with patch.object(Tape, "replay", counted):
            serve(e)
        assert set(captured.committed) == {commits}
    between = watched.launches.between
    for site, count in sorted(between.items()):
        print(f"launch {count} x {site}")
    kernels = Counter({name: n for name, n in watched.kernels.items() if name not in UNCOUNTED})
    print(f"kernels {kernels.total()}: {dict(sorted(kernels.items()))}")
    total = between.total() + kernels.total() + graphs.total()
    print(
        f"{between.total()} operators, {kernels.total()} kernels, {graphs.total()} graphs: {total} launches"
    )
    if not commits:
        assert total == MOST_BETWEEN + MOST_KERNELS + MOST_GRAPHS + BEHIND
        return
    assert 0 < between.total() <= MOST_BETWEEN
    assert 0 < kernels.total() <= MOST_KERNELS
    assert 0 < graphs.total() <= MOST_GRAPHS
