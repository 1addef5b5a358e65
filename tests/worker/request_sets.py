"""Requests that tests ask plain decoding and WHIFLASH, by what they ask for."""

import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import cycle, product
from typing import Any

import torch
from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest
from sglang.srt.function_call.function_call_parser import FunctionCallParser
from sglang.srt.sampling.custom_logit_processor import (
    CustomLogitProcessor,
    DeepseekOCRNoRepeatNGramLogitProcessor,
    DisallowedTokensLogitsProcessor,
    ThinkingBudgetLogitProcessor,
)
from tiny_models import FAVOURED_TOKENS
from traffic import Arrival, mixed

OPTIONS: dict[str, Any] = {
    "max_running_requests": 6,
    "skip_tokenizer_init": False,
    "constrained_json_disable_any_whitespace": True,
}
"""Arguments of an engine whose requests have grammars."""

KEYS: dict[str, dict[str, Any]] = {
    "name": {"type": "string", "maxLength": 12},
    "kind": {"enum": ["alpha", "beta", "gamma"]},
    "where": {"const": "at home, as ever"},
    "count": {"type": "integer", "minimum": 0, "maximum": 999},
}


def schema(*names: str) -> str:
    """Schema of an object with these keys."""
    keys = {name: KEYS[name] for name in names}
    return json.dumps({"type": "object", "properties": keys, "required": list(names), "additionalProperties": False})


SHORT_SCHEMA, SCHEMA = schema("name", "kind", "count"), schema(*KEYS)
_CALL = {"type": "json_schema", "json_schema": json.loads(SCHEMA), "max_whitespace_cnt": 1}
TAG = json.dumps(
    {
        "type": "structural_tag",
        "format": {
            "type": "triggered_tags",
            "tags": [
                {"type": "tag", "begin": f'<call>{{"name":"{name}", "arguments":', "content": _CALL, "end": "}</call>"}
                for name in ("look_up", "look_out")
            ],
            "triggers": ["<call>"],
            "at_least_one": True,
        },
    }
)
GRAMMARS: dict[str, dict[str, Any]] = {
    "schema": {"json_schema": SCHEMA},
    "tag": {"structural_tag": TAG},
    "regex": {"regex": "(red|green|blue), and once more: (red|green|blue)(; never again){2}"},
    "ebnf": {"ebnf": 'root ::= "begin " word " then " word " end"\nword ::= [a-z]{2,9}'},
}
CONSTRAINED: dict[str, dict[str, Any]] = {
    "schema": {"ignore_eos": False, "json_schema": SHORT_SCHEMA, "max_new_tokens": 90},
    "cut-short": {"json_schema": SHORT_SCHEMA, "max_new_tokens": 21},
    "regex": {"ignore_eos": False, "regex": "(red|green|blue)( (red|green|blue)){3}", "max_new_tokens": 60},
    "penalised": {"ignore_eos": False, "json_schema": SHORT_SCHEMA, "frequency_penalty": 0.4, "max_new_tokens": 90},
    "stop-string": {"stop": ["rs", "k", "m"], "max_new_tokens": 50},
    "free": {"max_new_tokens": 50},
}
STOPS: dict[str, dict[str, Any]] = {
    "later-listed-first": {"stop": ["Z", "N", "G", "J", "R"]},
    "token-before-string": {"ignore_eos": False, "stop_token_ids": [70, 77], "stop": ["I", "L", "Q"]},
    "regex": {"stop_regex": ["[P-S][D-J]", "K.?L"]},
    "regex-at-the-end": {"stop_regex": ["[G-I]$", "^[D-F][D-S][G-J]"]},
    "kept": {"stop": ["H", "M"], "no_stop_trim": True},
    "in-a-grammar": {"ignore_eos": False, "regex": "[D-S]{20}", "stop": ["N", "GE", "H"]},
    "behind-a-grammar": {"ignore_eos": False, "regex": "[D-S]{9}", "stop": ["ZZ"]},
    "at-least": {"ignore_eos": False, "stop_token_ids": [70, 74, 77, 80], "min_new_tokens": 9},
    "ignored": {"ignore_eos": True, "stop_token_ids": [70, 74, 77, 80], "max_new_tokens": 13},
    "more-than-rounds-know": {"ignore_eos": False, "stop_token_ids": [*range(1, 9), 70, 74, 77, 80]},
}
PENALISED: dict[str, dict[str, Any]] = {
    "frequency": {"frequency_penalty": 0.8},
    "presence": {"presence_penalty": 1.1},
    "repetition": {"repetition_penalty": 1.4},
    "three": {"frequency_penalty": 0.6, "presence_penalty": 0.3, "repetition_penalty": 1.3},
    "min-new-tokens": {"min_new_tokens": 12, "stop_token_ids": [69, 70, 75, 80]},
    "logit-bias": {"logit_bias": {"70": 2.0, "80": -3.0}},
    "plain": {},
    "sampled": {"temperature": 1.0},
}
RATED: dict[str, dict[str, Any]] = {
    "plain": {},
    "values-only": {"top_logprobs_num": 0, "token_ids_logprob": None},
    "frequency": {"frequency_penalty": 0.6, "presence_penalty": 0.3, "top_logprobs_num": 1},
    "repetition": {"repetition_penalty": 1.3, "top_logprobs_num": 5, "token_ids_logprob": None},
    "bias": {"logit_bias": {"70": 2.0, "80": -3.0}, "top_logprobs_num": 0, "token_ids_logprob": [70]},
    "grammar": {"regex": "(red|green|blue)( (red|green|blue)){9}", "ignore_eos": False},
    "processor": {
        "custom_logit_processor": DisallowedTokensLogitsProcessor.to_str(),
        "custom_params": {"token_ids": [70, 73, 76]},
    },
    "stopped": {"stop": ["EE", "N", "I"]},
    "prompt-too": {"logprob_start_len": 0},
    "not-asked": {"return_logprob": False},
}
SAMPLED = {name: {"temperature": 0.8, **params} for name, params in RATED.items()}
FILTERED = {name: {"top_p": 0.8, "top_k": 20, **params} for name, params in SAMPLED.items()}
"""All of a batch alike: SGLang draws from sorted probabilities where any request of it filters them."""
SEEDED: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 1.0},
    "top-p": {"temperature": 1.0, "top_p": 0.8},
    "top-k": {"temperature": 1.2, "top_k": 5},
    "frequency": {"temperature": 1.0, "frequency_penalty": 0.6},
}
STATES: dict[str, dict[str, Any]] = {
    "all": {"return_hidden_states": True},
    "last": {"return_hidden_states": "last"},
    "last-stopped": {"return_hidden_states": "last", "stop": ["E", "N"]},
    "all-stopped": {"return_hidden_states": True, "stop_token_ids": [70, 77, 80], "ignore_eos": False},
    "none": {},
}
THINK, THOUGHT, NEWLINE = 5, 6, 10


