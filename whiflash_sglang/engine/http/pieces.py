"""Streams in the pieces that plain decoding sends, for whoever reads an output as if it had one token.

A round commits several tokens, so an output of SGLang's has several. Most consumers were written for one: parsers of
calls and reasoning lose text, Ollama's routes drop the last output's, chat completions attach log-probabilities to text
of the same output. So every stream is cut into the outputs that plain decoding would have sent at the request's stream
interval; they follow each other without a wait. Consumers that only add outputs up get them as they come. In the
process that serves HTTP.
"""

from array import array
from collections import deque
from collections.abc import AsyncIterator
from itertools import islice, takewhile
from types import SimpleNamespace
from typing import Any

from sglang.srt.entrypoints import http_server
from sglang.srt.managers.detokenizer_manager import DetokenizerManager
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.managers.tokenizer_manager import _INCREMENTAL_STREAMING_META_INFO_KEYS
from sglang.srt.runtime_context import get_serving
from sglang.srt.sampling.sampling_params import SamplingParams

from whiflash_sglang.engine.http.requests import Call, as_chat, of_choice, parameters_of
from whiflash_sglang.engine.supported import has

_CONTEXT_TOKENS, _CONTEXT_CHARACTERS = 5, 32
_COUNTS = (
    "completion_tokens",
    "reasoning_tokens",
    "output_token_logprobs_length",
    "output_token_sampling_mask_length",
)
"""Numbers of `meta_info` that grow by at most one a token."""


def are_read_one_by_one(manager: Any, obj: Any, call: Call | None) -> bool:
    """Whether outputs are a stream that is read by somebody who does not only add them up.

    manager: SGLang's TokenizerManager. obj: the internal request. Chat completions, and Anthropic's Messages, which
    SGLang serves as chat completions, are read where something parses them.
    """
    if not getattr(obj, "stream", False) or manager.tokenizer is None:
        return False
    if call is None or call.form == "responses":
        return True
    if call.form in ("native", "completion"):
        return False
    chat, body, is_chat = http_server.app.state.openai_serving_chat, call.body, call.form == "chat"
    return bool(
        (is_chat and body.get("logprobs"))
        or (chat.reasoning_parser and (not is_chat or body.get("separate_reasoning", True)))
        or any(isinstance(message, dict) and message.get("tools") for message in body.get("messages") or ())
        or chat._tool_call_parsing_active(as_chat(call))
        or (has("0.5.23") and chat._encoding_output() is not None)
    )


async def as_plain(manager: Any, obj: Any, outputs: AsyncIterator[Any]) -> AsyncIterator[Any]:
    """The outputs of a stream as plain decoding sends them.

    manager: SGLang's TokenizerManager, with a tokenizer. obj: the internal request, before SGLang expands it to its
    choices.
    """
    choices: dict[int, Cutter] = {}
    async for output in outputs:
        choice = output.get("index", 0)
        if choice not in choices:
            own = of_choice(parameters_of(obj), obj, choice) or {}
            parameters = {**(manager.preferred_sampling_params or {}), **own}
            decoder = Detokenizer(manager, _context(manager, obj, choice), parameters)
            choices[choice] = Cutter(decoder, increments=manager.incremental_streaming_output)
        for piece in choices[choice].cut(output):
            yield piece


def _context(manager: Any, obj: Any, choice: int) -> list[int]:
    """The last token ids of the prompt that a choice answers."""
    prompt: Any = obj.input_ids or obj.text or []
    if not isinstance(prompt, str) and not all(isinstance(token, int) for token in prompt):
        prompt = of_choice(prompt, obj, choice)
    if isinstance(prompt, str):
        prompt = manager.tokenizer.encode(prompt[-_CONTEXT_CHARACTERS:])
    return list(prompt[-_CONTEXT_TOKENS:])


class Detokenizer(DetokenizerManager):
    """SGLang's scheduler and detokenizer for one answer: when its tokens are sent, and as which text.

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
        given = {name: parameters.get(name) for name in ("stop", "stop_regex", "stream_interval")}
        self._seen = _Seen(self.tokenizer, SamplingParams(**given))
        self._unsent: list[int] = []
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

    def take(self, token: int) -> tuple[int, str] | None:
        """The next token; where an output ends with it, that output's tokens and text, else None."""
        self._unsent.append(token)
        return self.flush() if self._seen.sends(token, len(self._unsent)) else None

    def flush(self) -> tuple[int, str]:
        """An output of the tokens that were not sent. Its text is empty inside a character."""
        self._output.decode_ids = [[*(self._context or ()), *self._unsent]]
        self._context, size, self._unsent = None, len(self._unsent), []
        return size, self._decode_batch_token_id_output(self._output)[0]


