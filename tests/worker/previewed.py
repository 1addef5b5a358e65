"""A session's turns, with a preview of the next one between them, beside other requests."""

import random
from typing import Any

from engine import Engine

from whiflash_sglang.engine.scheduler.session_tree import LINE, MARK

PREVIEW: dict[str, Any] = {"max_new_tokens": 0, "custom_params": {"whiflash": '{"preview": "X"}'}}
Talk = tuple[dict[str, list[int]], int, int, tuple[int, int]]
"""Outputs by request; tokens of the second turn's prompt that were cached, and of the preview's that came from host
memory; rounds of the second turn."""


def words(seed: int, length: int) -> list[int]:
    return random.Random(seed).choices(range(32, 127), k=length)


def preview(e: Engine, rid: str, tokens: list[int], session: str = f"{LINE}a") -> Any:
    e.submit(rid, tokens, session_id=session, **PREVIEW)
    return e.scheduler.previews.get(session)


def talk(e: Engine, *, ahead: bool, beside: int = 0, strangers: int = 0) -> Talk:
    """Play two turns of a session. The first one's answer stands shorter in the history, as without its thinking.

    ahead: whether the second is previewed, and another session, whose client gives it up. beside: tokens of a request
    that decodes plainly meanwhile. strangers: sessions between the turns, which evict the first one's KV.
    """
    asked, history = ["first", "turn"], [*words(1, 48), *words(2, 48)]
    if beside:
        asked += ["busy"]
        e.submit("busy", words(9, 24), max_new_tokens=beside, custom_params={"whiflash": '{"off": true}'})
        e.step()
    e.submit("first", history[:48], max_new_tokens=16, session_id=f"{LINE}a")
    while not e.requests["first"].finished():
        e.step()
    for number in range(strangers):
        e.ask(f"stranger{number}.", words(20 + number, 100), max_new_tokens=1, session_id=f"{MARK}{number}")
    if ahead:
        counted = dict(e.worker.snapshot()["cached"])
        preview(e, "ahead", [*history, *words(3, 1)])
        while not e.requests["ahead"].finished():
            e.step()
        assert e.worker.snapshot()["cached"] == counted, "nobody is answered"
        preview(e, "left", words(4, 64), f"{LINE}b")
        assert not (beside and e.step() and e.requests["busy"].finished())
        e.abort("left")
        assert (e.requests["left"].cached_tokens, e.scheduler.previews) == (0, {})
    e.ask("turn", [*history, *words(3, 20)], session_id=f"{LINE}a")
    e.close_session(f"{LINE}a")
    e.scheduler.tree_cache.sanity_check()
    e.check_leaks()
    host = e.requests["ahead"].cached_tokens_host if ahead else 0
    rounds = e.rounds("turn") if e.scheduler.draft_worker else (0, 0)
    return {rid: e.output(rid) for rid in asked}, e.requests["turn"].cached_tokens, host, rounds