class TinyThinkingBudget(ThinkingBudgetLogitProcessor):
    """SGLang's own, for a tokenizer of bytes."""

    THINKING_START_TOKEN_ID = THINK
    THINKING_END_TOKEN_ID = THOUGHT
    NEW_LINE_TOKEN_ID = NEWLINE


class Counting(CustomLogitProcessor):
    """Keeps state between calls: it forbids a token at every third one."""

    def __call__(self, logits: torch.Tensor, custom_param_list: list[dict[str, Any]] | None = None) -> torch.Tensor:
        for row, params in enumerate(custom_param_list or []):
            params["calls"] = params.get("calls", 0) + 1
            if params["calls"] % 3 == 0:
                logits[row, logits[row].argmax()] = -torch.inf
        return logits


class Own(CustomLogitProcessor):
    """A client's own, though it does what one of SGLang's does."""

    def __call__(self, logits: torch.Tensor, custom_param_list: list[dict[str, Any]] | None = None) -> torch.Tensor:
        return logits.index_fill(1, torch.tensor(FAVOURED_TOKENS[1::2]), -torch.inf)


PROCESSORS: dict[str, tuple[type[CustomLogitProcessor], dict[str, Any]]] = {
    "thinking": (TinyThinkingBudget, {"thinking_budget": 9}),
    "no-bigram-twice": (DeepseekOCRNoRepeatNGramLogitProcessor, {"ngram_size": 2, "window_size": 60}),
    "disallowed": (DisallowedTokensLogitsProcessor, {"token_ids": list(FAVOURED_TOKENS[::2])}),
    "own": (Own, {}),
    "counting": (Counting, {}),
}
BUDGETS: dict[str, tuple[int, dict[str, Any]]] = {
    **{str(budget): (budget, {}) for budget in (0, 1, 4, 9, 14, 1000)},
    "penalised": (7, {"frequency_penalty": 0.6}),
    "in a grammar": (8, {"regex": "[D-S+']{28}", "ignore_eos": False}),
}
"""Budgets of thinking."""


