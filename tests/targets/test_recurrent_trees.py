"""Targets with a recurrent state and a radix cache: a request goes on from a state that the tree kept of another one.

SGLang's tree keeps states for where prefills and requests end, and with its extra buffer for multiples of an interval,
so of the row in the middle of a verification that reached one. A wrong state need not change a tiny model's text, so
every state in the tree is compared with one pass over its text.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engine import Engine, engine
from families import FAMILIES, Family, HuggingFace, tiny_family
from matrix import chosen, sampled
from oracle_arm import OracleArm
from previewed import talk
from reference import Comparison
from tiny_models import tiny_pair
from traffic import Arrival, mixed, play

from whiflash_sglang.engine.scheduler.session_tree import LINE

EVERY = 8
"""Tokens of an interval."""
INTERVALS = {"mamba_radix_cache_strategy": "extra_buffer", "mamba_track_interval": EVERY}
POOL = {"max_mamba_cache_size": 64}
"""States, of requests and in the tree."""
CASES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "convolutions": ("Lfm2ForCausalLM", {}),
    "delta rule": ("Qwen3_5ForCausalLM", {}),
    "delta rule, intervals": ("Qwen3_5ForCausalLM", INTERVALS),
    "delta rule by channel, intervals": ("KimiLinearForCausalLM", INTERVALS),
    "Mamba 2, intervals": ("NemotronHForCausalLM", INTERVALS),
}
TOLERANCE = 1e-3  # times the largest number: plain decoding's states differ by 1.1e-4, one a token off by 0.4


@dataclass(frozen=True)
class Served:
    """An engine with a tree that routes at random, and three turns of conversations with what plain decoding without a
    tree answers."""

    model: HuggingFace
    engine: Engine
    oracle: OracleArm
    turns: Sequence[Sequence[Arrival]]
    expected: Mapping[str, list[int]]
    every: int | None


def with_chunks(family: Family, strategy: Mapping[str, Any]) -> Family:
    """SGLang tracks no interval finer than what the family's configuration has for the size of a kernel's chunk."""
    return replace(family, changes={**family.changes, "mamba_chunk_size": EVERY}) if strategy else family


@contextmanager
def serving(case: str, root: Path, **options: Any) -> Iterator[Served]:
    name, strategy = CASES[case]
    target = root / "target"
    model = tiny_family(target, with_chunks(FAMILIES[name], strategy))
    with engine(target, disable_radix_cache=True) as e:
        turns, expected = conversations(e)
    oracle = OracleArm(0.95, seed=3).knowing((a for turn in turns for a in turn), expected)
    flags = {**tiny_pair(root, target), "whiflash_router": "random"}
    options = {"max_running_requests": 4, **POOL, **strategy, **options}
    with engine(target, whiflash=flags, arms=[oracle], **options) as e:
        assert e.scheduler.tree_cache.supports_mamba()
        yield Served(model, e, oracle, turns, expected, EVERY if strategy else None)


def conversations(e: Engine) -> tuple[list[list[Arrival]], dict[str, list[int]]]:
    """First turns, some of which share a prefix or go on where another one's prompt ends; each later turn continues one
    before it, of a part of them its first tokens only."""
    first = mixed(seed=11, count=8, shared=40, stops=0.2, tokens=36)
    longer = [replace(a, rid=f"longer-{a.rid}", step=a.step + 9, prompt=(*a.prompt, 7, 7, 7)) for a in first[::3]]
    turns, expected = [[*first, *longer]], {}
    for number in (2, 3):
        expected |= play(e, turns[-1])
        turns.append(
            [
                replace(
                    a,
                    rid=f"turn{number}-{a.rid}",
                    prompt=(*a.prompt, *expected[a.rid][: None if i % 4 else 5], *b"and then"),
                )
                for i, a in enumerate(turns[-1])
            ]
        )
    expected |= play(e, turns[-1])
    return turns, expected


def kept_states(e: Engine) -> dict[int, list[int]]:
    """The slot of every state in the tree, and the tokens that it is behind."""
    from array import array

    from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams
    from sglang.srt.mem_cache.radix_cache import RadixKey
    from sglang.srt.mem_cache.unified_cache.component_type import ComponentType

    tree, found = e.scheduler.tree_cache, {}
    for req in e.requests.values():
        tokens = [*req.origin_input_ids, *req.output_ids]
        while tokens:
            match = tree.match_prefix(MatchPrefixParams(key=RadixKey(array("q", tokens))))
            tokens = tokens[: match.device_prefix_len]
            if tokens:
                state = tree.tree_core.get_component_device_value(match.best_match_node, ComponentType.MAMBA)
                found[int(state)] = tokens
                tokens = tokens[:-1]
    assert len(found) == tree.mamba_evictable_size() + tree.mamba_protected_size(), "states of unknown texts"
    return found


def check_states(e: Engine, model: HuggingFace) -> int:
    """Every state in the tree is that of one pass over its text; returns how many there are."""
    states = e.scheduler.req_to_token_pool.mamba_pool.mamba_cache
    kept = kept_states(e)
    for slot, tokens in kept.items():
        for layer, (inputs, matrix) in enumerate(model.states(tokens)):
            found = states.conv[0][layer, slot]
            if len(found) < len(inputs):  # KDA's lie the other way round
                found = found.mT
            what = f"layer {layer}, {len(tokens)} tokens {tokens[-4:]}"
            close(found, inputs[:, -found.shape[1] :], f"inputs of {what}")
            if matrix is not None:
                close(states.temporal[layer, slot], matrix, f"matrix of {what}")
    return len(kept)


def close(found: torch.Tensor, wanted: torch.Tensor, what: str) -> None:
    error, limit = float((found - wanted).abs().max()), TOLERANCE * float(wanted.abs().max())
    assert error <= limit, f"{what}: off by {error:.2e} (limit {limit:.2e})"


def turn(s: Served, arrivals: Sequence[Arrival], mark: str = "") -> None:
    """Play `arrivals` and compare what they bring with plain decoding, states with one pass, now and then while they
    run."""
    e = s.engine
    named = [replace(a, rid=f"{mark}{a.rid}") for a in arrivals]

    def look() -> None:
        if e.scheduler.forward_ct % 16 == 0:
            check_states(e, s.model)

    Comparison(s.model).check_all(arrivals, s.expected, play(e, named, look), mark)


def kept_of(s: Served, rid: str) -> int:
    """Tokens of an ended request whose state the tree must have: those with KV, as far as an interval goes."""
    req = s.engine.requests[rid]
    n = len(req.origin_input_ids) + len(req.output_ids) - 1
    return n if s.every is None else n // s.every * s.every


@pytest.mark.parametrize("case", sampled(CASES, "delta rule, intervals"))
def test_turns_go_on_from_kept_states(case: str, tmp_path: Path, pytestconfig: pytest.Config) -> None:
    """Under random routing, then under every policy; each turn that continues another one finds its state, and one that
    was previewed beside another request finds the preview's."""
    with serving(case, tmp_path, enable_session_radix_cache=True) as s:
        e = s.engine
        for number, arrivals in enumerate(s.turns):
            turn(s, arrivals)
            for i, a in enumerate(arrivals if number else []):
                before = a.rid.removeprefix(f"turn{number + 1}-")
                cached = e.requests[a.rid].cached_tokens
                if i % 4:
                    assert cached >= kept_of(s, before), a.rid
        assert max(s.oracle.accepted) == s.oracle.max_drafts, "no full block was accepted"
        assert s.oracle.rejected > 0, "nothing was rejected"
        assert check_states(e, s.model) > 20
        for policy in chosen(pytestconfig, ("ar", "diffusion", "lookup", "entropy", "auto", "none"), "auto"):
            e.start_over(policy)
            for arrivals in s.turns:
                turn(s, arrivals[1:3], f"{policy} ")
            hits = [e.requests[f"{policy} {a.rid}"].cached_tokens for a in s.turns[2][1:3]]
            assert min(hits) > 30
        talks = []
        for policy, ahead in (("none", False), ("random", True)):
            e.requests.clear()
            e.start_over(policy)
            talks.append(talk(e, ahead=ahead, beside=60))
        (plain, without, *_), (texts, cached, *_) = talks
        assert (texts, without, cached) == (plain, 48, 97 if s.every is None else 96)
        assert check_states(e, s.model) > 6


