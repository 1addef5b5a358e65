"""An EAGLE-3 drafter of two layers in the engine: a stale entry of its upper layer would cost acceptance alone, so
drafts are compared, and slots in `test_plain_text.py`.
"""

import random

import pytest
from engine import engine
from model_set import Models, build_models
from parity import listen


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return build_models(tmp_path_factory.mktemp("layers"), eagle3_layers=2)


def test_drafts_behind_other_arms_rounds_are_a_fresh_requests(models: Models) -> None:
    prompt = random.Random(5).choices(range(256), k=30)
    with engine(models.target, whiflash=models.whiflash("none"), chunked_prefill_size=16) as e:
        assert e.worker.drafters["ar"].kv.k.shape[0] == 2
        verified = listen(e)
        for others in ("none", "diffusion"):
            e.start_over(others)
            name = f"behind {others}"
            e.submit(name, prompt, max_new_tokens=70)
            while len(e.requests[name].output_ids) < 40:
                e.step()
            text = [*prompt, *e.requests[name].output_ids]
            e.worker.reconfigure({"router": "ar"})
            verified.clear()
            e.run()
            late = verified[0]
            e.start_over("ar")
            verified.clear()
            e.generate([text[:-1]], max_new_tokens=10)
            assert len(late[0]) == e.worker.drafters["ar"].max_drafts + 1
            assert verified[0] == late