def of_kinds(
    kinds: Mapping[str, Mapping[str, Any]],
    *,
    seed: int,
    each: int = 2,
    latest: int,
    prompt: tuple[int, int],
    alphabet: range = range(32, 127),
    **common: Any,
) -> list[Arrival]:
    """`each` requests of every kind, `kind/number`. prompt: how short and how long prompts are."""
    rng = random.Random(seed)
    return [
        Arrival(
            f"{kind}/{i}",
            rng.randint(0, latest),
            tuple(rng.choices(alphabet, k=rng.randint(*prompt))),
            {**common, **params},
        )
        for i in range(each)
        for kind, params in kinds.items()
    ]


def constrained() -> list[Arrival]:
    return of_kinds(CONSTRAINED, seed=6, latest=20, prompt=(4, 30))


def structured() -> list[Arrival]:
    kinds = {**GRAMMARS, "free": {"max_new_tokens": 40}}
    return of_kinds(kinds, seed=6, latest=15, prompt=(4, 30), ignore_eos=False, max_new_tokens=150)


def penalised() -> list[Arrival]:
    """Requests with different parameters in one batch, arriving at different times; one kind samples."""
    every = {"seed": 3, "each": 3, "latest": 12, "prompt": (4, 30), "alphabet": range(256)}
    return of_kinds(PENALISED, max_new_tokens=30, **every)


def rated(kinds: Mapping[str, Mapping[str, Any]]) -> list[Arrival]:
    """With log-probabilities: of the output, of the likeliest, of tokens that are named, of the prompt."""
    asked = {"return_logprob": True, "top_logprobs_num": 3, "token_ids_logprob": [69, 75, 256]}
    arrivals = of_kinds(kinds, seed=5, latest=6, prompt=(5, 30), max_new_tokens=24, **asked)
    return [replace(a, params={"sampling_seed": int(a.rid[-1]), **a.params}) for a in arrivals]


def seeded() -> list[Arrival]:
    """Noise is keyed by seed and absolute position, so the draft's width does not matter."""
    prompt = tuple(range(100, 130))
    return [
        Arrival(f"{name}/{i}", i, prompt[i:], {"max_new_tokens": 32, "sampling_seed": i, **params})
        for i in range(4)
        for name, params in SEEDED.items()
    ]


def processed(chosen: Iterable[str] = PROCESSORS) -> list[Arrival]:
    """With custom logit processors, and neighbours without."""
    rng, arrivals = random.Random(4), []
    asked = {name: PROCESSORS[name] for name in chosen}
    for i in range(2):
        for name, (processor, custom) in {**asked, "neighbour": (None, {})}.items():
            extra = {"custom_logit_processor": processor.to_str(), "custom_params": custom} if processor else {}
            prompt = (*rng.choices(range(32, 127), k=rng.randint(6, 20)), THINK)
            params = {"max_new_tokens": 30, "return_logprob": True, **extra}
            arrivals.append(Arrival(f"{name}/{i}", rng.randint(0, 10), prompt, params))
    return arrivals


def budgets(**common: Any) -> list[Arrival]:
    """With budgets of thinking, which began in the prompt, beside a grammar and SGLang's other processors."""
    asked = of_kinds({"regex": CONSTRAINED["regex"]}, seed=3, each=1, latest=9, prompt=(5, 9))
    asked += processed(("no-bigram-twice", "disallowed", "own"))[:4]
    rng, thinking = random.Random(7), {"custom_logit_processor": TinyThinkingBudget.to_str()}
    for (name, (budget, params)), again in product(BUDGETS.items(), range(2)):
        begins, more = (rng.choices(range(32, 127), k=k) for k in (8, rng.randint(0, 3)))
        params = {"max_new_tokens": 30, "custom_params": {"thinking_budget": budget}, **thinking, **params}
        asked.append(Arrival(f"budget {name}/{again}", rng.randint(0, 6), (*begins, THINK, *more), params))
    return [replace(a, params={**a.params, **common, "sampling_seed": i}) for i, a in enumerate(asked)]


