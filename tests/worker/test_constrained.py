"""Grammars: where a text ends with them, and what they may cost."""

from functools import partial
from typing import Any

import pytest
from engine import engine
from model_set import Models
from oracle_arm import OracleArm
from plain import plain_texts
from request_sets import OPTIONS, constrained
from sglang.srt.constrained.xgrammar_backend import XGrammarGrammar
from traffic import Arrival, play

from whiflash_sglang.serve import worker
from whiflash_sglang.structure import spending
from whiflash_sglang.structure.matchers import XGrammarMatcher
from whiflash_sglang.structure.spending import REQUEST_SECONDS, Spending


@pytest.mark.parametrize("backend", ["xgrammar", "llguidance"])
def test_a_grammars_end_is_the_end(models: Models, backend: str) -> None:
    """Also if a request says `ignore_eos`. Plain decoding goes on: SGLang looks at the grammar a token late there, or
    never with llguidance. SGLang's own speculative decoding ends where WHIFLASH does.
    """
    prompts = [[90, 91, 92, 93], [40, 41, 42]]
    params = {"ignore_eos": True, "regex": "(red|green)( blue)?", "max_new_tokens": 40}
    options = {**OPTIONS, "grammar_backend": backend}
    with engine(models.target, **options) as e:
        plain = e.generate(prompts, **params)
    with engine(models.target, whiflash=models.whiflash("random"), **options) as e:
        found = e.generate(prompts, **params)
    for ours, longer in zip(found, plain, strict=True):
        assert longer[: len(ours)] == ours
        assert len(longer) == (len(ours) + 1 if backend == "xgrammar" else 40)


class Meter:
    """A clock that moves by `seconds` whenever a grammar takes a token or makes a mask. moves: since the last step."""

    def __init__(self, seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self._seconds, self.moves = 0.0, seconds, 0
        monkeypatch.setattr(worker, "Spending", partial(Spending, lambda: self.now, lambda: self.now))
        for owner, name in (
            (XGrammarGrammar, "accept_token"),
            (XGrammarGrammar, "fill_vocab_mask"),
            (XGrammarMatcher, "_accept_token"),
            (XGrammarMatcher, "_accept_text"),
        ):
            monkeypatch.setattr(owner, name, self._moving(getattr(owner, name)))

    def _moving(self, method: Any) -> Any:
        def moving(*args: Any) -> Any:
            self.now += self._seconds
            self.moves += 1
            return method(*args)

        return moving


@pytest.mark.parametrize("steps", [0.5, 9])
def test_dear_grammars_have_plain_text_and_few_drafts(
    models: Models, monkeypatch: pytest.MonkeyPatch, steps: float
) -> None:
    """Whether a round's time for a grammar ends with its first step, or behind the masks of a few drafts."""
    arrivals = [a for a in constrained() if "stop" not in a.rid]
    expected = plain_texts(models.target, arrivals, **OPTIONS)
    oracle = OracleArm(1.0, alphabet=range(32, 127), ragged=False).knowing(arrivals, expected)
    meter, moves = Meter(REQUEST_SECONDS / steps, monkeypatch), []
    if steps > 1:
        monkeypatch.setattr(spending, "FIRST_PAUSE", 1)
        monkeypatch.setattr(spending, "LONGEST_PAUSE", 1)

    def on_step() -> None:
        moves.append(meter.moves)
        meter.moves = 0

    flags = models.whiflash("random")
    with engine(models.target, whiflash=flags, arms=[oracle], **OPTIONS) as e:
        assert play(e, arrivals, on_step) == expected
        accepted = {rid: e.rounds(rid)[1] for rid in expected}
    free = [accepted.pop(a.rid) for a in arrivals if a.rid.startswith("free")]
    assert min(free) > 20
    if steps > 1:
        assert sum(accepted.values()) >= len(accepted)
        return
    assert not any(accepted.values())
    assert max(moves) <= 3 * len(accepted), "one more a request than plain decoding"
    assert sum(moves) <= sum(2 * len(expected[rid]) + 4 for rid in accepted)


@pytest.mark.parametrize("router", ["none", "random"])
def test_a_grammar_without_a_way_on_ends_its_own_request(models: Models, router: str) -> None:
    """Behind "a" nothing is allowed: what is committed there is refused, also by a later round of the same step."""
    arrivals = [
        Arrival("free", 0, tuple(range(40, 60)), {"max_new_tokens": 40}),
        Arrival("stuck", 2, tuple(range(90, 110)), {"ebnf": 'root ::= "a" x\nx ::= x "b"', "max_new_tokens": 20}),
    ]
    expected = plain_texts(models.target, arrivals[:1], **OPTIONS)
    with engine(models.target, whiflash=models.whiflash(router), **OPTIONS) as e:
        assert play(e, arrivals)["free"] == expected["free"]
        assert e.requests["stuck"].finished_reason.to_json()["type"] == "abort"
