"""The GGUF's byte-level BPE vocabulary as a Hugging Face fast tokenizer.

GGUF names the pre-tokeniser ("smollm") without spelling it out: SmolLM splits every digit off, then applies
GPT-2's pattern over bytes. The vocabulary, the merges, the special tokens and the template are the file's
own.
"""

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

_CONTROL_TOKEN = 3  # gguf.TokenType.CONTROL


def write_tokenizer(fields: dict[str, Any], out: Path) -> None:
    """Write `tokenizer.json`, `tokenizer_config.json` and the chat template from GGUF metadata into `out`.

    Raises `ValueError` for a vocabulary or a pre-tokeniser other than SmolLM's.
    """
    if (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) != ("gpt2", "smollm"):
        raise ValueError(
            f"expected a 'gpt2' vocabulary with the 'smollm' pre-tokeniser, found "
            f"{fields['tokenizer.ggml.model']!r} with {fields['tokenizer.ggml.pre']!r}"
        )
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ")) for pair in fields["tokenizer.ggml.merges"]]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    types = fields["tokenizer.ggml.token_type"]
    controls = [token for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL_TOKEN]
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in controls])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=tokens[fields["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[fields["tokenizer.ggml.eos_token_id"]],
        unk_token=tokens[fields["tokenizer.ggml.unknown_token_id"]],
        pad_token=tokens[fields["tokenizer.ggml.padding_token_id"]],
        model_max_length=int(fields["llama.context_length"]),
        clean_up_tokenization_spaces=False,
        chat_template=fields["tokenizer.chat_template"],
    )
    tokenizer.save_pretrained(out)
