"""penalise_rows against penalties that are counted token by token."""

import math
import random
from itertools import accumulate

import pytest
import torch
from kernel_backends import DEVICE, examples, integers, running
from whiflash_kernels import PenaltyTable, penalise_rows

SLOTS, CONTEXT, PLACES = 7, 40, 8


def by_hand(x: torch.Tensor, factors: list[float], generated: list[int], bias: torch.Tensor) -> torch.Tensor:
    """Logits [V] behind the tokens that were generated."""
    frequency, presence, repetition = factors
    x = x.double().clone()
    for token in generated:
        x[token] -= frequency
    for token in set(generated):
        x[token] -= presence
        x[token] = x[token] * repetition if x[token] < 0 else x[token] / repetition
    return x + bias


def check(backend: str, seed: int, vocab: int, dtype: torch.dtype = torch.float32) -> None:
    """A batch of random widths, a slot of nobody and padded rows; prompts have images, too, whose ids are no tokens,
    and behind a request's text is what another one left.
    """
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    count = rng.randint(0, SLOTS - 1)
    slots, widths = rng.sample(range(1, SLOTS), count), [rng.randint(0, 6) for _ in range(count)]
    slots = [0 if rng.random() < 0.1 else slot for slot in slots]
    bounds, padding = [0, *accumulate(widths)], rng.randint(0, 3)
    logits = torch.randn((bounds[-1] + padding, vocab), generator=generator).to(dtype)
    ids = torch.randint(vocab, (len(logits),), generator=generator)
    text = torch.tensor([rng.choices([-2, -27, vocab, 1 << 40, 0, vocab - 1], k=CONTEXT) for _ in range(SLOTS)])
    bias = torch.randn((PLACES, vocab), generator=generator)
    bias[-1, rng.randrange(vocab)] = -math.inf
    places, factors, lengths = torch.full((SLOTS, 4), -1), torch.full((SLOTS, 3), math.nan), []
    for slot in slots:
        answer = rng.randint(1, 9)
        lengths.append(rng.randint(answer - 1, 25))
        if slot:
            for place in range(answer, lengths[-1] + 1):
                text[slot, place] = rng.randrange(vocab)
            places[slot] = torch.tensor(
                [rng.choice([-1, slot - 1, slot - 1]), PLACES - 1, answer, answer + rng.randint(0, 30)]
            )
            factors[slot] = torch.tensor([rng.choice([0, 0.5, -0.3]), rng.choice([0, 0.7]), rng.choice([1, 1.3])])
    expected = logits.double()
    for request, slot in enumerate(slots):
        place, early, answer, enough = places[slot].tolist()
        for row in range(bounds[request], bounds[request + 1]) if place >= 0 else ():
            generated = text[slot, answer : lengths[request] + 1].tolist()
            generated += ids[bounds[request] + 1 : row + 1].tolist()
            of_row = bias[early if answer + len(generated) < enough else place]
            expected[row] = by_hand(logits[row], factors[slot].tolist(), generated, of_row)
    table = PenaltyTable(factors, places, bias, torch.full((PLACES, vocab), 99, dtype=torch.int32))
    table = PenaltyTable(*(part.to(DEVICE) for part in table))
    batch = ids.to(DEVICE), integers(bounds, torch.int32), integers(lengths), integers(slots), text.to(DEVICE)
    changed = logits.to(DEVICE, copy=True)
    with running(backend):
        penalise_rows(changed, *batch, table)
    rtol = 1e-5 if dtype.itemsize > 2 else 1e-2
    torch.testing.assert_close(changed.cpu(), expected.to(dtype), atol=2e-6, rtol=rtol)
    others = sorted({*range(PLACES)} - {int(places[slot, 0]) for slot in slots})
    assert bool((table.counts[others] == 99).all()), "counts of others were cleared"


def test_every_row_counts_its_own_drafts(backend: str) -> None:
    for seed in range(examples(60)):
        check(backend, seed, vocab=11)


@pytest.mark.parametrize(("vocab", "dtype"), [(1, torch.float32), (4097, torch.float32), (300, torch.bfloat16)])
def test_vocabularies_and_types(backend: str, vocab: int, dtype: torch.dtype) -> None:
    for seed in range(3):
        check(backend, seed, vocab, dtype)


def test_misuse_is_refused() -> None:
    ids = torch.zeros(1, dtype=torch.int64)
    table = PenaltyTable(torch.ones(1, 3), ids.new_full((1, 4), -1), torch.zeros(1, 9), torch.zeros(1, 9))
    with pytest.raises(ValueError, match="is not for 8"):
        penalise_rows(torch.zeros(1, 8), ids, ids, ids, ids, ids[None], table)
