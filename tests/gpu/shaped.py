"""Rounds of an 8B-shaped target with random weights: `python tests/gpu/shaped.py --out figures.json`.

Nothing is downloaded: the target's weights are made on the card from a configuration (SGLang's `dummy` format), those
of the drafters are random files of the published shapes. Their drafts mean nothing, so how many of them are accepted is
pinned, in the graphs that commit: each arm's rounds accept as many as its rounds did on average in
`results/benchmark/report.json`, on another pair, and upstream's DFLASH as many as `diffusion`. A round's cost is real,
its tokens are not; every figure says so. All in one process, in SGLang's overlap loop where there is a card.
"""

import argparse
import itertools
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tiny_models
import torch
from checks import Checks
from pace import twice
from safetensors.torch import save_file
from served import on_device, started
from watched import Memory, Trace, Waits, stepping, watching

from whiflash_sglang.drafts.rates import continuing

LABEL = "8B-shaped target and drafters with random weights; acceptance pinned to the mean recorded on the embedded pair"
REPORT = Path(__file__).resolve().parents[2] / "results" / "benchmark" / "report.json"
POSITIONS = 1 << 18
"""Positions of target and drafters, for the longest context."""
ARMS = dict.fromkeys(("auto", "diffusion", "DFLASH", "DFLASH-4"), "diffusion")
ARMS |= {"ar": "EAGLE3", "none": "none", "plain": "none"}
"""Servers, and the arm of the report whose acceptance length it gets; `none` is SGLang alone, `plain` ours without
drafts, which is what `auto` has at its best where no draft is right. `DFLASH-4` verifies four rows of each block.

`auto` chooses between both drafters, at their measured prices, without arms that copy: a pinned acceptance would make
all copies as good as drafts.
"""


@dataclass(frozen=True)
class Shape:
    """Shape of a Llama-like target, and of its drafters: a chain's own vocabulary, a block's rows and layers."""

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
        sizes |= {"KV_HEADS": self.kv_heads, "HEAD_DIM": self.head_dim, "MAX_POSITIONS": POSITIONS}
        with patch.multiple(tiny_models, **sizes):
            yield


QWEN3_8B = Shape(4096, 12288, 32, 8, 128, 36, 151936, 32000, 16, 5)
TINY = Shape(96, 160, 4, 2, 16, 6, 320, 300, 8, 2)


