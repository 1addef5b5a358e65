"""A prefill server and a decode server, two processes, with SGLang's own code for Mooncake over memory of this machine.

The decode server's scheduler is in the test's process: drafters' KV that arrives is compared with one pass over the
text, and texts with those of two plain servers.
"""

import itertools
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import httpx
import pytest
from decode_loop import run
from engine import Engine, engine
from families import FAMILIES, tiny_family
from matrix import chosen, sampled
from model_set import Models
from oracle_arm import OracleArm
from records import all_logprobs, assert_same_logprobs
from reference import Comparison
from server_host import STAND_INS, Server, ServerHost
from sglang.srt.disaggregation.base.conn import KVPoll
from sglang.srt.disaggregation.common.conn import CommonKVReceiver
from tiny_models import tiny_pair
from trees import close

from whiflash_lab.servers import free_port
from whiflash_sglang.engine.scheduler import disaggregation
from whiflash_sglang.round.planning import Planner

sys.path.append(STAND_INS)

PROMPTS = [[40, 41, 42, 43] * 8, [90, 91, 92], [10, 11, 12, 13, 14] * 12, list(range(30, 75)) * 2]
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "grammar": {"regex": "A(red|green)( blue)?", "ignore_eos": False},
    "penalties": {"frequency_penalty": 0.6},
    "logprobs": {"return_logprob": True, "logprob_start_len": -1, "top_logprobs_num": 2},
}
SEEDED: dict[str, dict[str, Any]] = {"seeded": {"temperature": 0.6, "sampling_seed": 5}}
"""In batches of their own: a greedy neighbour changes what a seed draws."""

OUTSIDE = ("return_logprob", "logprob_start_len", "top_logprobs_num", "stream", "custom_params")
"""Fields of a request that are no sampling parameters."""
LENGTH = {"max_new_tokens": 24, "ignore_eos": True, "temperature": 0.0}
DECODE: dict[str, Any] = {
    "max_running_requests": 6,
    "skip_tokenizer_init": False,
    "disaggregation_mode": "decode",
    "disaggregation_transfer_backend": "mooncake",
    "enable_deterministic_inference": True,  # seeds count
    "hicache_ratio": 2.0,  # of a host pool for retracted requests: the default takes a tenth of the memory
}
_rooms = itertools.count(1)


@dataclass(frozen=True)
class Prefill:
    """A prefill server. port: of what SGLang registers and looks up there."""

    server: Server
    port: int

    def body(self, prompt: Sequence[int], params: Mapping[str, Any], room: int) -> dict[str, Any]:
        """Fields of a request to either server."""
        fields = {name: params[name] for name in OUTSIDE if name in params}
        rest = {name: value for name, value in params.items() if name not in OUTSIDE}
        where = {"bootstrap_host": "127.0.0.1", "bootstrap_port": self.port, "bootstrap_room": room}
        return {"input_ids": list(prompt), "sampling_params": {**LENGTH, **rest}, **fields, **where}

    def ask(self, prompt: Sequence[int], params: Mapping[str, Any], room: int) -> httpx.Response:
        body = {**self.body(prompt, params, room), "stream": False}
        return httpx.post(f"{self.server.url}/generate", json=body, timeout=None)


def arguments(models: Any, drafters: str, mode: str) -> list[str]:
    """Flags of a server in a role. drafters: `plain`, `none` or `pair`."""
    given = ["--model-path", str(models.target), "--dtype", "float32", "--disaggregation-mode", mode]
    given += ["--disaggregation-transfer-backend", "mooncake", "--enable-deterministic-inference"]
    if drafters != "plain":
        given += ["--speculative-algorithm", "WHIFLASH"]
    if drafters == "none":
        given += ["--whiflash-drafters", "none"]
    if drafters == "pair":
        given += ["--speculative-draft-model-path", str(models.dflash)]
        given += ["--whiflash-eagle-draft", str(models.eagle3), "--whiflash-router", "random"]
    return given


def started(
    host: ServerHost, models: Any, drafters: str, port: int | None = None, *more: str, **options: Any
) -> Prefill:
    port = port or free_port()
    given = [*arguments(models, drafters, "prefill"), "--disaggregation-bootstrap-port", str(port)]
    return Prefill(host.start(*given, *more, **options), port)


class ByDrafters(dict[str, Prefill]):
    """Prefill servers by their drafters, each of which starts when a test first asks for it."""

    def __init__(self, start: Callable[[str], Prefill]) -> None:
        super().__init__()
        self._start = start

    def __missing__(self, drafters: str) -> Prefill:
        return self.setdefault(drafters, self._start(drafters))


