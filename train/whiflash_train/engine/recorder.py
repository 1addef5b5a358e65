"""Features of texts in the scheduler of an offline engine, written to files as their prompts are prefilled.

A text whose features are wanted comes as a prompt whose name begins with `WANTED`. Its prefill is asked for hidden
states as our worker asks (`engine/forward/captured.py`), and they go to a file of that name before the
scheduler hears of the result. Other requests run as they would without this, by plain decoding.
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
"""Prefix of such requests' names."""


_wanted: tuple[Sequence[int], str, Path, Path] | None = None
"""Layers, the target's name, and the directories of the scheduler that this process makes."""


def run(
    layers: Sequence[int], name: str, origin: Path, states: Path, *arguments: Any, **options: Any
) -> None:
    """A scheduler's process, as SGLang starts it, with a `FeatureRecorder`. The rest are SGLang's own arguments."""
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
    """The scheduler of an engine for training data writes features of prompts."""
    original(self, *arguments, **options)
    if _wanted is not None:
        layers, name, origin, states = _wanted
        FeatureRecorder(self.tp_worker, layers, states).tell(origin, name)


class FeatureRecorder:
    """Takes the place of a worker's forward, and writes what it captures of wanted texts."""

    def __init__(self, worker: Any, layers: Sequence[int], states: Path) -> None:
        """Args:
            layers: whose outputs are captured, ascending; the state behind the final norm comes behind them.
            states: directory of the files, `[T, (layers + 1) · H]` of the target's dtype each, without a header.

        Raises:
            CheckpointError: the target cannot capture what its layers put out.
        """
        self.target, self._states = LoadedTarget(worker), states
        count = self.target.shape.num_layers
        self._captured = Captured(self.target.model, count, [*layers, count], keeps_final=False)
        self._forward, worker.forward_batch_generation = worker.forward_batch_generation, self.forward

    def forward(self, batch: Any, *arguments: Any, **options: Any) -> Any:
        """The worker's `forward_batch_generation`."""
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
        """Write what drafters take over from the target of that name into a directory: sizes, and this process's rows
        of the vocabulary.

        Raises:
            CheckpointError: embedding or head are quantised.
        """
        target, parallel = self.target, get_parallel()
        matrices = {"embedding": target.embedding, "head": target.lm_head}
        if any(len(matrix) == 0 for matrix in matrices.values()):
            raise CheckpointError(
                "the target's embedding or head is quantised, and drafters are trained on plain matrices: "
                "use a checkpoint that leaves both as they are"
            )
        place.mkdir(parents=True, exist_ok=True)
        # A matrix that is not split is whole in every process (Gemma 3's embedding): the first one's counts.
        again = {
            name: parallel.tp_rank > 0 and len(x) == target.shape.vocab_size for name, x in matrices.items()
        }
        # Copies: where the head is tied both would be one storage.
        plain = {name: (x[:0] if again[name] else x).detach().cpu().clone() for name, x in matrices.items()}
        with staged(vocabulary_file(place, parallel.tp_rank)) as file:
            save_file(plain, file)
        if parallel.tp_rank == 0:
            told = {"target": name, "ranks": parallel.tp_size, "embedding_scale": target.row_scale}
            write_whole(place / ORIGIN, json.dumps(told))


def _append(file: Path, rows: torch.Tensor) -> None:
    """A chunk of a long prompt goes behind the one before."""
    with file.open("ab") as out:
        out.write(rows.contiguous().cpu().view(torch.uint8).numpy().tobytes())