def write_models(root: Path, shape: Shape, dtype: str) -> dict[str, Any]:
    """A target's configuration and two drafters of it under `root`. Returns them as `engine(...)` takes them."""
    kind = getattr(torch, dtype)
    with shape.of_models():
        config = tiny_models._llama_config(shape.vocabulary, shape.layers, dtype)
        config |= {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": False}
        config |= {"eos_token_id": 0, "bos_token_id": 0}
        target = root / "target"
        target.mkdir()
        (target / "config.json").write_text(json.dumps(config))
        # A drafter of blocks borrows the target's head and reads nothing of its file; a chain brings its own.
        dflash = tiny_models.tiny_dflash(root / "dflash", target, block_size=shape.block, num_layers=shape.block_layers)
        embedding = torch.zeros(shape.vocabulary, shape.hidden, dtype=kind)
        embedding[: shape.draft_vocabulary].normal_(std=shape.hidden**-0.5)
        save_file({"lm_head.weight": embedding}, target / "model.safetensors")
        eagle3 = tiny_models.tiny_eagle3(root / "eagle3", target, draft_vocab_size=shape.draft_vocabulary)
        (target / "model.safetensors").unlink()
    return {"model": target, "dflash": dflash, "eagle3": eagle3}


def recorded() -> dict[str, float]:
    """Tokens that a round of each arm committed on average, the target's own among them."""
    arms = json.loads(REPORT.read_text())["arms"]
    return {ours: arms[theirs]["overall"]["acceptance_length"] for ours, theirs in ARMS.items()}


def pinned(rows: Any, chance: float) -> torch.Tensor:
    """Predictions that agree with a draft by `chance`, whatever came before: its request and position say whether.

    Nothing is read, so a graph may do it.
    """
    ends, device = rows.indptr[1:], rows.indptr.device
    row = torch.arange(len(rows.predictions), device=device)
    request = torch.searchsorted(ends, row, right=True).clamp(max=len(ends) - 1)
    place = rows.starts[request] + row - rows.indptr[request]
    follows = (torch.sin(place * 12.9898 + request * 78.233) * 43758.5453).frac().abs() < chance
    draft = rows.input_ids[: len(row)].roll(-1)
    return torch.where(follows, draft, (draft + 1) % rows.logits.shape[-1])


@contextmanager
def accepting(mean: float, rows: int = QWEN3_8B.block) -> Iterator[None]:
    """Full blocks of our rounds and of upstream's DFLASH commit `mean` tokens on average. Enter it before a capture.

    rows: that DFLASH verifies; of fewer than a block's it commits as many as chains of equal chances would.
    """
    from sglang.srt.speculative import dflash_worker_v2

    from whiflash_sglang.round.epilogue import Epilogue

    commit, right = Epilogue.commit, continuing(mean, QWEN3_8B.block)

    def agreed(self: Any, verified: Any, *rest: Any) -> Any:
        if verified.committed is None:
            verified = verified._replace(predictions=pinned(verified, right))
        return commit(self, verified, *rest)

    cut = mean if rows == QWEN3_8B.block else sum(right**place for place in range(rows))
    upstream = {"SIMULATE_ACC_LEN": cut, "SIMULATE_ACC_TOKEN_MODE": "real-draft-token"}
    with patch.object(Epilogue, "commit", agreed), patch.multiple(dflash_worker_v2, **upstream):
        yield


@dataclass(frozen=True)
class Load:
    """requests, contexts: each of the ones with each of the others. contexts: tokens of a prompt. tokens: of an answer.
    most: tokens of all prompts together that a card holds; if they have more, they share all but their ends.
    """

    requests: Sequence[int]
    contexts: Sequence[int]
    tokens: int
    most: int

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return itertools.product(self.contexts, self.requests)

    def prompts(self, context: int, requests: int) -> torch.Tensor:
        """Random tokens [requests, context]."""
        prompts = torch.randint(8, 256, (requests, context), generator=torch.Generator().manual_seed(0))
        ends = self.ends(context, requests)
        prompts[:, :-ends] = prompts[0, :-ends]
        return prompts

    def ends(self, context: int, requests: int) -> int:
        """Tokens of each prompt that no other has."""
        return context if context * requests <= self.most else max(context // 64, 1)


CARD, REHEARSAL = Load((8, 32, 48, 1), (1024,), 192, 300_000), Load((1, 2), (24,), 24, 48)
"""One request comes last on a card: the first rounds of a server go to learning what its text accepts."""


def options_of(made: dict[str, Any], arm: str, load: Load) -> dict[str, Any]:
    """Options of an engine on one arm."""
    most = max(load.requests)
    longest = max(context + (requests - 1) * load.ends(context, requests) for context, requests in load)
    options: dict[str, Any] = {"load_format": "dummy", "max_running_requests": most}
    options["max_total_tokens"] = 4096 + longest + 2 * most * load.tokens
    if arm.startswith("DFLASH"):
        options |= {"speculative_algorithm": "DFLASH", "speculative_draft_model_path": str(made["dflash"])}
        if rows := arm.partition("-")[2]:
            options["speculative_num_draft_tokens"] = int(rows)
    elif arm != "none":
        router = "none" if arm == "plain" else arm
        flags = {"draft": made["dflash"], "whiflash_eagle_draft": str(made["eagle3"]), "whiflash_router": router}
        options["whiflash"] = flags | {"whiflash_lookup": "off", "whiflash_structure": "off"}
    return options


def timed(e: Any, context: int, requests: int, load: Load, figures: dict[str, Any]) -> None:
    """Figures of requests that begin together."""
    prompts = load.prompts(context, requests).tolist()
    found = twice(e, lambda: sum(map(len, e.generate(prompts, max_new_tokens=load.tokens))), requests)
    figures |= {f"{name}_at_{requests}_of_{context}": value for name, value in found.items()}


def looked_at(e: Any, load: Load, device: str, figures: dict[str, Any], keep: Path) -> None:
    """Our rounds: where they wait, what they launch, what the largest batch takes beside what was kept for it."""
    from whiflash_sglang.engine.scheduler.kv_budget import sampling_bytes

    most, waits, used = max(load.requests), Waits(device), Memory(device)
    prompts = [list(range(8 + i, 8 + i + min(load.contexts))) for i in range(most)]
    prompts = [[token % 256 for token in prompt] for prompt in prompts]
    with watching(e.worker, used, full=most):
        e.generate(prompts, max_new_tokens=load.tokens)
    widest = 1 + max(drafter.max_drafts for drafter in e.worker.drafters.values())
    figures["peak_bytes"] = used.most
    figures["promised_bytes"] = sampling_bytes(most * widest, e.worker.target.shape.vocab_size)
    with stepping(e, waits):
        e.generate(prompts[:8], max_new_tokens=load.tokens)
    figures["waits"] = dict(waits.found)
    for requests, trace in ((most, Trace(device)), (8, Trace(device))):
        with watching(e.worker) as rounds, trace.profile:
            e.generate(prompts[:requests], max_new_tokens=24)
        figures[f"trace_of_{len(prompts[:requests])}"] = trace.figures(rounds.seen)
    trace.profile.export_chrome_trace(str(keep))
    if device == "cuda":
        figures["allocated_bytes"], figures["free_bytes"] = (
            torch.cuda.memory_allocated(),
            torch.cuda.mem_get_info()[0],
        )
        assert used.most <= figures["promised_bytes"], "a round of the largest batch takes more than was kept for it"
    known = ("transfers.py",) if device == "cuda" else ("transfers.py", "forward/target.py")  # rows, without graphs
    others = [site for site in waits.found if not any(part in site for part in known)]
    assert not others, f"rounds wait at {others}"


def measure(checks: Checks, chosen: argparse.Namespace, load: Load, shape: Shape, root: Path) -> None:
    """The arms at every load."""
    card = chosen.device == "cuda"
    made, means = write_models(root, shape, "bfloat16" if card else "float32"), recorded()
    for arm in chosen.arms.split(","):
        mean = means[arm]
        with ExitStack() as stack:
            e: Any = None
            with checks.check(arm) as figures:
                figures["acceptance_length_wanted"] = mean
                stack.enter_context(accepting(mean, int(arm.partition("-")[2] or QWEN3_8B.block)))
                options = options_of(made, arm, load) | {"attention": chosen.attention}
                e = stack.enter_context(started(made["model"], chosen.device, **options))
                if arm == "auto" and card:
                    figures["prices"] = asdict(e.worker.controller.costs.tables)
                for context, requests in load:
                    timed(e, context, requests, load, figures)
                    checks.save()  # a long context may be the last
            if e is not None and arm == chosen.trace and len(load.contexts) == 1:
                with checks.check("rounds") as figures:
                    looked_at(e, load, chosen.device, figures, chosen.out.with_suffix(".trace.json.gz"))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu", "phantom"), default="cuda")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--arms", default="none,plain,auto,ar,diffusion", help=f"of {', '.join(ARMS)}")
    parser.add_argument("--attention", default="triton", help="backend on a card; SGLang's own choice if empty")
    parser.add_argument("--trace", default="diffusion", help="arm of ours whose rounds are traced")
    parser.add_argument("--requests", help="at a time, such as 1,8,32")
    parser.add_argument("--contexts", help="tokens of a prompt, such as 2048,131072; 1 and 8 requests each")
    chosen = parser.parse_args(arguments)
    card = chosen.device == "cuda"
    load, shape = (CARD, QWEN3_8B) if card else (REHEARSAL, TINY)
    if chosen.requests and card:
        load = replace(load, requests=tuple(map(int, chosen.requests.split(","))))
    if chosen.contexts:
        contexts = tuple(map(int, chosen.contexts.split(","))) if card else (24, 48)
        load = replace(load, requests=load.requests[:2], contexts=contexts)
    checks = Checks(chosen.out, label=LABEL if card else f"a rehearsal with tiny models, not: {LABEL}")
    with tempfile.TemporaryDirectory() as root, on_device(chosen.device, Path(root)):
        measure(checks, chosen, load, shape, Path(root))
    return checks.exit_status


if __name__ == "__main__":
    sys.exit(main())
