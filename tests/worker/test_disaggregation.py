"""Decode servers, whose prompts another server computed. SGLang's `fake` transfer brings nothing, so the test writes KV
that depends on the prompt into the slots that a request gets: every server continues the same text.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from decode_loop import run
from engine import Engine, engine
from model_set import Models
from overlap import overlapped
from request_sets import OPTIONS
from sglang.srt.disaggregation.utils import FAKE_BOOTSTRAP_HOST
from sglang.srt.managers.schedule_batch import ScheduleBatch

from whiflash_sglang.engine.scheduler import disaggregation

FIRST_TOKEN = 65
"""That the prefill server sampled."""

PROMPTS = [[40, 41, 42, 43] * 8, [90, 91, 92], [10, 11, 12, 13, 14] * 4]
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "grammar": {"regex": "A(red|green)( blue)?", "ignore_eos": False},
    "penalties": {"frequency_penalty": 0.6},
    "logprobs": {"return_logprob": True, "logprob_start_len": -1},
}
SERVER = {
    **OPTIONS,
    "disaggregation_mode": "decode",
    "disaggregation_transfer_backend": "fake",
    "hicache_ratio": 2.0,  # the host pool for retracted requests: the default takes a tenth of the memory
}


@contextmanager
def prompts_computed() -> Iterator[None]:
    """K and V of a prompt are there when its request is first taken. After a retraction SGLang brings them back."""
    prepare = ScheduleBatch.prepare_for_prebuilt

    def prepared(batch: ScheduleBatch) -> None:
        prepare(batch)
        pool = batch.token_to_kv_pool_allocator.get_kvcache()
        for req in batch.reqs:
            if req.retraction_count:
                continue
            prompt = torch.tensor(req.origin_input_ids, dtype=torch.float32)
            slots = batch.req_to_token_pool.req_to_token[req.kv.req_pool_idx, : len(prompt)]
            for layer in (*pool.k_buffer, *pool.v_buffer):
                layer[slots.long()] = prompt.sin()[:, None, None].to(layer.dtype)

    with patch.object(ScheduleBatch, "prepare_for_prebuilt", prepared):
        yield


def texts(e: Engine, prompts: Sequence[Sequence[int]] = PROMPTS, **params: Any) -> dict[str, list[int]]:
    """Outputs of all kinds, all at once."""
    e.scheduler.disagg_metadata_buffers.output_ids.fill_(FIRST_TOKEN)
    with prompts_computed():
        for kind, fields in KINDS.items():
            for number, prompt in enumerate(prompts):
                asked = {"max_new_tokens": 24, **fields, **params}
                where = {"bootstrap_host": FAKE_BOOTSTRAP_HOST, "bootstrap_room": 7}
                e.submit(f"{kind}-{number}", prompt, **where, **asked)
        run(e)
    return {rid: e.output(rid) for rid in e.requests}


@pytest.fixture(scope="module")
def plain(models: Models) -> dict[str, list[int]]:
    with engine(models.target, **SERVER) as e:
        return texts(e)


def test_a_decode_server_continues_what_another_server_read(models: Models, plain: dict[str, list[int]]) -> None:
    """Without overlap, and after a retraction, it does in `tests/parallel/test_prefill_and_decode.py`."""
    with overlapped(models.target, whiflash={"whiflash_drafters": "none"}, **SERVER) as e:
        assert texts(e) == plain
        assert sum(req.spec_num_correct_drafts for req in e.requests.values()) > 0
        assert not e.worker.controller.states
        e.check_leaks()


def test_an_aborted_neighbour(models: Models, plain: dict[str, list[int]]) -> None:
    with engine(models.target, whiflash={"whiflash_drafters": "none"}, **SERVER) as e:
        process, steps = e.scheduler.process_batch_result, 0

        def processed(*args: Any) -> Any:
            nonlocal steps
            done, steps = process(*args), steps + 1
            if steps == 4:
                e.abort("greedy-0")
            return done

        e.scheduler.process_batch_result = processed
        written = texts(e)
        cut = written.pop("greedy-0")
        assert len(cut) < 24
        assert cut == plain["greedy-0"][: len(cut)]
        assert written == {rid: text for rid, text in plain.items() if rid != "greedy-0"}
        e.check_leaks()
        prefill = SimpleNamespace(kv_layout=e.worker.draft_layout, attn_tp_size=2)
        reason = disaggregation.mismatch(e.worker, prefill, 1, "there:1")
        assert reason is None, "no drafter's KV is cut by heads"
