"""SGLang's grammars, as far as the structure arm needs them."""

from typing import Any

from sglang.srt.constrained.reasoner_grammar_backend import ReasonerGrammarObject
from sglang.srt.constrained.xgrammar_backend import XGrammarGrammar

from whiflash_sglang.engine.forward import sampling
from whiflash_sglang.spans.vocabulary import Vocabulary
from whiflash_sglang.structure.matchers import Grammar, GuidanceMatcher, Matcher, XGrammarMatcher
from whiflash_sglang.structure.schemas import is_plain


class RequestGrammar:
    """The grammar of a request, which has accepted all tokens that the scheduler has processed (`Grammar`)."""

    def __init__(self, req: Any) -> None:
        self._req = req
        ends = sampling.ending_ids(req)
        usual = None if req.tokenizer is None else req.tokenizer.eos_token_id
        self._end = usual if usual in ends else next(iter(ends), None)

    @property
    def known(self) -> int:
        return len(self._req.origin_input_ids) + len(self._req.output_ids)

    @property
    def prompt(self) -> int:
        return len(self._req.origin_input_ids)

    @property
    def schema(self) -> str:
        params = self._req.sampling_params
        return str(params.json_schema or params.structural_tag or "")

    @property
    def end(self) -> int | None:
        return self._end

    def matcher(self, vocabulary: Vocabulary) -> Matcher | None:
        grammar = self._req.grammar
        if isinstance(grammar, ReasonerGrammarObject):
            # While the model thinks nothing is constrained, and it stops whenever it likes.
            active = getattr(grammar, "reasoning_in_grammar", False) or grammar._is_generation()
            grammar = grammar.grammar if active else None
        if grammar is None or grammar.is_terminated():
            return None
        return _matcher_of(grammar, vocabulary, plain=is_plain(self.schema))


def grammar_of(req: Any) -> Grammar | None:
    """Constraint of a request; None: nothing constrains it."""
    return None if req.grammar is None else RequestGrammar(req)


def _matcher_of(grammar: Any, vocabulary: Vocabulary, *, plain: bool) -> Matcher | None:
    """None: of another backend (outlines), which cannot be asked token by token."""
    if isinstance(grammar, XGrammarGrammar):
        return XGrammarMatcher(grammar.matcher, None if plain else vocabulary, grammar.vocab_size)
    guidance = getattr(grammar, "ll_matcher", None)  # its module is imported only where it serves
    return None if guidance is None else GuidanceMatcher(guidance, vocabulary.encode)
