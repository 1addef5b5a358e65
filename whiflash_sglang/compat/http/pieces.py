"""Streams for SGLang's parsers of tool calls and reasoning, a token at a time.

These parsers lose text when a chunk holds several tokens, and a round commits several. So outputs that a parser reads
are cut into those that single tokens would have brought; they follow each other without a wait. In the process that
serves HTTP.
"""

from collections import deque
from collections.abc import AsyncIterator
from itertools import takewhile
from types import SimpleNamespace
from typing import Any

from sglang.srt.entrypoints.openai.serving_chat import OpenAIServingChat
from sglang.srt.managers.detokenizer_manager import DetokenizerManager

from whiflash_sglang.compat.patching import around, replace

_PARSED = "_whiflash_parsed"
_CONTEXT_TOKENS, _CONTEXT_CHARACTERS = 5, 32
_LOGPROBS = (
    "output_token_logprobs",
    "output_top_logprobs",
    "output_token_ids_logprobs",
    "output_token_sampling_mask",
    "output_token_sampling_logprobs",
)
"""Parts of `meta_info` with an entry for each token; in increments when the server streams those."""


def install() -> None:
    """Idempotent."""
    replace(OpenAIServingChat, "_convert_to_internal_request", _marking)


def mark(obj: Any) -> None:
    """Note that a parser reads the answer to the internal request `obj`."""
    setattr(obj, _PARSED, True)


@around
def _marking(original: Any, self: Any, request: Any, *rest: Any, **named: Any) -> Any:
    """Chat completions, and Anthropic's Messages, which SGLang serves as chat completions."""
    adapted, request = original(self, request, *rest, **named)
    if (
        self._tool_call_parsing_active(request)
        or (self.reasoning_parser and request.separate_reasoning)
        or self._encoding_output() is not None
    ):
        mark(adapted)
    return adapted, request


async def single_tokens(manager: Any, obj: Any, outputs: AsyncIterator[Any]) -> AsyncIterator[Any]:
    """The outputs of a stream that a parser reads, one for each token; all others as they are.

    manager: SGLang's TokenizerManager. obj: the internal request, before SGLang expands it to its choices.
    """
    cut = getattr(obj, _PARSED, False) and obj.stream and manager.tokenizer is not None
    if not cut:
        async for output in outputs:
            yield output
        return
    prompt = obj.input_ids or manager.tokenizer.encode((obj.text or "")[-_CONTEXT_CHARACTERS:])
    parameters = obj.sampling_params
    choices: dict[int, Cutter] = {}
    async for output in outputs:
        choice = output.get("index", 0)
        if choice not in choices:
            decoder = OneByOne(manager, prompt[-_CONTEXT_TOKENS:], parameters)
            choices[choice] = Cutter(decoder, increments=manager.incremental_streaming_output)
        for piece in choices[choice].cut(output):
            yield piece


class OneByOne(DetokenizerManager):
    """SGLang's detokenizer for one answer, given one token at a time.

    Args:
        manager: SGLang's TokenizerManager.
        context: last token ids of the prompt; first tokens are decoded beside them.
        parameters: of sampling, as the request gives them.
    """

    def __init__(self, manager: Any, context: list[int], parameters: dict[str, Any]) -> None:
        self.tokenizer = manager.tokenizer
        self.vocab_size = len(self.tokenizer) if hasattr(self.tokenizer, "__len__") else None
        self.decode_status: dict[str, Any] = {}
        self.disable_tokenizer_batch_decode = manager.server_args.disable_tokenizer_batch_decode
        self._context: list[int] | None = list(context)
        self._output = SimpleNamespace(
            rids=["answer"],
            decoded_texts=[""],
            read_offsets=[len(context)],
            finished_reasons=[None],
            no_stop_trim=[False],
            skip_special_tokens=[parameters.get("skip_special_tokens", True)],
            spaces_between_special_tokens=[parameters.get("spaces_between_special_tokens", True)],
        )

    def text_of(self, token: int) -> str:
        """What a step with this token alone would have added to the text; empty inside a character."""
        self._output.decode_ids = [[*(self._context or ()), token]]
        self._context = None
        text: str = self._decode_batch_token_id_output(self._output)[0]
        return text


class Cutter:
    """One choice's outputs, cut into those of single tokens.

    The text is always the one that arrived. A token whose text has not arrived waits: SGLang's detokenizer holds back
    more when a step ends inside a character than single tokens would have.

    Args:
        increments: whether outputs bring what is new, or everything so far.
    """

    def __init__(self, decoder: OneByOne, *, increments: bool) -> None:
        self._decoder, self._increments = decoder, increments
        self._waiting: deque[tuple[int, int]] = deque()
        self._end = 0
        """Where the text of the last token of `_waiting` ends, in characters from the answer's begin."""
        self._text = ""
        """What arrived and was not sent, which begins at `_shown`."""
        self._shown = self._sent = 0
        """Characters and tokens that were sent."""
        self._logprobs: dict[str, list[Any]] = {}

    def cut(self, output: dict[str, Any]) -> list[dict[str, Any]]:
        """The outputs to send now for one that arrived; the last one of an answer ends with what arrived as its end."""
        meta, tokens, text = output["meta_info"], output["output_ids"], output["text"]
        if not self._increments:
            tokens, text = tokens[self._sent + len(self._waiting) :], text[self._shown + len(self._text) :]
        self._text += text
        for token in tokens:
            self._end += len(self._decoder.text_of(token))
            self._waiting.append((token, self._end))
        if self._increments:
            for key in _LOGPROBS:
                self._logprobs.setdefault(key, []).extend(meta.get(key) or ())
        if meta["finish_reason"] is not None:
            return [*(self._piece(output) for _ in range(len(self._waiting) - 1)), self._last(output)]
        arrived = self._shown + len(self._text)
        return [
            self._piece(output) for _ in takewhile(lambda token: token[1] <= arrived, tuple(self._waiting))
        ]

    def _piece(self, output: dict[str, Any]) -> dict[str, Any]:
        token, end = self._waiting.popleft()
        size = max(end - self._shown, 0)
        text, self._text = self._text[:size], self._text[size:]
        self._shown += len(text)
        self._sent += 1
        meta = {**output["meta_info"], "finish_reason": None, "completion_tokens": self._sent}
        if "output_token_logprobs_length" in meta:
            meta["output_token_logprobs_length"] = min(self._sent, meta["output_token_logprobs_length"])
        if not self._increments:
            whole, tokens = output["text"][: self._shown], output["output_ids"][: self._sent]
            return {**output, "text": whole, "output_ids": tokens, "meta_info": meta}
        for key in meta.keys() & self._logprobs.keys():
            meta[key], self._logprobs[key] = self._logprobs[key][:1], self._logprobs[key][1:]
        return {**output, "text": text, "output_ids": [token], "meta_info": meta}

    def _last(self, output: dict[str, Any]) -> dict[str, Any]:
        if not self._increments:
            return output
        meta = {**output["meta_info"]}
        for key in meta.keys() & self._logprobs.keys():
            meta[key] = self._logprobs[key]
        tokens = [token for token, _ in self._waiting]
        return {**output, "text": self._text, "output_ids": tokens, "meta_info": meta}