class _Seen(Req):  # type: ignore[misc]
    """Members of a request that SGLang's scheduler reads to know whether its unsent tokens are sent."""

    def __init__(self, tokenizer: Any, params: SamplingParams) -> None:
        params.normalize(tokenizer)
        self.tokenizer, self.sampling_params = tokenizer, params
        self.output_ids = array("q")
        self._interval = params.stream_interval or get_serving().stream_interval

    def sends(self, token: int, unsent: int) -> bool:
        self.output_ids.append(token)
        enough = unsent >= self._interval or unsent == len(self.output_ids)
        return enough and not self.check_match_stop_str_prefix()


class Cutter:
    """One choice's outputs, cut into those that plain decoding sends.

    The text is always the one that arrived. An output whose text has not arrived waits: SGLang's detokenizer holds back
    more when a step ends inside a character than single tokens would have.

    Args:
        increments: whether outputs bring what is new, or everything so far.
    """

    def __init__(self, decoder: Detokenizer, *, increments: bool) -> None:
        self._decoder, self._increments = decoder, increments
        self._waiting: deque[tuple[int, int]] = deque()
        """Sizes of outputs in tokens, and where their texts end, in characters from the answer's begin."""
        self._end = self._seen = 0
        """End of the last of them; tokens that the decoder has seen."""
        self._tokens: list[int] = []
        self._text = ""
        """Text that arrived and was not sent; it begins at `_shown`, its tokens and records at `_sent`."""
        self._shown = self._sent = 0
        self._records: dict[str, list[Any]] = {}

    def cut(self, output: dict[str, Any]) -> list[dict[str, Any]]:
        """The outputs to send now for one that arrived; the last one of an answer ends with what arrived as its end."""
        meta, tokens, text = output["meta_info"], output["output_ids"], output["text"]
        if not self._increments:
            tokens, text = tokens[self._seen :], text[self._shown + len(self._text) :]
        self._seen += len(tokens)
        self._text += text
        self._tokens += tokens
        if self._increments:
            for key in meta.keys() & _INCREMENTAL_STREAMING_META_INFO_KEYS:
                self._records.setdefault(key, []).extend(meta[key])
        for token in tokens:
            if (taken := self._decoder.take(token)) is not None:
                size, decoded = taken
                self._end += len(decoded)
                self._waiting.append((size, self._end))
        arrived = self._shown + len(self._text)
        ready = sum(1 for _ in takewhile(lambda waiting: waiting[1] <= arrived, self._waiting))
        if meta["finish_reason"] is None:
            return [self._piece(output, *self._waiting.popleft()) for _ in range(ready)]
        whole = sum(size for size, _ in islice(self._waiting, ready)) == len(self._tokens)
        pieces = [self._piece(output, *self._waiting.popleft()) for _ in range(ready - whole)]
        return [*pieces, self._piece(output, len(self._tokens), arrived, ends=True)]

    def _piece(self, output: dict[str, Any], size: int, end: int, *, ends: bool = False) -> dict[str, Any]:
        """The next `size` tokens, with the text up to `end`."""
        fresh = max(end - self._shown, 0)
        text, self._text = self._text[:fresh], self._text[fresh:]
        tokens, self._tokens = self._tokens[:size], self._tokens[size:]
        self._shown += len(text)
        self._sent += size
        if ends and not self._increments:
            return output
        meta = {**output["meta_info"]}
        if not ends:
            meta["finish_reason"] = None
            meta |= {key: min(self._sent, meta[key]) for key in _COUNTS if key in meta}
        if not self._increments:
            whole = output["output_ids"][: self._sent]
            return {**output, "text": output["text"][: self._shown], "output_ids": whole, "meta_info": meta}
        for key in meta.keys() & self._records.keys():
            records = self._records[key]
            meta[key], self._records[key] = (records, []) if ends else (records[:size], records[size:])
        return {**output, "text": text, "output_ids": tokens, "meta_info": meta}
