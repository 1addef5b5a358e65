"""Penalties at every verified position equal those of decoding token by token."""

import pytest
import torch
from host_reads import HostReads, Launches
from hypothesis import given, settings
from hypothesis import strategies as st

from whiflash_sglang.engine.forward.penalties import PenalisedBatch, PenaltyRequest

VOCAB = 11

MOST_LAUNCHES = 50
"""For any number of penalised requests. A ratchet: lower it only."""


def by_hand(
    request: PenaltyRequest, start: int, tokens: list[int], row: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Additive and scaling penalties of one row, counted token by token."""
    additive, scaling = torch.zeros(VOCAB), torch.ones(VOCAB)
    generated = tokens[request.prompt : start + row + 1]
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
    """Members of a batch are any, and the host knows their lengths as bounds.

    Prompts have images, and behind a request's drafts is what another one left.
    """
    left = st.sampled_from([-2, -27, VOCAB, 1 << 40])
    table = torch.tensor([data.draw(st.lists(left, min_size=20, max_size=20)) for _ in range(4)])
    rows = data.draw(st.permutations(range(4)))
    requests, starts, widths = [], [], []
    for member in range(4):
        prompt = data.draw(st.integers(1, 5))
        starts.append(prompt + data.draw(st.integers(0, 6)))
        widths.append(data.draw(st.integers(1, 5)))
        for place in range(prompt, starts[-1] + widths[-1]):
            table[rows[member], place] = data.draw(st.integers(0, VOCAB - 1))
        if member and data.draw(st.booleans()):
            continue
        requests.append(
            PenaltyRequest(
                member,
                prompt,
                starts[-1] + data.draw(st.integers(0, 20)),
                data.draw(st.sampled_from([0.0, 0.5])),
                data.draw(st.sampled_from([0.0, -0.7])),
                data.draw(st.sampled_from([1.0, 1.3])),
                data.draw(st.integers(0, 8)),
                data.draw(st.sampled_from([(0, 3), (4,), ()])),
            )
        )
    places = [(member, row) for member, width in enumerate(widths) for row in range(width)]
    owner = torch.tensor([member for member, _ in places] + [-1])
    positions = torch.tensor([starts[member] + row for member, row in places] + [0])
    batch = PenalisedBatch(requests, torch.tensor(rows), torch.tensor(starts), table, max(widths), VOCAB)
    added, factors = batch.at(owner, positions)
    scaling = torch.ones_like(added) if factors is None else factors
    penalised = {request.member: request for request in requests}
    for i, (member, row) in enumerate(places):
        if member in penalised:
            own = table[rows[member]].tolist()
            additive, factor = by_hand(penalised[member], starts[member], own, row)
            assert torch.allclose(added[i], additive, atol=1e-5)
            assert torch.allclose(scaling[i], factor)
        else:
            assert not added[i].any()
            assert scaling[i].eq(1).all()


def one_request(
    minimum: int, width: int, *, frequency: float = 0.0, members: int = 1
) -> tuple[torch.Tensor, Launches]:
    """Penalties of so many equal members, and the launches for them."""
    requests = [
        PenaltyRequest(i, 2, 2, frequency, 0.0, 1.0 + frequency, minimum, (5,)) for i in range(members)
    ]
    rows, starts = torch.arange(members), torch.full((members,), 2)
    owner, offset = rows.repeat_interleave(width), torch.arange(width).repeat(members)
    table = torch.zeros((members, 16), dtype=torch.int64)
    with Launches() as launches, HostReads() as seen:
        added, _ = PenalisedBatch(requests, rows, starts, table, width, VOCAB).at(owner, offset + 2)
    assert not seen.reads
    assert not seen.pageable
    return added, launches


@pytest.mark.parametrize("minimum", [0, 1, 3, 9])
def test_min_new_tokens_forbids_stop_tokens_only_while_short(minimum: int) -> None:
    added, _ = one_request(minimum, 4)
    forbidden = [bool(torch.isinf(added[row, 5])) for row in range(4)]
    # Row i decides output token i + 2: the bonus token is the first.
    assert forbidden == [row + 1 < minimum for row in range(4)]


def test_many_requests_launch_what_one_does() -> None:
    """And for none of them does the host read the device, or send what is not pinned."""
    one, many = (one_request(3, 4, frequency=0.5, members=members)[1].count for members in (1, 30))
    print(f"{one} launches")
    assert 10 < one == many <= MOST_LAUNCHES
