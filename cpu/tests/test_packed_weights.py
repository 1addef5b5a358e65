"""A bfloat16 target with packed weights writes what it writes without, also after its weights have become others."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from engine import Engine, engine
from safetensors.torch import load_file
from tiny_models import tiny_target
from whiflash_kernels.packed import is_packed, linear, packable

from whiflash_cpu import packed_weights
from whiflash_sglang.arms.paged import dflash_weights, eagle3_weights
from whiflash_sglang.formats import packed

from .conftest import Checkpoints

Texts = list[list[int]]

pytestmark = pytest.mark.skipif(
    not packable(torch.zeros(8, 8, dtype=torch.bfloat16)), reason="oneDNN multiplies no bfloat16 on this processor"
)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_target(tmp_path_factory.mktemp("other"), seed=5, peaked=True)


@contextmanager
def without_copies() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed, "MEMORY_SHARE", 0.0)
        yield


def model_of(e: Engine) -> Any:
    return e.scheduler.tp_worker.model_runner.model


def stale(e: Engine) -> list[str]:
    """Packed weights whose copy is of other numbers."""
    found = []
    for name, weight in model_of(e).named_parameters():
        x = torch.ones(2, weight.shape[-1], dtype=torch.bfloat16)
        if is_packed(weight) and not torch.equal(linear(x, weight), F.linear(x, weight)):
            found.append(name)
    return found


def texts(e: Engine) -> Texts:
    return e.generate([[7, 8, 9, 10], [50, 60, 70], list(range(100, 130))], max_new_tokens=24)


def started(target: Path) -> Any:
    return engine(target, dtype="bfloat16", disable_radix_cache=True)


def asked(target: Path) -> Texts:
    with started(target) as e:
        return texts(e)


@pytest.fixture(scope="module")
def plain(checkpoints: Checkpoints, other: Path) -> tuple[Texts, Texts]:
    """Without copies: the texts of either target."""
    with without_copies():
        return asked(checkpoints.target), asked(other)


def test_no_room_is_said_and_nothing_is_packed(checkpoints: Checkpoints, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "whiflash_cpu"), without_copies(), started(checkpoints.target) as e:
        assert not any(is_packed(weight) for weight in model_of(e).parameters())
    assert "weights are not laid out for this CPU's matrix kernels" in caplog.text


def test_layers_in_the_layout_of_other_kernels_are_left() -> None:
    """SGLang's own AMX kernels keep a layer's weight in blocks of theirs, under the shape of rows."""
    from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod

    layer, head = torch.nn.Module(), torch.nn.Module()
    for module in (layer, head):
        module.weight = torch.nn.Parameter(torch.zeros(32, 64, dtype=torch.bfloat16), requires_grad=False)
        module.use_intel_amx_backend = True  # type: ignore[assignment]
    layer.quant_method = UnquantizedLinearMethod()
    packed_weights.pack_model(torch.nn.ModuleDict({"layer": layer, "lm_head": head}))
    assert not is_packed(layer.weight)
    assert not is_packed(head.weight)


def test_a_head_with_an_adapter_is_sglangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_weights, "has_kernel", lambda _: True)
    monkeypatch.setattr(packed_weights, "linear", lambda *_: "ours")
    compute: Any = packed_weights.compute_lm_head(lambda *_, **__: "SGLang's")  # type: ignore[arg-type,return-value]
    processor, weight = SimpleNamespace(use_fp32_lm_head=False, rl_on_policy_target=None), torch.zeros(1)
    assert compute(processor, weight, SimpleNamespace(weight=weight)) == "ours"
    assert compute(processor, weight, SimpleNamespace(weight=weight, set_lora=None)) == "SGLang's"


def test_what_the_log_says_is_of_weights_without_a_copy(caplog: pytest.LogCaptureFixture) -> None:
    """A matrix under two names (a tied head) counts once, and one that has its copy not at all."""
    head = torch.nn.Module()
    head.weight = torch.nn.Parameter(torch.zeros(1000, 10_000, dtype=torch.bfloat16), requires_grad=False)
    model = torch.nn.ModuleDict({"a": torch.nn.ModuleDict({"lm_head": head}), "lm_head": head})
    with caplog.at_level(logging.INFO, "whiflash_cpu"), without_copies():
        packed_weights.pack_model(model)
    assert "the copies' 0.02 GB" in caplog.text
    packed_weights.pack_model(model)
    assert is_packed(head.weight)
    caplog.clear()
    with caplog.at_level(logging.INFO, "whiflash_cpu"):
        packed_weights.pack_model(model)
    assert caplog.text == ""


def test_drafters_are_packed_and_a_head_that_they_borrow_is_the_targets(
    checkpoints: Checkpoints, other: Path, plain: tuple[Texts, Texts]
) -> None:
    flags = {"draft": checkpoints.dflash, "whiflash_eagle_draft": str(checkpoints.eagle3)}
    flags |= {"whiflash_router": "ar", "whiflash_lookup": "off"}
    with engine(checkpoints.target, dtype="bfloat16", whiflash=flags) as e:
        for arm in ("ar", "diffusion"):
            modules = e.worker.drafters[arm].model.modules()
            matrices = [module.weight for module in modules if isinstance(module, packed.Linear)]
            assert matrices
            assert all(is_packed(weight) for weight in matrices)
        for read, arm in ((dflash_weights, "diffusion"), (eagle3_weights, "ar")):
            model = e.worker.drafters[arm].model
            assert read(model).fc is model.fc.weight, "a second copy of one matrix"
            e.start_over(arm)
            assert texts(e) == plain[0]
        head, weight = e.worker.drafters["diffusion"].model.head, model_of(e).lm_head.weight
        x = torch.ones(2, weight.shape[1], dtype=torch.bfloat16)
        before = head.logits(x)
        assert updater_of(e).update_weights_from_disk(str(other), "auto")[0]
        assert not torch.equal(head.logits(x), before)
        assert torch.equal(head.logits(x), F.linear(x, weight)[:, : before.shape[1]])


@pytest.fixture(scope="module")
def shared(checkpoints: Checkpoints, plain: tuple[Texts, Texts]) -> Iterator[Engine]:
    with started(checkpoints.target) as e:
        yield e


@pytest.fixture
def running(shared: Engine, checkpoints: Checkpoints) -> Engine:
    """With the first target's weights. No other engine may run beside it, so these tests come last."""
    assert updater_of(shared).update_weights_from_disk(str(checkpoints.target), "auto")[0]
    return shared


