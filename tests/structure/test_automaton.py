"""A walk over what is shared finds what its reference in Python finds, and what is found from nothing."""

import json
from collections.abc import Sequence
from functools import partial
from random import Random
from typing import Any

import pytest
import walked
from drafting import continued, propose
from matrix import sampled
from structure_grammars import PROMPT, Grammars, Told
from whiflash_kernels.cpu.texts import NONE, Batch, Candidates, Table, Walk
from whiflash_sdk.presets import TOOL_CALL_PARSERS

from whiflash_sglang.arms import structure
from whiflash_sglang.arms.structure import StructureArm
from whiflash_sglang.checkpoints.manifest import Structure
from whiflash_sglang.drafts.candidates import NOTHING, Candidate, common_prefix
from whiflash_sglang.prices.costs import FULL_LENGTH
from whiflash_sglang.records.request import Request
from whiflash_sglang.spans.hints import RequestHints
from whiflash_sglang.spans.vocabulary import Vocabulary, bytes_of, text_of
from whiflash_sglang.structure import automaton
from whiflash_sglang.structure.automaton import MOST_NODES, Automaton
from whiflash_sglang.structure.calls import JsonCall
from whiflash_sglang.structure.spending import Spending
from whiflash_sglang.structure.tools import carried_tools

KEYS = {"to": {"type": "string"}, "in": {"enum": ["celsius", "kelvin"]}, "n": {"type": "number"}}
TOOL = {"type": "object", "properties": KEYS, "required": [*KEYS]}
CALL = json.dumps({"to": "São \\ ãã ãã ã ãã x", "in": "kelvin", "n": 120.5}, ensure_ascii=False)
PARAMETERS = (("to", "Os lo"), ("in", "kelvin"), ("n", "12"))
MARKUP = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in PARAMETERS)
BODIES = {"hermes": f'{{"name": "f", "arguments": {CALL}}}', "qwen3_coder": f"<function=f>\n{MARKUP}</function>"}
LISTS = {"schema": {"type": "array", "items": TOOL}, "counted": {"type": "array", "items": TOOL, "minItems": 1}}
BEGIN = '[call]{"name":"%s", "arguments":'
ONE = {"type": "object", "properties": {"in": {"enum": ["celsius", "kelvin"]}}, "required": ["in"]}
LISTS["tagged"] = {
    "type": "structural_tag",
    "triggers": ["[call]"],
    "structures": [
        {"begin": BEGIN % name, "schema": schema, "end": "}[/call]"} for name, schema in (("f", TOOL), ("g", ONE))
    ],
}
TAGGED = f'Ah [t "so.\n{BEGIN % "f"}{CALL}}}[/call] [call x{BEGIN % "g"}{{"in": "celsius"}}}}[/call]\n'
DOCUMENTS = dict.fromkeys(LISTS, f"[{CALL}, {CALL}, {CALL}]") | {
    form: f"Ah <t.\n<tool_call>\n{body}\n</tool_call>\n so\n" * 3 for form, body in BODIES.items()
}
DOCUMENTS["tagged"] = TAGGED * 3


def hints_of(form: str, tools: Sequence[tuple[str, Any]] = (("f", TOOL), ("list", None))) -> RequestHints:
    return RequestHints(tools=carried_tools(tools, form) or "", spans=[*TOOL_CALL_PARSERS.get(form, ())])


class Written:
    """A text of a form that two arms look at. told: its grammar; None without one."""

    def __init__(self, form: str, grammars: Grammars) -> None:
        self.told = Told(grammars, LISTS[form]) if form in LISTS else None
        self.hints, self.text = hints_of(form), [*PROMPT]

    def begin(self, arm: StructureArm) -> Request:
        request = Request("r", self.hints, grammar=self.told, prompt=len(PROMPT), read=lambda: PROMPT)
        arm.begin(request)
        return request

    def look(self, arm: StructureArm, request: Request, drafts: Candidate, room: int = 24) -> tuple[Any, Any]:
        said = propose(arm, request, lambda start: self.text[start:], FULL_LENGTH)
        return said or NOTHING, continued(arm, request, drafts, room, FULL_LENGTH)

    def write(self, tokens: Sequence[int]) -> None:
        if self.told is not None:
            self.told.tell(tokens)
        self.text += tokens


