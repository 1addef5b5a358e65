"""A preview's prompt is cut where no later text changes its tokens."""

import asyncio
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
from sglang.srt.managers.io_struct import GenerateReqInput
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from whiflash_sglang.engine.scheduler.session_tree import LINE
from whiflash_sglang.http.callers import NOBODY
from whiflash_sglang.http.previews import known_tokens, prepare, serves_previews
from whiflash_sglang.http.sessions import CLOSE, scope, scoped_body
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


def test_many_special_tokens_are_decoded_together(tokenizer: PreTrainedTokenizerFast) -> None:
    with patch.object(tokenizer, "decode", wraps=tokenizer.decode) as decode:
        found = known_tokens(tokenizer, tokenizer.encode("<s>z y END" + "<s>" * 1000), "END")
    assert (tokenizer.convert_ids_to_tokens(found), decode.call_count < 16) == (["<s>", "z"], True)


def test_a_preview_is_no_request_that_is_answered(tokenizer: PreTrainedTokenizerFast) -> None:
    flags = SimpleNamespace(pp_size=1, disaggregation_mode="null", enable_session_radix_cache=True)
    flags.attn_dp_size, flags.enable_dp_attention, flags.disable_radix_cache = 1, False, False
    manager = SimpleNamespace(server_args=flags, tokenizer=tokenizer, context_len=64)

    def prepared(**fields: Any) -> GenerateReqInput:
        asked = GenerateReqInput(session_id=f"{LINE}a", **fields)
        asyncio.run(prepare(manager, asked, "END"))
        return asked

    assert not prepared(text="z y; END").log_metrics
    for spelling in ({"attn_dp_size": 2}, {"enable_dp_attention": True}, {"disable_radix_cache": True}):
        assert not serves_previews(SimpleNamespace(**{**vars(flags), **spelling}))
    refused: list[dict[str, Any]] = [{"text": text} for text in ("no marker", "END first", "y; " * 64 + "END")]
    refused += [{"text": "z y; END", "return_logprob": True}, {"input_ids": [-1]}, {"input_embeds": [[0.5]]}]
    for fields in refused:
        with pytest.raises(HintError, match=r"whiflash\.preview"):
            prepared(**fields)


def test_a_session_is_of_both_keys_of_its_tenant() -> None:
    ids, server = list[str](), SimpleNamespace(dp_size=1, attn_dp_size=1)
    for salt, key in (("", ""), ("a", ""), ("", "a"), (LINE, "")):
        body = {"session_id": "s", "cache_salt": salt, "extra_key": key}
        scope(asked := SimpleNamespace(**body), None, server)
        ids += asked.session_id, scoped_body(CLOSE, body, NOBODY, trusted=False)["session_id"]
    assert (len({*ids}), ids[0], any(LINE in one for one in ids)) == (4, "\x1fs", False)