@pytest.fixture(scope="module")
def prefills(host: ServerHost, models: Models) -> dict[str, Prefill]:
    return ByDrafters(partial(started, host, models))


@pytest.fixture(scope="module", autouse=True)
def hasty() -> Iterator[None]:
    """SGLang gives a prefill server up after ten seconds without an answer."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("SGLANG_DISAGGREGATION_HEARTBEAT_INTERVAL", "2")
        patched.setenv("SGLANG_DISAGGREGATION_HEARTBEAT_MAX_FAILURE", "1")
        # It keeps slots that a lost server might still write to.
        patched.setenv("SGLANG_DISAGGREGATION_DEFERRED_DECODE_KV_RELEASE_TIMEOUT", "1")
        yield


@contextmanager
def decoding(models: Any, whiflash: dict[str, Any] | None = None, **changes: Any) -> Iterator[Engine]:
    """The scheduler of a decode server, whose threads and sockets end with it."""
    with engine(models.target, whiflash=whiflash, **{**DECODE, **changes}) as e:
        try:
            yield e
        finally:
            manager = e.scheduler.disagg_decode_prealloc_queue.kv_manager
            manager._stopped = True
            # Its thread waits for a message, and a socket may not be closed under it.
            here = [(manager.local_ip, manager.rank_port)]
            manager.send_kv_status_message(targets=here, bootstrap_room=0, status=KVPoll.Failed)
            manager.teardown()
            CommonKVReceiver.close_all_sockets()


def submit(e: Engine, prefill: Prefill, name: str, prompt: Sequence[int], params: Mapping[str, Any]) -> int:
    """Give a request to the decode server; the room where both servers meet for it."""
    room = next(_rooms)
    where = {"bootstrap_host": "127.0.0.1", "bootstrap_port": prefill.port, "bootstrap_room": room}
    e.submit(name, prompt, **{**LENGTH, **params, **where})
    return room


def texts(
    e: Engine,
    prefill: Prefill,
    kinds: Mapping[str, dict[str, Any]],
    on_pass: Callable[[], object] = lambda: None,
    **changes: Any,
) -> dict[str, list[int]]:
    """Outputs of all kinds for all prompts, all at once."""
    tag, answers = next(_rooms), dict[str, Future[httpx.Response]]()
    with ThreadPoolExecutor(len(kinds) * len(PROMPTS)) as pool:
        for kind, fields in kinds.items():
            for number, prompt in enumerate(PROMPTS):
                name, params = f"{kind}-{number}", {**fields, **changes}
                room = submit(e, prefill, f"{tag:05d}-{name}", prompt, params)
                answers[name] = pool.submit(prefill.ask, prompt, params, room)
        run(e, on_pass)
    assert all(answer.result().is_success for answer in answers.values())
    e.requests |= {name: e.requests[f"{tag:05d}-{name}"] for name in answers}
    return {name: e.output(name) for name in answers}


@pytest.fixture(scope="module")
def plain(models: Models, prefills: dict[str, Prefill]) -> dict[str, Any]:
    """Answers of two plain servers, with log-probabilities."""
    with decoding(models) as e:
        written = texts(e, prefills["plain"], KINDS) | texts(e, prefills["plain"], SEEDED)
        scored = all_logprobs(e, [rid for rid in written if rid.startswith("logprobs")])
        return {"texts": written, "logprobs": scored}


@contextmanager
def arrivals(e: Engine, models: Models) -> Iterator[list[int]]:
    """Compare drafters' KV of every request that arrives with one pass over its text; tokens of each."""
    adopt, lengths, wrong = e.worker.adopt, list[int](), list[str]()

    def adopted(batch: Any) -> None:
        adopt(batch)
        for req in batch.reqs:
            text = [*req.origin_input_ids, *req.output_ids]
            slots = e.worker.target.slot_table[req.kv.req_pool_idx, : len(text) - 1].long()
            for arm, expected in models.reference.keys_values(text).items():
                kv = e.worker.drafters[arm].kv
                for name, here, wanted in (("k", kv.k, expected.k), ("v", kv.v, expected.v)):
                    try:
                        close(here[:, slots], wanted, f"{name} of {arm} in {req.rid}")
                    except AssertionError as error:  # later: the prefill server waits for all of them
                        wrong.append(str(error))
            lengths.append(len(slots))

    with patch.object(e.worker, "adopt", adopted):
        yield lengths
    assert not wrong, wrong