def unprocessed() -> list[Arrival]:
    """`processed` without their processors."""
    return [Arrival(a.rid, a.step, a.prompt, {"max_new_tokens": 30}) for a in processed()]


def forced_calls() -> list[Arrival]:
    """A forced call under every tool-call parser that reads no template of a checkpoint, and a tag in
    `response_format`; many parsers share a grammar."""
    constraints = {json.dumps(kinds): (parser, kinds) for parser, kinds in _constraints()}
    params = {"max_new_tokens": 60, "ignore_eos": False}
    return [Arrival(parser, 0, (70, 71, 72), {**params, **kinds}) for parser, kinds in constraints.values()]


def _constraints() -> Iterator[tuple[str, dict[str, Any]]]:
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "Look."}]}
    tool = {"name": "look", "parameters": json.loads(SHORT_SCHEMA), "strict": True}
    tools = [{"type": "function", "function": tool}]
    request = ChatCompletionRequest.model_validate({**asked, "tools": tools, "tool_choice": "required"})
    for parser in sorted(FunctionCallParser.ToolCallParserEnum.keys() - {"response_template"}):
        constraint = FunctionCallParser(request.tools, parser).get_structure_constraint("required")
        yield parser, _grammar(request.to_sampling_params([], {}, constraint))
    content = {"type": "json_schema", "json_schema": tool["parameters"]}
    tag = {"type": "tag", "begin": "<t>", "content": content, "end": "</t>"}
    form = {"type": "structural_tag", "format": tag}
    request = ChatCompletionRequest.model_validate({**asked, "response_format": form})
    yield "response_format", _grammar(request.to_sampling_params([], {}))


def _grammar(params: Mapping[str, Any]) -> dict[str, Any]:
    return {name: params[name] for name in ("structural_tag", "json_schema", "ebnf") if params.get(name)}


def thinking() -> list[Arrival]:
    """Filters of tokens, with and without a grammar behind them; a stop would end the marker. Some have a budget of
    their own in place of the server's.
    """
    own = cycle([{}, {"thinking_budget": 3}, {"thinking_budget": 0}, {"thinking_budget": 14}])
    return [
        replace(a, params={**a.params, "require_reasoning": True, "custom_params": next(own)})
        for a in constrained()
        if "stop" not in a.params
    ]


def counted() -> list[Arrival]:
    """Half of them are penalised by too little to change a token."""
    arrivals = mixed(seed=4, count=10, shared=30)
    for arrival in arrivals[::2]:
        arrival.params["frequency_penalty"] = 1e-7
    return arrivals


CASES: dict[str, dict[str, Any]] = {
    "one request": {"max_running_requests": 1},
    "batch": {},
    "pages": {"page_size": 16},
    "small chunks": {"chunked_prefill_size": 16},
    "chunks in pages": {"page_size": 16, "chunked_prefill_size": 16},
    "full pool": {"max_total_tokens": 320},
    "no tree": {"disable_radix_cache": True},
}
"""Server arguments under which text stays what it is."""

CONTEXT = 96


def coming_and_going(seed: int) -> list[Arrival]:
    """Requests of every priority; half of them run to the end of the context, many are aborted wherever they are."""
    rng, count = random.Random(seed), 48
    shared, arrivals = rng.choices(range(256), k=24), []
    for i in range(count):
        prompt = rng.choices(range(256), k=rng.randint(2, 60))
        if rng.random() < 0.5:
            prompt = [*shared, *prompt]
        tokens = 10 * CONTEXT if rng.random() < 0.5 else rng.randint(1, 30)
        params = {"max_new_tokens": tokens, "priority": rng.randint(0, 5)}
        abort = rng.randint(0, 40) if rng.random() < 0.4 else None
        arrivals.append(Arrival(f"r{i:02d}", rng.randint(0, 9 * count), tuple(prompt), params, abort))
    return arrivals


