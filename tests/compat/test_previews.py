"""A preview's prompt is cut where no later text changes its tokens."""

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from whiflash_sglang.http.previews import known_tokens
from whiflash_sglang.spans.hints import HintError

MERGES = [("a", "b"), ("ab", "c"), ("\n", "\n"), (";", "\n\n"), (" ", "x")]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Merges cross words and lines, as without a pre-tokenizer."""
    pieces = [*map(chr, range(128)), "é", *("".join(pair) for pair in MERGES)]
    made = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=MERGES))
    made.decoder = decoders.Fuse()
    made.add_special_tokens(["<s>"])
    return PreTrainedTokenizerFast(tokenizer_object=made)


@pytest.mark.parametrize(
    ("text", "known"),
    [("y ab", ["y"]), ("z y;\n", ["z"]), ("y;\n\nz", ["y"]), ("y; ab\nz", ["y", ";", " ", "ab"]), ("ab", [])],
)
def test_no_later_text_changes_known_tokens(tokenizer: PreTrainedTokenizerFast, text: str, known: list[str]) -> None:
    prompt = tokenizer.encode(f"END<s>{text}END<s>later")
    found = known_tokens(tokenizer, prompt, "END")
    assert tokenizer.convert_ids_to_tokens(found) == [*"END", "<s>", *known]
    for later in ("c", "\n\n", " x", "ab", ";\n"):
        assert tokenizer.encode(f"END<s>{text}{later}")[: len(found)] == found


@pytest.mark.parametrize("prompt", ["nothing of it", "END follows nothing"])
def test_a_prompt_without_known_tokens_is_refused(tokenizer: PreTrainedTokenizerFast, prompt: str) -> None:
    with pytest.raises(HintError, match=r"whiflash\.preview.*'END'"):
        known_tokens(tokenizer, tokenizer.encode(prompt), "END")
