"""Penalties at every verified position equal those of decoding token by token."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from whiflash_sglang.compat.forward.penalties import PenaltyRequest, penalties_at

VOCAB = 11


def by_hand(request: PenaltyRequest, tokens: list[int], row: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Additive and scaling penalties of one row, counted token by token."""
    additive, scaling = torch.zeros(VOCAB), torch.ones(VOCAB)
    generated = tokens[request.prompt : request.length + row + 1]
    for token in generated:
        additive[token] -= request.frequency
        scaling[token] = request.repetition
    for token in set(generated):
        additive[token] -= request.presence
    if len(generated) < request.min_new_tokens:
        additive[list(request.stop_ids)] = float("-inf")
    return additive, scaling


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_every_row_counts_its_own_drafts(data: st.DataObject) -> None:
    requests, table, first = [], torch.zeros((4, 40), dtype=torch.int64), 0
    for row in data.draw(st.lists(st.integers(0, 3), unique=True, min_size=1, max_size=3)):
        prompt = data.draw(st.integers(1, 5))
        length = prompt + data.draw(st.integers(0, 6))
        width = data.draw(st.integers(1, 5))
        table[row] = torch.tensor(data.draw(st.lists(st.integers(0, VOCAB - 1), min_size=40, max_size=40)))
        requests.append(
            PenaltyRequest(
                row,
                first,
                width,
                prompt,
                length,
                data.draw(st.sampled_from([0.0, 0.5])),
                data.draw(st.sampled_from([0.0, -0.7])),
                data.draw(st.sampled_from([1.0, 1.3])),
                data.draw(st.integers(0, 8)),
                (0, 3),
            )
        )
        first += width + 1  # a row of another request between them
    found = penalties_at(requests, table, first, VOCAB)
    assert found is not None
    scaling = torch.ones_like(found.additive) if found.scaling is None else found.scaling
    for request in requests:
        for row in range(request.width):
            additive, factor = by_hand(request, table[request.table_row].tolist(), row)
            assert torch.allclose(found.additive[request.first_row + row], additive, atol=1e-5)
            assert torch.allclose(scaling[request.first_row + row], factor)
        assert not found.additive[request.first_row + request.width].any()


def test_nothing_penalised() -> None:
    assert penalties_at([], torch.zeros((1, 4), dtype=torch.int64), 3, VOCAB) is None


@pytest.mark.parametrize("minimum", [0, 1, 3, 9])
def test_min_new_tokens_forbids_stop_tokens_only_while_short(minimum: int) -> None:
    request = PenaltyRequest(0, 0, 4, 2, 2, 0.0, 0.0, 1.0, minimum, (5,))
    found = penalties_at([request], torch.zeros((1, 16), dtype=torch.int64), 4, VOCAB)
    assert found is not None
    forbidden = [bool(torch.isinf(found.additive[row, 5])) for row in range(4)]
    # Row i decides output token i + 2: the bonus token is the first.
    assert forbidden == [row + 1 < minimum for row in range(4)]
