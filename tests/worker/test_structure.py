"""The structure arm in the real scheduler: what it drafts from and forces. With other arms: `test_plain_text.py`."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
from engine import Engine, engine
from model_set import Models
from plain import plain_texts
from request_sets import GRAMMARS, OPTIONS, SCHEMA, structured
from traffic import play, without_a_pass
from trees import assert_tree_is_true
from whiflash_kernels.cpu.texts import Batch

from whiflash_sglang.records.request import Request
from whiflash_sglang.serve import lifecycle
from whiflash_sglang.spans.hints import TOOLS_KEY
from whiflash_sglang.structure.tools import carried_tools

ROUTER = "random"
WIDTH = 16
"""Tokens that the arm proposes at most."""


@pytest.fixture(scope="module")
def expected(models: Models) -> dict[str, list[int]]:
    return plain_texts(models.target, structured(), **OPTIONS)


def use_only(arm: str, controller: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on no model drafts, and one draft source is used."""
    monkeypatch.setattr(controller, "route", partial(without_a_pass, controller))
    monkeypatch.setattr(Request, "may_verify", lambda _, other: other == arm)
    monkeypatch.setattr(Request, "may_join", property(lambda _: False))


def test_tools_without_a_grammar(
    models: Models, expected: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The target writes calls, and the arm is told of tools alone: what these tell is drafted, and nothing is lost."""
    functions: list[tuple[str | None, object]] = [("look_up", json.loads(SCHEMA)), ("look_out", json.loads(SCHEMA))]
    spans = {"spans": [{"kind": "tool_call", "begin": "<call>", "end": "</call>"}]}
    carried = {"whiflash": json.dumps(spans), TOOLS_KEY: carried_tools(functions, "hermes")}
    arrivals = [replace(a, params={**a.params, "custom_params": carried}) for a in structured()]
    monkeypatch.setattr(lifecycle, "grammar_of", lambda req: None)
    for router in ("random", "auto"):
        with engine(models.target, whiflash=models.whiflash(router), **OPTIONS) as e:
            if router == "auto":
                use_only("structure", e.worker.controller, monkeypatch)
            assert play(e, arrivals) == expected
            accepted = {rid: e.rounds(rid)[1] for rid in expected}
            assert assert_tree_is_true(e, models) > 50
        if router == "auto":
            assert accepted["tag/0"] > 10
            assert accepted["free/0"] == accepted["regex/0"] == 0


@pytest.fixture(scope="module")
def shared(models: Models, expected: dict[str, list[int]]) -> Iterator[Engine]:
    with engine(models.target, whiflash=models.whiflash(ROUTER), **OPTIONS) as e:
        yield e


def test_what_is_forced_is_accepted_at_once(
    running: Engine, expected: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every draft is right but the ends of tokens, and a forced stretch takes the rounds that its width takes."""
    use_only("structure", running.worker.controller, monkeypatch)
    assert play(running, structured()) == expected
    for rid, output in expected.items():
        verified, accepted = running.rounds(rid)
        assert verified + accepted == len(output) - 1
        if rid.startswith("free"):
            assert accepted == 0
        else:
            assert accepted > len(output) // 3, rid


def test_wherever_a_forced_draft_is_rejected(
    running: Engine, expected: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Look by look another one of its tokens is wrong, behind every arm's drafts: what is before it stays, and the
    grammar goes on from there.
    """
    propose = Batch.propose
    wrong: Counter[int] = Counter()
    walking, spoilt = running.worker.drafters["structure"]._walking, set[str]()

    def spoil(batch: Batch, *asked: Any) -> Any:
        found = propose(batch, *asked)
        tokens, sizes = batch.candidates.tokens[:, -1], batch.candidates.sizes[:, -1]
        for request in sizes.nonzero()[0]:
            at = min(reversed(range(sizes[request])), key=wrong.__getitem__)
            tokens[request, at] = ord("~")
            wrong[at] += 1
            spoilt.add(walking[int(batch._arrays[1][request])].rid)
        return found

    monkeypatch.setattr(Batch, "propose", spoil)
    assert play(running, structured()) == expected
    assert set(wrong) == set(range(WIDTH)), "every position"
    assert len(spoilt) == 2 * len(GRAMMARS), "every request that has a grammar"
