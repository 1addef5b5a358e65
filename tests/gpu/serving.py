"""One attention backend, served with: `python tests/gpu/serving.py --attention triton --out figures.json`.

`--family` serves a tiny random model of one family of targets (`tests/targets/families.py`) in place of a pair.
`--overlap` serves in SGLang's overlap loop, as a server on CUDA does by default; without it a result is processed
before the next round is planned.

The real scheduler, worker and pools in one process (`tests/engine.py`): that they start, that 40 greedy answers with
every arm in turn are plain decoding's, that what agents send is served side by side under `auto`, where a steady round
waits for the device, what the largest batch takes, and which operators a round is made of. Greedy answers are judged as
everywhere (`whiflash_sglang/files/equality.py`).
"""

import argparse
import contextlib
import json
import math
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.append(str(Path(__file__).resolve().parents[1] / "worker"))

from checks import Checks
from served import Served, on_device
from watched import Memory, Trace, Waits, stepping, unoverlapped, watching


@dataclass(frozen=True)
class Scale:
    """prompts: asked, as many tokens of each at most as `context`. tokens: of an answer. running: at a time."""

    prompts: int
    context: int
    tokens: int
    running: int


SCALES = {"cuda": Scale(40, 512, 128, 40), "cpu": Scale(4, 24, 24, 4), "phantom": Scale(2, 8, 12, 2)}
"""Scales by device; the phantom card's kernels are interpreted."""

SAMPLED = {"temperature": 0.6, "top_p": 0.95, "top_k": 20}
"""As a model of the Qwen3 family is asked by default."""
AGENTS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": SAMPLED,
    "seeded": SAMPLED | {"sampling_seed": 7},
    "penalised": SAMPLED | {"presence_penalty": 0.5, "frequency_penalty": 0.5, "repetition_penalty": 1.1},
    "rated": {"return_logprob": True, "top_logprobs_num": 3},
}
"""Parameters that agents send beside grammars."""
LONGEST = 96
"""Tokens of an agent's answer: a byte each, those of the schema end before."""


@dataclass(frozen=True)
class Plain:
    """A greedy answer of plain decoding. gaps: between its two likeliest tokens, for each of `tokens`."""

    tokens: list[int]
    gaps: list[float]


class Case:
    """The pair, its prompts, and an engine on one backend. overlap: ours runs SGLang's overlap loop."""

    def __init__(self, served: Served, attention: str, device: str, scale: Scale, *, overlap: bool = False) -> None:
        self.served, self.attention, self.device, self.scale = served, attention, device, scale
        self.overlap = overlap
        self.prompts = drawn(scale) if served.model else tokenised(served.target, scale)

    @contextlib.contextmanager
    def engine(self, *, whiflash: bool) -> Iterator[Any]:
        from engine import engine
        from overlap import overlapped
        from overlap_loop import OverlapLoop

        arguments: dict[str, Any] = {
            "device": self.device,
            "dtype": self.served.dtype,
            "max_running_requests": self.scale.running,
            "skip_tokenizer_init": self.served.model is not None,
            "constrained_json_disable_any_whitespace": True,
            **self.served.options,
        }
        if self.device != "cpu":
            # Graphs of prefills, which ours has not: captured in pieces, and long to capture.
            arguments["cuda_graph_backend_prefill"] = "disabled"
        if self.device == "phantom":
            # SGLang's kernel of plain decoding is one that Triton 3.6 does not interpret.
            plain = {"attention_backend": "torch_native", "disable_cuda_graph": True}
            arguments |= {"device": "cuda", "sampling_backend": "pytorch"}
            arguments |= {"attention_backend": self.attention} if whiflash else plain
        if self.device == "cuda":
            # Sized by SGLang, and small enough for what another engine of this process may not have returned.
            arguments |= {"attention_backend": self.attention, "max_total_tokens": None, "random_seed": 0}
            arguments |= {"mem_fraction_static": 0.4}
        flags: dict[str, Any] | None = None
        if whiflash:
            flags = {"draft": self.served.bundle, "whiflash_router": "random"}
        overlap = whiflash and self.overlap
        if overlap and self.device == "cpu":
            with overlapped(self.served.target, host_lengths=False, whiflash=flags, **arguments) as e:
                yield e
            return
        arguments["disable_overlap_schedule"] = not overlap
        with engine(self.served.target, whiflash=flags, **arguments) as e:
            yield OverlapLoop(e.scheduler) if overlap else e

    def plain(self) -> list[Plain]:
        """Plain decoding's answers to all prompts."""
        with self.engine(whiflash=False) as e:
            for i, prompt in enumerate(self.prompts):
                e.submit(f"p{i:03}", prompt, max_new_tokens=self.scale.tokens, return_logprob=True)
            e.run()
            return [self._answer(e, f"p{i:03}") for i in range(len(self.prompts))]

    @staticmethod
    def _answer(e: Any, rid: str) -> Plain:
        top = e.requests[rid].logprob.output_top_logprobs_val
        return Plain(e.output(rid), [float(best) - float(second) for best, second, *_ in top])


