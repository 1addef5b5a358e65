"""Answers forced along a recorded text: whoever drafts, for those who ask, on a server that was started for it."""

import random
from typing import Any

import pytest
from engine import Engine, engine
from matrix import sampled
from model_set import Models
from plain import plain_texts
from traffic import Arrival

RNG = random.Random(8)
PROMPTS = [RNG.choices(range(256), k=n) for n in (5, 40, 19)]
RECORDED = [RNG.choices(range(256), k=40) for _ in PROMPTS]


def ask(e: Engine, router: str, name: str, **more: Any) -> list[str]:
    """Three requests, of which the middle one is not forced."""
    e.worker.reconfigure({"router": router})
    names = [f"{name}-{router}-{i}" for i in range(3)]
    for i, rid in enumerate(names):
        custom = {"whiflash_forced": RECORDED[i]} if i != 1 else {}
        if more.get("predicted") and i != 1:
            custom["whiflash_prediction"] = RECORDED[i]
        e.submit(rid, PROMPTS[i], max_new_tokens=40, custom_params=custom or None)
    e.run()
    return names


@pytest.mark.parametrize(
    "case", sampled([{"chunked_prefill_size": 16}, {"max_total_tokens": 160}], {"max_total_tokens": 160})
)
def test_answers_are_the_recorded_ones(models: Models, case: dict[str, Any]) -> None:
    free = plain_texts(models.target, [Arrival("free", 0, tuple(PROMPTS[1]), {"max_new_tokens": 40})])["free"]
    flags = models.whiflash("random", whiflash_force_recorded="on")
    with engine(models.target, whiflash=flags, **case) as e:
        for router in ("random", "none", "ar"):
            names = ask(e, router, "forced")
            assert [e.output(name) for name in names] == [RECORDED[0], free, RECORDED[2]]
        assert any(r.retraction_count for r in e.requests.values()) == ("max_total_tokens" in case)


def test_without_the_flag_nothing_is_forced(models: Models) -> None:
    with engine(models.target, whiflash=models.whiflash("none")) as e:
        forced = ask(e, "none", "off")
        free = e.generate(PROMPTS, max_new_tokens=40)
        assert [e.output(name) for name in forced] == free
        assert e.worker.stages.forcing is None