def test_plain_decoding_keeps_states_at_intervals(tmp_path: Path) -> None:
    """SGLang's own, on the CPU platform."""
    name, strategy = CASES["delta rule, intervals"]
    model = tiny_family(tmp_path, with_chunks(FAMILIES[name], strategy))
    with engine(tmp_path, max_running_requests=4, **POOL, **strategy) as e:
        first = [replace(a, params={"max_new_tokens": 30}) for a in mixed(seed=12, count=4)]
        said = play(e, first)
        second = [replace(a, rid=f"turn2-{a.rid}", prompt=(*a.prompt, *said[a.rid])) for a in first]
        play(e, second)
        assert min(e.requests[a.rid].cached_tokens for a in second) >= 24
        assert check_states(e, model) > 4


@pytest.mark.parametrize("sessions", [False, True])
@pytest.mark.parametrize("case", sampled(["delta rule", "delta rule, intervals"], "delta rule, intervals"))
def test_few_states_chunks_aborts_and_retractions(case: str, sessions: bool, tmp_path: Path) -> None:
    """sessions: they hold their states, and each gives up what its newest turn does not continue."""
    few: dict[str, Any] = {"max_mamba_cache_size": 20, "chunked_prefill_size": 16, "max_total_tokens": 640}
    with serving(case, tmp_path, retract=7, enable_session_radix_cache=sessions, **few) as s:
        hits = 0
        for arrivals in s.turns:
            leaving = [replace(a, abort_after=5) if i % 5 == 4 else a for i, a in enumerate(arrivals)]
            if sessions:
                names = [LINE + a.rid.replace("turn2-", "").replace("turn3-", "") for a in leaving]
                leaving = [
                    replace(a, params={**a.params, "session_id": name}) for a, name in zip(leaving, names, strict=True)
                ]
            turn(s, leaving)
            hits += sum(s.engine.requests[a.rid].cached_tokens for a in arrivals)
        assert hits > 0
        assert sum(req.retraction_count for req in s.engine.requests.values()) > 5
        assert check_states(s.engine, s.model) > 3
        s.engine.scheduler.tree_cache.sanity_check()


