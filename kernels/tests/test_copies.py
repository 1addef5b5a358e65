"""propose_copies against a loop over every place of a text."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import kernel_oracles as oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_backends import BACKENDS, DEVICE, INTERPRETING, examples, guarded_outputs, running
from whiflash_kernels import Drafts, propose_copies
from whiflash_kernels.cpu.copies import compiled_copies

BOUNDARIES = (1, 2, 3, 4, 6, 9, 14, 22)

pytestmark = pytest.mark.parametrize(
    "backend", BACKENDS if INTERPRETING or DEVICE.type == "cuda" else [*BACKENDS, "compiled"]
)


@cache
def compiled() -> Callable[..., Drafts]:
    try:
        return compiled_copies(Path(mkdtemp()) / "own")
    except OSError as error:
        pytest.skip(str(error))


def check(
    backend: str,
    texts: list[list[int]],
    *,
    sources: list[int] | None = None,
    limits: list[int] | None = None,
    width: int = 9,
    worth: float = 0.1,
    min_match: int = 1,
    drafts: int | None = None,
    context: int = 3000,
    right: float | None = None,
) -> None:
    """`sources`: where each last copy would go on. `drafts`: so many of each text's tokens are drafts. `right`: what
    all chances are; None: random ones.
    """
    generator = torch.Generator().manual_seed(len(texts))
    requests = len(texts)
    # Beyond a text: what others left, images among it.
    table = torch.randint(-4, 4, (requests + 1, context), generator=generator)
    slots = torch.randperm(requests + 1, generator=generator)[:requests]
    for slot, text in zip(slots.tolist(), texts, strict=True):
        table[slot, : len(text)] = torch.tensor(text, dtype=torch.int64)
    sources = sources or [0] * requests
    limits = limits or [width] * requests
    counts = [min(drafts or 0, max(len(text) - 1, 0)) for text in texts]
    back = torch.full((requests + 1,), -3)
    for slot, text, source in zip(slots.tolist(), texts, sources, strict=True):
        back[slot] = max(len(text) - source, 0) if source > 0 else 0
    chances = torch.rand(requests, len(BOUNDARIES), 4, generator=generator) * 0.5 + 0.5
    factors = torch.rand(requests, generator=generator) * 0.5 + 0.5
    alive = torch.rand(requests, 3, generator=generator) * 0.5 + 0.5
    if right is not None:
        chances.fill_(right)
        factors.fill_(1.0)
    left = [limit if drafts is None else limit * (count > 0) for limit, count in zip(limits, counts, strict=True)]
    on_device = [
        tensor.to(DEVICE)
        for tensor in (
            table,
            slots,
            torch.tensor([len(text) - 1 - count for text, count in zip(texts, counts, strict=True)]),
            back,
            torch.tensor([limit + count for limit, count in zip(limits, counts, strict=True)]),
            factors,
            chances,
            torch.tensor(BOUNDARIES, dtype=torch.int32),
        )
    ]
    behind = None if drafts is None else (torch.tensor(counts, dtype=torch.int64).to(DEVICE), alive.to(DEVICE))
    expected_back = back.clone()  # on a CPU the op writes to `back` itself
    options = {"width": width, "worth": worth, "min_match": min_match}
    propose = compiled() if backend == "compiled" else propose_copies
    with running("torch" if backend == "compiled" else backend), guarded_outputs():
        copies = propose(*on_device, **options, behind=behind)
    for b, text in enumerate(texts):
        before = 1.0 if drafts is None else alive[b, max(counts[b] - 1, 0)].item()
        judged = (before, factors[b].item(), chances[b].tolist(), BOUNDARIES)
        tokens, lives, agreements, place, length = oracles.propose_copy(
            text, sources[b], left[b], *judged, width, worth, min_match, drafts is None
        )
        found = copies.counts[b].item()
        assert copies.tokens[b].tolist() == tokens + [0] * (width - found)
        assert copies.alive[b].tolist() == pytest.approx(lives + [0.0] * (width - found), abs=1e-5)
        assert copies.agreements[b].tolist() == agreements + [0] * (width - found)
        assert copies.matched[b].item() == length
        if drafts is None and length:
            expected_back[slots[b]] = len(text) - place
    assert on_device[3].tolist() == expected_back.tolist()


NOISE = list(range(100, 1200))
OFTEN = [token for i in range(200) for token in (1, 2, 10 + i % 7)]
TEXTS: dict[str, tuple[list[list[int]], dict[str, Any]]] = {
    "repeats": ([[5, 6, 7, 8, 9, 5, 6, 7], [1, 2, 3], [4], [], [3] * 40, [1, 2] * 30], {}),
    "places disagree": ([[1, 2, 9, 1, 2, 9, 8, 1, 2, 7, 1, 2], [8, 1, 2, 5, 3, 1, 2, 6, 8, 1, 2]], {}),
    "more places than are kept": ([[*OFTEN, 1, 2], [*OFTEN, 1], [*OFTEN * 4, 1, 2]], {}),
    "a copy goes on where it was": ([[1, 2, 3, 4, 9, *[1, 2, 8] * 10, 1, 2]] * 4, {"sources": [2, 5, 0, 10_000]}),
    "the only place is where a copy goes on": ([[5, 6, 7, 8, 9, 5, 6, 7]], {"sources": [3]}),
    "a chance that equals its price": ([[5, 6, 7, 8, 9, 5, 6, 7]], {"worth": 0.25, "right": 0.5}),
    "no chance is certain": ([[5, 6, 7, 8, 9, 5, 6, 7]], {"right": 1.0}),
    "the last copy is remembered where nothing matches": ([[5, 6, 7, 8, 9]], {"sources": [3]}),
    # The longest match is the second newest of four, with one in each of the tiles before.
    "places of three tiles": (
        [[1, 2, 30, *NOISE, 1, 2, 31, *NOISE, 9, 1, 2, 32, 8, 1, 2, 33, *NOISE[:10], 9, 1, 2]],
        {},
    ),
    "two tokens match behind many places where one does": ([[1, 2, 7, *[3, 2] * 600, 5, 1, 2]], {}),
    **{
        f"matches of {shortest}": ([[1, 5, 2, 1], [3, 1, 5, 2, 3, 1], [4, 3, 1, 5, 4, 3, 1]], {"min_match": shortest})
        for shortest in (1, 2, 3, 40)
    },
    "no requests": ([], {}),
}


@pytest.mark.parametrize("case", TEXTS)
def test_texts(backend: str, case: str) -> None:
    texts, options = TEXTS[case]
    check(backend, texts, **options)


@pytest.mark.parametrize("length", [1023, 1024, 1025, 1026, 2500])
def test_far_back(backend: str, length: int) -> None:
    """The only place is in another tile than the text's end, or across the border of two."""
    noise = list(range(10, 10 + length))
    check(backend, [[1, 2, 3, *noise, 1, 2], [3, 1, *noise, 3], [*noise[:5], *noise]])


@pytest.mark.parametrize("drafts", [None, 0, 1, 3])
def test_limits_and_worth(backend: str, drafts: int | None) -> None:
    text = [5, 6, 7, 8, 9, 5, 6, 7]
    for worth in (0.0, 0.3, 0.9, 1.1):
        check(backend, [text] * 3, limits=[0, 1, 4], worth=worth, drafts=drafts)


@settings(max_examples=examples(40), deadline=None)
@given(
    texts=st.lists(st.lists(st.sampled_from([-7, 0, 1, 2, 3]), max_size=60), min_size=1, max_size=3),
    source=st.integers(-2, 61),
    width=st.integers(1, 12),
    drafts=st.none() | st.integers(0, 3),
)
def test_any_text(backend: str, texts: list[list[int]], source: int, width: int, drafts: int | None) -> None:
    check(backend, texts, sources=[source] * len(texts), width=width, drafts=drafts)


def test_rejects_what_does_not_fit(backend: str) -> None:
    with pytest.raises(ValueError, match="width must be"):
        check(backend, [[1, 2, 1]], width=0)
