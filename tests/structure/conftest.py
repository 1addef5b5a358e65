"""A tokenizer of its own and grammars over it."""

import json
import sys
from pathlib import Path

import llguidance.hf
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from structure_grammars import NAMES, Grammars
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from whiflash_sglang.spans.vocabulary import Vocabulary, vocabulary_of


@pytest.fixture(scope="package")
def tokenizer() -> PreTrainedTokenizerFast:
    """A small byte-level BPE with merges across punctuation, learned from JSON."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    texts = [
        json.dumps({name: value, name + "s": [value]}) for name in NAMES for value in ("Paris", 3, True, None)
    ]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, special_tokens=["<|end|>"])
    backend.train_from_iterator(texts * 5, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")


@pytest.fixture(scope="package")
def vocabulary(tokenizer: PreTrainedTokenizerFast) -> Vocabulary:
    return vocabulary_of(tokenizer)


@pytest.fixture(scope="package", params=["xgrammar", "llguidance"])
def grammars(request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerFast) -> Grammars:
    return Grammars(request.param, tokenizer, llguidance.hf.from_tokenizer(tokenizer))
