"""A look that is answered from what was kept is one that is taken from nothing."""

import json
from random import Random

import pytest
from matrix import sampled
from structure_grammars import PROMPT, Grammars, Told
from whiflash_sdk.presets import TOOL_CALL_PARSERS

from whiflash_sglang.arms.structure import StructureArm
from whiflash_sglang.checkpoints.manifest import Structure
from whiflash_sglang.prices.costs import FULL_LENGTH
from whiflash_sglang.records.request import Request
from whiflash_sglang.spans.hints import RequestHints
from whiflash_sglang.spans.vocabulary import Vocabulary, text_of
from whiflash_sglang.structure.guesses import TEXTS
from whiflash_sglang.structure.tools import carried_tools, read_tools

KEYS = {"to": {"type": "string"}, "in": {"enum": ["celsius", "kelvin"]}}
TOOL = {"type": "object", "properties": KEYS, "required": [*KEYS]}
CALL = json.dumps({"to": "São \\ ãã ãã ã ãã x", "in": "kelvin"}, ensure_ascii=False)
MARKUP = "<function=f>\n<parameter=to>\nOs\n</parameter>\n<parameter=in>\nkelvin\n</parameter>\n</function>"
BODIES = {"hermes": f'{{"name": "f", "arguments": {CALL}}}', "qwen3_coder": MARKUP}
DOCUMENTS = {"grammar": f"[{CALL}, {CALL}, {CALL}]"} | {
    form: f"Ah <t.\n<tool_call>\n{body}\n</tool_call>\n so\n" * 3 for form, body in BODIES.items()
}


@pytest.mark.parametrize("seeds", sampled([2, 6], 2))
@pytest.mark.parametrize("texts", [2, TEXTS])
@pytest.mark.parametrize("form", DOCUMENTS)
def test_kept_answers_are_those_of_a_look_from_nothing(
    form: str, texts: int, seeds: int, grammars: Grammars, vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("whiflash_sglang.structure.guesses.TEXTS", texts)
    monkeypatch.setattr("whiflash_sglang.structure.guesses.PLACES", 9 * texts)
    monkeypatch.setattr(StructureArm, "_learn", lambda *_: None)
    tools, spans = carried_tools([("f", TOOL), ("list", None)], form), TOOL_CALL_PARSERS.get(form, ())
    hints = RequestHints(tools=tools or "", spans=[*spans])
    tokens, table, free = vocabulary.encode(DOCUMENTS[form]), vocabulary.token_bytes, 0
    parts = [token for token, part in enumerate(table) if not part.isascii() and len(part) == 1]
    others = range(len(table)), [*vocabulary.special], parts, vocabulary.encode("x")
    shared = StructureArm(Structure(max_width=8), vocabulary, lambda: False)
    for seed in range(seeds):
        told = Told(grammars, {"type": "array", "items": TOOL} if form == "grammar" else None)
        random, request = (
            Random(seed),
            Request("r", hints, grammar=told if form == "grammar" else None, read=lambda: PROMPT),
        )
        shared.begin(request)
        rest, text = tokens, [*PROMPT]
        while rest:
            drafts = rest[: random.choice((0, 0, 2, 9))]
            drafts += random.choices(random.choice(others), k=random.choice((0, 0, 1)))
            anew = StructureArm(Structure(max_width=8), vocabulary, lambda: False)
            monkeypatch.setattr(anew, "_are_free", lambda *_: False)
            anew.begin(other := Request("r", hints, grammar=request.grammar, read=lambda: PROMPT))
            looks, known_free = [], False
            for arm, asked, read in ((shared, request, read_tools), (anew, other, read_tools.__wrapped__)):
                monkeypatch.setattr("whiflash_sglang.structure.calls.read_tools", read)
                arm.propose(asked, len(PROMPT), lambda start, text=text: text[start:], FULL_LENGTH)
                kept = asked.kept[arm.arm]
                known_free = arm._are_free(kept, drafts) or known_free
                arm._follow(kept)
                kept.looks = []
                look = arm._look(kept, drafts, len(drafts) + 12)
                looks.append((list(look.ids), look.allowed, list(look.tokens), look.refused))
            assert looks[0] == looks[1], (text_of(vocabulary, text), text_of(vocabulary, drafts))
            if request.grammar is not None and grammars.end not in drafts:
                assert looks[0][1] == len(drafts) - grammars.forbidden(told._raw, drafts)
            assert not known_free or looks[1][1:3] == (len(drafts), []), text_of(vocabulary, drafts)
            free += known_free
            count = random.randint(1, 4)
            if request.grammar is not None:
                told.tell(rest[:count])
            text, rest = [*text, *rest[:count]], rest[count:]
    assert free > 2
