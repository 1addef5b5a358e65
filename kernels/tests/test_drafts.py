"""cut_drafts, lay_drafts and choose_drafts against loops. Chances are multiples of 1/8: their sums are exact."""

import kernel_oracles as oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_backends import BACKENDS, DEVICE, examples, guarded_outputs, running
from whiflash_kernels import Drafted, Laid, choose_drafts, cut_drafts, join_drafts, lay_drafts

SLOTS, CONTEXT = 12, 40

Draft = tuple[int, float]


def integers(values: object, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, device=DEVICE)


def floats(values: object) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32, device=DEVICE)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=examples(60), deadline=None)
@given(
    data=st.data(),
    members=st.integers(0, 5),
    width=st.integers(1, 9),
    worth=st.sampled_from([0.0, 0.125, 0.5, 1.0, 2.0]),
)
def test_any_cut(backend: str, data: st.DataObject, members: int, width: int, worth: float) -> None:
    edges = [0.1, 0.4, 0.5, 0.97]
    calibration = data.draw(st.lists(st.sampled_from([0.25, 0.5, 1.0]), min_size=6, max_size=6))
    sure = st.lists(st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.96, 1.0]), min_size=width, max_size=width)
    confidences = [data.draw(sure) for _ in range(members)]
    limits = [data.draw(st.integers(0, width)) for _ in range(members)]
    dtype = data.draw(st.sampled_from([torch.int32, torch.int64]))
    strided = torch.empty(members, 2 * width + 1, device=DEVICE)[:, 1::2].copy_(
        floats(confidences).view(members, width)
    )
    with running(backend), guarded_outputs():
        counts, alive = cut_drafts(
            strided, floats(calibration), floats(edges), integers(limits, dtype), worth=worth
        )
    # As float32 sees the edges: 0.1 is not below itself.
    found = [
        oracles.cut(own, calibration, edges, limit, worth)
        for own, limit in zip(confidences, limits, strict=True)
    ]
    assert counts.tolist() == [kept for kept, _ in found]
    assert alive.tolist() == [lives for _, lives in found]
    assert (counts.dtype, alive.dtype) == (torch.int64, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_cut_of_a_part_of_wider_rows(backend: str) -> None:
    wide = floats([[9.0, 0.9, 0.2, 0.9, 9.0], [9.0, 0.2, 0.9, 0.9, 9.0]])
    with running(backend), guarded_outputs():
        counts, alive = cut_drafts(
            wide[:, 1:4], floats([0.25, 1.0]), floats([0.5]), integers([3, 3]), worth=0.5
        )
    assert counts.tolist() == [1, 1]
    assert alive.tolist() == [[1.0, 0.25, 0.25], [0.25, 0.25, 0.25]]


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=examples(60), deadline=None)
@given(data=st.data(), size=st.integers(1, 7), width=st.integers(1, 6), columns=st.integers(0, 6))
def test_any_laying(backend: str, data: st.DataObject, size: int, width: int, columns: int) -> None:
    order = data.draw(st.permutations(range(size)))
    bounds = sorted(data.draw(st.lists(st.integers(0, size), max_size=3)))
    members = [list(order[a:b]) for a, b in zip([0, *bounds[:-1]], bounds, strict=False) if a < b]
    slots = list(range(SLOTS - size, SLOTS))
    starts = [data.draw(st.integers(0, CONTEXT - 8)) for _ in range(size)]
    tokens, counts = torch.zeros(size, width), [0] * size
    alive, sure = torch.ones(size, width), torch.zeros(size, columns)
    text = torch.full((SLOTS, CONTEXT), -5, dtype=torch.int64, device=DEVICE)
    written, parts = text.clone(), []
    for part, own in enumerate(members):
        drafts = data.draw(st.integers(1, 6))
        judged, told = data.draw(st.booleans()), data.draw(st.booleans())
        values = torch.arange(len(own) * drafts).view(len(own), drafts) + 100 * part
        parts.append(
            Drafted(
                integers(own),
                values.to(DEVICE),
                integers([min(drafts, width, b) for b in range(len(own))]),
                (values / 1000).to(DEVICE) if judged else None,
                (values / 500).to(DEVICE) if told else None,
            )
        )
        kept = min(drafts, width)
        for m, b in enumerate(own):
            tokens[b, :kept], counts[b] = values[m, :kept].float(), min(drafts, width, m)
            if judged:
                alive[b, :kept] = values[m, :kept] / 1000
            if told:
                sure[b, : min(drafts, columns)] = values[m, :columns] / 500
            place = slice(starts[b] + 1, starts[b] + 1 + width)
            written[slots[b], place] = tokens[b].long().to(DEVICE)
    keeps = data.draw(st.booleans())
    with running(backend), guarded_outputs():
        laid = lay_drafts(
            parts,
            integers(slots),
            integers(starts),
            width=width,
            confidences=columns,
            vocabulary=1000,
            text=text if keeps else None,
        )
    assert laid.counts.tolist() == counts
    drafted = torch.arange(width) < torch.tensor(counts)[:, None]  # the rest may be anything
    assert torch.equal(laid.tokens.cpu()[drafted], tokens.long()[drafted])
    assert torch.equal(laid.alive.cpu()[drafted], alive[drafted])
    assert torch.equal(laid.confidences.cpu(), sure)
    assert torch.equal(text, written if keeps else torch.full_like(text, -5))


