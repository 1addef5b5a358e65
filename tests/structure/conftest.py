"""A tokenizer of its own and grammars over it."""

import llguidance.hf
import pytest
from structure_grammars import Grammars, small_tokenizer
from transformers import PreTrainedTokenizerFast

from whiflash_sglang.spans.vocabulary import Vocabulary, vocabulary_of


@pytest.fixture(scope="package")
def tokenizer() -> PreTrainedTokenizerFast:
    return small_tokenizer()


@pytest.fixture(scope="package")
def vocabulary(tokenizer: PreTrainedTokenizerFast) -> Vocabulary:
    return vocabulary_of(tokenizer)


@pytest.fixture(scope="package", params=["xgrammar", "llguidance"])
def grammars(request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerFast) -> Grammars:
    return Grammars(request.param, tokenizer, llguidance.hf.from_tokenizer(tokenizer))
