"""What the scheduler carries from round to round, under its overlap loop: sessions, hidden states, processors."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import test_hidden_states as states
import test_processors as processors
import test_sessions as talks
import torch
from engine import Engine, engine
from model_set import Models
from oracle_arm import OracleArm
from overlap import overlapped
from records import all_logprobs, assert_same_logprobs
from traffic import play

from whiflash_sglang.routing.costs import FULL_LENGTH, MeasuredCosts


@contextmanager
def serving(
    models: Models, monkeypatch: pytest.MonkeyPatch, oracle: OracleArm, options: dict[str, Any]
) -> Iterator[Engine]:
    """Ours, a round behind its device, with arms in turn; no race may have been seen when it ends."""
    monkeypatch.setenv("WHIFLASH_DEVICE_RESIDENT", "1")
    monkeypatch.setattr(MeasuredCosts, "worth", lambda self, arm: FULL_LENGTH)
    flags = models.whiflash("random")
    with overlapped(models.target, whiflash=flags, arms=[oracle], host_lengths=False, **options) as e:
        yield e
        assert not e.streams.races
        assert not e.states


def test_turns_of_sessions(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = talks.sessions()[: 2 * len(talks.ENDS)]
    oracle = OracleArm(0.95, alphabet=range(32, 127))
    with engine(models.target, **talks.OPTIONS) as e:
        plain = talks.converse(e, chosen)
        prompts = [prompt for turns in plain.values() for prompt, _ in turns]
        for prompt, said in zip(prompts, e.generate(prompts, max_new_tokens=32), strict=True):
            oracle.learn(prompt, said)
    with serving(models, monkeypatch, oracle, talks.OPTIONS) as e:
        assert talks.converse(e, chosen) == plain
    assert max(oracle.accepted) == oracle.max_drafts


def test_hidden_states(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    arrivals = states.requests()
    oracle = OracleArm(0.9, alphabet=range(32, 127))
    with engine(models.target, **states.OPTIONS) as e:
        outputs = play(e, arrivals)
        wanted = {rid: states.hidden_states(e, rid) for rid in outputs}
    for a in arrivals:
        oracle.learn(a.prompt, outputs[a.rid])
    with serving(models, monkeypatch, oracle, states.OPTIONS) as e:
        assert play(e, arrivals) == outputs
        for rid in outputs:
            found = states.hidden_states(e, rid)
            assert [s.ndim for s in found] == [s.ndim for s in wanted[rid]], rid
            for ours, plain in zip(found, wanted[rid], strict=True):
                rows = min(len(ours), len(plain))
                torch.testing.assert_close(ours[-rows:], plain[-rows:], atol=1e-4, rtol=1e-4)


def test_processors(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """They see the text as plain decoding shows it to them under the same loop: without its newest token, but where a
    prefill ran between two rounds. So all begin together.
    """
    arrivals = [
        replace(a, step=0) for a in processors.requests()[: processors.OPTIONS["max_running_requests"] - 1]
    ]
    with overlapped(models.target, host_lengths=False, **processors.OPTIONS) as e:
        outputs = play(e, arrivals)
        wanted = all_logprobs(e, outputs)
    oracle = OracleArm(0.9)
    for a in arrivals:
        oracle.learn(a.prompt, outputs[a.rid])
    with serving(models, monkeypatch, oracle, processors.OPTIONS) as e:
        assert play(e, arrivals) == outputs
        for rid, found in all_logprobs(e, outputs).items():
            assert_same_logprobs(found, wanted[rid], rid)
