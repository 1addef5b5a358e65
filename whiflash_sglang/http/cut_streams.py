"""Cut streams for consumers that were written for one token per output.

A round commits several tokens, so an output of SGLang's has several. Its parsers of tool calls and reasoning lose text
if a mark (a bracket, a quote, a line's end) and other text come together. Ollama's routes drop the last output's text,
and chat completions attach log-probabilities to text of the same output. So their streams are cut without waits between
the pieces: for parsers at every token with a mark, for the others into the outputs that plain decoding would have
sent at the request's stream interval. Consumers that only concatenate outputs get them as they arrive. Runs in the
process that serves HTTP.
"""

from array import array
from collections.abc import AsyncIterator
from itertools import takewhile
from typing import Any, Literal

from sglang.srt.entrypoints import http_server
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.managers.tokenizer_manager import _INCREMENTAL_STREAMING_META_INFO_KEYS
from sglang.srt.runtime_context import get_serving
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.utils import find_printable_text

from whiflash_sglang.http.reader import Call, as_chat, of_choice, parameters_of
from whiflash_sglang.http.token_texts import MARK, WORD, Decoder, decoder_of

Cuts = Literal["tokens", "marks"]
"""Places at which a stream is cut: those of plain decoding, or of these the ones at an output's marks."""
_COUNTS = ("completion_tokens", "reasoning_tokens", "output_token_logprobs_length", "output_token_sampling_mask_length")
"""Numbers of `meta_info` that grow by at most one a token."""


def cuts_of(manager: Any, obj: Any, call: Call | None) -> Cuts | None:
    """Return where a request's outputs are cut; None if its consumer only concatenates them.

    manager: SGLang's TokenizerManager. obj: the internal request. Chat completions, and Anthropic's Messages, which
    SGLang serves as such, do more than concatenate if SGLang parses their text or adds log-probabilities.
    """
    if not getattr(obj, "stream", False) or manager.tokenizer is None:
        return None
    if call is None:
        return "tokens"
    if call.form in ("native", "completion"):
        return None
    state, body, is_chat = http_server.app.state, call.body, call.form == "chat"
    chat = state.openai_serving_chat
    reads_tokens = chat._encoding_output() is not None
    if call.form == "responses":
        return "tokens" if reads_tokens or state.openai_serving_responses.use_harmony else "marks"
    # In an answer without channels, SGLang's parser of gpt-oss takes single words as their marks.
    by_words = "gpt-oss" in (chat.reasoning_parser, chat.tool_call_parser)
    if reads_tokens or by_words or (is_chat and body.get("logprobs")):
        return "tokens"
    is_parsed = (
        (chat.reasoning_parser and (not is_chat or body.get("separate_reasoning", True)))
        or any(isinstance(message, dict) and message.get("tools") for message in body.get("messages") or ())
        or chat._tool_call_parsing_active(as_chat(call))
    )
    return "marks" if is_parsed else None


async def cut(manager: Any, obj: Any, call: Call | None, outputs: AsyncIterator[Any], cuts: Cuts) -> AsyncIterator[Any]:
    """Yield the outputs of a stream in pieces. The events that a route sends for an output leave together.

    manager: SGLang's TokenizerManager, with a tokenizer. obj: the internal request, before SGLang expands it to its
    choices.
    """
    choices: dict[int, Cutter] = {}
    async for output in outputs:
        choice = output.get("index", 0)
        if choice not in choices:
            own = of_choice(parameters_of(obj), obj, choice) or {}
            parameters = {**(manager.preferred_sampling_params or {}), **own}
            decoder, holder = decoder_of(manager, parameters), holder_of(manager.tokenizer, parameters)
            choices[choice] = Cutter(decoder, holder, increments=manager.incremental_streaming_output, cuts=cuts)
        if call is not None:
            call.holds = True
        for piece in choices[choice].cut(output):
            yield piece
        if call is not None and call.flush is not None:
            await call.flush()


def holder_of(tokenizer: Any, parameters: dict[str, Any]) -> Req:
    """Return a request with only the members by which SGLang's scheduler holds back text that may become a stop string.

    parameters: of sampling, as the request gives them.
    """
    params = SamplingParams(**{name: parameters.get(name) for name in ("stop", "stop_regex", "stream_interval")})
    params.normalize(tokenizer)
    params.stream_interval = params.stream_interval or get_serving().stream_interval
    holder = Req.__new__(Req)
    holder.tokenizer, holder.sampling_params, holder.output_ids = tokenizer, params, array("q")
    return holder


Place = tuple[int, int]
"""A place in an answer at which it is cut: tokens before it, and characters before it."""


