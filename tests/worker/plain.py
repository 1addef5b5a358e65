"""Plain decoding's answers, which every test of a process shares, and what it takes to agree with them.

A text is plain decoding's if it is identical, or if plain decoding's own top-two logit gap at the first difference is
at most 1e-4 (fp32); such ties are counted and printed. With penalties, biases or processors it must be identical.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from engine import Engine, engine
from records import Logprobs, assert_same_logprobs, logprobs
from reference import Comparison, ReferenceTarget
from traffic import Arrival, play

STOPS = ("stop", "stop_token_ids", "stop_regex")
GRAMMARS = ("json_schema", "structural_tag", "regex", "ebnf")
UNADJUSTED = {*STOPS, *GRAMMARS, "custom_params", "ignore_eos", "max_new_tokens", "no_stop_trim", "priority"}
UNADJUSTED |= {"return_hidden_states", "require_reasoning", "lora_id"}
"""Parameters with which a token is the likeliest, or the likeliest that a grammar allows."""


@dataclass(frozen=True)
class Answer:
    """Answer to one request. kept: tokens that the engine has of it. states: hidden states as a client gets them.
    beyond: the text if nothing would stop it.
    """

    tokens: list[int]
    kept: list[int]
    reason: dict[str, Any]
    logprobs: Logprobs | None
    states: list[torch.Tensor]
    beyond: list[int]


Answers = dict[str, Answer]
Start = Callable[..., Any]
_known: dict[str, Answers] = {}


def plain(target: Path, arrivals: Sequence[Arrival], *, start: Start = engine, **arguments: Any) -> Answers:
    """Plain decoding's answers; nothing is aborted. Arguments as of `engine`, which may not run meanwhile."""
    return plain_sets(target, {"": arrivals}, start=start, **arguments)[""]


def plain_texts(target: Path, arrivals: Sequence[Arrival], **arguments: Any) -> dict[str, list[int]]:
    return {rid: answer.tokens for rid, answer in plain(target, arrivals, **arguments).items()}


def plain_sets(
    target: Path, sets: Mapping[str, Sequence[Arrival]], *, start: Start = engine, **arguments: Any
) -> dict[str, Answers]:
    """The same of several sets of requests, all in one engine."""
    keys = {name: repr((target, start, sorted(arguments.items()), name, asked)) for name, asked in sets.items()}
    missing = [name for name, key in keys.items() if key not in _known]
    if missing:
        with adding_first(), start(target, **arguments) as e:
            for name in missing:
                _known[keys[name]] = _answers(e, sets[name])
    return {name: _known[key] for name, key in keys.items()}


def _answers(e: Engine, arrivals: Sequence[Arrival]) -> Answers:
    play(e, [replace(a, abort_after=None, params=deepcopy(a.params)) for a in arrivals])
    answers = read(e, arrivals)
    stopping = [a for a in arrivals if a.params.keys() & {*STOPS} and not a.params.keys() & {*GRAMMARS}]
    for a in stopping:
        params = {name: value for name, value in a.params.items() if name not in (*STOPS, "min_new_tokens")}
        more = {"max_new_tokens": 16 + a.params.get("max_new_tokens", 32), "ignore_eos": True}
        e.submit(f"beyond {a.rid}", a.prompt, **{**deepcopy(params), **more})
    e.run()
    answers |= {a.rid: replace(answers[a.rid], beyond=e.output(f"beyond {a.rid}")) for a in stopping}
    e.scheduler.flush_cache()
    e.requests.clear()
    return answers


def read(e: Engine, arrivals: Sequence[Arrival]) -> Answers:
    """Answers of the engine."""
    answers = {}
    for a in arrivals:
        req, rid = e.requests[a.rid], a.rid
        rates = logprobs(e, rid) if a.params.get("return_logprob") else None
        states = hidden_states(e, rid) if a.params.get("return_hidden_states") else []
        reason = req.finished_reason.to_json() if req.finished_reason else {}
        answers[rid] = Answer(e.output(rid), list(req.output_ids), reason, rates, states, [])
    return answers


def hidden_states(e: Engine, rid: str) -> list[torch.Tensor]:
    """As the output streamer cuts them: the prompt's, then one a token."""
    req = e.requests[rid]
    states = req.hidden_states[-1:] if req.return_hidden_states == "last" else req.hidden_states
    return [torch.tensor(state) for state in states[: req.finished_len]]


@contextmanager
def adding_first() -> Iterator[None]:
    """Plain decoding subtracts before it scales, as under overlap scheduling. Without that it applies its penalties in
    the order of a set of classes, which is another one in every process.
    """
    from sglang.srt.sampling import penaltylib

    made = penaltylib.BatchedPenalizerOrchestrator

    def ordered(vocab_size: int, batch: Any, penalizers: set[Any]) -> Any:
        return made(vocab_size, batch, sorted(penalizers, key=lambda kind: kind.is_multiplicative))

    with patch.object(penaltylib, "BatchedPenalizerOrchestrator", ordered):
        yield


def compare(
    target: ReferenceTarget, arrivals: Sequence[Arrival], expected: Mapping[str, list[int]], texts: Mapping[str, Any]
) -> Comparison:
    """An aborted request must have a prefix of the plain text, any other one all of it."""
    comparison = Comparison(target)
    for a in arrivals:
        text = expected[a.rid] if a.abort_after is None else expected[a.rid][: len(texts[a.rid])]
        if a.params.keys() <= UNADJUSTED:
            comparison.check(a.prompt, text, texts[a.rid], f"{a.rid} {a.params}")
        else:
            assert texts[a.rid] == text, f"{a.rid} {a.params}"
    print(comparison.summary())
    return comparison


def check(target: ReferenceTarget, arrivals: Sequence[Arrival], expected: Answers, answers: Answers) -> Comparison:
    """Texts, and of those that were not aborted also why they ended, log-probabilities and hidden states."""
    texts = {rid: answer.tokens for rid, answer in answers.items()}
    comparison = compare(target, arrivals, {rid: answer.tokens for rid, answer in expected.items()}, texts)
    for a in arrivals:
        ours, wanted = answers[a.rid], expected[a.rid]
        if a.abort_after is not None or ours.tokens != wanted.tokens:
            continue
        assert ours.reason == wanted.reason, a.rid
        assert ours.kept == wanted.kept, f"{a.rid}: what lies behind a stop is kept"
        if wanted.logprobs is not None and ours.logprobs is not None:
            assert_same_logprobs(ours.logprobs, wanted.logprobs, a.rid)
        assert [state.ndim for state in ours.states] == [state.ndim for state in wanted.states], a.rid
        for state, plain_state in zip(ours.states, wanted.states, strict=True):
            # SGLang returns what a prompt's last chunk had: chunks depend on who else is there.
            rows = min(len(state), len(plain_state))
            torch.testing.assert_close(state[-rows:], plain_state[-rows:], atol=1e-4, rtol=1e-4)
    return comparison
