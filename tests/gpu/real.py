"""Trained drafters at an 8B model's cost: `python tests/gpu/real.py --out figures.json`.

As `shaped.py`, on a pair that was trained: the user's as it is, or the embedded one, widened to the same function at a
large model's cost (`whiflash_lab/widen.py`). Nothing is pinned, so text, acceptance and time are the servers' own.
Prompts are chats, code, mathematics, tools and schemas; `--agents` asks the latter two only, enforces their grammars,
and lets ours copy and force text. Stock plain decoding comes first: greedy answers of the other arms are compared with
its own. A rehearsal widens tiny random models.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.append(str(Path(__file__).resolve().parents[1] / "worker"))

from checks import Checks
from pace import twice
from served import Served, on_device, started

STOCK: dict[str, dict[str, Any]] = {
    "none": {},
    "EAGLE3": {
        "speculative_algorithm": "EAGLE3",
        "speculative_num_steps": 4,
        "speculative_eagle_topk": 1,
        "speculative_num_draft_tokens": 5,
    },
    "block": {},
}
"""SGLang's own servers. `block` is its DFLASH or DSPARK, by the format of the pair's block drafter."""
DRAFTERS = {"EAGLE3": "eagle3", "block": "dflash"}
"""Stock arm → key of its drafter in a manifest."""
OURS = {"plain": "none", "ar": "ar", "diffusion": "diffusion", "auto": "auto"}
"""Our arms, and the policy of each."""
PROMPT = {"cuda": 1024, "cpu": 64}
"""Most tokens of a prompt, by device. The last ones are kept."""


def served(chosen: argparse.Namespace, scratch: Path) -> tuple[Path, Path]:
    """Return target and bundle: the user's, or the embedded ones, widened unless they have been."""
    from whiflash_lab.widen import Shape, widen_pair

    card = chosen.device == "cuda"
    wide = chosen.wide if card else scratch / "wide"
    if chosen.bundle or not wide.exists():
        pair = Served.find(chosen.model_path, chosen.bundle, scratch, rehearse=not card)
        if chosen.bundle:
            return pair.target, pair.bundle
        if card and pair.name != "the embedded pair":
            raise RuntimeError(f"the embedded pair is not here, only {pair.name}: bring all of its pieces")
        partial = wide.with_name(f"{wide.name}.partial")
        widen_pair(pair.target, pair.bundle, partial, Shape() if card else Shape(3, 12, 4, 256, 7, 3))
        partial.rename(wide)
    return wide / "target", wide / "bundle"


def options_of(chosen: argparse.Namespace, bundle: Path, arm: str, most: int) -> dict[str, Any]:
    """Options of an engine on one arm."""
    from whiflash_lab.bench.arms import block_arm
    from whiflash_sglang.checkpoints.manifest import load_manifest
    from whiflash_sglang.formats.table import read_draft

    options: dict[str, Any] = {"max_running_requests": most, "attention": chosen.attention}
    options["max_total_tokens"] = 4096 + most * (PROMPT[chosen.device] + 3 * chosen.tokens)
    options |= {"skip_tokenizer_init": not chosen.agents, "constrained_json_disable_any_whitespace": True}
    if chosen.device == "cuda":
        options["mem_fraction_static"] = 0.75
    if arm in STOCK:
        options |= STOCK[arm]
        if arm in DRAFTERS:
            drafter = bundle / getattr(load_manifest(bundle), DRAFTERS[arm])
            options["speculative_draft_model_path"] = str(drafter)
        if arm == "block":
            options["speculative_algorithm"] = block_arm(read_draft(drafter).format, on_cpu=False)
    else:
        copies = {} if chosen.agents else {"whiflash_lookup": "off", "whiflash_structure": "off"}
        options["whiflash"] = {"draft": bundle, "whiflash_router": OURS[arm], **copies}
    return options


class Load:
    """Requests that begin together, asked again under other names each time.

    prompts: tokens and grammar of each. sampling: SGLang's parameters of all.
    """

    def __init__(self, prompts: Sequence[tuple[Sequence[int], dict[str, Any]]], sampling: dict[str, Any]) -> None:
        self.prompts, self.sampling, self.asked = prompts, sampling, 0

    def ask(self, e: Any) -> list[Any]:
        """Run all requests. Returns SGLang's records of them."""
        self.asked += 1
        names = [f"{len(self.prompts)}/{self.asked}/{number:03}" for number in range(len(self.prompts))]
        for name, (tokens, grammar) in zip(names, self.prompts, strict=True):
            e.submit(name, tokens, **self.sampling, **grammar, ignore_eos=not grammar)
        e.run()
        return [e.requests[name] for name in names]