class Cutter:
    """Cuts the outputs of one choice.

    The text is always the one that arrived. A piece whose text has not arrived waits: SGLang's detokenizer holds back
    more text when a step ends inside a character than it would for single tokens.

    Args:
        increments: whether outputs have only new tokens and text, or everything so far.
    """

    def __init__(self, decoder: Decoder, holder: Req, *, increments: bool, cuts: Cuts) -> None:
        self._decoder, self._holder, self._increments, self._at_marks = decoder, holder, increments, cuts == "marks"
        self._waiting: list[Place] = []
        self._grows = False
        """Ends of the pieces that wait, and whether the last one begins with a word and has no `MARK`."""
        self._end = self._seen = 0
        """End of the text in whole characters; number of tokens that arrived."""
        self._kinds: list[int] = []
        """Kinds of the tokens that are in no piece yet."""
        self._tokens: list[int] = []
        self._text = ""
        """Tokens and text that arrived. Those before `_sent` and `_shown` were sent."""
        self._shown = self._sent = 0
        self._records: dict[str, list[Any]] = {}

    def cut(self, output: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the pieces to send now that `output` has arrived; only the answer's last one has a finish reason."""
        meta, tokens, text = output["meta_info"], output["output_ids"], output["text"]
        is_last = meta["finish_reason"] is not None
        if self._increments:
            self._tokens += tokens
            self._text += text
            for key in meta.keys() & _INCREMENTAL_STREAMING_META_INFO_KEYS:
                self._records.setdefault(key, []).extend(meta[key])
        else:
            # SGLang's own list grows while the output of one of several choices waits for its turn.
            grown = not is_last and len(tokens) > meta["completion_tokens"]
            self._tokens, self._text = tokens[: meta["completion_tokens"]] if grown else tokens, text
        joins = self._at_marks and not is_last  # what parsers have sent at the end depends on the last two pieces
        for token in self._tokens[self._seen :]:
            self._take(token, joins)
        self._seen, arrived = len(self._tokens), len(self._text)
        if not self._decoder.begun and not is_last and self._end != arrived:  # some tokenizers join texts otherwise
            self._end = arrived
            if self._waiting and not self._kinds:
                self._waiting[-1] = self._seen, arrived
        ready = list(takewhile(lambda place: place[1] <= arrived, self._waiting))
        if is_last:  # the piece that ends the answer has all that is left
            ready = [*(place for place in ready if place[0] < self._seen), (self._seen, arrived)]
        else:
            del self._waiting[: len(ready)]
        return [self._cut(output, *place) for place in ready]

    def _take(self, token: int, joins: bool) -> None:
        """Add the next token, and a piece if plain decoding would send it now. joins: a waiting piece may grow."""
        text, kind = self._decoder.take(token)
        self._end = end = self._end + len(text)
        if self._decoder.begun:
            end += len(find_printable_text(self._decoder.begun))
        holder, kinds = self._holder, self._kinds
        kinds.append(kind)
        holder.output_ids.append(token)
        enough = len(kinds) >= holder.sampling_params.stream_interval or len(kinds) == len(holder.output_ids)
        if not enough or holder.check_match_stop_str_prefix():
            return
        is_plain = MARK not in kinds
        if joins and is_plain and self._waiting and self._grows:
            self._waiting.pop()
        else:
            self._grows = is_plain and kinds[0] == WORD
        self._waiting.append((len(holder.output_ids), end))
        kinds.clear()

    def _cut(self, output: dict[str, Any], tokens_end: int, end: int) -> dict[str, Any]:
        """Return an output of the next tokens, up to `tokens_end`, with the text up to `end`."""
        size = tokens_end - self._sent
        sent, shown = (self._sent, self._shown) if self._increments else (0, 0)
        self._sent, self._shown = tokens_end, max(self._shown, end)
        ends = self._sent == self._seen
        if ends and self._shown == len(self._text) and not self._increments:
            return {**output, "output_ids": self._tokens}
        meta = {**output["meta_info"]}
        if not ends:
            meta["finish_reason"] = None
            meta |= {key: min(self._sent, meta[key]) for key in _COUNTS if key in meta}
        for key in meta.keys() & self._records.keys():
            records = self._records[key]
            meta[key], self._records[key] = (records, []) if ends else (records[:size], records[size:])
        text, tokens = self._text[shown : self._shown], self._tokens
        if self._increments or not self._at_marks:  # parsers read no tokens; SGLang's outputs share a growing list, too
            tokens = tokens[sent : self._sent]
        return {**output, "text": text, "output_ids": tokens, "meta_info": meta}
