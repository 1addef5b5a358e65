"""Adapters (LoRA) of the target: they come and go, what is sampled, kept and learned. Texts: `test_plain_text.py`.

Plain decoding serves the same adapters. Each is also merged with the target into a checkpoint, whose one pass gives the
drafters' right KV and the distribution of sampled tokens.
"""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch.nn.functional as F
from adapters import Adapter, serving
from engine import Engine, engine
from expected import goodness_of_fit, joint
from model_set import Models
from oracle_arm import OracleArm
from trees import assert_tree_is_true

from whiflash_sglang.copying.tenants import tenant_of
from whiflash_sglang.engine.forward.parallel import input_embedding, output_head


@pytest.fixture
def adapted(adapters: dict[str, Adapter]) -> dict[str, Models]:
    return {adapter.id: adapter.models for adapter in adapters.values()}


def test_the_requests_can_show_a_fault(models: Models, adapters: dict[str, Adapter]) -> None:
    """An adapter changes the text of a prompt, as the target that it is merged into says."""
    prompt = random.Random(5).choices(range(256), k=20)
    of: dict[str | None, Models] = {None: models, **{a.id: a.models for a in adapters.values()}}
    with engine(models.target, **serving(*adapters.values(), at_once=4)) as e:
        for adapter in of:
            e.submit(f"of {adapter}", prompt, lora_id=adapter)
        e.run()
        texts = {adapter: e.output(f"of {adapter}") for adapter in of}
    assert len(set(map(tuple, texts.values()))) == len(texts)
    for adapter, text in texts.items():
        target = of[adapter].reference.target
        logits = F.linear(target.forward([*prompt, *text]).final, target.model.head)[len(prompt) - 1 : -1]
        assert logits.argmax(-1).tolist() == text


def test_adapters_come_and_go(models: Models, adapters: dict[str, Adapter]) -> None:
    """One is loaded while others' requests run, pushes one out of the batch's memory, and is unloaded; another one
    comes under its name."""
    from sglang.srt.managers.io_struct import LoadLoRAAdapterReqInput, UnloadLoRAAdapterReqInput

    one, two, three = adapters.values()
    prompts = [random.Random(seed).choices(range(256), k=18) for seed in range(8)]
    turns: list[tuple[Adapter | None, Sequence[int]]] = list(
        zip([one, None, three, two, one, three, None, two], prompts, strict=True)
    )
    with engine(models.target, **serving(one, two, three, at_once=4)) as e:
        for i, (adapter, prompt) in enumerate(turns):
            e.submit(f"plain-{i}", prompt, lora_id=adapter and adapter.id)
        e.submit("plain-again", prompts[0], lora_id=two.id)
        e.run()
        wanted = {rid.removeprefix("plain-"): e.output(rid) for rid in e.requests}
    with engine(
        models.target, whiflash=models.whiflash("random"), **serving(one, two, at_once=2), max_running_requests=4
    ) as e:
        memory, held = e.worker.model_runner.lora_manager.memory_pool, set[str | None]()
        load = LoadLoRAAdapterReqInput(lora_name="three", lora_path=str(three.path), lora_id=three.id)
        for i, (adapter, prompt) in enumerate(turns):
            if i == 2:
                assert e.scheduler.running_batch.reqs
                assert e.scheduler.load_lora_adapter(load).success
            e.submit(str(i), prompt, lora_id=adapter and adapter.id)
            e.step()
            held.update(memory.uid_to_buffer_id)
        e.run(lambda: held.update(memory.uid_to_buffer_id))
        assert len(memory.uid_to_buffer_id) == 2
        assert held >= {None, one.id, two.id, three.id}
        unload = UnloadLoRAAdapterReqInput(lora_name="three", lora_id=three.id)
        e.submit("runs", prompts[0], lora_id=one.id)
        e.step()
        assert e.scheduler.unload_lora_adapter(unload).success
        other = LoadLoRAAdapterReqInput(lora_name="three", lora_path=str(two.path), lora_id="of another one")
        assert e.scheduler.load_lora_adapter(other).success
        e.ask("again", prompts[0], lora_id="of another one")
        found = {rid: e.output(rid) for rid in e.requests}
        e.check_leaks()
    assert found.pop("runs") == wanted["0"]
    assert found == wanted