def timed(e: Any, load: Load, figures: dict[str, Any]) -> list[list[int]]:
    """Figures of a load. Returns the answers of its last run."""
    answers: list[list[int]] = []

    def ask() -> int:
        requests = load.ask(e)
        answers[:] = [list(request.output_ids_through_stop) for request in requests]
        if rounds := sum(request.spec_verify_ct for request in requests):
            drafts = sum(request.spec_num_correct_drafts for request in requests)
            figures["acceptance_length"] = 1 + drafts / rounds
        return sum(map(len, answers))

    figures |= twice(e, ask, len(load.prompts))
    if tally := getattr(e.worker, "tally", None):
        figures["by_arm_since_start"] = tally.snapshot()["by_arm"]
    return answers


def compared(answers: Sequence[list[int]], plain: Sequence[list[int]]) -> dict[str, float]:
    """Shares of answers that are plain decoding's, and of its tokens before the first that differs."""
    agreed = [
        next((at for at, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
        for ours, theirs in zip(answers, plain, strict=True)
    ]
    equal = sum(ours == theirs for ours, theirs in zip(answers, plain, strict=True))
    return {"answers_equal": equal / len(plain), "tokens_agreed": sum(agreed) / sum(map(len, plain))}


def prompts_of(
    target: Path, device: str, agents: bool, own_template: bool
) -> list[tuple[Sequence[int], dict[str, Any]]]:
    """Return tokens of real prompts, and the grammar of each: none unless it is asked as an agent asks. own_template:
    format them in the target's chat template, not the embedded bundle's."""
    from embedded_prompts import prompts

    found = prompts(target, own_template)
    kinds = ("json", "tool_call") if agents else sorted({prompt.kind for prompt in found})
    by_kind = [[prompt for prompt in found if prompt.kind == kind] for kind in kinds]
    mixed = [prompt for each in zip(*by_kind, strict=False) for prompt in each]
    return [(prompt.tokens[-PROMPT[device] :], prompt.params if agents else {}) for prompt in mixed]


def measure(chosen: argparse.Namespace, checks: Checks, scratch: Path) -> None:
    """Every arm at every load."""
    loads = [int(number) for number in chosen.requests.split(",")]
    sampling: dict[str, Any] = {"max_new_tokens": chosen.tokens, "temperature": chosen.temperature}
    reference: dict[int, list[list[int]]] = {}
    with checks.check("pair") as figures:
        pair = served(chosen, scratch)
        figures["bytes"] = sum(file.stat().st_size for file in chain(*(each.rglob("*.safetensors") for each in pair)))
    if checks.failed:
        return
    prompts = prompts_of(pair[0], chosen.device, chosen.agents, bool(chosen.bundle))
    for arm in chosen.arms.split(","):
        with checks.check(arm) as figures, ExitStack() as stack:
            options = options_of(chosen, pair[1], arm, max(loads))
            e = stack.enter_context(started(pair[0], chosen.device, **options))
            for number in loads:
                asked = [prompts[at % len(prompts)] for at in range(number)]
                found = figures[str(number)] = {}
                answers = timed(e, Load(asked, sampling), found)
                if not chosen.temperature:
                    if arm == "none":
                        reference[number] = answers
                    found |= compared(answers, reference[number]) if number in reference else {}
                checks.save()
            if tables := getattr(getattr(getattr(e.worker, "controller", None), "costs", None), "tables", None):
                figures["prices"] = asdict(tables)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--wide", type=Path, default=Path("/dev/shm/wide"), help="where the wide pair is kept")
    parser.add_argument("--model-path", help="target to serve as it is, with --bundle: directory or hub id")
    parser.add_argument("--bundle")
    parser.add_argument("--arms", default="none,plain,auto,ar,diffusion", help=f"of {', '.join({**STOCK, **OURS})}")
    parser.add_argument("--requests", default="8,32,48,4,16,1", help="at a time")
    parser.add_argument("--tokens", type=int, default=160, help="of an answer")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--agents", action="store_true", help="enforce tools and schemas; copy and force text")
    parser.add_argument("--attention", default="", help="backend on a card; FA3 if it is there, else Triton's")
    parser.add_argument("--operators", choices=("stand-ins", "own"), default="stand-ins", help="in the kit")
    chosen = parser.parse_args(arguments)
    if chosen.device == "cuda":
        os.environ["KIT_OPERATORS"] = chosen.operators  # before the kit's `sgl_kernel` is imported
        chosen.attention = chosen.attention or ("fa3" if find_spec("sgl_kernel.flash_ops") else "triton")
    elif not chosen.bundle:
        chosen.requests, chosen.tokens = "2,1", 24
    pair = "a trained pair, widened to an 8B model's cost"
    if chosen.bundle:
        pair = f"{chosen.model_path} with {chosen.bundle}"
    checks = Checks(chosen.out, label=f"{pair}: its own text and acceptance")
    with tempfile.TemporaryDirectory() as scratch, on_device(chosen.device, Path(scratch)):
        measure(chosen, checks, Path(scratch))
    return checks.exit_status


if __name__ == "__main__":
    sys.exit(main())