def updater_of(e: Engine) -> Any:
    return e.scheduler.tp_worker.model_runner.weight_updater


def tensors_of(target: Path) -> list[tuple[str, torch.Tensor]]:
    return [(name, tensor.bfloat16()) for name, tensor in load_file(target / "model.safetensors").items()]


def test_texts_before_and_after_every_kind_of_update(
    running: Engine, checkpoints: Checkpoints, other: Path, plain: tuple[Texts, Texts]
) -> None:
    first, second = plain
    assert first != second
    layer, updater = model_of(running).model.layers[0], updater_of(running)
    held = [layer.self_attn.qkv_proj, layer.self_attn.o_proj, layer.mlp.gate_up_proj, layer.mlp.down_proj]
    for module in (*held, model_of(running).lm_head):
        assert is_packed(module.weight), module
    assert texts(running) == first
    assert updater.update_weights_from_disk(str(other), "auto")[0]
    assert texts(running) == second
    assert updater.update_weights_from_tensor(tensors_of(checkpoints.target))[0]
    assert texts(running) == first
    updater.begin_weight_update()
    assert updater.load_weights_from_distributed(tensors_of(other))[0]
    assert stale(running) == []
    updater.end_weight_update(run_post_load=True)
    assert texts(running) == second
    assert is_packed(held[0].weight)


def test_weights_that_are_checked_by_overwriting_them(
    running: Engine, checkpoints: Checkpoints, plain: tuple[Texts, Texts]
) -> None:
    """SGLang's `/weights_checker` writes random numbers over them, and an update brings them back."""
    from sglang.srt.utils.weight_checker import WeightChecker

    WeightChecker(get_model=lambda: model_of(running)).handle("reset_tensors", role="target")
    assert texts(running) != plain[0]
    assert stale(running) == []
    assert updater_of(running).update_weights_from_disk(str(checkpoints.target), "auto")[0]
    assert texts(running) == plain[0]


def test_a_session_of_updates_packs_at_its_end_alone(
    running: Engine, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights come in many parts, or are written from outside (RDMA): no copy is right before the end."""
    updater, packings = updater_of(running), list[Any]()
    pack = packed_weights.pack_model
    monkeypatch.setattr(packed_weights, "pack_model", lambda model: (packings.append(model), pack(model)))
    updater.begin_weight_update()
    assert not any(is_packed(weight) for weight in model_of(running).parameters())
    for name, tensor in tensors_of(other):
        assert updater.load_weights_from_distributed([(name, tensor)])[0]
    assert packings == []
    updater.end_weight_update(run_post_load=True)
    assert packings == [model_of(running)]
    assert is_packed(model_of(running).lm_head.weight)
    assert stale(running) == []


def test_copies_are_made_anew_though_memory_went_elsewhere_since(running: Engine, other: Path) -> None:
    """To the KV pool, say: what the copies took is given back before an update, so they have room behind it."""
    updater = updater_of(running)
    with without_copies():
        assert updater.update_weights_from_disk(str(other), "auto")[0]
        assert is_packed(model_of(running).lm_head.weight)
        updater.begin_weight_update()
        updater.end_weight_update(run_post_load=True)
        assert is_packed(model_of(running).lm_head.weight)
