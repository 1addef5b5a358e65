"""Cut streams into the pieces that plain decoding sends, for consumers that expect one token per output.

A round commits several tokens, so an output of SGLang's has several. Most consumers were written for one: parsers of
tool calls and reasoning lose text, Ollama's routes drop the last output's text, chat completions attach
log-probabilities to text of the same output. So their streams are cut into the outputs that plain decoding would have
sent at the request's stream interval, without waits between them. Consumers that only concatenate outputs get them as
they arrive. Runs in the process that serves HTTP.
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

from whiflash_sglang.engine.supported import has
from whiflash_sglang.http.reader import Call, as_chat, of_choice, parameters_of

_CONTEXT_TOKENS, _CONTEXT_CHARACTERS = 5, 32
_COUNTS = ("completion_tokens", "reasoning_tokens", "output_token_logprobs_length", "output_token_sampling_mask_length")
"""Numbers of `meta_info` that grow by at most one a token."""


def are_read_one_by_one(manager: Any, obj: Any, call: Call | None) -> bool:
    """Whether outputs are streamed to a consumer that does more than concatenate them.

    manager: SGLang's TokenizerManager. obj: the internal request. Chat completions, and Anthropic's Messages, which
    SGLang serves as chat completions, have such a consumer if SGLang parses their text or adds log-probabilities.
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
    """Yield the outputs of a stream as plain decoding would send them.

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
    """Return the last token ids of the prompt that `choice` answers."""
    prompt: Any = obj.input_ids or obj.text or []
    if not isinstance(prompt, str) and not all(isinstance(token, int) for token in prompt):
        prompt = of_choice(prompt, obj, choice)
    if isinstance(prompt, str):
        prompt = manager.tokenizer.encode(prompt[-_CONTEXT_CHARACTERS:])
    return list(prompt[-_CONTEXT_TOKENS:])


class Detokenizer(DetokenizerManager):
    """Decides for one answer, as SGLang's scheduler and detokenizer do, when tokens are sent and as which text.

    Args:
        manager: SGLang's TokenizerManager.
        context: last token ids of the prompt; the answer's first tokens are decoded with them.
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
        """Add the next token. Return the number and text of all unsent tokens if SGLang sends them now, else None."""
        self._unsent.append(token)
        return self.flush() if self._seen.sends(token, len(self._unsent)) else None

    def flush(self) -> tuple[int, str]:
        """Return the number and the text of all unsent tokens, as one output. The text is empty inside a character."""
        self._output.decode_ids = [[*(self._context or ()), *self._unsent]]
        self._context, size, self._unsent = None, len(self._unsent), []
        return size, self._decode_batch_token_id_output(self._output)[0]


class _Seen(Req):  # type: ignore[misc]
    """A request with only the members by which SGLang's scheduler decides whether to send its unsent tokens."""

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
    """Cuts the outputs of one choice into those that plain decoding would send.

    The text is always the one that arrived. An output whose text has not arrived waits: SGLang's detokenizer holds back
    more text when a step ends inside a character than it would for single tokens.

    Args:
        increments: whether outputs have only new tokens and text, or everything so far.
    """

    def __init__(self, decoder: Detokenizer, *, increments: bool) -> None:
        self._decoder, self._increments = decoder, increments
        self._waiting: deque[tuple[int, int]] = deque()
        """Outputs that wait: their sizes in tokens, and the ends of their texts in characters of the answer."""
        self._end = self._seen = 0
        """End of the last waiting output's text; number of tokens that the decoder has seen."""
        self._tokens: list[int] = []
        self._text = ""
        """Tokens and text that arrived. Those before `_sent` and `_shown` were sent."""
        self._shown = self._sent = 0
        self._records: dict[str, list[Any]] = {}

    def cut(self, output: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the outputs to send now that `output` has arrived; only the answer's last one has a finish reason."""
        meta, tokens, text = output["meta_info"], output["output_ids"], output["text"]
        if self._increments:
            self._tokens += tokens
            self._text += text
            for key in meta.keys() & _INCREMENTAL_STREAMING_META_INFO_KEYS:
                self._records.setdefault(key, []).extend(meta[key])
        else:
            self._tokens, self._text = tokens, text
        for token in self._tokens[self._seen :]:
            if (taken := self._decoder.take(token)) is not None:
                size, decoded = taken
                self._end += len(decoded)
                self._waiting.append((size, self._end))
        self._seen, arrived = len(self._tokens), len(self._text)
        ready = sum(1 for _ in takewhile(lambda waiting: waiting[1] <= arrived, self._waiting))
        if meta["finish_reason"] is None:
            return [self._piece(output, *self._waiting.popleft()) for _ in range(ready)]
        unsent = self._seen - self._sent
        is_whole = sum(size for size, _ in islice(self._waiting, ready)) == unsent
        pieces = [self._piece(output, *self._waiting.popleft()) for _ in range(ready - is_whole)]
        return [*pieces, self._piece(output, self._seen - self._sent, arrived, ends=True)]

    def _piece(self, output: dict[str, Any], size: int, end: int, *, ends: bool = False) -> dict[str, Any]:
        """Return an output of the next `size` tokens, with the text up to character `end`. ends: the answer's last."""
        sent, shown = (self._sent, self._shown) if self._increments else (0, 0)
        self._sent, self._shown = self._sent + size, max(self._shown, end)
        if ends and not self._increments:
            return output
        meta = {**output["meta_info"]}
        if not ends:
            meta["finish_reason"] = None
            meta |= {key: min(self._sent, meta[key]) for key in _COUNTS if key in meta}
        for key in meta.keys() & self._records.keys():
            records = self._records[key]
            meta[key], self._records[key] = (records, []) if ends else (records[:size], records[size:])
        text, tokens = self._text[shown : self._shown], self._tokens[sent : self._sent]
        return {**output, "text": text, "output_ids": tokens, "meta_info": meta}
