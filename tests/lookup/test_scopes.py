"""Where in an agent's work a text belongs: its blocks, and what is copied, learned and forgotten of them."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whiflash_sglang.checkpoints.manifest import Lookup
from whiflash_sglang.drafters.lookup import LookupArm
from whiflash_sglang.lookup.calibration import SCOPES, Agreement, Calibrations
from whiflash_sglang.lookup.index import GAP
from whiflash_sglang.lookup.memory import Tenant, TenantMemory, handle_of, tenant_of
from whiflash_sglang.lookup.scopes import LEAD, WHOLE, Scope, blocks_of
from whiflash_sglang.routing.costs import FULL_LENGTH
from whiflash_sglang.spans.hints import Block, RequestHints, SpanHint

WORDS = [bytes([97 + token]) for token in range(26)]
STRUCTURE = (Block("x", "y"), Block("z", None))
"""A block from `x` to `y`, and one from `z` on."""


def ids(text: str) -> list[int]:
    return [ord(letter) - 97 for letter in text]


def tenant(name: str = "t") -> Tenant:
    found = tenant_of(None, name)
    assert found is not None
    return found


def cut(text: str, **hints: Any) -> list[tuple[str | None, str]]:
    blocks = blocks_of(RequestHints(**hints), WORDS)
    assert blocks is not None
    return [
        (scope.block, "".join(chr(97 + token) for token in part)) for scope, part in blocks.parts(ids(text))
    ]


def test_an_output_is_cut_at_the_markers_with_what_leads_to_each_part() -> None:
    assert cut("abxcdyefzgh", structure=STRUCTURE) == [
        (None, "abx"),
        ("x", "abxcdy"),
        (None, "efz"),
        ("z", "efzgh"),
    ]
    assert cut("a" * 30 + "xb", structure=STRUCTURE)[1] == ("x", "a" * (LEAD - 1) + "xb")
    assert cut("xyxy", structure=STRUCTURE)[-1] == ("x", "xy"), "nothing is left behind the last marker"


def test_parts_of_one_scope_are_one_text_with_gaps() -> None:
    """Nobody copies from the end of one into the next."""
    blocks = blocks_of(RequestHints(structure=STRUCTURE), WORDS)
    assert blocks is not None
    assert blocks.texts(ids("aaxaybxcy")) == {
        WHOLE: [*ids("aax"), GAP, *ids("bx")],
        Scope(block="x"): [*ids("aaxay"), GAP, *ids("bxcy")],
    }


def test_without_a_structure_spans_are_the_blocks() -> None:
    spans = (SpanHint("json", begin="x", end="y"), SpanHint("code", open=True, end="w"))
    assert [block for block, _ in cut("abwcxdye", agent="a", spans=spans)] == ["code", None, "json", None]
    assert [block for block, _ in cut("axbyc", agent="a", spans=spans, structure=STRUCTURE)] == [
        None,
        "x",
        None,
    ]
    assert cut("axbyc", agent="a") == [(None, "axbyc")]


def test_who_says_nothing_has_no_blocks() -> None:
    assert blocks_of(RequestHints(spans=(SpanHint("code", open=True),)), WORDS) is None
    without = blocks_of(RequestHints(agent="a", structure=STRUCTURE), ())
    assert without is not None
    assert without.parts([1, 2]) == [(Scope("a"), [1, 2])], (
        "without a tokenizer there is nothing to find markers in"
    )


@settings(deadline=None)
@given(st.text("abxyz", max_size=40), st.data())
def test_a_text_is_cut_alike_however_it_came(text: str, data: st.DataObject) -> None:
    whole = blocks_of(RequestHints(agent="a", structure=STRUCTURE), WORDS)
    rounds = blocks_of(RequestHints(agent="a", structure=STRUCTURE), WORDS)
    assert whole is not None
    assert rounds is not None
    tokens, at = ids(text), 0
    while at < len(tokens) and data.draw(st.booleans()):
        step = data.draw(st.integers(1, 5))
        rounds.follow(tokens[at : at + step])
        at += step
    parts = rounds.parts(tokens)
    assert parts == whole.parts(tokens)
    other = [*tokens, 0] if data.draw(st.booleans()) else [1, *tokens]
    assert rounds.parts(other) == blocks_of(RequestHints(agent="a", structure=STRUCTURE), WORDS).parts(other)  # type: ignore[union-attr]
    assert [token for part in bare(parts) for token in part] == tokens, "every token is in one block"


def bare(parts: Sequence[tuple[Scope, Sequence[int]]]) -> list[Sequence[int]]:
    """The parts without what leads to them, of which none is in another block."""
    found: list[Sequence[int]] = []
    before = 0
    for scope, part in parts:
        lead = 0 if scope.block is None else min(LEAD, before)
        found.append(part[lead:])
        before = len(found[-1]) if scope.block is None else 0
    return found


def since(text: list[int], start: int) -> list[int]:
    return text[start:]


def asked(
    server: LookupArm, hints: RequestHints, prompt: str, answer: str, salt: str = "t", row: int = 0
) -> list[int]:
    """What is proposed behind the prompt; then the request writes `answer` and ends."""
    text = ids(prompt + answer[:1])
    server.begin(row, hints, tenant(salt))
    said = server.speak(row, len(text) - 1, lambda start: text[start:], FULL_LENGTH)
    found = list(said.tokens) if said else []
    for token in ids(answer[1:]):
        text.append(token)
        server.speak(row, len(text) - 1, lambda start: text[start:], FULL_LENGTH)
    server.finish(row, ids(answer))
    server.release(row)
    return found


@pytest.fixture
def server() -> LookupArm:
    return LookupArm(Lookup(max_width=4, memory_mib=1), token_bytes=WORDS)


def test_the_same_block_of_the_same_agent_is_copied_first(server: LookupArm) -> None:
    """The same words go on otherwise wherever they were written; each request gets its own scope's."""
    places = [
        (RequestHints(agent=agent, structure=STRUCTURE), opening)
        for agent in ("a", "b")
        for opening in ("x", "z", "w")
    ]
    for number, (hints, opening) in enumerate(places):
        asked(server, hints, "", opening + "pqrs" + chr(97 + number) + "ooo")
    found = []
    for hints, opening in places:
        text = ids(opening + "pqrs")
        server.begin(1, hints, tenant())
        said = server.speak(1, 0, lambda start, text=text: text[start:], FULL_LENGTH)  # type: ignore[misc]
        assert said is not None
        found.append(said.tokens[0])
    assert found == list(range(len(places)))