def test_states_and_draft_kv_come_back_from_host_memory(tmp_path: Path) -> None:
    """Turns of conversations that were evicted meanwhile: text, and states and draft KV of a prefill."""
    host = {"enable_hierarchical_cache": True, "hicache_ratio": 6.0, "hicache_write_policy": "write_through"}
    with serving("delta rule, intervals", tmp_path, max_total_tokens=640, **host) as s:
        e, loaded = s.engine, {}
        for arrivals in s.turns:
            Comparison(s.model).check_all(arrivals, s.expected, play(e, arrivals))
            loaded |= {a.rid: e.requests[a.rid].cached_tokens_host for a in arrivals}
        assert sum(loaded.values()) > 200
        rid = max(loaded, key=lambda rid: loaded[rid])
        text = [*e.requests[rid].origin_input_ids, *e.output(rid)]
        warm = prefilled(e, text, "warm")
        assert e.scheduler.flush_cache()
        cold = prefilled(e, text, "cold")
        assert e.requests["warm"].cached_tokens > len(text) - 2 * EVERY
        assert e.requests["cold"].cached_tokens == 0
        wrong = {name: differing(warm[name], cold[name]) for name in cold}
        assert not wrong["k of diffusion"] + wrong["v of diffusion"], wrong
        # Trees of these targets have plain keys: where texts part, the slot before holds another one's next token.
        assert len(set(wrong["k of ar"] + wrong["v of ar"])) <= 3, wrong


def differing(found: torch.Tensor, wanted: torch.Tensor) -> list[int]:
    error = (found - wanted).abs().amax(dim=(0, 2, 3))
    return [int(at) for at in (error > TOLERANCE * float(wanted.abs().max())).nonzero()]


def prefilled(e: Engine, text: Sequence[int], rid: str) -> dict[str, torch.Tensor]:
    """Draft KV [layers, tokens, heads, width] of a request at the end of its prefill."""
    e.submit(rid, text, max_new_tokens=8)
    while not e.requests[rid].output_ids:
        e.step()
    slots = e.scheduler.req_to_token_pool.req_to_token[e.requests[rid].kv.req_pool_idx, : len(text)].long()
    kvs = {arm: e.worker.drafters[arm].kv for arm in ("ar", "diffusion")}
    found = {f"{name} of {arm}": getattr(kv, name)[:, slots] for arm, kv in kvs.items() for name in ("k", "v")}
    e.run()
    return found
