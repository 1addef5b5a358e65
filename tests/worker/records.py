"""Records of every output token of a request, to compare with plain decoding's."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
from engine import Engine
from reference import TIE

Beside = list[tuple[list[int], list[float]]]
"""Per token: the ids of others, and their log-probabilities."""


@dataclass(frozen=True)
class Logprobs:
    """Scores of one request. prompt: of its own tokens; values: of the output's. top, given: of tokens beside those."""

    prompt: list[float]
    tokens: list[int]
    values: list[float]
    top: Beside
    given: Beside


def logprobs(e: Engine, rid: str) -> Logprobs:
    """Log-probabilities that a client would get: the scheduler sends as many as there are tokens."""
    req = e.requests[rid]
    record, end = req.logprob, len(req.output_ids_through_stop)
    return Logprobs(
        [float(value) for value in record.input_token_logprobs_val or [] if value is not None],
        list(record.output_token_logprobs_idx)[:end],
        [float(value) for value in record.output_token_logprobs_val][:end],
        _beside(record.output_top_logprobs_idx, record.output_top_logprobs_val)[:end],
        _beside(record.output_token_ids_logprobs_idx, record.output_token_ids_logprobs_val)[:end],
    )


def all_logprobs(e: Engine, rids: Iterable[str]) -> dict[str, Logprobs]:
    return {rid: logprobs(e, rid) for rid in rids}


def _beside(ids: Any, values: Any) -> Beside:
    return [([int(i) for i in a], [float(v) for v in b]) for a, b in zip(ids or [], values or [], strict=True)]


def assert_same_logprobs(found: Logprobs, expected: Logprobs, name: str) -> None:
    """Equal ids, and values that differ by rounding; top ids may change places where their values are as close."""
    assert found.tokens == expected.tokens, name
    assert len(found.values) == len(found.tokens), name
    assert found.prompt == pytest.approx(expected.prompt, abs=TIE), name
    assert found.values == pytest.approx(expected.values, abs=TIE), name
    for kind in ("top", "given"):
        ours, plain = getattr(found, kind), getattr(expected, kind)
        assert len(ours) == len(plain), (name, kind)
        for at, ((ids, values), (wanted_ids, wanted)) in enumerate(zip(ours, plain, strict=True)):
            assert values == pytest.approx(wanted, abs=TIE), (name, kind, at)
            tied = kind == "top" and any(a - b < TIE for a, b in pairwise(wanted))
            assert ids == wanted_ids or tied, (name, kind, at, ids, wanted_ids, wanted)