def test_wider_texts_are_copied_where_nearer_ones_have_nothing(server: LookupArm) -> None:
    asked(server, RequestHints(agent="a"), "", "pqrstuv")
    for hints in (RequestHints(agent="a", structure=STRUCTURE), RequestHints(agent="b"), RequestHints()):
        assert asked(server, hints, "pqrs", "t")[:2] == ids("uv")
    assert asked(server, RequestHints(agent="a"), "pqrs", "t", salt="another") == []
    assert asked(server, RequestHints(agent="a", lookup="context"), "pqrs", "t") == []


def test_an_agent_or_a_block_is_forgotten_alone(server: LookupArm) -> None:
    one = RequestHints(agent="a", structure=STRUCTURE)
    other = RequestHints(agent="b", structure=STRUCTURE)

    def fill() -> None:
        server.forget(None)
        asked(server, one, "", "abcxefgy")
        asked(server, other, "", "ijkxmnoyw")

    def known() -> list[str]:
        """Which of the four texts are still there."""
        assert server.memory is not None
        scopes = [own for of_tenant in server.memory._tenants.values() for own in of_tenant.values()]
        text = "".join(chr(97 + token) for own in scopes for token in own.young._tokens)
        return [part for part in ("abc", "efg", "ijk", "mno") if part in text]

    fill()
    assert known() == ["abc", "efg", "ijk", "mno"]
    for handle, left in (
        (handle_of(tenant(), "a"), ["ijk", "mno"]),
        (handle_of(tenant(), None, "x"), ["abc", "ijk"]),
        (handle_of(tenant(), "b", "x"), ["abc", "efg", "ijk"]),
        (handle_of(tenant("another"), "a"), ["abc", "efg", "ijk", "mno"]),
        (handle_of(tenant()), []),
    ):
        fill()
        server.forget(handle)
        assert known() == left


def test_of_a_block_nothing_is_kept_with_what_follows_it(server: LookupArm) -> None:
    """So that who forgets a block forgets all of it, also where a block stands inside another one."""
    hints = RequestHints(agent="a", structure=(Block("x", "y"), Block("p", "q")))
    asked(server, hints, "", "axbcypdefqghxijpklqmny")
    server.forget(handle_of(tenant(), "a", "x"))
    assert server.memory is not None
    left = server.memory._tenants[tenant()]
    texts = {
        scope.block: "".join(chr(97 + token) for token in own.young._tokens if token >= 0)
        for scope, own in left.items()
    }
    assert texts == {None: "axpghx", "p": "pdefqklq"}


