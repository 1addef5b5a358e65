"""Prices of a server whose context is shorter than what is timed elsewhere."""

import torch
from emulated import emulated_graphs
from engine import engine
from model_set import Models

from whiflash_sglang.device.clock import Clock
from whiflash_sglang.engine.scheduler.pricing import Start


def test_no_position_is_beyond_the_tables(models: Models) -> None:
    """Neither one of a draft nor one of a catch-up, which ingests as much as rings hold."""
    sizes = {"max_running_requests": 8, "context_length": 24, "max_total_tokens": 512}
    with engine(models.target, whiflash=models.whiflash("auto"), **sizes) as e, emulated_graphs(e):
        worker = e.worker
        start = worker.target, worker.drafters, worker.sync, Clock(), 8
        with torch.no_grad():
            tables = Start(*start).tables()
    assert set(tables.drafts) == set(tables.catch_up) == {"ar", "diffusion"}
