"""Whole rounds on SGLang's Triton attention and our Triton kernels, against the torch references and plain decoding.

Run by `test_interpreted_rounds.py` in a child process: Triton's interpreter must be chosen before Triton is first
imported, and would change every kernel of a process. The engine is the real one, on the CPU; the name of the CPU
platform's attention stands for our subclass of SGLang's Triton backend here, so prefills run `extend_attention_fwd` and
verifications `verify_attention` on the plan that the subclass makes. The platform's replacements of other helpers of
SGLang's (`whiflash_cpu/seams.py`: slots, bonus tokens) stay torch. It does not prove that compiled kernels do the same.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from engine import engine
from families import FAMILIES, WINDOW, tiny_family
from matrix import sampled
from model_set import Models
from priced import priced
from reference import Comparison
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
from tiny_models import tiny_dflash, tiny_eagle3
from whiflash_kernels import MixedBlock
from whiflash_kernels.triton_kernels import attention, backlog, block, catch_up, drafts, passes, routing, verify

from whiflash_sglang.engine.forward.triton_backend import RaggedTritonBackend
from whiflash_sglang.engine.scheduler import pricing
from whiflash_sglang.files.cpu import ATTENTION_BACKEND

ARMS = ("ar", "diffusion", "lookup", "none")
PROMPTS = [[1, 2, 3, 4, 1, 2, 3, 4, 1, 2], [70, 9] * 12, [200], list(range(30, 50)) * 2]
TOKENS = 8

KERNELS = {
    attention: ("draft_attention",),
    backlog: ("claim_backlogs", "park", "unpark"),
    block: ("accept_and_commit", "prepare_mixed_block"),
    catch_up: ("layer_input", "write_kv"),
    drafts: ("choose_drafts", "cut_drafts", "lay_drafts"),
    passes: ("draft_inputs", "pass_rows"),
    routing: ("routing_stats",),
    verify: ("verify_attention",),
}
"""Launchers of our kernels that the rounds here need."""


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Calls of our launchers and of the backend's attention."""
    calls: Counter[str] = Counter()

    def watch(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)

    for module, names in KERNELS.items():
        for name in names:
            watch(module, name)
    watch(RaggedTritonBackend, "forward_extend")
    return calls


class Rounds(NamedTuple):
    """tokens: what each request was answered. verified: of every round, rows per request and all rows' tokens."""

    tokens: list[list[int]]
    verified: list[tuple[list[int], list[int]]]


def speculate(models: Models, **options: Any) -> Rounds:
    """All prompts at once, each with another arm in every round. Drafts have full lengths: none depends on a time."""
    verified: list[tuple[list[int], list[int]]] = []
    with engine(models.target, whiflash=models.whiflash("entropy", {"entropy": {"tau": 2.0}}), **options) as e:
        turns, target, controller = count(), e.worker.target, e.worker.controller
        verify, plan = target.verify, controller.route

        def route(row_ids: Sequence[int], forecasts: Sequence[Any]) -> list[str]:
            plan(row_ids, forecasts)
            turn = next(turns)
            wanted = [ARMS[(turn + i) % len(ARMS)] for i in range(len(row_ids))]
            return [arm if arm in may else "none" for arm, may in zip(wanted, forecasts, strict=True)]

        def noted(*args: Any) -> Any:
            rows = next(arg for arg in args if isinstance(arg, MixedBlock))
            verified.append((rows.qo_indptr.diff().tolist(), rows.input_ids.tolist()))
            return verify(*args)

        controller.route, target.verify = route, noted
        return Rounds(e.generate(PROMPTS, max_new_tokens=TOKENS), verified)


@pytest.fixture(scope="module")
def plain(models: Models) -> list[list[int]]:
    """Plain decoding of the prompts, on the CPU platform's own attention."""
    with engine(models.target) as e:
        return e.generate(PROMPTS, max_new_tokens=TOKENS)


def on_torch_and_triton(
    models: Models, launched: Counter[str], monkeypatch: pytest.MonkeyPatch, **options: Any
) -> Rounds:
    """Rounds on Triton, which are those on torch."""
    # Interpreted work has no price worth measuring.
    monkeypatch.setattr(
        pricing.Start, "tables", lambda _: priced(lambda arm: 4, {"ar": 1e-3, "diffusion": 1e-3}).tables
    )
    monkeypatch.setattr(verify, "shares_for", lambda *_: 4)
    monkeypatch.setenv("WHIFLASH_KERNELS", "torch")
    on_torch = speculate(models, **options)
    assert not launched
    monkeypatch.setenv("WHIFLASH_KERNELS", "triton")
    monkeypatch.setitem(ATTENTION_BACKENDS, ATTENTION_BACKEND, RaggedTritonBackend)
    on_triton = speculate(models, **options)
    assert set(launched) == {"forward_extend", *(name for names in KERNELS.values() for name in names)}
    assert any(len(set(widths)) > 2 for widths, _ in on_torch.verified), "no verification was ragged"
    assert on_triton == on_torch
    return on_triton


@pytest.mark.parametrize("page_size", sampled([1, 16], 16))
def test_rounds_on_triton_are_those_on_torch(
    models: Models, plain: list[list[int]], launched: Counter[str], monkeypatch: pytest.MonkeyPatch, page_size: int
) -> None:
    on_triton = on_torch_and_triton(models, launched, monkeypatch, page_size=page_size)
    comparison = Comparison(models.reference.target)
    for prompt, expected, found in zip(PROMPTS, plain, on_triton.tokens, strict=True):
        comparison.check(prompt, expected, found, f"pages of {page_size}")
    print(comparison.summary(), dict(launched))


@pytest.mark.evidence
@pytest.mark.parametrize("architecture", ["GptOssForCausalLM", "LagunaForCausalLM"])
def test_rounds_in_windows_are_those_on_torch(
    architecture: str, models: Models, tmp_path: Path, launched: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts in chunks, longer and shorter than the window, with sinks and without; of Laguna's class SGLang asks its
    window in vain."""
    target = tmp_path / "target"
    model = tiny_family(target, FAMILIES[architecture])
    eagle3, dflash = tiny_eagle3(tmp_path / "eagle3", target), tiny_dflash(tmp_path / "dflash", target)
    served = replace(models, target=target, eagle3=eagle3, dflash=dflash)
    with engine(target) as e:
        plain = e.generate(PROMPTS, max_new_tokens=TOKENS)
    on_triton = on_torch_and_triton(served, launched, monkeypatch, chunked_prefill_size=16)
    assert min(map(len, PROMPTS)) < WINDOW < max(map(len, PROMPTS))
    comparison = Comparison(model)
    for prompt, expected, found in zip(PROMPTS, plain, on_triton.tokens, strict=True):
        comparison.check(prompt, expected, found, architecture)
    print(comparison.summary(), dict(launched))
