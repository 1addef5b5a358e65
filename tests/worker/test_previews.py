"""Previews of a session's next prompt: what they leave cached, and that no other request waits for one."""

from typing import Any

import pytest
from engine import engine
from model_set import Models
from overlap import overlapped
from previewed import PREVIEW, preview, talk, words
from sglang.srt.managers.io_struct import PauseGenerationReqInput
from trees import assert_tree_is_true, matched_slots

from whiflash_sglang.engine.scheduler import previews
from whiflash_sglang.engine.scheduler.session_tree import LINE

FLAGS: dict[str, Any] = {"enable_session_radix_cache": True}
HOST = {"enable_hierarchical_cache": True, "hicache_ratio": 6.0, "hicache_write_policy": "write_through"}
CASES: list[tuple[dict[str, Any], dict[str, int], list[int]]] = [
    ({}, {}, [47, 96]),
    ({"page_size": 16}, {"beside": 60}, [32, 96]),
    ({"chunked_prefill_size": 32}, {}, [47, 96]),
    ({"overlap": True}, {"beside": 60}, [47, 96]),
    (HOST | {"max_total_tokens": 448}, {"strangers": 6}, [47, 96]),
]
"""Flags, who else is there, and the cached tokens without and with a preview; keys of two tokens leave out the last
one."""


@pytest.mark.parametrize(("flags", "others", "found"), CASES, ids=str)
def test_the_next_turn_finds_its_preview_cached(
    models: Models, flags: dict[str, Any], others: dict[str, int], found: list[int]
) -> None:
    """With its drafters' KV, from the host, too."""
    flags = dict(flags)
    starts = overlapped if flags.pop("overlap", False) else engine
    with engine(models.target, **FLAGS, **flags) as e:
        plain = talk(e, ahead=False, **others)
    drafted = []
    for ahead in (False, True):
        with starts(models.target, whiflash=models.whiflash("ar"), **FLAGS, **flags) as e:
            texts, cached, host, rounds = talk(e, ahead=ahead, **others)
            assert (texts, cached, host > 0) == (plain[0], found[ahead], ahead and "strangers" in others)
            drafted.append(rounds)
            assert_tree_is_true(e, models)
    assert drafted[0] == drafted[1], "the first rounds draft as without a preview"