@st.composite
def drafts(draw: st.DrawFn, most: int, tokens: int) -> list[Draft]:
    """Tokens with chances that never rise."""
    chances = draw(st.lists(st.sampled_from([0.125, 0.25, 0.5, 0.75, 1.0]), max_size=most))
    return [(tokens + i, chance) for i, chance in enumerate(sorted(chances, reverse=True))]


def padded(rows: list[list[Draft]], width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, counts and chances; what lies past the counts is nonsense that must not be read."""
    tokens = [[token for token, _ in own] + [-7] * (width - len(own)) for own in rows]
    chances = [[chance for _, chance in own] + [9.0] * (width - len(own)) for own in rows]
    size = len(rows)
    return (
        integers(tokens).view(size, width),
        integers([len(own) for own in rows]),
        floats(chances).view(size, width),
    )


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=examples(60), deadline=None)
@given(data=st.data(), size=st.integers(0, 6), width=st.integers(1, 7))
def test_any_choice(backend: str, data: st.DataObject, size: int, width: int) -> None:
    has_behind, has_late = data.draw(st.booleans()), data.draw(st.booleans())
    worth, room = data.draw(st.sampled_from([0.0, 0.125])), data.draw(st.none() | st.integers(0, 20))
    extra, late_width = data.draw(st.integers(1, 7)), data.draw(st.integers(1, 9))
    requests = []
    for b in range(size):
        laid = data.draw(drafts(width, 100 * b))
        least = laid[-1][1] if laid else 1.0
        most = min(extra, width - len(laid)) if has_behind and laid else 0
        behind = [(token, min(chance, least)) for token, chance in data.draw(drafts(most, 100 * b + 20))]
        late = data.draw(drafts(min(width, late_width), 100 * b + 40)) if has_late else []
        must_beat = data.draw(st.sampled_from([0.0, 0.5, 1.0, float("inf")]))
        requests.append((laid, behind, late, must_beat))
    own, more, late = (padded([r[i] for r in requests], w) for i, w in enumerate((width, extra, late_width)))
    none = integers([0] * size)
    slots = list(range(SLOTS, SLOTS - size, -1))
    starts = [3 + b for b in range(size)]
    text = torch.full((SLOTS + 1, CONTEXT), -5, dtype=torch.int64, device=DEVICE)
    with running(backend), guarded_outputs():
        chosen = choose_drafts(
            Laid(*own, own[2], none),
            integers(slots),
            integers(starts),
            text,
            behind=Drafted(none, *more, None) if has_behind else None,
            late=Drafted(none, *late, None) if has_late else None,
            must_beat=floats([r[3] for r in requests]) if has_late else None,
            worth=worth,
            room=room,
        )
    expected, taken, kept, wanted = oracles.choose(requests, worth, room)
    assert chosen.widths.tolist() == [len(own) + 1 for own in expected]
    assert chosen.late.tolist() == taken
    assert chosen.own.tolist() == kept
    assert chosen.wanted.tolist() == wanted
    assert [t.dtype for t in chosen] == [torch.int64] + [torch.int32] * 4
    for b, drafted in enumerate(expected):
        tokens = [token for token, _ in drafted]
        assert chosen.tokens[b, : len(tokens)].tolist() == tokens
        assert text[slots[b], starts[b] + 1 : starts[b] + 1 + width].tolist() == chosen.tokens[b].tolist()
        text[slots[b], starts[b] + 1 : starts[b] + 1 + width] = -5
    assert bool((text == -5).all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_many_requests_compete(backend: str) -> None:
    """More chances than are compared at a time; of equals the earlier depth, then the earlier request."""
    generator = torch.Generator().manual_seed(0)
    chances = (torch.randint(1, 9, (70, 7), generator=generator) / 8).cumprod(1)
    counts = torch.randint(0, 8, (70,), generator=generator)
    requests = [
        ([(0, chance) for chance in row[:count]], [], [], 0.0)
        for row, count in zip(chances.tolist(), counts.tolist(), strict=True)
    ]
    laid = Laid(
        torch.zeros_like(chances, dtype=torch.int64).to(DEVICE),
        counts.to(DEVICE),
        chances.to(DEVICE),
        chances.to(DEVICE),
        counts.to(DEVICE),
    )
    text = torch.zeros(70, 16, dtype=torch.int64, device=DEVICE)
    at = torch.arange(70, device=DEVICE)
    for room in (0, 1, 69, 100, 489, 490):
        with running(backend), guarded_outputs():
            widths = choose_drafts(laid, at, at * 0, text, room=room).widths
        expected, *_ = oracles.choose(requests, 0.0, room)
        assert widths.tolist() == [len(own) + 1 for own in expected]


@pytest.mark.parametrize("backend", BACKENDS)
def test_drafts_without_a_chance_are_verified_where_there_is_room(backend: str) -> None:
    chances, none = floats([[0.5, 0.0], [0.25, 0.0]]), integers([0, 0])
    laid = Laid(integers([[1, 2], [3, 4]]), integers([2, 1]), chances, chances, none)
    text = torch.zeros(2, 9, dtype=torch.int64, device=DEVICE)
    with running(backend), guarded_outputs():
        chosen = choose_drafts(laid, integers([0, 1]), none, text, room=3)
    assert chosen.widths.tolist() == [3, 2]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_late_copy_must_beat_the_arm_when_its_rows_are_paid(backend: str) -> None:
    """Of 3/8 an eighth is its row's; what is left equals what it must beat."""
    none = integers([0, 0])
    laid = Laid(integers([[1], [2]]), integers([1, 1]), floats([[0.5]] * 2), floats([[0.5]] * 2), none)
    late = Drafted(none, integers([[3], [4]]), integers([1, 1]), floats([[0.375], [0.5]]), None)
    text = torch.zeros(2, 9, dtype=torch.int64, device=DEVICE)
    with running(backend), guarded_outputs():
        chosen = choose_drafts(
            laid, integers([0, 1]), none, text, late=late, must_beat=floats([0.25, 0.25]), worth=0.125
        )
    assert chosen.late.tolist() == [0, 1]
    assert chosen.tokens.tolist() == [[1], [4]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_goes_behind_in_turns(backend: str) -> None:
    """Behind all drafts, or the first of them; then own drafts are fewer than were laid."""
    laid = Laid(
        integers([[1, 2, 9, 9], [3, 4, 9, 9]]),
        integers([2, 2]),
        floats([[0.5] * 4] * 2),
        floats([[], []]),
        integers([0, 0]),
    )
    more = Drafted(
        integers([0, 1]), integers([[5, -7], [6, 7]]), integers([1, 2]), floats([[0.25, 9.0]] * 2), None
    )
    text, at = torch.full((2, 9), -5, dtype=torch.int64, device=DEVICE), integers([1, 0])
    with running(backend):
        joined = join_drafts(laid, more, at, integers([2, 3]), after=integers([2, 1]), text=text)
        chosen = choose_drafts(joined, at, integers([2, 3]), text, own=integers([2, 1]))
    assert joined.counts.tolist() == [3, 3]
    assert [row[:3] for row in joined.tokens.tolist()] == [[1, 2, 5], [3, 6, 7]]
    assert joined.alive[0, :3].tolist() == [0.5, 0.5, 0.25]
    assert text[1, 3:6].tolist() == [1, 2, 5]
    assert text[0, 4:7].tolist() == [3, 6, 7]
    assert (chosen.own.tolist(), chosen.widths.tolist()) == ([2, 1], [4, 4])


WRONG = st.sampled_from(["id below", "id above", "chance", "confidence"])


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=examples(60), deadline=None)
@given(data=st.data(), size=st.integers(1, 4), width=st.integers(1, 7))
def test_what_is_no_draft_is_left_out(backend: str, data: st.DataObject, size: int, width: int) -> None:
    """From the first wrong id, chance or confidence on; of what lies past the counts nobody is accused."""
    vocabulary, most = 50, data.draw(st.integers(1, 7))
    tokens = torch.arange(size * most).view(size, most) % vocabulary
    alive, sure = torch.full((size, most), 0.5), torch.full((size, most), 0.25)
    said = [data.draw(st.integers(-1, most + 1)) for _ in range(size)]
    expected = []
    for row, count in enumerate(said):
        wrong = data.draw(st.dictionaries(st.integers(0, most - 1), WRONG, max_size=2))
        for column, what in wrong.items():
            if what.startswith("id"):
                tokens[row, column] = data.draw(
                    st.integers(-(2**40), -1) if what == "id below" else st.integers(vocabulary, 2**40)
                )
            else:
                (alive if what == "chance" else sure)[row, column] = torch.nan
        seen = [column for column in wrong if column < width]
        expected.append(max(min([count, width, *seen]), 0))
    drafted = Drafted(
        integers(list(range(size))), tokens.to(DEVICE), integers(said), alive.to(DEVICE), sure.to(DEVICE)
    )
    with running(backend), guarded_outputs():
        laid = lay_drafts(
            [drafted],
            integers(list(range(size))),
            integers([0] * size),
            width=width,
            confidences=width,
            vocabulary=vocabulary,
        )
    assert laid.counts.tolist() == expected
    assert laid.faults.tolist() == [int(kept != count) for kept, count in zip(expected, said, strict=True)]
    assert 0 <= int(laid.tokens.min()) <= int(laid.tokens.max()) < vocabulary
    assert laid.faults.dtype == torch.int32


def test_rejects_what_does_not_fit_the_drafts() -> None:
    one, sure = integers([1]), floats([[0.5]])
    with pytest.raises(ValueError, match=r"must be \[M, W\]"):
        cut_drafts(sure, floats([1.0]), floats([]), integers([1, 2]), worth=0.0)
    with pytest.raises(ValueError, match="part more bins"):
        cut_drafts(sure, floats([1.0]), floats([0.5]), one, worth=0.0)
    laid = Laid(integers([[1]]), one, sure, sure, one)
    text = torch.zeros(2, 9, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match="need chances and must_beat"):
        choose_drafts(laid, one, one, text, late=Drafted(one, integers([[1]]), one, sure, None))
