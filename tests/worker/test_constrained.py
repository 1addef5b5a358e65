"""Grammars and stop strings: greedy output equals plain decoding's, and ends where plain decoding's ends."""

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
from engine import engine
from model_set import Models
from oracle_arm import ARM, OracleArm
from sglang.srt.constrained.xgrammar_backend import XGrammarGrammar
from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest
from sglang.srt.function_call.function_call_parser import FunctionCallParser
from traffic import Arrival, play

from whiflash_sglang import worker
from whiflash_sglang.structure import spending
from whiflash_sglang.structure.matchers import XGrammarMatcher
from whiflash_sglang.structure.spending import REQUEST_SECONDS, Spending

SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 12},
            "kind": {"enum": ["alpha", "beta", "gamma"]},
            "count": {"type": "integer", "minimum": 0, "maximum": 999},
        },
        "required": ["name", "kind", "count"],
        "additionalProperties": False,
    }
)
KINDS: dict[str, dict[str, Any]] = {
    "schema": {"ignore_eos": False, "json_schema": SCHEMA, "max_new_tokens": 90},
    "cut-short": {"json_schema": SCHEMA, "max_new_tokens": 21},
    "regex": {"ignore_eos": False, "regex": "(red|green|blue)( (red|green|blue)){3}", "max_new_tokens": 60},
    "penalised": {"ignore_eos": False, "json_schema": SCHEMA, "frequency_penalty": 0.4, "max_new_tokens": 90},
    "stop-string": {"stop": ["rs", "k", "m"], "max_new_tokens": 50},
    "free": {"max_new_tokens": 50},
}

OPTIONS: dict[str, Any] = {
    "max_running_requests": 6,
    "skip_tokenizer_init": False,
    "constrained_json_disable_any_whitespace": True,
}


def requests() -> list[Arrival]:
    rng = random.Random(6)
    return [
        Arrival(
            f"{kind}/{i}",
            rng.randint(0, 20),
            tuple(rng.choices(range(32, 127), k=rng.randint(4, 30))),
            params,
        )
        for i in range(2)
        for kind, params in KINDS.items()
    ]


@pytest.mark.parametrize("router", ["ar", "diffusion", "random"])
def test_grammars_and_stop_strings(models: Models, router: str) -> None:
    arrivals = requests()
    with engine(models.target, **OPTIONS) as e:
        expected = play(e, arrivals)
        reasons = {rid: req.finished_reason.to_json() for rid, req in e.requests.items()}
        decode = e.scheduler.tokenizer.decode
    oracle = OracleArm(0.9, alphabet=range(32, 127))
    for a in arrivals:
        oracle.learn(a.prompt, expected[a.rid])
    arms = [oracle] if router == "random" else []
    with engine(models.target, whiflash=models.whiflash(router), arms=arms, **OPTIONS) as e:
        assert play(e, arrivals) == expected
        assert {rid: req.finished_reason.to_json() for rid, req in e.requests.items()} == reasons
    assert router != "random" or max(oracle.accepted) == oracle.max_drafts
    assert set(json.loads(decode(expected["schema/0"], skip_special_tokens=True))) == {
        "name",
        "kind",
        "count",
    }
    assert any(reason["type"] == "stop" for rid, reason in reasons.items() if rid.startswith("stop-string"))


@pytest.mark.parametrize("router", ["none", "random"])
def test_grammars_follow_rounds_that_share_a_step(models: Models, router: str, steps: list[int]) -> None:
    """Within a step a grammar has not seen what earlier rounds committed; its masks are those of plain decoding."""
    arrivals = [a for a in requests() if "penalised" not in a.rid]
    options = {**OPTIONS, "max_running_requests": 2}  # of more, one nearly always drafts
    with engine(models.target, **options) as e:
        expected = play(e, arrivals)
    with engine(models.target, whiflash=models.whiflash(router), **options) as e:
        assert play(e, arrivals) == expected
    assert max(steps) > 1


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


STOPS: dict[str, dict[str, Any]] = {
    "later-listed-first": {"stop": ["Z", "N", "G", "J", "R"]},
    "token-before-string": {"ignore_eos": False, "stop_token_ids": [70, 77], "stop": ["I", "L", "Q"]},
    "regex": {"stop_regex": ["[P-S][D-J]", "K.?L"]},
    "regex-at-the-end": {"stop_regex": ["[G-I]$", "^[D-F][D-S][G-J]"]},
    "kept": {"stop": ["H", "M"], "no_stop_trim": True},
    "in-a-grammar": {"ignore_eos": False, "regex": "[D-S]{20}", "stop": ["N", "GE", "H"]},
    "behind-a-grammar": {"ignore_eos": False, "regex": "[D-S]{9}", "stop": ["ZZ"]},
    "at-least": {"ignore_eos": False, "stop_token_ids": [70, 74, 77, 80], "min_new_tokens": 9},
    "ignored": {"ignore_eos": True, "stop_token_ids": [70, 74, 77, 80], "max_new_tokens": 13},
}


