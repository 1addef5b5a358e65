"""Rounds of an 8B-shaped target with random weights: `python tests/gpu/shaped.py --out figures.json`.

Nothing is downloaded: the target's weights are made on the card from a configuration (SGLang's `dummy` format), those
of the drafters are random files of the published shapes. Their drafts mean nothing, so how many of them are accepted is
set: each round accepts as many as the same arm did on average in `results/benchmark/report.json`, on another pair.
What a round costs is real, what it commits is not; every figure says so. All in one process, without overlap
scheduling, so plain decoding is slower than a server's.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tiny_models
import torch
from checks import Checks
from safetensors.torch import save_file

LABEL = "8B-shaped target and drafters with random weights; acceptance set to the mean recorded on the embedded pair"
REPORT = Path(__file__).resolve().parents[2] / "results" / "benchmark" / "report.json"
ARMS = {"ar": "EAGLE3", "diffusion": "diffusion"}
"""Our arms, and those of the report whose acceptance length they get."""


@dataclass(frozen=True)
class Shape:
    """Of a Llama-like target, and of its drafters: a chain's own vocabulary, a block's rows and layers."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: int
    vocabulary: int
    draft_vocabulary: int
    block: int
    block_layers: int

    @contextmanager
    def of_models(self) -> Iterator[None]:
        """The sizes that `tiny_models` writes."""
        sizes = {"HIDDEN": self.hidden, "INTERMEDIATE": self.intermediate, "HEADS": self.heads}
        sizes |= {"KV_HEADS": self.kv_heads, "HEAD_DIM": self.head_dim}
        with patch.multiple(tiny_models, **sizes):
            yield


LLAMA_8B = Shape(4096, 14336, 32, 8, 128, 32, 128256, 32000, 10, 5)
TINY = Shape(64, 128, 4, 2, 16, 6, 320, 300, 8, 2)


def write_models(root: Path, shape: Shape, dtype: str) -> dict[str, Any]:
    """A target's configuration and two drafters of it under `root`. Returns them as `engine(...)` takes them."""
    kind = getattr(torch, dtype)
    with shape.of_models():
        config = tiny_models._llama_config(shape.vocabulary, shape.layers, dtype)
        config |= {"architectures": ["LlamaForCausalLM"], "eos_token_id": 0, "bos_token_id": 0}
        target = root / "target"
        target.mkdir()
        (target / "config.json").write_text(json.dumps(config))
        # A drafter of blocks borrows the target's head and reads nothing of its file; a chain brings its own.
        dflash = tiny_models.tiny_dflash(
            root / "dflash", target, block_size=shape.block, num_layers=shape.block_layers
        )
        embedding = torch.zeros(shape.vocabulary, shape.hidden, dtype=kind)
        embedding[: shape.draft_vocabulary].normal_(std=shape.hidden**-0.5)
        save_file({"lm_head.weight": embedding}, target / "model.safetensors")
        eagle3 = tiny_models.tiny_eagle3(root / "eagle3", target, draft_vocab_size=shape.draft_vocabulary)
        (target / "model.safetensors").unlink()
    return {"model": target, "whiflash": {"draft": dflash, "whiflash_eagle_draft": str(eagle3)}}


def recorded() -> dict[str, float]:
    """Tokens that a round of each arm committed on average, the target's own among them."""
    arms = json.loads(REPORT.read_text())["arms"]
    return {ours: arms[theirs]["overall"]["acceptance_length"] for ours, theirs in ARMS.items()}


@contextmanager
def accepting(worker: Any, mean: float) -> Iterator[None]:
    """Rounds that commit `mean` tokens of a request on average, as far as so many were drafted. Nothing is read."""
    verify, let = worker.stages.verifier.verify, worker.stages.epilogue.let_graphs_commit

    def agreed(*args: Any) -> Any:
        found = verify(*args)
        ends, device = found.indptr[1:], found.indptr.device
        wanted = torch.rand(len(ends), device=device).add(mean).floor().long()
        rows = torch.arange(len(found.predictions), device=device)
        request = torch.searchsorted(ends, rows, right=True).clamp(max=len(ends) - 1)
        follows = rows - found.indptr[request] + 1 < wanted[request]
        draft = found.input_ids[: len(rows)].roll(-1)
        other = (draft + 1) % found.logits.shape[-1]
        return found._replace(predictions=torch.where(follows, draft, other))

    with (
        patch.object(worker.stages.verifier, "verify", agreed),
        # A graph would commit what the target says.
        patch.object(worker.stages.epilogue, "let_graphs_commit", lambda _, row_ids: let(False, row_ids)),
    ):
        yield


def speed(e: Any, concurrency: int, tokens: int) -> float:
    """Tokens a second of so many requests that begin together; the second of two runs."""
    generator = torch.Generator().manual_seed(concurrency)
    prompts = torch.randint(8, 256, (concurrency, 32), generator=generator).tolist()
    began = 0.0
    for _ in range(2):
        began = time.perf_counter()
        e.generate(prompts, max_new_tokens=tokens)
    return concurrency * tokens / (time.perf_counter() - began)


def measure(checks: Checks, device: str, loads: Sequence[int], tokens: int, shape: Shape, root: Path) -> None:
    """Plain decoding, then our arms, at every load."""
    from engine import engine

    dtype = "bfloat16" if device == "cuda" else "float32"
    made = write_models(root, shape, dtype)
    options: dict[str, Any] = {"device": device, "dtype": dtype, "max_running_requests": max(loads)}
    options["disable_overlap_schedule"] = True
    options |= {"load_format": "dummy", "max_total_tokens": 4096 + 2 * max(loads) * (tokens + 64)}
    with checks.check("plain") as figures, engine(made["model"], **options) as e:
        figures |= {f"tokens_per_s_at_{c}": speed(e, c, tokens) for c in loads}
    for arm, mean in recorded().items():
        flags = {**made["whiflash"], "whiflash_router": arm}
        with checks.check(arm) as figures, engine(made["model"], whiflash=flags, **options) as e:
            figures["acceptance_length_wanted"] = mean
            before = e.worker.snapshot()
            with accepting(e.worker, mean):
                figures |= {f"tokens_per_s_at_{c}": speed(e, c, tokens) for c in loads}
            after = e.worker.snapshot()
            figures["tokens_per_round"] = (after["tokens"] - before["tokens"]) / (
                after["rounds"] - before["rounds"]
            )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, required=True)
    chosen = parser.parse_args(arguments)
    card = chosen.device == "cuda"
    loads, tokens, shape = ((1, 8, 32, 64), 192, LLAMA_8B) if card else ((1, 2), 24, TINY)
    checks = Checks(chosen.out, label=LABEL if card else f"a rehearsal with tiny models, not: {LABEL}")
    with tempfile.TemporaryDirectory() as root:
        measure(checks, chosen.device, loads, tokens, shape, Path(root))
    return checks.exit_status


if __name__ == "__main__":
    sys.exit(main())