@pytest.mark.parametrize("seeds", sampled([2, 8], 2))
@pytest.mark.parametrize("nodes", [40, MOST_NODES])
@pytest.mark.parametrize("form", DOCUMENTS)
def test_walks_are_those_of_the_reference_and_say_what_is_found_from_nothing(
    form: str, nodes: int, seeds: int, grammars: Grammars, vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables, walks = {walked.Walks: walked.Table}, {walked.Table: walked.Walk}
    monkeypatch.setattr(automaton, "MOST_NODES", nodes)
    monkeypatch.setattr(automaton, "Table", lambda own, *rest: tables.get(type(own), Table)(own, *rest))
    monkeypatch.setattr(structure, "Walk", lambda table, *rest: walks.get(type(table), Walk)(table, *rest))
    # A special token that a text has is no draft, and the text goes on after it.
    vocabulary = vocabulary._replace(special=vocabulary.special | {*vocabulary.encode("x")})
    shared, twin = (StructureArm(Structure(max_width=8), vocabulary, Spending(float, float)) for _ in range(2))
    twin._walks = walked.Walks(None, vocabulary.token_bytes, vocabulary.special)  # type: ignore[assignment]
    twin.forget()
    tokens, table = vocabulary.encode(DOCUMENTS[form]), vocabulary.token_bytes
    parts = [token for token, part in enumerate(table) if not part.isascii() and len(part) == 1]
    others = range(len(table)), [*vocabulary.special], parts, vocabulary.encode("x")
    found = late = 0
    for seed in range(seeds):
        random, written = Random(seed), Written(form, grammars)
        requests, rest = [written.begin(arm) for arm in (shared, twin)], tokens
        while rest:
            ids = rest[: random.choice((0, 0, 2, 9))]
            ids += random.choices(random.choice(others), k=random.choice((0, 0, 1)))
            drafts = Candidate(ids, [0.95**i for i in range(len(ids))])
            looks = [written.look(arm, request, drafts) for arm, request in zip((shared, twin), requests, strict=True)]
            assert [(each.tokens, each.alive, each.at) for each in looks[0]] == [
                (each.tokens, each.alive, each.at) for each in looks[1]
            ]
            late += len(looks[0][0].tokens) if 3 * len(rest) < len(tokens) else 0
            fresh = StructureArm(Structure(max_width=8), vocabulary, Spending(float, float))
            fresh.forget()
            own = written.look(fresh, written.begin(fresh), drafts)
            # A special token that a text had may be drafted there, which nothing says from nothing.
            if vocabulary.special.isdisjoint(ids):
                for now, once in zip(looks[0], own, strict=True):
                    one, other = (bytes_of(vocabulary, each.tokens) for each in (now, once))
                    assert one.startswith(other) or other.startswith(one), text_of(vocabulary, written.text)
                    found += len(now.tokens)
                kept = [common_prefix(each[1].tokens, ids) for each in (looks[0], own)]
                assert kept[0] == kept[1], "as many drafts are allowed"
            if written.told is not None:
                assert not any(grammars.forbidden(written.told._raw, each.tokens) for each in looks[0])
            count = random.randint(1, 4)
            written.write(rest[:count])
            rest = rest[count:]
    assert found > 60
    assert late
    assert sorted(walked.cuts_of(shared._walks)) == sorted((*place, cut) for place, cut in twin._walks.cuts.items())  # type: ignore


@pytest.mark.parametrize("form", ["schema", "tagged", *BODIES])
def test_requests_with_equal_tools_ask_once_and_forgetting_ends_that(
    form: str, grammars: Grammars, vocabulary: Vocabulary
) -> None:
    arm, tokens = StructureArm(Structure(), vocabulary, Spending(float, float)), vocabulary.encode(DOCUMENTS[form])

    def asked() -> list[int]:
        written = Written(form, grammars)
        request = written.begin(arm)
        for token in tokens:
            written.look(arm, request, NOTHING)
            written.write([token])
        (only,) = arm._automata.values()
        assert only._characters == sum(len(state.text) for state in only._nodes)
        return walked.counts_of(only.table)

    first = asked()
    assert asked() == first
    arm.forget()
    assert not arm._automata
    assert asked() == first


def looks_at(
    arm: StructureArm, grammars: Grammars, properties: dict[str, Any], text: str, at_once: bool = False
) -> tuple[list[Any], int]:
    """Return the drafts before each token of a text under a grammar, and how many edges were asked for."""
    told = Told(grammars, {"type": "object", "properties": properties, "required": [*properties]})
    request, looks = Request("r", RequestHints(), grammar=told, prompt=len(PROMPT), read=lambda: PROMPT), list[Any]()
    arm.begin(request)
    tokens = arm._vocabulary.encode(text)
    for written in [tokens] if at_once else [[], *([token] for token in tokens)]:
        told.tell(written)
        said = propose(arm, request, told.history, FULL_LENGTH)
        looks.append(said.tokens if said else [])
    return looks, walked.counts_of(request.kept[arm.arm].automaton.table)[3]


@pytest.mark.parametrize("first", ["0", "7", "-0.05e-01", "10"])
def test_numbers_that_go_on_otherwise_are_apart(first: str, grammars: Grammars, vocabulary: Vocabulary) -> None:
    arm, alone = (StructureArm(Structure(), vocabulary, Spending(float, float)) for _ in range(2))
    keys = {"n": {"type": "number"}, "m": {"enum": ["celsius", "kelvin"]}}
    looks_at(arm, grammars, keys, f'{{"n": {first}, "m": "kelvin"}}')
    for number in ("101", "-0", "0.0", "-105.50"):
        text = f'{{"n": {number}, "m": "celsius"}}'
        for after, own in zip(
            looks_at(arm, grammars, keys, text)[0], looks_at(alone, grammars, keys, text)[0], strict=True
        ):
            assert after[: len(own)] == own[: len(after)], number
            assert bool(after) == bool(own), number


def test_documents_of_lists_ask_little_after_the_first(grammars: Grammars, vocabulary: Vocabulary) -> None:
    arm, random, asked = StructureArm(Structure(), vocabulary, Spending(float, float)), Random(0), [0]
    words = {"enum": ["celsius", "kelvin", "user"]}
    item = {"type": "object", "properties": {"x": words, "y": words}, "required": ["x", "y"]}
    for _ in range(6):
        items = [{"x": random.choice(words["enum"]), "y": random.choice(words["enum"])} for _ in range(12)]
        text = json.dumps({"l": items})
        asked.append(looks_at(arm, grammars, {"l": {"type": "array", "items": item}}, text)[1])
        arm._habits.clear()
    assert asked[-1] - asked[-2] <= 2, asked


def test_a_look_whose_time_ends_leaves_nothing_to_others(grammars: Grammars, vocabulary: Vocabulary) -> None:
    """The time ends at each of its questions. Then strings that nobody has written are followed without any."""
    keys, left, asked = {"m": {"type": "string"}}, 0, list[int]()

    def exhausted() -> bool:
        nonlocal left
        left -= 1
        return left < 0

    spending = Spending(float, float)
    spending.exhausted = exhausted  # type: ignore[method-assign]
    for most in range(40):
        arm, left = StructureArm(Structure(), vocabulary, spending), most
        looks_at(arm, grammars, keys, '{"m": "Pa', at_once=True)
        left = 10**6
        before = looks_at(arm, grammars, keys, '{"m": "Paris \\n \\u001f city"}')[1]
        asked.append(looks_at(arm, grammars, keys, '{"m": "user ids \\n \\u001f numbers"}')[1] - before)
    assert not any(asked), asked


def test_a_restart_that_fails_ends_the_walk(
    grammars: Grammars, vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All nodes are gone by then, and compiled code must not read the walk's old one."""
    arm, written = (
        StructureArm(Structure(max_width=8), vocabulary, Spending(float, float)),
        Written("counted", grammars),
    )
    request, tokens, failed = written.begin(arm), vocabulary.encode(DOCUMENTS["counted"]), False

    def fail(*_: Any) -> int:
        raise ZeroDivisionError

    for place in range(0, 40, 2):
        with monkeypatch.context() as patch:
            if place == 20:
                patch.setattr(Automaton, "_add", fail)
            try:
                said, _ = written.look(arm, request, Candidate())
                assert not (failed and said.tokens)
            except ZeroDivisionError:
                failed, arm.raised = True, []
        written.write(tokens[place : place + 2])
    assert failed


def test_calls_without_places_and_prompts_are_in_no_automaton_of_others(vocabulary: Vocabulary) -> None:
    arm, secret = StructureArm(Structure(), vocabulary, Spending(float, float)), "Mr Mrs"
    parameters = {
        "type": "object",
        "properties": {"n": {"enum": [1, 2]}, "to": {"type": "string"}},
        "required": ["n", "to"],
    }
    request = Request("r", hints_of("hermes", [("f", parameters)]), prompt=len(PROMPT), read=lambda: PROMPT)
    arm.begin(request)
    body, text, found = json.dumps({"name": "f", "arguments": {"n": 2, "to": secret}}), [*PROMPT], ""
    for token in vocabulary.encode(f"Ah.\n<tool_call>\n{body}\n</tool_call>\n"):
        said = propose(arm, request, lambda start: text[start:], FULL_LENGTH)
        found += text_of(vocabulary, said.tokens) if said else ""
        text.append(token)
    assert '"arguments"' in found
    assert "</tool_call>" in found
    ends_in_a_word = Request("r", hints_of("qwen3_coder"), read=lambda: vocabulary.encode(secret))
    arm.begin(ends_in_a_word)
    nodes = [node for each in arm._automata.values() for node in each._nodes]
    assert nodes
    assert not any("rs" in node.text + text_of(vocabulary, node.tail) for node in nodes)


def test_nothing_is_asked_in_a_round_that_has_no_time_left(vocabulary: Vocabulary) -> None:
    """It is asked in a later one, and the text is followed then."""
    spending = Spending(float, float)
    arm = StructureArm(Structure(), vocabulary, spending)
    request = Request("r", hints_of("qwen3_coder"), prompt=len(PROMPT), read=lambda: PROMPT)
    arm.begin(request)
    text = [*PROMPT, *vocabulary.encode("<tool_call>\n<func")]
    table, spending._questions = request.kept[arm.arm].automaton.table, 0.0
    assert propose(arm, request, lambda start: text[start:], FULL_LENGTH) is None
    assert walked.counts_of(table)[:3] == [1, 0, 0]
    spending.begin(["r"])
    assert spending.late == "r", "it is asked for first"
    said = propose(arm, request, lambda start: text[start:], FULL_LENGTH)
    assert said is not None
    assert text_of(vocabulary, said.tokens).startswith("tion=f>")


def test_who_waited_for_an_answer_is_asked_about_first(vocabulary: Vocabulary) -> None:
    """Each round has time for one question, and a request has more than that."""
    spending, tables = Spending(float, float), []
    arm = StructureArm(Structure(), vocabulary, spending)
    handles, text = [], vocabulary.encode("<tool_call>\n<func")
    for name in "ab":
        hints = hints_of("qwen3_coder", [(name, TOOL)])
        request = Request(name, hints, prompt=len(PROMPT), read=lambda: PROMPT)
        arm.begin(request)
        tables.append(request.kept[arm.arm].automaton.table)
        handles.append(arm.handle(request, lambda start: PROMPT[start:]))
    candidates = Candidates.of(2, 1, 8)
    batch = Batch(arm.library, candidates, [[0, 0], handles], [0, 0], [NONE, 0], [8, 8], 0.1, first=1)  # type: ignore[arg-type]
    ask = spending.ask
    spending.ask = lambda rid, question: setattr(spending, "_questions", 0.0) or ask(rid, question)  # type: ignore
    spending.begin(["a", "b"])
    batch.propose([*text, *text], [len(text), 2 * len(text)], [len(PROMPT)] * 2)
    assert spending._waiting == "b"
    spending.ask = ask  # type: ignore[method-assign]
    spending.begin(["a", "b"])
    batch.propose([], [0, 0], [len(PROMPT) + len(text)] * 2)
    assert all(walked.counts_of(table)[0] > 1 for table in tables)


def test_hostile_tools_keep_memory_and_work_bounded(vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests with tools of their own, whose texts never come twice. Counted are nodes, and questions of a round."""
    monkeypatch.setattr(automaton, "MOST_NODES", 300)
    monkeypatch.setattr(structure, "KEPT_NODES", 32 * structure.LEAST_NODES)
    arm, most, random = StructureArm(Structure(), vocabulary, Spending(float, float)), 0, Random(0)
    recurring: dict[str, Any] = {"type": "object", "properties": {}}
    recurring["properties"] = {"a": {"anyOf": [{"type": "array", "items": TOOL}, TOOL]}, "b": {"enum": [*"abcdefghi"]}}
    for number in range(40):
        hints = hints_of(("hermes", "qwen3_coder")[number % 2], [(f"t{number}_{i}", recurring) for i in range(120)])
        request, text = Request("r", hints, prompt=len(PROMPT), read=lambda: PROMPT), [*PROMPT]
        arm.begin(request)
        for _ in range(40):
            said = propose(arm, request, lambda start, text=text: text[start:], FULL_LENGTH)  # type: ignore[misc]
            kept = request.kept[arm.arm]
            before = sum(walked.counts_of(kept.automaton.table)[3:])
            drafts = Candidate(random.choices(range(len(vocabulary.token_bytes)), k=8), [0.9] * 8)
            continued(arm, request, drafts, 24, FULL_LENGTH)
            most = max(most, sum(walked.counts_of(kept.automaton.table)[3:]) - before)
            text += said.tokens[:2] if said else random.choices(vocabulary.encode('<tool_call>\n{"a": 12}'), k=3)
    assert len(arm._automata) == 32
    assert max(walked.counts_of(each.table)[0] for each in arm._automata.values()) <= 300 + 200
    assert most <= 8 + 24


def test_a_tenant_shares_no_automaton_with_another(vocabulary: Vocabulary) -> None:
    arm = StructureArm(Structure(), vocabulary, Spending(float, float))
    hints, kept = hints_of("hermes", [("f", TOOL)]), []
    for tenant in (b"a", b"b", None, b"a"):
        request = Request("r", hints, tenant=tenant, prompt=len(PROMPT), read=lambda: PROMPT)
        arm.begin(request)
        kept.append(request.kept[arm.arm].automaton)
    assert kept[0] is kept[3]
    assert len({id(each) for each in kept}) == 3


def test_calls_of_equal_tools_share_a_matcher(vocabulary: Vocabulary) -> None:
    """It takes 3 MB for 120 tools, and a client's prompts bring calls that differ in blanks only."""
    arm = StructureArm(Structure(), vocabulary, Spending(float, float))
    for number in range(8):
        prompt = vocabulary.encode(f'<tool_call>{" " * number}{{"name": "f"}}</tool_call>\n')
        request = Request("r", hints_of("hermes"), prompt=len(prompt), read=partial(list, prompt))
        arm.begin(request)
        propose(arm, request, lambda start, prompt=prompt: prompt[start:], FULL_LENGTH)  # type: ignore[misc]
        arm.end(request)
    (only,) = arm._automata.values()
    calls = [node.calls._call for node in only._nodes if node.calls is not None and node.calls._call is not None]
    assert len({id(each._matcher) for each in calls if isinstance(each, JsonCall)}) == 1
    assert len(calls) > 8
