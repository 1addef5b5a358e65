"""Requests that run to the end of the context: the engine reserves slots behind it, and no write leaves its row."""

import pytest
from engine import engine
from model_set import Models

CONTEXT = 96


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("router", ["none", "random"])
def test_text_up_to_the_contexts_end(models: Models, router: str, page_size: int) -> None:
    prompts = [[1, 2, 3], list(range(40))]
    options = {"context_length": CONTEXT, "max_running_requests": 2, "page_size": page_size}
    with engine(models.target, **options) as e:
        expected = e.generate(prompts, max_new_tokens=10 * CONTEXT)
    assert [len(p) + len(out) for p, out in zip(prompts, expected, strict=True)] > [CONTEXT - 4] * 2
    with engine(models.target, whiflash=models.whiflash(router), **options) as e:
        assert e.generate(prompts, max_new_tokens=10 * CONTEXT) == expected
        e.check_leaks()