def test_texts_are_plain_servers(
    models: Models, prefills: dict[str, Prefill], plain: dict[str, Any], pytestconfig: pytest.Config
) -> None:
    """Under every policy; drafters' KV is that of one pass when a request arrives."""
    asked = len(KINDS) + len(SEEDED)
    with decoding(models, models.whiflash("ar")) as e:
        for router in chosen(pytestconfig, ("ar", "diffusion", "random", "auto"), "random"):
            e.start_over(router)
            with arrivals(e, models) as lengths:
                written = texts(e, prefills["pair"], KINDS) | texts(e, prefills["pair"], SEEDED)
            assert written == plain["texts"]
            for rid, expected in plain["logprobs"].items():
                assert_same_logprobs(all_logprobs(e, [rid])[rid], expected, rid)
            assert sorted(lengths) == sorted(len(prompt) for prompt in PROMPTS * asked)
            assert not e.worker.controller.states
            e.check_leaks()


@pytest.mark.evidence
def test_without_drafters(models: Models, prefills: dict[str, Prefill], plain: dict[str, Any]) -> None:
    """A plain prefill server has the same layout here."""
    with decoding(models, {"whiflash_drafters": "none"}) as e:
        for prefill in ("none", "plain"):
            assert texts(e, prefills[prefill], KINDS) == {
                rid: text for rid, text in plain["texts"].items() if not rid.startswith("seeded")
            }
        assert sum(req.spec_num_correct_drafts for req in e.requests.values()) > 0
        e.check_leaks()
    state = prefills["none"].server.get("/whiflash/state")
    assert state["requests"] == 0


@pytest.mark.evidence
def test_as_many_drafts_are_right_as_in_one_server(models: Models, prefills: dict[str, Prefill]) -> None:
    """The block drafter begins at once. EAGLE-3 begins with the target's last feature, which no server sends."""
    with engine(models.target, whiflash=models.whiflash("diffusion"), max_running_requests=6) as one:
        expected = one.generate(PROMPTS, **LENGTH)
        rounds = [one.rounds(rid) for rid in one.requests]
    plan, first = Planner.plan, dict[str, str]()

    def noted(planner: Planner, round_: Any) -> None:
        plan(planner, round_)
        for req, route in zip(round_.reqs, round_.plan.routes, strict=True):
            first.setdefault(req.rid, route)

    with decoding(models, models.whiflash("diffusion")) as e:
        found = texts(e, prefills["pair"], {"greedy": {}})
        assert list(found.values()) == expected
        assert [e.rounds(rid) for rid in found] == rounds
        e.start_over("ar")
        with patch.object(Planner, "plan", noted):
            assert texts(e, prefills["pair"], {"greedy": {}}) == found
        assert set(first.values()) == {"none"}
        assert sum(e.rounds(rid)[1] for rid in found) > 0


@pytest.mark.parametrize("backup", sampled(["host_pool", "cpu_tensor"], "host_pool"))
def test_draft_kv_waits_on_the_host(
    models: Models, prefills: dict[str, Prefill], plain: dict[str, Any], backup: str
) -> None:
    """A request that is retracted arrives once more, with what its drafters had and what was parked of it."""
    given = {"disaggregation_decode_retraction_backup": backup}
    with decoding(models, models.whiflash("random"), retract=5, **given) as e:
        with arrivals(e, models) as lengths:
            written = texts(e, prefills["pair"], KINDS)
        assert len(lengths) == len(written) + sum(e.requests[rid].retraction_count for rid in written)
        assert len(lengths) > len(written) == e.worker.tally.requests["none"]
        assert written == {rid: text for rid, text in plain["texts"].items() if rid in written}
        e.check_leaks()


def test_an_aborted_transfer(models: Models, prefills: dict[str, Prefill], plain: dict[str, Any]) -> None:
    """One that a client leaves before the prefill server has heard of it; its neighbours go on."""
    with decoding(models, models.whiflash("random")) as e:
        submit(e, prefills["pair"], "left", PROMPTS[0], {})
        passes = itertools.count()

        def leaving() -> None:
            queue = e.scheduler.disagg_decode_transfer_queue.queue
            if next(passes) > 50 and any(waiting.req.rid == "left" for waiting in queue):
                e.abort("left")

        with arrivals(e, models):
            written = texts(e, prefills["pair"], {"greedy": {}}, leaving)
        assert written == {rid: plain["texts"][rid] for rid in written}
        assert not e.output("left")
        assert "Abort" in e.requests["left"].finished_reason.message
        e.check_leaks()