def tokenised(target: Path, scale: Scale) -> list[list[int]]:
    """The shipped prompts' words, as ids."""
    from transformers import AutoTokenizer

    from whiflash_lab.bench.prompts import load_prompts, shipped

    tokenizer = AutoTokenizer.from_pretrained(str(target))
    texts = [
        "\n".join(str(message.get("content") or "") for message in prompt.messages)
        for prompt in load_prompts(str(shipped()))[: scale.prompts]
    ]
    return [tokenizer(text).input_ids[: scale.context] for text in texts]


def drawn(scale: Scale) -> list[list[int]]:
    """Random bytes, half of each prompt the one's before it."""
    rng, prompts = random.Random(scale.prompts), [[0]]
    for _ in range(scale.prompts):
        prompts.append([*prompts[-1][: scale.context // 2], *rng.choices(range(256), k=scale.context // 2)])
    return prompts[1:]


def greedy(case: Case, e: Any, figures: dict[str, Any]) -> list[list[int]]:
    """Answers with every arm in turn. Raises AssertionError where no round was drafted or, if expected, replayed."""
    with watching(e.worker) as rounds:
        answers: list[list[int]] = e.generate(case.prompts, max_new_tokens=case.scale.tokens)
    figures |= rounds.figures()
    snapshot = e.worker.clock.snapshot()
    figures["committed"] = snapshot["tokens"]
    e.check_leaks()
    if case.device == "cuda":
        assert rounds.replayed == rounds.seen, f"{rounds.seen - rounds.replayed} rounds ran without their graph"
    return answers


def agents(case: Case, e: Any, figures: dict[str, Any]) -> None:
    """Agents' requests, side by side under `auto`, each asked twice. Raises AssertionError where an answer breaks its
    grammar, or a token has no log-probability.
    """
    asked = dict(AGENTS)
    if case.served.model is None:  # it has a tokenizer
        from request_sets import SHORT_SCHEMA, TAG

        asked["schema"] = SAMPLED | {"json_schema": SHORT_SCHEMA, "ignore_eos": False}
        asked["tool"] = SAMPLED | {"structural_tag": TAG, "ignore_eos": False}
    e.start_over("auto")
    with watching(e.worker) as rounds, unoverlapped(e) as figures["not_overlapped"]:
        for i, name in enumerate((*asked, *asked)):
            prompt = case.prompts[i % len(case.prompts)]
            e.submit(f"{i:02}-{name}", prompt, max_new_tokens=LONGEST, **asked[name])
            e.step()
        e.run()
    e.check_leaks()
    figures |= rounds.figures()
    for i, name in enumerate((*asked, *asked)):
        request, tokens = e.requests[f"{i:02}-{name}"], e.output(f"{i:02}-{name}")
        assert tokens, f"{name} has no answer"
        if name == "rated":
            rated = request.logprob.output_token_logprobs_val
            assert len(rated) == len(tokens), "tokens without log-probabilities"
            assert all(math.isfinite(value) and value <= 0 for value in rated), f"{rated}"
        if name in ("schema", "tool"):
            text = e.scheduler.tokenizer.decode(tokens, skip_special_tokens=True)
            assert name == "tool" or json.loads(text, strict=False)["kind"], text
            assert name == "schema" or text.startswith('<call>{"name":"look_'), text


def equality(case: Case, ours: Sequence[Sequence[int]], figures: dict[str, Any]) -> None:
    """Compare with plain decoding on the same backend. Raises AssertionError where an answer differs."""
    from whiflash_lab.bench.reference import compare
    from whiflash_sglang.files.equality import TopTwo

    verdicts: Counter[str] = Counter()
    for prompt, plain, answer in zip(case.prompts, case.plain(), ours, strict=True):

        def top_two_at(at: int, prompt: Any = prompt, plain: Plain = plain) -> TopTwo:
            return TopTwo(best_logit(case.served, [*prompt, *plain.tokens[:at]]), plain.gaps[at])

        verdicts[compare(plain.tokens, answer, top_two_at, case.served.dtype).verdict.value] += 1
    figures |= verdicts
    assert not verdicts["different"], "greedy answers differ from plain decoding's"


def best_logit(served: Served, tokens: Sequence[int]) -> float:
    """The largest logit behind `tokens`, from a forward of the same weights on the CPU."""
    import torch

    if served.model:
        return float(served.model.logits(tokens).max())

    from whiflash_train.target import TargetModel

    model = TargetModel(served.target, device=torch.device("cpu"), dtype=getattr(torch, served.dtype))
    return float(model.next_logits(tokens).max())


def waits(case: Case, e: Any, figures: dict[str, Any]) -> None:
    """The scheduler's loop reads results, and waits for nothing else. Raises AssertionError if it does.

    Requests come and go at different times, and one is aborted, so every pass may prefill, verify and release.
    Everything that is compiled or made once has been by then.
    """
    seen = Waits(case.device)
    with watching(e.worker) as rounds, stepping(e, seen):
        for i, prompt in enumerate(case.prompts):
            e.submit(f"w{i:03}", prompt, max_new_tokens=case.scale.tokens // (1 + i % 3))
            e.step()
        e.submit("aborted", case.prompts[0], max_new_tokens=case.scale.tokens)
        for _ in range(3):
            e.step()
        e.abort("aborted")
        e.run()
    figures |= {**rounds.figures(), "waits": dict(seen.found)}
    results = sum(n for site, n in seen.found.items() if "transfers.py" in site)
    # Without graphs it reads the number of rows, too.
    known = ("transfers.py",) if figures["replayed"] else ("transfers.py", "engine/forward/target.py")
    others = {site: n for site, n in seen.found.items() if not any(part in site for part in known)}
    assert not others, f"the scheduler's loop waits at {others}"
    assert results <= rounds.seen, "more than one wait a round"


def memory(case: Case, e: Any, figures: dict[str, Any]) -> None:
    """The largest batch, sampled. Raises AssertionError where a round takes more than was kept for it."""
    from whiflash_sglang.engine.scheduler.kv_budget import sampling_bytes

    sampling = {"temperature": 1.0, "top_p": 0.95, "top_k": 50, "min_p": 0.01}
    used, largest = Memory(case.device), min(case.scale.running, len(case.prompts))
    with watching(e.worker, used, full=largest) as rounds:
        e.generate(case.prompts[:largest], max_new_tokens=case.scale.tokens, **sampling)
    widest = 1 + max(drafter.max_drafts for drafter in e.worker.drafters.values())
    promised = sampling_bytes(case.scale.running * widest, e.worker.target.shape.vocab_size)
    figures |= {**rounds.figures(), "peak_bytes": used.most, "promised_bytes": promised}
    if case.device == "cuda":
        assert used.most <= promised, "a round of the largest batch takes more than was kept for it"


def trace(case: Case, e: Any, figures: dict[str, Any], keep: Path) -> None:
    """Profile rounds of eight requests. keep: file of the trace, for a viewer."""
    seen = Trace(case.device)
    e.start_over("random")
    with watching(e.worker) as rounds, seen.profile:
        e.generate(case.prompts[:8], max_new_tokens=min(case.scale.tokens, 32))
    figures |= {**rounds.figures(), **seen.figures(rounds.seen)}
    seen.profile.export_chrome_trace(str(keep))


def serve(case: Case, checks: Checks, keep: Path) -> int:
    """All checks of one backend, one after the other, those of our engine first. Returns the exit status."""
    from whiflash_sglang.errors import ConfigError

    answers: list[list[int]] | None = None
    with contextlib.ExitStack() as stack:
        refusal, e = "", None
        with checks.check("starts"):
            try:
                e = stack.enter_context(case.engine(whiflash=True))
            except ConfigError as refused:
                refusal = str(refused)
        if refusal:
            return checks.leave_out(f"refused: {refusal}")
        if e is None:
            return checks.exit_status
        with checks.check("greedy") as figures:
            answers = greedy(case, e, figures)
        with checks.check("waits") as figures:
            waits(case, e, figures)
        with checks.check("memory") as figures:
            memory(case, e, figures)
        with checks.check("trace") as figures:
            trace(case, e, figures, keep)
        with checks.check("agents") as figures:
            agents(case, e, figures)
    if answers is not None:
        with checks.check("equality") as figures:
            equality(case, answers, figures)
    return checks.exit_status


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--attention", required=True)
    parser.add_argument("--overlap", action="store_true")
    parser.add_argument("--device", choices=("cuda", "cpu", "phantom"), default="cuda")
    parser.add_argument("--model-path")
    parser.add_argument("--bundle")
    parser.add_argument("--family")
    parser.add_argument("--out", type=Path, required=True)
    chosen = parser.parse_args(arguments)
    rehearse = chosen.device != "cuda"
    with tempfile.TemporaryDirectory() as scratch, on_device(chosen.device, Path(scratch)):
        if chosen.family:
            served = Served.family(chosen.family, Path(scratch), "float32" if rehearse else "bfloat16")
        else:
            served = Served.find(chosen.model_path, chosen.bundle, Path(scratch), rehearse=rehearse)
        scale = SCALES[chosen.device]
        case = Case(served, chosen.attention, chosen.device, scale, overlap=chosen.overlap)
        described = {"served": served.name, "dtype": served.dtype, "attention": chosen.attention}
        checks = Checks(chosen.out, **described, overlap=chosen.overlap)
        return serve(case, checks, chosen.out.with_suffix(".trace.json.gz"))


if __name__ == "__main__":
    sys.exit(main())
