"""Write features of texts to files, in the scheduler of an offline engine, when their prompts are prefilled.

A request whose id begins with `WANTED` asks for its prompt's features. Its prefill captures hidden states as our worker
does (`engine/forward/captured.py`), and writes them to a file of that name before the scheduler receives the result.
Other requests run unchanged, by plain decoding.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from sglang.srt.managers import scheduler
from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode
from sglang.srt.runtime_context import get_parallel

from whiflash_sglang.engine.forward.captured import Captured, LoadedTarget
from whiflash_sglang.engine.patching import around, install
from whiflash_sglang.errors import CheckpointError
from whiflash_sglang.files.jsonl import staged, write_whole
from whiflash_train.origin import ORIGIN, vocabulary_file

WANTED = "whiflash-features-"
"""Prefix of the ids of requests for features."""


_wanted: tuple[Sequence[int], str, Path, Path] | None = None
"""Layers, the target's name and two directories (`run`), for the scheduler that this process starts; None elsewhere."""


def run(layers: Sequence[int], name: str, origin: Path, states: Path, *arguments: Any, **options: Any) -> None:
    """Run SGLang's scheduler process with a `FeatureRecorder`. Further arguments are SGLang's own."""
    global _wanted
    _wanted = layers, name, origin, states
    install(sys.modules[__name__])
    scheduler.run_scheduler_process(*arguments, **options)


@around(
    "sglang.srt.managers.scheduler:Scheduler.__init__",
    params=("server_args", "port_args"),
    why="SGLang returns no layer's output of a prompt",
    until="it returns features of chosen layers",
)
def _recorded(original: Any, self: Any, *arguments: Any, **options: Any) -> None:
    """Attach a `FeatureRecorder` to a scheduler that `run` starts, and write the target's matrices."""
    original(self, *arguments, **options)
    if _wanted is not None:
        layers, name, origin, states = _wanted
        FeatureRecorder(self.tp_worker, layers, states).tell(origin, name)


class FeatureRecorder:
    """Replaces a worker's forward, and writes the captured states of requests for features."""

    def __init__(self, worker: Any, layers: Sequence[int], states: Path) -> None:
        """Replace the forward of `worker`.

        Args:
            layers: layers whose outputs are captured, ascending; the state after the final norm follows them.
            states: directory of the files, each `[T, (layers + 1) · H]` of the target's dtype, without a header.

        Raises:
            CheckpointError: the target cannot capture its layers' outputs.
        """
        self.target, self._states = LoadedTarget(worker), states
        count = self.target.shape.num_layers
        self._captured = Captured(self.target.model, count, [*layers, count], keeps_final=False)
        self._forward, worker.forward_batch_generation = worker.forward_batch_generation, self.forward

    def forward(self, batch: Any, *arguments: Any, **options: Any) -> Any:
        """Run the worker's `forward_batch_generation`, and write features of the requests that ask for them."""
        if batch is None or not batch.forward_mode.is_extend():
            return self._forward(batch, *arguments, **options)
        rows = list(zip((req.rid for req in batch.reqs), batch.extend_lens, strict=True))
        if not any(rid.startswith(WANTED) for rid, _ in rows):
            return self._forward(batch, *arguments, **options)
        options["capture_hidden_mode"] = CaptureHiddenMode.FULL
        result = self._forward(batch, *arguments, **options)
        features, _ = self._captured.take(result.logits_output)
        if get_parallel().tp_rank == 0:
            parts = features[: sum(length for _, length in rows)].split([length for _, length in rows])
            for (rid, _), rows_of_text in zip(rows, parts, strict=True):
                if rid.startswith(WANTED):
                    _append(self._states / rid, rows_of_text.to(self.target.dtype))
        return result

    def tell(self, place: Path, name: str) -> None:
        """Write the target's facts under `name` into the directory `place`: ranks, embedding scale, and this process's
        rows of embedding and head, with which drafters begin.

        Raises:
            CheckpointError: embedding or head is quantised.
        """
        target, parallel = self.target, get_parallel()
        matrices = {"embedding": target.embedding, "head": target.lm_head}
        if any(len(matrix) == 0 for matrix in matrices.values()):
            raise CheckpointError(
                "the target's embedding or head is quantised, and drafters are trained on plain matrices: "
                "use a checkpoint that leaves both as they are"
            )
        place.mkdir(parents=True, exist_ok=True)
        # Every process has the whole of a matrix that is not split (Gemma 3's embedding): only rank 0 writes it.
        again = {name: parallel.tp_rank > 0 and len(x) == target.shape.vocab_size for name, x in matrices.items()}
        # Cloned, because safetensors refuses tensors that share storage, as a tied head and embedding do.
        plain = {name: (x[:0] if again[name] else x).detach().cpu().clone() for name, x in matrices.items()}
        with staged(vocabulary_file(place, parallel.tp_rank)) as file:
            save_file(plain, file)
        if parallel.tp_rank == 0:
            told = {"target": name, "ranks": parallel.tp_size, "embedding_scale": target.row_scale}
            write_whole(place / ORIGIN, json.dumps(told))


def _append(file: Path, rows: torch.Tensor) -> None:
    """Append rows to a text's file; a long prompt comes in several chunks."""
    with file.open("ab") as out:
        out.write(rows.contiguous().cpu().view(torch.uint8).numpy().tobytes())
