"""Drafters borrow the target's embedding and head as the target reads them: quantised or tied, on one rank or two."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from matrix import sampled
from ranks_at_work import on_ranks
from reference import Comparison, ReferenceTarget
from tensor_parallel import Checkpoints
from traffic import mixed
from vocabularies import TOKENS, find, states, stepped, tied, without_head

from whiflash_sglang.formats.choice import choose

ARRIVALS = mixed(seed=4, count=8, tokens=14)


def greedy(reference: ReferenceTarget, prompt: tuple[int, ...], count: int) -> list[int]:
    text = list(prompt)
    for _ in range(count):
        text.append(int(reference.next_logits(text).argmax()))
    return text[len(prompt) :]


@pytest.mark.parametrize(("made", "size"), sampled([(stepped, 1), (stepped, 2), (tied, 2)], (stepped, 2)))
def test_the_targets_own_embedding_and_head(
    checkpoints: Checkpoints, tmp_path: Path, made: Callable[[Path, Path], Path], size: int
) -> None:
    target = made(checkpoints.target, tmp_path / "target")
    eagle3 = without_head(checkpoints.eagle3, tmp_path / "eagle3")
    borrowing = Checkpoints(target, eagle3, checkpoints.dflash)
    first, *others = on_ranks(size, partial(find, borrowing, ARRIVALS, size))

    reference = ReferenceTarget(target.with_suffix(".plain") if made is stepped else target)
    expected = {a.rid: greedy(reference, a.prompt, a.params["max_new_tokens"]) for a in ARRIVALS}
    Comparison(reference).check_all(ARRIVALS, expected, first.outputs)
    assert first.accepted
    torch.testing.assert_close(first.embedded, reference.model.embedding[TOKENS])
    expected_choice = choose(states() @ reference.model.head.T)
    for choice in first.choices.values():
        assert choice.token.tolist() == expected_choice.token.tolist()
        torch.testing.assert_close(choice.confidence, expected_choice.confidence)
    assert all(other.outputs == first.outputs for other in others)