@pytest.mark.evidence
def test_a_room_is_one_requests(models: Models, prefills: dict[str, Prefill], plain: dict[str, Any]) -> None:
    """Another request for a room that is taken ends with a sentence (sglang #40125), and the first is served."""
    rooms, prefill = itertools.repeat(next(_rooms)), prefills["none"]
    with decoding(models, {"whiflash_drafters": "none"}) as e, patch.dict(globals(), _rooms=rooms):
        queue = e.scheduler.disagg_decode_prealloc_queue
        with patch.object(queue, "add", wraps=queue.add) as add:
            room, _ = (submit(e, prefill, rid, PROMPTS[0], {}) for rid in ("first", "second"))
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(prefill.ask, PROMPTS[0], {}, room)
            run(e)
        assert answer.result().is_success
        assert e.output("first") == plain["texts"]["greedy-0"]
        assert "is another request's" in add.call_args.args[0].finished_reason.message
        e.check_leaks()


def test_servers_that_do_not_fit(models: Models, prefills: dict[str, Prefill], pytestconfig: pytest.Config) -> None:
    """Requests end with a sentence, and the server serves on."""
    with decoding(models, models.whiflash("random")) as e:
        for prefill in chosen(pytestconfig, ("plain", "none"), "plain"):
            rids = [f"from-{prefill}-{number}" for number in range(2)]
            for rid in rids:
                submit(e, prefills[prefill], rid, PROMPTS[0], {})
            run(e)
            for message in (e.requests[rid].finished_reason.message for rid in rids):
                assert "sends KV of the layout of plain SGLang, and this decode server reads whiflash-" in message
                assert "start both with WHIFLASH, the same drafters" in message
        assert texts(e, prefills["pair"], {"greedy": {}})
        e.check_leaks()
        infos = [SimpleNamespace(kv_layout=e.worker.draft_layout, attn_tp_size=ranks) for ranks in (1, 2)]
        same, more = (disaggregation.mismatch(e.worker, info, 1, "there:1") for info in infos)
        assert same is None
        assert "2 of the prefill server there:1, 1 of this decode" in str(more)


@pytest.mark.evidence
def test_over_http(host: ServerHost, models: Models, prefills: dict[str, Prefill], plain: dict[str, Any]) -> None:
    """Streams of the decode server add up to the text. It would see a process of the server that does not start."""
    given = arguments(models, "pair", "decode")
    given += ["--disaggregation-decode-retraction-backup", "cpu_tensor"]
    with host.running(*given) as server, ThreadPoolExecutor() as pool:
        room, prefill, tokens = next(_rooms), prefills["pair"], list[list[int]]()
        asked = pool.submit(prefill.ask, PROMPTS[0], {}, room)
        body = prefill.body(PROMPTS[0], {"stream": True}, room)
        with httpx.stream("POST", f"{server.url}/generate", json=body, timeout=None) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    tokens.append(json.loads(line.removeprefix("data: "))["output_ids"])
        assert asked.result().is_success
        assert len(tokens) > 1
        assert tokens[-1] == plain["texts"]["greedy-0"]


TARGETS: dict[str, tuple[str, dict[str, Any]]] = {
    "latent attention": ("DeepseekV3ForCausalLM", {}),
    "delta rule": ("Qwen3_5ForCausalLM", {}),
    "windows": ("LagunaForCausalLM", {}),
    "window pool": ("LagunaForCausalLM", {"swa_full_tokens_ratio": 0.8}),
}


@pytest.mark.parametrize("case", sampled(TARGETS))
def test_targets(host: ServerHost, tmp_path: Path, case: str) -> None:
    """A family's state beside KV travels too, as SGLang sends it."""
    name, flags = TARGETS[case]
    model = tiny_family(tmp_path / "target", FAMILIES[name])
    pair = tiny_pair(tmp_path, tmp_path / "target")
    eagle3, dflash = pair["whiflash_eagle_draft"], pair["draft"]
    served = SimpleNamespace(target=tmp_path / "target", eagle3=eagle3, dflash=dflash)
    written = [str(part) for key, value in flags.items() for part in (f"--{key.replace('_', '-')}", value)]
    environment = {"SGLANG_MAMBA_CONV_DTYPE": "float32"}
    with engine(served.target, max_running_requests=6) as e:
        expected = e.generate(PROMPTS, **LENGTH)
    whiflash = {**pair, "whiflash_router": "random"}
    prefill = started(host, served, "pair", None, "--skip-tokenizer-init", *written, env=environment)
    comparison = Comparison(model)
    oracle = OracleArm(0.95)  # random drafters may be wrong in every round
    for prompt, text in zip(PROMPTS, expected, strict=True):
        oracle.learn(prompt, text)
    with decoding(served, whiflash, skip_tokenizer_init=True, arms=[oracle], **flags) as e:
        found = texts(e, prefill, {"greedy": {}})
        for prompt, wanted, here in zip(PROMPTS, expected, found.values(), strict=True):
            comparison.check(prompt, wanted, here, case)
        assert sum(e.rounds(rid)[1] for rid in found) > 0
        e.check_leaks()
    prefill.server.close()
