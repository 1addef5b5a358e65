"""cut_drafts, lay_drafts and choose_drafts against loops. Chances are multiples of 1/8: their sums are exact."""

import kernel_oracles as oracles
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kernel_backends import DEVICE, examples, guarded_outputs, integers, running
from whiflash_kernels import Drafts, choose_drafts, cut_drafts, lay_drafts

SLOTS, CONTEXT = 12, 40

Draft = tuple[int, float]


def floats(values: object) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32, device=DEVICE)


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
        counts, alive = cut_drafts(strided, floats([*calibration, worth]), floats(edges), integers(limits, dtype))
    # As float32 sees the edges: 0.1 is not below itself.
    found = [oracles.cut(own, calibration, edges, limit, worth) for own, limit in zip(confidences, limits, strict=True)]
    assert counts.tolist() == [kept for kept, _ in found]
    assert alive.tolist() == [lives for _, lives in found]
    assert (counts.dtype, alive.dtype) == (torch.int64, torch.float32)


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
            (
                integers(own),
                Drafts(
                    values.to(DEVICE),
                    integers([min(drafts, width, b) for b in range(len(own))]),
                    (values / 1000).to(DEVICE) if judged else None,
                    (values / 500).to(DEVICE) if told else None,
                ),
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
    size = draw(st.sampled_from([most, min(most, 1), 0]))
    chances = draw(st.lists(st.sampled_from([0.5, 0.0, 0.125, 0.25, 0.75, 1.0]), min_size=size, max_size=size))
    return [(tokens + i, chance) for i, chance in enumerate(sorted(chances, reverse=True))]


def padded(rows: list[list[Draft]], width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, counts and chances; values past the counts are nonsense that must not be read."""
    tokens = [[token for token, _ in own] + [-7] * (width - len(own)) for own in rows]
    chances = [[chance for _, chance in own] + [9.0] * (width - len(own)) for own in rows]
    size = len(rows)
    return (integers(tokens).view(size, width), integers([len(own) for own in rows]), floats(chances).view(size, width))


@st.composite
def host_candidates(draw: st.DrawFn, most: int, tokens: int) -> tuple[list[Draft], int, bool, int]:
    """Drafts, how many of them were committed since or would have to be forgotten, whether they are the text's, and how
    many are verified at most. Chances are powers of two: their quotients are exact.
    """
    size = draw(st.sampled_from([most, most, min(most, 2), 0]))
    some = draw(st.sampled_from([[0.125, 0.0], [1.0, 0.5, 0.25, 0.125, 0.0]]))
    chances = draw(st.lists(st.sampled_from(some), min_size=size, max_size=size))
    proposed = [(tokens + i, chance) for i, chance in enumerate(sorted(chances, reverse=True))]
    passed, agrees = draw(st.sampled_from([1, 2, 0, 3, -1])), draw(st.sampled_from([True, True, False]))
    return proposed, passed, agrees, draw(st.sampled_from([8, 2, 1, 0]))


@settings(max_examples=examples(100), deadline=None)
@given(data=st.data(), size=st.sampled_from([5, 2, 0]), width=st.sampled_from([7, 4, 1]), count=st.integers(0, 2))
def test_any_choice(backend: str, data: st.DataObject, size: int, width: int, count: int) -> None:
    has_behind, has_copies = data.draw(st.booleans()), data.draw(st.booleans())
    worth, room = data.draw(st.sampled_from([0.0, 0.125])), data.draw(st.none() | st.integers(0, 20))
    least = data.draw(st.sampled_from([0.0, 0.25]))
    extra, columns, longest = (data.draw(st.integers(1, most)) for most in (7, 9, 9))
    fills, spare = data.draw(st.booleans()), list[list[Draft]]()
    requests = []
    for b in range(size):
        laid = data.draw(drafts(data.draw(st.sampled_from([1, 0, width])), 100 * b))
        last = laid[-1][1] if laid else 1.0
        left = data.draw(drafts(width - len(laid), 100 * b + 10)) if fills else []
        spare.append([(token, min(chance, last)) for token, chance in left])
        most = min(extra, width - len(laid)) if has_behind and laid else 0
        behind = [(token, min(chance, last)) for token, chance in data.draw(drafts(most, 100 * b + 20))]
        proposed = [data.draw(host_candidates(longest, 100 * b + 60 + 10 * k)) for k in range(count)]
        copies = data.draw(drafts(min(width, columns), 100 * b + 40)) if has_copies else []
        limit = min([candidate[3] for candidate in proposed], default=0)
        requests.append((laid, behind, [(*candidate[:3], min(limit, width)) for candidate in proposed], copies))
    own, more, copied = (padded([r[i] for r in requests], w) for i, w in ((0, width), (1, extra), (3, columns)))
    drawn, faults = [len(r[0]) + len(left) for r, left in zip(requests, spare, strict=True)], [0, 0, 1, 0, 0]
    drafted, _, chances = padded([r[0] + left for r, left in zip(requests, spare, strict=True)], width)
    laid_drafts = Drafts(drafted, own[1], chances, faults=integers(faults[:size]))
    slots = list(range(SLOTS, SLOTS - size, -1))
    starts = [6 + b for b in range(size)]
    text = torch.full((SLOTS + 1, CONTEXT), -5, dtype=torch.int64, device=DEVICE)
    ending = st.lists(st.sampled_from([0, 1, 3, 20, 22, 40, 43, 61, 64, 71, 72]), max_size=3)
    stops = [[100 * b + token for token in data.draw(ending)] for b in range(size)]
    stopping = torch.full((SLOTS + 1, 3), -1)
    for slot, ids in zip(slots, stops, strict=True):
        stopping[slot, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
    lines, at = [], []
    for start, (_, _, proposed, _) in zip(starts, requests, strict=True):
        for tokens, passed, agrees, _ in proposed:
            line = [(-5, chance) for _, chance in tokens[: max(passed, 0)]] + tokens[max(passed, 0) :]
            if not agrees and passed > 0 and tokens:
                line[min(passed, len(tokens)) - 1] = (-6, 1.0)
            lines.append(line)
            at.append(start + 1 - passed)
    # Nothing can disagree with a candidate nothing of which was committed since.
    requests = [
        (
            laid,
            behind,
            [(proposed, passed, agrees or passed <= 0, most) for proposed, passed, agrees, most in own_candidates],
            copies,
        )
        for laid, behind, own_candidates, copies in requests
    ]
    proposed, counts, chances = padded(lines, longest)
    from_host = Drafts(
        proposed.view(size, count, longest), counts.view(size, count), chances.view(size, count, longest)
    )
    with running(backend), guarded_outputs():
        chosen = choose_drafts(
            laid_drafts,
            integers(slots),
            integers(starts),
            text,
            appended=Drafts(*more) if has_behind else None,
            from_host=from_host if count else None,
            at=integers(at).view(size, count),
            copies=Drafts(*copied) if has_copies else None,
            limits=integers([min([candidate[3] for candidate in r[2]], default=0) for r in requests]),
            worth=worth,
            least=least,
            most_drafts=room,
            stops=stopping.to(DEVICE),
            drawn=integers(drawn) if fills else None,
        )
    spare = [left if not fault else [] for left, fault in zip(spare, faults, strict=False)]
    expected, sources, kept, wanted = oracles.choose(requests, worth, room, least, stops, spare)
    assert chosen.widths.tolist() == [len(own) + 1 for own in expected]
    assert chosen.source.tolist() == sources
    assert chosen.first_drafts.tolist() == kept
    assert chosen.wanted.tolist() == wanted
    assert [t.dtype for t in chosen] == [torch.int64] + [torch.int32] * 4
    for b, drafted in enumerate(expected):
        tokens = [token for token, _ in drafted]
        assert chosen.tokens[b, : len(tokens)].tolist() == tokens
        assert text[slots[b], starts[b] + 1 : starts[b] + 1 + width].tolist() == chosen.tokens[b].tolist()
        text[slots[b], starts[b] + 1 : starts[b] + 1 + width] = -5
    assert bool((text == -5).all())


def test_many_requests_compete(backend: str) -> None:
    """More chances than are compared at a time; of equals the earlier depth, then the earlier request."""
    generator = torch.Generator().manual_seed(0)
    chances = (torch.randint(1, 9, (70, 7), generator=generator) / 8).cumprod(1)
    counts = torch.randint(0, 8, (70,), generator=generator)
    requests = [
        ([(0, chance) for chance in row[:count]], [], [], [])
        for row, count in zip(chances.tolist(), counts.tolist(), strict=True)
    ]
    laid = Drafts(torch.zeros_like(chances, dtype=torch.int64).to(DEVICE), counts.to(DEVICE), chances.to(DEVICE))
    text = torch.zeros(70, 16, dtype=torch.int64, device=DEVICE)
    at = torch.arange(70, device=DEVICE)
    for room in (0, 1, 69, 100, 489, 490):
        with running(backend), guarded_outputs():
            chosen = choose_drafts(laid, at, at * 0, text, most_drafts=room)
        kept = [len(own) for own in oracles.choose(requests, 0.0, room)[0]]
        assert chosen.widths.tolist() == [count + 1 for count in kept]
        assert chosen.first_drafts.tolist() == torch.minimum(counts, torch.tensor(kept)).tolist()


def test_drafts_join_those_before_them(backend: str) -> None:
    zero, text = integers([0]), integers([[9, 0, 0, 0]])
    laid = Drafts(integers([[1, 0, 0]]), integers([1]), floats([[0.5, 0.0, 0.0]]))
    more = Drafts(integers([[2, 3]]), integers([2]), floats([[0.5, 0.25]]))
    with running(backend), guarded_outputs():
        chosen = choose_drafts(laid, zero, zero, text, appended=more)
    assert (chosen.tokens.tolist(), text.tolist()) == ([[1, 2, 3]], [[9, 1, 2, 3]])
    assert (chosen.widths.tolist(), chosen.first_drafts.tolist()) == ([4], [1])


def test_drafts_without_a_chance_are_verified_where_there_is_room(backend: str) -> None:
    chances, none = floats([[0.5, 0.0], [0.25, 0.0]]), integers([0, 0])
    laid = Drafts(integers([[1, 2], [3, 4]]), integers([2, 1]), chances)
    text = torch.zeros(2, 9, dtype=torch.int64, device=DEVICE)
    with running(backend), guarded_outputs():
        chosen = choose_drafts(laid, integers([0, 1]), none, text, most_drafts=3)
    assert chosen.widths.tolist() == [3, 2]


def test_a_copy_must_promise_more_when_its_rows_are_paid(backend: str) -> None:
    """An eighth of 3/8 is its row's; the rest equals what the drafts promise. Behind its count are no chances."""
    none = integers([0, 0])
    laid = Drafts(integers([[1, 0], [2, 0]]), integers([1, 1]), floats([[0.375, 0.0]] * 2))
    copies = Drafts(integers([[3, 5], [4, 5]]), integers([1, 1]), floats([[0.375, 9.0], [0.5, 9.0]]))
    text = torch.zeros(2, 9, dtype=torch.int64, device=DEVICE)
    with running(backend), guarded_outputs():
        chosen = choose_drafts(laid, integers([0, 1]), none, text, copies=copies, worth=0.125)
    assert chosen.source.tolist() == [0, -1]
    assert chosen.tokens[:, 0].tolist() == [1, 4]


def test_a_candidate_counts_from_where_the_text_is(backend: str) -> None:
    """It was proposed two tokens ago: where these are its own the rest is left, at the chances that are left. One that
    promises no more than the drafts leaves them. At the chances that it was made with the first would too.
    """
    at, three = integers([0, 1, 2]), [[9, 9]] * 3
    text = torch.tensor([[0, 1, 2, 3, 4, 0, 0, 0, 0]] * 3, device=DEVICE)
    laid = Drafts(integers(three), integers([1] * 3), floats([[0.75, 0.0], *[[0.5, 0.0]] * 2]))
    from_host = Drafts(
        integers([[[3, 4, 5, 6]], [[3, 7, 5, 6]], [[3, 4, 5, 6]]]),
        integers([[4], [4], [3]]),
        floats([[[1.0, 0.5, 0.5, 0.25]]] * 2 + [[[1.0, 1.0, 0.5, 0.25]]]),
    )
    host = {"from_host": from_host, "at": integers([[3]] * 3)}
    starts, limits = integers([4] * 3), integers([2] * 3)
    with running(backend), guarded_outputs():
        chosen = choose_drafts(laid, at, starts, text, **host, limits=limits, worth=0.125)
    assert (chosen.source.tolist(), chosen.widths.tolist()) == ([1, 0, 0], [3, 2, 2])
    assert chosen.tokens.tolist() == [[5, 6], [9, 9], [9, 9]]
    with pytest.raises(ValueError, match="limits"):
        choose_drafts(laid, at, starts, text, **host)


def test_every_candidate_ends_with_its_requests_stop(backend: str) -> None:
    """Own drafts, those behind them, the host's and copies, each the most likely once, with a stop in the middle."""
    at, zero = integers([0, 1, 2, 3]), integers([0] * 4)
    text = torch.zeros(4, 9, dtype=torch.int64, device=DEVICE)
    likely, unlikely = [0.5] * 3, [0.125] * 3
    laid = Drafts(integers([[5, 7, 5]] * 4), integers([3, 1, 1, 1]), floats([likely, *[unlikely] * 3]))
    more = Drafts(integers([[7, 5]] * 4), integers([0, 2, 0, 0]), floats([[0.125] * 2] * 4))
    host = Drafts(integers([[[5, 7, 5]]] * 4), integers([[0], [0], [3], [0]]), floats([[likely]] * 4))
    copies = Drafts(integers([[5, 7, 5]] * 4), integers([0, 0, 0, 3]), floats([likely] * 4))
    known = {"from_host": host, "at": integers([[1]] * 4), "limits": integers([3] * 4), "copies": copies}
    for stops, width in (([[-1, 7]] * 4, 3), ([[-1, -1]] * 4, 4)):
        with running(backend), guarded_outputs():
            chosen = choose_drafts(laid, at, zero, text, appended=more, **known, stops=integers(stops))
        assert chosen.source.tolist() == [0, 0, 1, -1]
        assert chosen.widths.tolist() == [width] * 4


def test_a_copy_does_not_count_if_the_copying_arms_candidate_pays(backend: str) -> None:
    """It may promise less than the copy. The copy counts if the text has left it, or it does not pay."""
    at, none = integers([0, 1, 2, 3]), integers([0] * 4)
    text = torch.tensor([[0, 1, 2, 0, 0]] * 4, device=DEVICE)
    laid = Drafts(integers([[9]] * 4), none, floats([[0.0]] * 4))
    proposed = integers([[[2, 5], [2, 6]], [[7, 5], [2, 6]], [[7, 5], [7, 6]], [[2, 5], [7, 6]]])
    chances = floats([*[[[1.0, 0.25]] * 2] * 3, [[1.0, 0.125]] * 2])
    twos = integers([[2, 2]] * 4)
    host = {"from_host": Drafts(proposed, twos, chances), "at": twos}
    copies = Drafts(integers([[8]] * 4), integers([1] * 4), floats([[0.5]] * 4))
    starts, limits = integers([2] * 4), integers([1] * 4)
    with running(backend), guarded_outputs():
        chosen = choose_drafts(laid, at, starts, text, **host, limits=limits, copies=copies, worth=0.125)
    assert chosen.source.tolist() == [1, -1, -1, -1]
    assert chosen.tokens.tolist() == [[5], [8], [8], [8]]


WRONG = st.sampled_from([-(2**40), -1, 50, 2**40, "chance", "confidence"])
BY_COLUMN = st.dictionaries(st.integers(0, 6), WRONG, max_size=2)


@settings(max_examples=examples(60), deadline=None)
@given(
    requests=st.lists(st.tuples(st.integers(-1, 8), BY_COLUMN), min_size=1, max_size=4),
    width=st.integers(1, 7),
    most=st.integers(1, 7),
)
@example([(2, {1: -1}), (2, {1: 50}), (2, {1: "chance"}), (2, {1: "confidence"}), (-1, {})], 2, 2)
def test_what_is_no_draft_is_left_out(
    backend: str, requests: list[tuple[int, dict[int, int | str]]], width: int, most: int
) -> None:
    """From the first wrong id, chance or confidence on; values past the counts are not reported."""
    vocabulary, size, said = 50, len(requests), [min(count, most + 1) for count, _ in requests]
    tokens = torch.arange(size * most).view(size, most) % vocabulary
    alive, sure = torch.full((size, most), 0.5), torch.full((size, most), 0.25)
    expected = []
    for row, (_, wrong) in enumerate(requests):
        there = {column: what for column, what in wrong.items() if column < most}
        for column, what in there.items():
            if isinstance(what, int):
                tokens[row, column] = what
            else:
                (alive if what == "chance" else sure)[row, column] = torch.nan
        seen = [column for column in there if column < width]
        expected.append(max(min([said[row], width, *seen]), 0))
    drafted = Drafts(tokens.to(DEVICE), integers(said), alive.to(DEVICE), sure.to(DEVICE))
    with running(backend), guarded_outputs():
        laid = lay_drafts(
            [(integers(list(range(size))), drafted)],
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
        cut_drafts(sure, floats([1.0, 0.0]), floats([]), integers([1, 2]))
    with pytest.raises(ValueError, match="part more bins"):
        cut_drafts(sure, floats([1.0, 0.0]), floats([0.5]), one)
    laid = Drafts(integers([[1]]), one, sure)
    text = torch.zeros(2, 9, dtype=torch.int64, device=DEVICE)
    unjudged = laid._replace(alive=None)
    for drafts, copies in ((laid, unjudged), (unjudged, None)):
        with pytest.raises(ValueError, match="copies need chances"):
            choose_drafts(drafts, one, one, text, copies=copies)