def test_the_first_stop_in_a_block_ends_the_request(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts that are right lead past it, and past others that plain decoding never comes to."""
    rng = random.Random(8)
    arrivals = [
        Arrival(f"{kind}/{i}", rng.randint(0, 20), tuple(rng.choices(range(32, 127), k=12)), params)
        for i in range(6)
        for kind, params in STOPS.items()
    ]
    with engine(models.target, **OPTIONS) as e:
        expected = play(e, arrivals)
        reasons = {rid: req.finished_reason.to_json() for rid, req in e.requests.items()}
        beyond = e.generate([a.prompt for a in arrivals], max_new_tokens=48)
    oracle = OracleArm(0.97, alphabet=range(32, 127))
    for a, text in zip(arrivals, beyond, strict=True):
        oracle.learn(a.prompt, expected[a.rid] if "regex" in a.params else text)

    def route(rows: Any, forecasts: Sequence[Any]) -> list[str]:
        return [ARM if ARM in forecast else "none" for forecast in forecasts]

    with engine(models.target, whiflash=models.whiflash("random"), arms=[oracle], **OPTIONS) as e:
        monkeypatch.setattr(e.worker.controller, "route", route)
        assert play(e, arrivals) == expected
        assert {rid: e.requests[rid].finished_reason.to_json() for rid in reasons} == reasons
        for rid, output in expected.items():
            assert list(e.requests[rid].output_ids) == output, "what lies behind a stop is kept"
    assert max(oracle.accepted) == oracle.max_drafts


def test_strict_thinking(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """Filters of tokens, with and without a grammar behind them."""
    monkeypatch.setenv("SGLANG_MAX_THINK_TOKENS", "9")
    options = {**OPTIONS, "reasoning_parser": "deepseek-r1", "enable_strict_thinking": True}
    arrivals = [
        replace(a, params={**a.params, "require_reasoning": True})
        for a in requests()
        if "stop" not in a.params  # a stop would end the marker
    ]
    with engine(models.target, **options) as e:
        expected = play(e, arrivals)
        assert all("</think>" in e.scheduler.tokenizer.decode(output) for output in expected.values())
    oracle = OracleArm(0.9, alphabet=range(32, 127))
    for a in arrivals:
        oracle.learn(a.prompt, expected[a.rid])
    with engine(models.target, whiflash=models.whiflash("random"), arms=[oracle], **options) as e:
        assert play(e, arrivals) == expected
    assert max(oracle.accepted) == oracle.max_drafts


class Meter:
    """A clock that moves by `seconds` whenever a grammar takes a token or makes a mask. moves: since the last step."""

    def __init__(self, seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self._seconds, self.moves = 0.0, seconds, 0
        monkeypatch.setattr(worker, "Spending", partial(Spending, lambda: self.now))
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


@pytest.mark.parametrize(("steps", "branches"), [(0.5, 1), (9, 4)])
def test_dear_grammars_have_plain_text_and_few_drafts(
    models: Models, monkeypatch: pytest.MonkeyPatch, steps: float, branches: int
) -> None:
    """Whether a round's time for a grammar ends with its first step, or behind the masks of a few drafts."""
    arrivals = [a for a in requests() if "stop" not in a.rid]
    with engine(models.target, **OPTIONS) as e:
        expected = play(e, arrivals)
    oracle = OracleArm(1.0, alphabet=range(32, 127), ragged=False)
    for a in arrivals:
        oracle.learn(a.prompt, expected[a.rid])
    meter, moves = Meter(REQUEST_SECONDS / steps, monkeypatch), []
    if steps > 1:
        monkeypatch.setattr(spending, "FIRST_PAUSE", 1)
        monkeypatch.setattr(spending, "LONGEST_PAUSE", 1)

    def on_step() -> None:
        moves.append(meter.moves)
        meter.moves = 0

    flags = models.whiflash("random", whiflash_branches=branches)
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


NEEDS_TEMPLATE = {"response_template"}
"""Parsers that read a checkpoint's own template."""


def forced_calls() -> Iterator[tuple[str, dict[str, Any]]]:
    """Sampling parameters of a forced call under every tool-call parser, and of a tag in `response_format`."""
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "Look."}]}
    tool = {"name": "look", "parameters": json.loads(SCHEMA), "strict": True}
    tools = [{"type": "function", "function": tool}]
    request = ChatCompletionRequest.model_validate({**asked, "tools": tools, "tool_choice": "required"})
    for parser in sorted(FunctionCallParser.ToolCallParserEnum.keys() - NEEDS_TEMPLATE):
        constraint = FunctionCallParser(request.tools, parser).get_structure_constraint("required")
        yield parser, request.to_sampling_params([], {}, constraint)
    content = {"type": "json_schema", "json_schema": tool["parameters"]}
    tag = {"type": "tag", "begin": "<t>", "content": content, "end": "</t>"}
    form = {"type": "structural_tag", "format": tag}
    request = ChatCompletionRequest.model_validate({**asked, "response_format": form})
    yield "response_format", request.to_sampling_params([], {})


def test_forced_calls_are_plain_decodings(models: Models) -> None:
    """With the same flags, whitespace included: a random model goes on with it where a grammar leaves it free."""
    constraints = {}
    for parser, params in forced_calls():
        kinds = {name: params[name] for name in ("structural_tag", "json_schema", "ebnf") if params.get(name)}
        constraints[json.dumps(kinds)] = parser, kinds  # many parsers share one
    arrivals = [
        Arrival(parser, 0, (70, 71, 72), {"max_new_tokens": 60, "ignore_eos": False, **kinds})
        for parser, kinds in constraints.values()
    ]
    with engine(models.target, **OPTIONS) as e:
        expected = play(e, arrivals)
    with engine(models.target, whiflash=models.whiflash("random"), **OPTIONS) as e:
        assert play(e, arrivals) == expected