def test_an_output_of_many_blocks_is_remembered_scope_by_scope(
    server: LookupArm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scheduler's work at a request's end does not grow with how often its markers occur."""
    calls: list[Scope] = []
    remember = TenantMemory.remember

    def counted(self: TenantMemory, owner: Tenant, output: Sequence[int], scope: Scope = WHOLE) -> None:
        calls.append(scope)
        remember(self, owner, output, scope)

    monkeypatch.setattr(TenantMemory, "remember", counted)
    asked(server, RequestHints(agent="a", structure=STRUCTURE), "", "axbyc" * 50)
    assert sorted(calls, key=str) == sorted({Scope("a"), Scope("a", None, "x")}, key=str)
    assert asked(server, RequestHints(agent="a", structure=STRUCTURE), "x", "b")[:1] == ids("y")


@pytest.mark.parametrize("memory_mib", [0, 1])
def test_who_runs_while_its_scope_is_forgotten_teaches_nobody(memory_mib: int) -> None:
    server = LookupArm(Lookup(max_width=4, memory_mib=memory_mib), token_bytes=WORDS)
    text = ids("abcabcabc")
    server.begin(0, RequestHints(agent="a", structure=STRUCTURE), tenant())
    server.speak(0, len(text), lambda start: text[start:], FULL_LENGTH)
    server.forget(handle_of(tenant(), "a"))
    for token in ids("abcabcabc"):
        text.append(token)
        server.speak(0, len(text), lambda start: text[start:], FULL_LENGTH)
    assert not server._calibrations.of(tenant())._scopes


def test_who_runs_while_its_scope_is_forgotten_leaves_nothing(server: LookupArm) -> None:
    hints = RequestHints(agent="a", structure=STRUCTURE)
    for handle in (handle_of(tenant(), "a"), handle_of(tenant(), None, "x"), handle_of(tenant(), "a", "x")):
        server.begin(0, hints, tenant())
        server.forget(handle)
        server.finish(0, ids("wabcdxefgh"))
        assert server.snapshot()["tenants"] == 0
    server.begin(0, hints, tenant())
    server.forget(handle_of(tenant(), "b"))
    server.finish(0, ids("wabcdxefgh"))
    assert len(server.snapshot()["scopes"]) == 2


def test_chances_are_those_of_the_scope_and_begin_with_the_wider_ones() -> None:
    book = Calibrations().of(tenant())
    plans, calls = book.of("a", "x"), book.of("a", "z")
    for _ in range(200):
        plans.observe(3, Agreement.ALONE, True)
        calls.observe(3, Agreement.ALONE, False)
    chances = [table.chance(3, Agreement.ALONE) for table in (plans, book.of("a", None), book, calls)]
    assert chances[0] > 0.95 > 0.6 > chances[1] > 0.4 > 0.05 > chances[3]
    assert chances[1] == pytest.approx(chances[2], abs=0.02)
    fresh = book.of("b", "x")
    assert fresh.chance(3, Agreement.ALONE) == book.chance(3, Agreement.ALONE)
    assert fresh.chances == book.chances
    assert book.of(None, None) is book


def test_forgetting_a_scope_forgets_its_chances() -> None:
    books = Calibrations()
    for agent in ("a", "b"):
        for _ in range(50):
            books.of(tenant()).of(agent, "x").observe(3, Agreement.ALONE, True)
    running = books.of(tenant()).of("a", "x")
    books.forget(handle_of(tenant(), "a"))
    root = books.of(tenant())
    assert root.of("a", "x") is not running
    assert root.of("a", "x").chance(3, Agreement.ALONE) == root.chance(3, Agreement.ALONE)
    assert root.of("b", "x").chance(3, Agreement.ALONE) > root.chance(3, Agreement.ALONE)
    books.forget(handle_of(tenant()))
    assert books.of(tenant()).chance(3, Agreement.ALONE) == 0.5


def test_scopes_that_chances_are_kept_of_are_bounded() -> None:
    book = Calibrations().of(tenant())
    kept = book.of("agent 0", None)
    for number in range(2 * SCOPES):
        book.of(f"agent {number}", None)
        assert book.of("agent 0", None) is kept
    assert len(book._scopes) == SCOPES


def test_a_request_learns_in_the_block_that_its_answer_is_in(server: LookupArm) -> None:
    """Markers of its prompt open none."""
    text = ids("axbzc")
    server.begin(0, RequestHints(agent="a", structure=STRUCTURE), tenant())
    for more, block in (("d", None), ("x", "x"), ("e", "x"), ("y", None)):
        text += ids(more)
        server.speak(0, len(text) - 1, partial(since, text), FULL_LENGTH)
        assert server._requests[0].blocks.scope == Scope("a", block=block)
        assert server._requests[0].copier.calibration is server._requests[0].learns.of("a", block)


def test_what_says_nothing_learns_for_the_tenant_as_before(server: LookupArm) -> None:
    asked(server, RequestHints(), "abcabc", "abc")
    table = server._calibrations.of(tenant())
    assert not table._scopes
    assert server.memory is not None
    assert list(server.memory._tenants[tenant()]) == [WHOLE]


def test_a_trace_tells_who_said_where_it_belongs_from_who_did_not(server: LookupArm) -> None:
    asked(server, RequestHints(agent="a"), "ab", "cdefgh")
    for hints, source in ((RequestHints(agent="a"), "scope"), (RequestHints(), "memory")):
        assert asked(server, hints, "xc", "defg")[:2] == ids("ef")
        server.begin(1, hints, tenant())
        for text, origin in (("xycde", source), ("xycdexyc", "context")):
            said = server.speak(1, len(text) - 1, lambda start, text=text: ids(text)[start:], FULL_LENGTH)  # type: ignore[misc]
            assert said is not None
            assert [part.source for part in said.parts] == [origin]
