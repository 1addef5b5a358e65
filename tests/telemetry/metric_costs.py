"""What metrics cost beside the rounds that they count: `python tests/telemetry/metric_costs.py`.

The embedded model answers eight requests under `auto`, with prometheus_client writing to files as in a server of
several processes. Printed are microseconds of counting and of writing, also as a share of the seconds of rounds.
"""

import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))


def timed(owner: Any, name: str, seconds: Counter[str], calls: Counter[str]) -> None:
    """Add up what `owner.name` takes."""
    run: Callable[..., Any] = getattr(owner, name)

    def measured(*args: Any, **named: Any) -> Any:
        began = time.perf_counter()
        try:
            return run(*args, **named)
        finally:
            seconds[name] += time.perf_counter() - began
            calls[name] += 1

    setattr(owner, name, measured)


def main() -> None:
    with tempfile.TemporaryDirectory() as files:
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = files
        from engine import engine

        from whiflash_sglang.checkpoints.manifest import embedded_bundle
        from whiflash_sglang.embedded import ensure_target
        from whiflash_sglang.metrics import Publisher
        from whiflash_sglang.telemetry.tally import Tally

        seconds, calls = Counter[str](), Counter[str]()
        for owner, name in ((Tally, "committed"), (Tally, "compare"), (Publisher, "flush")):
            timed(owner, name, seconds, calls)
        flags = {"draft": embedded_bundle()}
        with engine(ensure_target(), whiflash=flags, dtype="bfloat16", enable_metrics=True) as e:
            seconds.clear()
            calls.clear()
            prompts = [random.Random(i).choices(range(1000, 40000), k=60) for i in range(8)]
            e.generate(prompts, max_new_tokens=96)
            clock = e.worker.clock
            for name, spent in seconds.items():
                print(
                    f"{name}: {calls[name]} calls, {1e6 * spent / calls[name]:.1f} microseconds each, "
                    f"{1e6 * spent / clock.rounds:.1f} a round, {100 * spent / clock.round_seconds:.3f} % of the rounds"
                )
            print(f"rounds: {clock.rounds}, {1e3 * clock.round_seconds / clock.rounds:.1f} ms each")


if __name__ == "__main__":
    main()
