"""Acceptance pinned by SGLang's environment: what WHIFLASH commits is what SGLang's DFLASH worker would."""

import random
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from engine import engine
from model_set import Models
from whiflash_kernels import accept_and_commit

from whiflash_sglang.cache.tokens import NO_TOKEN
from whiflash_sglang.round.forcing import PinnedAcceptance

RNG = random.Random(35)
PROMPTS = [RNG.choices(range(256), k=n) for n in (5, 40, 19)]


def upstream(candidates: torch.Tensor, target: torch.Tensor, pin: tuple[float, str, str]) -> list[int]:
    """Tokens of SGLang's DFLASH worker for one request: [1, W] bonus token and drafts, [1, W] the target's tokens."""
    from sglang.srt.speculative.dflash_utils import apply_dflash_simulated_acceptance

    length, method, mode = pin
    commit, bonus, tokens = torch.zeros(1, dtype=torch.int64), target[:, 0].clone(), candidates.clone()
    apply_dflash_simulated_acceptance(
        candidates=candidates,
        target_predict=target,
        accept_len=torch.zeros_like(commit),
        commit_lens=commit,
        bonus=bonus,
        out_tokens=tokens,
        simulate_acc_len=length,
        simulate_acc_method=method,
        simulate_acc_token_mode=mode,
    )
    assert tokens[0, commit[0] - 1] == bonus[0]
    return tokens[0, : commit[0]].tolist()


@pytest.mark.parametrize(
    "pin", [(2.5, "match-expected", "real-draft-token"), (3.0, "multinomial", "fixed")], ids=str
)
def test_rounds_commit_what_upstream_would(
    models: Models, monkeypatch: pytest.MonkeyPatch, pin: tuple[float, str, str]
) -> None:
    from sglang.srt.speculative import spec_utils

    for name, value in zip(("LEN", "METHOD", "TOKEN_MODE"), pin, strict=True):
        monkeypatch.setattr(spec_utils, f"SIMULATE_ACC_{name}", value)
    expected: list[list[int]] = []
    committed: list[list[int]] = []
    with engine(models.target, whiflash=models.whiflash("random")) as e:
        pinned, commit = e.worker.stages.hooks[0], e.worker.stages.epilogue.commit
        over = pinned.verified

        def watched(rows: Any, block: Any) -> Any:
            state = torch.get_rng_state()
            for begin, end in pairwise(rows.indptr.tolist()):
                torch.set_rng_state(state)
                expected.append(
                    upstream(rows.input_ids[None, begin:end], rows.predictions[None, begin:end], pin)
                )
            torch.set_rng_state(state)
            return over(rows, block)

        def kept(*args: Any) -> Any:
            found = commit(*args)
            for tokens, length in zip(found.tokens.tolist(), found.accept_lens.tolist(), strict=True):
                committed.append(tokens[:length])
            return found

        monkeypatch.setattr(pinned, "verified", watched)
        monkeypatch.setattr(e.worker.stages.epilogue, "commit", kept)
        e.generate(PROMPTS, max_new_tokens=40)
        e.check_leaks()
    assert committed == expected
    assert len({len(tokens) for tokens in committed}) > (pin[0] > 1)


@pytest.mark.parametrize("real", [True, False])
def test_a_rejected_draft_ends_what_is_committed(real: bool) -> None:
    """One of two requests has a draft that there was no time to mask."""
    ids, indptr = torch.tensor([1, 2, NO_TOKEN, 4, 5, 6, 7]), torch.tensor([0, 4, 7], dtype=torch.int32)
    rows = SimpleNamespace(
        predictions=torch.full((7,), 9), input_ids=ids, indptr=indptr, _replace=SimpleNamespace
    )
    found = PinnedAcceptance(lambda: 4, real=real).verified(cast(Any, rows), cast(Any, None))
    starts, text = torch.zeros(2, dtype=torch.int64), torch.zeros(3, 9, dtype=torch.int64)
    stops = torch.full((3, 1), NO_TOKEN)
    committed = accept_and_commit(
        cast(Any, found.predictions),
        found.input_ids,
        indptr,
        starts,
        stride=4,
        request_slots=torch.tensor([1, 2]),
        stops=stops,
        text=text,
    )
    assert committed.accept_lens.tolist() == [2, 3]
    if real:
        assert committed.tokens.tolist() == [[2, 9, 0, 0], [6, 7, 9, 0]]
