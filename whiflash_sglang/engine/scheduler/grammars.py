"""Read SGLang's grammars for the structure arm."""

from typing import Any

from sglang.srt.constrained.reasoner_grammar_backend import ReasonerGrammarObject
from sglang.srt.constrained.xgrammar_backend import XGrammarGrammar

from whiflash_sglang.engine.forward import sampling
from whiflash_sglang.engine.forward.processors import own_grammar
from whiflash_sglang.spans.vocabulary import Vocabulary
from whiflash_sglang.structure.matchers import Grammar, GuidanceMatcher, Matcher, XGrammarMatcher
from whiflash_sglang.structure.schemas import is_plain


class RequestGrammar:
    """The grammar of a request, which has accepted all tokens that the scheduler has processed (`Grammar`)."""

    def __init__(self, req: Any) -> None:
        self._req = req
        ends = sampling.ending_ids(req)
        usual = None if req.tokenizer is None else req.tokenizer.eos_token_id
        self.end: int | None = usual if usual in ends else next(iter(ends), None)

    @property
    def schema(self) -> str:
        params = self._req.sampling_params
        return str(params.json_schema or params.structural_tag or "")

    @property
    def begins(self) -> int | None:
        grammar, prompt = own_grammar(self._req), len(self._req.origin_input_ids)
        if not isinstance(grammar, ReasonerGrammarObject) or getattr(grammar, "reasoning_in_grammar", False):
            return prompt
        # Nothing is constrained while the model thinks, and it may stop thinking at any token.
        constrained = grammar.tokens_after_end
        return prompt + len(self._req.output_ids) - constrained if constrained >= 0 else None

    def beginning(self, vocabulary: Vocabulary) -> Matcher | None:
        grammar = own_grammar(self._req)
        grammar = grammar.grammar if isinstance(grammar, ReasonerGrammarObject) else grammar
        if isinstance(grammar, XGrammarGrammar):
            searched = None if is_plain(self.schema) else vocabulary
            return XGrammarMatcher(grammar.copy().matcher, searched, grammar.vocab_size)
        # llguidance is known by this member, since its module is imported only if it serves. Outlines has no matcher.
        if getattr(grammar, "ll_matcher", None) is None:
            return None
        new = type(grammar)(grammar.llguidance_tokenizer, grammar.serialized_grammar)  # `copy` copies the state, too
        return GuidanceMatcher(new.ll_matcher, vocabulary.encode)


def grammar_of(req: Any) -> Grammar | None:
    """Return the constraint of a request; None if nothing constrains it."""
    return None if own_grammar(req) is None else RequestGrammar(req)
