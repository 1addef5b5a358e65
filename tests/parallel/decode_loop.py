"""SGLang's own loop of a decode server, in this process."""

import time
from collections.abc import Callable
from typing import Any

import torch
from engine import Engine


def run(e: Engine, on_pass: Callable[[], object] = lambda: None, *, ends: Callable[[bool], bool] = bool) -> None:
    """Until nothing is left here, and `ends` says that it may end."""
    scheduler, idle = e.scheduler, 0
    queue, arriving = scheduler.disagg_decode_prealloc_queue, scheduler.disagg_decode_transfer_queue

    def ingest() -> list[Any]:
        nonlocal idle
        on_pass()
        running = scheduler.running_batch.reqs or scheduler.last_batch or scheduler.waiting_queue
        waiting = queue.queue or queue.retracted_queue or scheduler.grammar_manager.grammar_queue
        waiting = waiting or arriving.queue or arriving.has_pending_deferred_releases()
        if waiting and not running:
            time.sleep(0.001)  # other processes have the core meanwhile
        idle = 0 if running or waiting else idle + 1
        scheduler.gracefully_exit = ends(idle > 3)
        return []

    scheduler.gracefully_exit, scheduler.ingest_requests = False, ingest
    scheduler.maybe_sleep_on_idle = lambda: None
    if scheduler.enable_overlap:
        streams = torch.get_device_module(scheduler.device)
        with streams.StreamContext(scheduler.schedule_stream), getattr(e, "watched")():  # noqa: B009
            scheduler.event_loop_overlap_disagg_decode()
    else:
        scheduler.event_loop_normal_disagg_decode()
