"""`whiflash check --echo` in one process: nothing is wrong on three kinds of targets, and a planted fault is found."""

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from engine import REQUEST_FIELDS, Engine, engine
from families import FAMILIES, tiny_family
from oracle_arm import ARM, OracleArm
from tiny_models import save_tokenizer, tiny_pair

from whiflash_sglang.cli import echo
from whiflash_sglang.cli.echo import Echo
from whiflash_sglang.drafts.arms import AR, DIFFUSION
from whiflash_sglang.engine.scheduler.streamer import _RECORDING
from whiflash_sglang.serve import verify
from whiflash_sglang.telemetry.trace import build_trace

TARGETS = {"dense": "Qwen3ForCausalLM", "windowed": "Gemma3ForCausalLM", "recurrent": "Qwen3_5ForCausalLM"}
EVIDENCE_TOKENS = 36_000
"""Tokens compared on each target: more than 100,000 on the three together."""


@contextmanager
def served(name: str, root: Path, length: int) -> Iterator[tuple[Engine, Echo]]:
    """An engine with all arms, one of which is mostly right, and the questions to it."""
    target = root / "target"
    tiny_family(target, FAMILIES[TARGETS[name]])
    save_tokenizer(target)
    flags = {**tiny_pair(root, target), "whiflash_router": "random"}
    oracle, names = OracleArm(0.95, seed=3), map("e{:06d}".format, itertools.count())
    sizes = {"max_running_requests": echo.AT_ONCE, "max_total_tokens": 16_384}

    def ask(bodies: Sequence[Any]) -> list[Any]:
        asked = list(zip(names, bodies, strict=False))
        for rid, body in asked:
            fields = {key: value for key, value in body.items() if key in REQUEST_FIELDS}
            e.submit(rid, body["input_ids"], **{"ignore_eos": False, **deepcopy(body["sampling_params"])}, **fields)
        e.run()
        answers = [answered(e, rid) for rid, _ in asked]
        if len(bodies) == 1:
            oracle.learn(bodies[0]["input_ids"], answers[0]["output_ids"])
        return answers

    with engine(target, whiflash=flags, arms=[oracle], skip_tokenizer_init=False, **sizes) as e:
        yield e, Echo(ask, ("ar", "diffusion", "lookup", "structure"), "float32", length)


def answered(e: Engine, rid: str) -> dict[str, Any]:
    """As `/generate` answers it."""
    req = e.requests.pop(rid)
    tokens = req.output_ids_through_stop
    meta: dict[str, Any] = {"whiflash": build_trace(getattr(req, _RECORDING), "", len(tokens))}
    if req.return_logprob:
        meta["output_top_logprobs"] = [[(value,) for value in top] for top in req.logprob.output_top_logprobs_val]
    return {"output_ids": list(tokens), "meta_info": meta}


def sweep(e: Engine, asked: Echo, prompts: Iterator[tuple[str, Any]], count: int) -> None:
    encode = e.scheduler.tokenizer.encode
    list(asked.sweep([(encode(text), params) for text, params in itertools.islice(prompts, count)]))


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("name", "whole"), [("dense", False), *(pytest.param(name, True, marks=pytest.mark.evidence) for name in TARGETS)]
)
def test_identifiers_are_plain_decodings(
    name: str, whole: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By every arm and width. In a short test a position that is off by one at one width is found there."""
    with served(name, tmp_path, echo.LENGTH if whole else 40) as (e, asked):
        prompts, keys, ask = echo.prompts(seed=1), Counter[str](), asked.ask

        def counted(bodies: Sequence[Any]) -> Sequence[Any]:
            with_grammar = [body for body in bodies if "regex" in body["sampling_params"]]
            keys.update(body["extra_key"] for body in with_grammar if "return_logprob" not in body)
            return ask(bodies)

        monkeypatch.setattr(asked, "ask", counted)
        sweep(e, asked, prompts, echo.AT_ONCE if whole else 3)
        while whole and asked.counts.total() < EVIDENCE_TOKENS:
            sweep(e, asked, prompts, echo.AT_ONCE)
        print(name, asked.counts.total(), *asked.rows(), sep="\n")
        assert not asked.wrong
        assert set(keys.values()) == {2}, "the second time its prompt is in the prefix cache"
        seen = {(row["arm"], row["width"]) for row in asked.rows()}
        assert seen >= {(AR, width) for width in range(2, 7)} | {(DIFFUSION, width) for width in range(2, 9)}
        assert {arm for arm, _ in seen} >= {"lookup", "structure", "none", "plain", "prefill", ARM}
        if not whole:
            check_planted(e, asked, monkeypatch)


def check_planted(e: Engine, asked: Echo, monkeypatch: pytest.MonkeyPatch) -> None:
    """A position that is off by one, of one row of three, is found at this width, and nothing else is."""
    prepare = verify.prepare_mixed_block

    def shifted(bonus: Any, drafts: Any, widths: Any, *args: Any, **options: Any) -> Any:
        block = prepare(bonus, drafts, widths, *args, **options)
        block.positions[block.qo_indptr[:-1][widths == 3]] += 1
        return block

    monkeypatch.setattr(verify, "prepare_mixed_block", shifted)
    e.worker.reconfigure({"router": AR})
    found = Echo(asked.ask, [AR], "float32", 40)
    sweep(e, found, echo.prompts(seed=1), 4)
    print(*found.rows(), *found.wrong, sep="\n")
    assert {(row["arm"], row["width"]) for row in found.rows() if row["wrong"]} == {(AR, 3)}