def prioritised() -> list[Arrival]:
    """Low priorities first; while these run, high ones."""
    rng = random.Random(4)
    prompts = [tuple(rng.choices(range(256), k=rng.randint(5, 40))) for _ in range(6)]
    low = [Arrival(f"low-{i}", 0, p, {"max_new_tokens": 40, "priority": 0}) for i, p in enumerate(prompts[:3])]
    high = [
        Arrival(f"high-{i}", 4 + 3 * i, p, {"max_new_tokens": 12, "priority": 5}) for i, p in enumerate(prompts[3:])
    ]
    return [*low, *high]


ADAPTED: tuple[dict[str, Any], ...] = (
    {},
    {},
    {"return_logprob": True, "top_logprobs_num": 3},
    {"ignore_eos": False, "json_schema": SHORT_SCHEMA, "max_new_tokens": 60},
    {"regex": "(red|green|blue)( (red|green|blue)){5}", "ignore_eos": False, "max_new_tokens": 40},
    {"frequency_penalty": 0.6},
    {"return_logprob": True, "top_logprobs_num": 1, "frequency_penalty": 0.4},
)


def adapted() -> list[Arrival]:
    """Requests of two adapters, by name, and of the target itself, with common prefixes; some are aborted.

    None with a grammar: SGLang gives one token to a request that is aborted while its grammar is compiled.
    """
    names, params = cycle(["one", None, "two"]), cycle(ADAPTED)
    found = mixed(7, 18, shared=24, longest=30, aborts=0.2, stops=0.2, tokens=30)
    asked = [replace(a, params={**a.params, **next(params), "lora_id": next(names)}) for a in found]
    return [replace(a, abort_after=None) if a.params.keys() & {"json_schema", "regex"} else a for a in asked]


def sampled() -> list[Arrival]:
    """Long enough to be retracted in the middle of their outputs."""
    found = mixed(seed=8, count=10, shared=30, aborts=0.3, tokens=70)
    return [replace(a, params={**a.params, "temperature": 1.0}) for a in found]


def loads() -> list[Arrival]:
    """Three loads of twenty requests, one after the other."""
    return [
        replace(a, rid=f"{seed}-{a.rid}", step=a.step + 60 * number)
        for number, seed in enumerate((101, 102, 103))
        for a in mixed(seed, count=20, shared=40, aborts=0.2, stops=0.3)
    ]


def short() -> list[Arrival]:
    """For a small context. Most are sampled from changed logits, and some rated, one with more than graphs rate."""
    words, penalised = {"regex": "[A-Z]( ?[A-Z])*"}, {"frequency_penalty": 0.3}
    rated = {"return_logprob": True, "top_logprobs_num": 3, "token_ids_logprob": [69, 75]}
    bias = {"logit_bias": {"70": 2.0}, **rated, "top_logprobs_num": 30}
    kinds = cycle([rated, penalised, words, words | penalised | rated, bias, penalised])
    arrivals = mixed(17, 6, shared=12, longest=30, stops=0.3, tokens=24)
    return [replace(a, params=a.params | kind) for a, kind in zip(arrivals, kinds, strict=False)]


SETS: dict[str, Callable[[], list[Arrival]]] = {
    "traffic": partial(mixed, seed=2, count=14, shared=40, aborts=0.15, stops=0.3),
    "long prompts": partial(mixed, seed=46, count=10, shared=70, stops=0.2),
    "three loads": loads,
    "short": short,
    "adapted": adapted,
    "adapted, few": lambda: adapted()[:9],
    "counted": counted,
    "sampled": sampled,
    "constrained": constrained,
    "structured": structured,
    "thinking": thinking,
    "calls": forced_calls,
    "stops": lambda: of_kinds(STOPS, seed=8, each=6, latest=20, prompt=(12, 12)),
    "penalised": penalised,
    "rated": lambda: rated(RATED),
    "rated beside samples": lambda: rated(RATED | {"sampled": {"temperature": 1.0}}),
    "rated seeds": lambda: rated(SAMPLED),
    "rated seeds, original": lambda: rated(SAMPLED),
    "filtered seeds": lambda: rated(FILTERED),
    "seeds": seeded,
    "states": lambda: of_kinds(STATES, seed=2, latest=10, prompt=(4, 50), max_new_tokens=24),
    "processed": processed,
    "unprocessed": unprocessed,
    "budgets": budgets,
    "seeded budgets": lambda: budgets(temperature=0.6),
    "priorities": prioritised,
    **{f"coming and going {seed}": partial(coming_and_going, seed) for seed in range(12)},
}
