"""Turn SGLang's own logit processors into grammars.

Each of them is a mask that depends on the tokens before it and on the request's parameters. As a grammar it reaches
rows under drafts, and counts committed tokens exactly: under overlap scheduling a processor reads a text that lacks the
newest ones. A processor is known by the function that it calls, so subclasses that only set token ids are known, too.
"""

from array import array
from inspect import getattr_static
from typing import Any
from weakref import proxy

import numpy as np
import torch
from sglang.srt.constrained.base_grammar_backend import BaseGrammarObject
from sglang.srt.constrained.xgrammar_backend import XGrammarGrammarBackend
from sglang.srt.sampling.custom_logit_processor import (
    CustomLogitProcessor,
    DeepseekOCRNoRepeatNGramLogitProcessor,
    DisallowedTokensLogitsProcessor,
    ThinkingBudgetLogitProcessor,
)

NEVER = 1 << 62
"""A length in tokens that no text reaches."""


class _Row:
    """A row of logits for SGLang's processors: writing -inf clears a token's bit of its mask `words`, uint32."""

    def __init__(self, words: np.ndarray, vocabulary: int) -> None:
        self._words, self._vocabulary = words, vocabulary

    def __setitem__(self, place: Any, value: float) -> None:
        if isinstance(place[-1], slice):
            self._words[:] = 0
            return
        ids = np.atleast_1d(np.asarray(place[-1], dtype=np.int64))
        ids = np.where(ids < 0, ids + self._vocabulary, ids)
        ids = ids[(ids >= 0) & (ids < self._vocabulary)]
        bits = np.uint32(1) << (ids % 32).astype(np.uint32)
        if value == -np.inf:
            np.bitwise_and.at(self._words, ids // 32, ~bits)
        else:
            np.bitwise_or.at(self._words, ids // 32, bits)


class ProcessorGrammar(BaseGrammarObject):  # type: ignore[misc]
    """A grammar of the tokens that a processor allows, written over the masks of the request's own grammar.

    Args:
        processor: SGLang's. params: `custom_params` of the request. prompt: token ids. grammar: the request's own,
            None if nothing else constrains it. vocabulary: number of token ids.

    Attributes:
        origin_input_ids, output_ids: the text with drafts, which the processor reads as those of its request.
    """

    def __init__(self, processor: Any, params: Any, prompt: Any, grammar: Any, vocabulary: int) -> None:
        super().__init__()
        self.grammar, self.origin_input_ids, self.output_ids = grammar, prompt, array("q")
        named = {**params, "__req__": proxy(self)} if isinstance(params, dict) else params
        self._processor, self._params, self._vocabulary = processor, [named], vocabulary

    @property
    def length(self) -> int:
        """Return the number of tokens of the text, prompt included."""
        return len(self.origin_input_ids) + len(self.output_ids)

    @property
    def narrows_from(self) -> int:
        """Return the length in tokens, prompt included, from which on the processor may forbid a token."""
        return 0

    @property
    def free_until(self) -> int:
        """Return `narrows_from`; 0 if the request has a grammar of its own, which may forbid tokens anywhere."""
        return 0 if self.grammar is not None else self.narrows_from

    def accept_token(self, token: int) -> None:
        """Append a token to the text. Raises ValueError if the request's own grammar refuses it."""
        if self.grammar is not None:
            self.grammar.accept_token(token)
        self.current_token = token
        self.output_ids.append(token)

    def rollback(self, k: int) -> None:
        if self.grammar is not None:
            self.grammar.rollback(k)
        del self.output_ids[len(self.output_ids) - k :]

    def is_terminated(self) -> bool:
        return self.grammar is not None and bool(self.grammar.is_terminated())

    def fill_vocab_mask(self, vocab_mask: torch.Tensor, idx: int) -> None:
        if self.grammar is not None:
            self.grammar.fill_vocab_mask(vocab_mask, idx)
        if self.length >= self.narrows_from:
            self._processor(_Row(vocab_mask[idx].numpy().view(np.uint32), self._vocabulary), self._params)

    # In a prefill SGLang asks any grammar of the batch for all masks, which have one form in all backends.
    def allocate_vocab_mask(self, vocab_size: int, batch_size: int, device: Any) -> Any:
        return XGrammarGrammarBackend.allocate_vocab_mask(vocab_size, batch_size, device)

    def move_vocab_mask(self, vocab_mask: torch.Tensor, device: Any) -> Any:
        return XGrammarGrammarBackend.move_vocab_mask(vocab_mask, device)

    def apply_vocab_mask(self, logits: torch.Tensor, vocab_mask: torch.Tensor) -> None:
        XGrammarGrammarBackend.apply_vocab_mask(logits, vocab_mask)


class _DisallowedTokens(ProcessorGrammar):
    """The grammar of SGLang's disallowed tokens, which forbids the same ones everywhere: its mask is made once."""

    _allowed: Any = None

    def fill_vocab_mask(self, vocab_mask: torch.Tensor, idx: int) -> None:
        if self.grammar is not None:
            self.grammar.fill_vocab_mask(vocab_mask, idx)
        words = vocab_mask[idx].numpy().view(np.uint32)
        if self._allowed is None:
            self._allowed = np.full_like(words, 0xFFFFFFFF)
            self._processor(_Row(self._allowed, self._vocabulary), self._params)
        words &= self._allowed


class _ThinkingBudget(ProcessorGrammar):
    """The grammar of SGLang's thinking budget: after `thinking_budget` tokens it forces a newline and the end."""

    def __init__(self, processor: Any, params: Any, prompt: Any, grammar: Any, vocabulary: int) -> None:
        super().__init__(processor, params, prompt, grammar, vocabulary)
        budget = params.get("thinking_budget") if isinstance(params, dict) else None
        self._budget = budget if isinstance(budget, int) and budget >= 0 else NEVER
        self._marks, text = ((processor.THINKING_START_TOKEN_ID, processor.THINKING_END_TOKEN_ID), np.asarray(prompt))
        ends = np.flatnonzero(np.isin(text, self._marks))
        # The place at which open thinking began, -1 without: before the output, and after each of its tokens.
        self._began = [int(ends[-1]) if len(ends) and text[ends[-1]] == self._marks[0] else -1]

    @property
    def narrows_from(self) -> int:
        began = self._began[-1]
        return (self.length if began < 0 else began) + 1 + self._budget

    def accept_token(self, token: int) -> None:
        super().accept_token(token)
        begin, end = self._marks
        self._began.append(self.length - 1 if token == begin else -1 if token == end else self._began[-1])

    def rollback(self, k: int) -> None:
        super().rollback(k)
        del self._began[len(self._began) - k :]


def processor_grammar(processor: str, params: object, prompt: Any, grammar: Any, vocabulary: int) -> Any:
    """Return the `ProcessorGrammar` of what a processor's `to_str` returned; None if it is a client's own."""
    loaded = CustomLogitProcessor.from_str(processor)
    call = getattr_static(type(loaded), "__call__", None)
    names = ("THINKING_START_TOKEN_ID", "THINKING_END_TOKEN_ID", "NEW_LINE_TOKEN_ID")
    ids = [getattr_static(loaded, name, None) for name in names]
    kind: type[ProcessorGrammar] | None = None
    if call is DisallowedTokensLogitsProcessor.__call__:
        kind = _DisallowedTokens
    elif call is DeepseekOCRNoRepeatNGramLogitProcessor.__call__:
        kind = ProcessorGrammar
    elif call is ThinkingBudgetLogitProcessor.__call__ and all(type(i) is int and 0 <= i < vocabulary for i in ids):
        kind = _ThinkingBudget
    return kind and kind(loaded, params, prompt, grammar, vocabulary)


def take_over(req: Any) -> None:
    """Give a request the grammar of its processor in place of the processor, if that is one of SGLang's."""
    if req.custom_logit_processor:
        params, text = req.sampling_params.custom_params, req.origin_input_ids
        grammar = processor_grammar(req.custom_logit_processor, params, text, req.grammar, req.vocab_size)
        if grammar is not None:
            req.grammar, req.custom_logit_processor = grammar, None


def own_grammar(req: Any) -> Any:
    """Return the grammar of a request without its processor's; None if nothing else constrains it."""
    grammar = req.grammar
    return grammar.grammar if isinstance(grammar, ProcessorGrammar) else grammar