def test_no_other_request_waits_for_a_preview(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    flags: dict[str, Any] = {"max_running_requests": 5, "max_total_tokens": 1400, **FLAGS}
    with engine(models.target, whiflash=models.whiflash("ar"), **flags) as e:
        seen, prefill = list[tuple[str, int]](), e.worker._prefill

        def spy(batch: Any, *args: Any) -> Any:
            seen.append((batch.reqs[0].rid, len(e.scheduler.running_batch.reqs)))
            return prefill(batch, *args)

        monkeypatch.setattr(e.worker, "_prefill", spy)
        for number in range(10):
            e.submit(f"other/{number}.", words(number, 24), max_new_tokens=8 + number)
        preview(e, "ahead", words(20, 300))
        e.run()
        assert (seen[-1][0], seen[-1][1] < 4) == ("ahead", True)
        assert [len(e.output(f"other/{number}.")) for number in range(10)] == [*range(8, 18)]
        # Beside running requests the next one rests for rounds of which it would take 1 %.
        for number in range(2):
            e.submit(f"more/{number}.", words(30 + number, 24), max_new_tokens=200)
            e.step()
        e.scheduler.rounds_to_wait, second = 3, preview(e, "second", words(21, 900))
        for _ in range(3):
            assert e.step()
            assert e.scheduler.previews
        e.scheduler.prefill_decode_interval = 9
        e.step()
        assert (seen[-1][0], len(second.origin_input_ids)) == ("second", previews.BESIDE)
        assert e.scheduler._prefill_decode_interval_remaining == 0, "no prompt waits after a preview"
        e.scheduler.prefill_decode_interval = 0
        assert e.scheduler.rounds_to_wait >= 1 / previews.SHARE
        # The running requests may need the KV that is left.
        e.submit("long", words(40, 24), max_new_tokens=500)
        e.step()
        e.scheduler.rounds_to_wait, large = 0, preview(e, "large", words(22, 500))
        e.step()
        assert (large in e.scheduler.previews.values(), len(large.origin_input_ids)) == (True, 500)
        assert not e.scheduler.running_batch.batch_is_full
        assert e.scheduler.rounds_to_wait > 1
        e.submit("grammar", words(42, 24), max_new_tokens=4)  # it is ready just when the preview is tried
        ready: list[list[Any]] = [[], [e.scheduler.waiting_queue.pop()]]
        monkeypatch.setattr(e.scheduler.grammar_manager, "has_waiting_grammars", lambda: bool(ready))
        monkeypatch.setattr(e.scheduler.grammar_manager, "get_ready_grammar_requests", lambda: ready.pop(0))
        e.scheduler.rounds_to_wait = 0
        while ready:
            e.step()
        preview(e, "small", words(23, 40), f"{LINE}b")
        e.submit("last but one", words(41, 24), max_new_tokens=8)
        for _ in range(3):  # the last row is for others
            e.step()
            e.scheduler.rounds_to_wait = 0
        assert seen[-1][0] == "last but one"
        e.run()
        assert e.output("grammar")
        assert not any(req.retraction_count for req in e.requests.values())
        e.check_leaks()


def test_a_preview_ends_with_its_use(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its session's next request, a newer preview, its client, its session, its tenant's others, or any request if
    it is prefilled in chunks. Unused, its KV is evicted before its session's."""
    flags: dict[str, Any] = {"max_total_tokens": 640, "chunked_prefill_size": 64, **FLAGS}
    with engine(models.target, whiflash=models.whiflash("ar"), **flags) as e:
        e.ask("live", words(5, 80), max_new_tokens=4, session_id=f"{LINE}b")
        preview(e, "unused", words(6, 120), f"{LINE}b")
        e.run()
        e.ask("stranger", words(7, 440), max_new_tokens=1)
        assert [len(matched_slots(e, words(*text))) >= 64 for text in ((5, 80), (6, 120))] == [True, False]
        ended: list[str] = []
        monkeypatch.setattr(e.scheduler, "send_abort_output", lambda abort, _: ended.append(abort.rid))
        e.submit("busy", words(0, 24), max_new_tokens=200)
        e.step()
        e.scheduler.rounds_to_wait = 1e9
        for rid in ("old", "new"):
            preview(e, rid, words(1, 40))
        e.submit("turn", words(1, 60), max_new_tokens=4, session_id=f"{LINE}a")
        preview(e, "left", words(1, 80))
        e.abort("left")
        preview(e, "closed", words(1, 80))
        e.close_session(f"{LINE}a")
        preview(e, "late", words(1, 80))
        assert f"{LINE}a" not in e.scheduler.tree_cache.session_refs._session_generations
        monkeypatch.setattr(previews, "MOST_WAITING", 3)
        for number, tenant in enumerate("abbb"):
            preview(e, f"of {tenant}{number}", words(number, 40), f"{tenant}{LINE}{number}")
        assert ended == ["old", "new", "left", "closed", "late", "of b1"]
        assert [one.rid for one in e.scheduler.previews.values()] == ["of a0", "of b2", "of b3"]
        e.run()
        assert not e.scheduler.previews
        assert e.output("busy")
        preview(e, "chunks", words(50, 400), f"{LINE}b")
        assert [e.step(), e.step()] == [True, True]
        e.submit("arrives", words(51, 24), max_new_tokens=4)
        e.run()
        assert (ended[6:], len(e.output("arrives"))) == (["chunks"], 4)
        pool, before = e.scheduler.token_to_kv_pool_allocator, dict(e.worker.tally.previews)
        e.scheduler.flush_cache()
        slots = pool.alloc(pool.available_size() - 90)
        preview(e, "does not fit", words(52, 100))
        e.run()
        assert (ended[7:], e.scheduler.previews) == (["does not fit"], {})
        pool.free(slots)
        preview(e, "fits", words(52, 100))
        e.run()
        assert e.worker.tally.previews == {name: count + 1 for name, count in before.items()}
        preview(e, "retracted", words(53, 300), f"{LINE}b")
        assert [e.step(), e.step()] == [True, True]
        e.scheduler.pause_generation(PauseGenerationReqInput(mode="retract"))
        e.scheduler.enable_priority_scheduling, e.scheduler.max_queued_requests = True, 1
        e.submit("urgent", words(54, 24), max_new_tokens=4, priority=-5)
        e.submit("default", words(55, 40), session_id=f"{LINE}b", priority=0, **PREVIEW)
        assert ended[8:] == ["retracted", "default"], "it takes nobody's place in the queue"
        e.run()
        e.check_leaks()
