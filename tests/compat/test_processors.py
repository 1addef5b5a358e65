"""SGLang's logit processors as grammars: what they allow, and which ones are known."""

import random
from array import array
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sglang.srt.sampling import custom_logit_processor as sglangs
from sglang.srt.sampling.custom_logit_processor import Qwen3ThinkingBudgetLogitProcessor

from whiflash_sglang.engine.forward.masks import fill_masks
from whiflash_sglang.engine.forward.processors import processor_grammar
from whiflash_sglang.structure.spending import Spending

VOCABULARY, IDS = 201_088, ("THINKING_START_TOKEN_ID", "THINKING_END_TOKEN_ID", "NEW_LINE_TOKEN_ID")
BASE, REPEATS = sglangs.ThinkingBudgetLogitProcessor, sglangs.DeepseekOCRNoRepeatNGramLogitProcessor
FAMILIES = [each for each in vars(sglangs).values() if isinstance(each, type) and BASE in each.__bases__]
ASKED: list[tuple[type, Any]] = [
    *((family, {"thinking_budget": budget}) for family in FAMILIES for budget in (0, 1, 3, True)),
    *((FAMILIES[0], params) for params in (None, {}, {"thinking_budget": -1}, {"thinking_budget": "7"})),
    (sglangs.DisallowedTokensLogitsProcessor, {"token_ids": [0, 31, 32, 198, -1]}),
    *((REPEATS, {"ngram_size": size, "window_size": 9}) for size in (0, 1, 3)),
    (REPEATS, {"ngram_size": "2", "window_size": 30, "whitelist_token_ids": [198, "5"]}),
]


@pytest.mark.parametrize(("kind", "params"), ASKED, ids=str)
def test_masks_are_what_sglangs_processor_allows(kind: Any, params: dict[str, Any] | None) -> None:
    """Along random texts that are taken back now and then; no mask is narrowed before `free_until` says so."""
    tokens = [*(getattr(kind, name, 5) for name in IDS), 5, 6, 7]
    for seed in range(4):
        rng = random.Random(seed)
        prompt, output, least = array("q", rng.choices(tokens, k=rng.randint(1, 9))), array("q"), 0
        req = SimpleNamespace(origin_input_ids=prompt, output_ids=output)
        grammar = processor_grammar(kind.to_str(), params, prompt, None, VOCABULARY)
        for _ in range(20):
            bits, logits = (torch.full((2, -(-VOCABULARY // 32)), -1, dtype=torch.int32), torch.ones(1, VOCABULARY))
            grammar.fill_vocab_mask(bits, 1)
            forbidden = np.unpackbits(bits[1].numpy().view(np.uint8), bitorder="little")[:VOCABULARY] == 0
            logits = kind()(logits, [None if params is None else {**params, "__req__": req}])
            assert np.array_equal(forbidden, (logits[0] == -torch.inf).numpy())
            assert not forbidden.any() or grammar.length >= least
            if back := rng.choice([0, 0, 0, 0, min(3, len(output))]):
                grammar.rollback(back)
                del output[-back:]
                least = 0
            least = max(least, grammar.free_until)
            output.append(rng.choice(tokens))
            grammar.accept_token(output[-1])


def by_value(**body: Any) -> type:
    """A class that no other process can import, named as one of SGLang's."""
    base = Qwen3ThinkingBudgetLogitProcessor
    return type(base.__name__, (base,), {"__module__": "__main__", **body})


@pytest.mark.parametrize(
    ("kind", "is_known"),
    [
        (by_value(THINKING_START_TOKEN_ID=5), True),
        (by_value(THINKING_START_TOKEN_ID=property(lambda self: 5)), False),
        (by_value(NEW_LINE_TOKEN_ID=VOCABULARY), False),
        (by_value(__call__=lambda self, logits, params: logits), False),
        (BASE, False),
    ],
)
def test_a_processor_is_known_by_what_it_calls(kind: Any, is_known: bool) -> None:
    assert (processor_grammar(kind.to_str(), {}, array("q"), None, VOCABULARY) is not None) == is_known


def test_what_a_processor_forces_and_a_grammar_refuses_is_no_draft() -> None:
    """It ends the request if it is committed, which drafts before it decide."""

    class Refusing(SimpleNamespace):
        def accept_token(self, token: int) -> None:
            if token == 198:
                raise ValueError(token)

    inner = Refusing(fill_vocab_mask=lambda *_: None, is_terminated=lambda: False, rollback=lambda _: None)
    processor, prompt = Qwen3ThinkingBudgetLogitProcessor, array("q", [151667])
    grammar = processor_grammar(processor.to_str(), {"thinking_budget": 1}, prompt, inner, VOCABULARY)
    bits = torch.full((3, -(-VOCABULARY // 32)), -1, dtype=torch.int32)
    assert fill_masks(grammar, [5, 198], bits, VOCABULARY, Spending()) == 2
    assert grammar.length == 1
