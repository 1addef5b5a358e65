"""SGLang's own overlap loop in this process, one pass at a time, on whatever device the engine has."""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from engine import Engine


class OverlapLoop(Engine):
    """As `Engine`, but a result is processed while the next batch is under way.

    The scheduler must have been started with overlap scheduling.
    """

    def __init__(self, scheduler: Any) -> None:
        super().__init__(scheduler)
        # SGLang does this on CUDA when its loop begins.
        scheduler._war_barrier_enabled = True
        scheduler.ingest_requests = self._end_after_this_pass
        scheduler.maybe_sleep_on_idle = lambda: None
        self.results: deque[Any] = deque()
        scheduler.result_queue = self.results

    def step(self) -> bool:
        """One pass of the scheduler's overlap loop; False when there was nothing to run and no result was left."""
        from sglang.srt.managers import scheduler as module

        self.scheduler.gracefully_exit = False
        streams = torch.get_device_module(self.scheduler.device)
        with (
            # The loop begins with a queue of its own: give it the one of the pass before.
            patch.object(module, "deque", lambda: self.results),
            streams.StreamContext(self.scheduler.schedule_stream),
            self.watched(),
        ):
            self.scheduler.event_loop_overlap()
        return bool(self.scheduler.last_batch or self.results)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Around every pass."""
        yield

    def _end_after_this_pass(self) -> list[Any]:
        self.scheduler.gracefully_exit = True
        return []