@pytest.mark.evidence
@pytest.mark.parametrize("router", ["ar", "diffusion", "random"])
def test_sampled_tokens_have_the_adapters_distribution(
    models: Models, adapters: dict[str, Adapter], adapted: dict[str, Models], router: str
) -> None:
    """The first three tokens, sampled at 0.6, of all adapters' requests side by side.

    It would see a sampler that draws from another request's logits. Greedy rows see logits of a wrong adapter.
    """
    of: dict[str | None, Models] = {None: models, **dict(list(adapted.items())[:2])}
    prompt, each, params = tuple(range(100, 124)), 160, {"temperature": 0.6, "top_k": 4}
    oracle, drawn = OracleArm(0.9, seed=4), {adapter: list[list[int]]() for adapter in of}
    options = serving(*list(adapters.values())[:2])
    with engine(
        models.target, whiflash=models.whiflash(router), arms=[oracle], max_running_requests=24, **options
    ) as e:
        for begin in range(0, each, 8):
            names = [(adapter, f"{adapter} {i:04d}") for i in range(begin, begin + 8) for adapter in of]
            for adapter, name in names:
                e.submit(name, prompt, max_new_tokens=5, lora_id=adapter, **params)
            e.run()
            for adapter, name in names:
                drawn[adapter].append(e.output(name)[:3])
                if begin == 0:
                    oracle.learn(prompt, e.output(name))
                del e.requests[name]
    for adapter, samples in drawn.items():
        fits = {}
        for source, served in of.items():
            cells = joint(served.reference.target, prompt, params, 3, rare=5 / each)
            fits[source] = goodness_of_fit(samples, cells)
        print(adapter, {source: f"{fit.p_value:.2g} ({fit.freedom})" for source, fit in fits.items()})
        assert fits[adapter].freedom >= 5
        assert fits[adapter].p_value > 1e-4
        assert all(fit.p_value < 1e-6 for source, fit in fits.items() if source != adapter)


def test_draft_kv_comes_back_from_the_host_by_adapter(
    models: Models, adapters: dict[str, Adapter], adapted: dict[str, Models]
) -> None:
    """Three talks with the same prompts, evicted and loaded: keys of the tree, of host copies, and of draft KV."""
    prompt, rng = random.Random(1).choices(range(256), k=50), random.Random(2)
    ids = [None, *list(adapted)[:2]]
    fillers = [rng.choices(range(256), k=100) for _ in range(9)]
    options = {
        **serving(*list(adapters.values())[:2]),
        "enable_hierarchical_cache": True,
        "hicache_ratio": 6.0,
        "hicache_write_policy": "write_through",
        "max_total_tokens": 512,
        "max_running_requests": 4,
    }

    def talk(e: Engine) -> list[list[int]]:
        for i in ids:
            e.submit(f"first {i}", prompt, max_new_tokens=30, lora_id=i)
        e.run()
        for n, filler in enumerate(fillers):
            e.ask(f"filler {n}", filler, max_new_tokens=1)
        for i in ids:
            e.submit(f"second {i}", [*prompt, *e.output(f"first {i}"), 7, 8], max_new_tokens=30, lora_id=i)
        e.run()
        assert all(e.requests[f"second {i}"].cached_tokens_host > 30 for i in ids)
        return [e.output(rid) for rid in e.requests]

    with engine(models.target, **options) as e:
        wanted = talk(e)
    with engine(models.target, whiflash=models.whiflash("random"), **options) as e:
        assert talk(e) == wanted
        assert assert_tree_is_true(e, models, adapted) > 100
        e.check_leaks()


def test_what_is_learned_is_an_adapters(models: Models, adapters: dict[str, Adapter], tmp_path: Path) -> None:
    """Its rounds teach `auto` nothing of others', and no sample is kept of it. SGLang appends an adapter's id to a
    request's key, which names a tenant all the same."""
    one, two, _ = adapters.values()
    flags = models.whiflash("auto", whiflash_learn=str(tmp_path))
    with engine(models.target, whiflash=flags, **serving(one, two)) as e:
        for i in range(3):
            e.submit(f"of one {i}", list(range(20 + i)), lora_id=one.id)
        e.run()
        policy, spool = e.worker.controller.policy, e.worker.spool
        assert policy.estimator.rounds("ar") == policy.estimator.rounds("diffusion") == 0
        assert list(policy._adapters) == [one.id]
        assert policy._adapters[one.id].rounds("ar") > 0
        e.ask("of two", list(range(20)), lora_id=two.id)
        assert list(policy._adapters) == [one.id, two.id]
        for key in ("a", "b"):
            e.submit(f"{key} adapted", [4, 5, 6], lora_id=one.id, extra_key=key)
            e.submit(f"{key} itself", [4, 5, 6], extra_key=key)
        e.step()
        assert {request.tenant for request in e.states.values()} == {tenant_of(key, None) for key in "ab"}
        e.run()
        spool.flush()
        assert (spool.counts["declined"], spool.counts["written"]) == (6, 2)


def test_drafters_read_the_target_without_adapters(models: Models, adapters: dict[str, Adapter]) -> None:
    """Its embedding and head, where an adapter wraps them."""
    from sglang.srt.lora.layers import BaseLayerWithLoRA

    with engine(models.target, whiflash=models.whiflash("ar"), **serving(adapters["one"])) as e:
        target = e.worker.target
        embedding, head = target.model.model.embed_tokens, target.model.lm_head
        embedding.embed_scale = 2.0  # as Gemma's
        target.model.model.embed_tokens = BaseLayerWithLoRA(embedding, Any)
        target.model.lm_head = BaseLayerWithLoRA(head, Any)
        assert input_embedding(target.model) is embedding
        assert output_head(target.model) is head
        assert target.row_scale == 2.0
        assert target.embedding is embedding.weight
        assert target.lm_head is head.weight
