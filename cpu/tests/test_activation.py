"""Conditions for the CPU platform, and choices that stay the user's."""

import pytest
import torch
from sglang.srt import plugins
from sglang.srt.arg_groups.overrides import resolving_view
from sglang.srt.distributed import bootstrap
from sglang.srt.server_args import ServerArgs

import whiflash_cpu as platform
from whiflash_cpu.cpu import CpuPlatform
from whiflash_sglang.files.cpu import PLATFORM

from .conftest import Checkpoints

OURS = "whiflash_cpu.cpu:CpuPlatform"


def test_it_runs_where_nothing_else_could(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SGLANG_PLATFORM", raising=False)
    monkeypatch.delenv("SGLANG_USE_CPU_ENGINE", raising=False)
    assert platform.activate() == OURS
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert platform.activate() is None


def test_it_steps_aside_for_sglangs_own_cpu_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SGLANG_PLATFORM", raising=False)
    monkeypatch.setenv("SGLANG_USE_CPU_ENGINE", "1")
    assert platform.activate() is None
    monkeypatch.setenv("SGLANG_PLATFORM", PLATFORM)
    assert platform.activate() == OURS


@pytest.mark.parametrize("chosen", [None, "whiflash_cpu", "intel_amx", "torch_native"])
def test_an_attention_backend_that_was_chosen_stays(checkpoints: Checkpoints, chosen: str | None) -> None:
    """`intel_amx` becomes `torch_native` in SGLang itself, where the processor has no AMX."""
    arguments = ServerArgs(model_path=str(checkpoints.target), device="cpu", attention_backend=chosen)
    arguments.resolve_once()
    ours = chosen in (None, "whiflash_cpu")
    assert (resolving_view(arguments).attention_backend == "whiflash_cpu") is ours


def test_what_others_allocate_meanwhile_ends_no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks on one machine measure its free memory one after the other; what differs is no device's."""
    check = "SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK"
    free = {"pre_model_load_memory": 11.6, "local_gpu_memory": 12.9}
    monkeypatch.setenv(check, "1")
    with pytest.raises(RuntimeError, match="unbalanced"):
        bootstrap._check_tp_memory_balance(**free)
    monkeypatch.delenv(check)
    CpuPlatform()
    bootstrap._check_tp_memory_balance(**free)


@pytest.mark.parametrize(
    ("said", "algorithms", "platforms"),
    [
        ("none", set(), set()),
        (PLATFORM, set(), {PLATFORM}),
        (f"whiflash, {PLATFORM}", {"whiflash"}, {PLATFORM}),
        (None, {"whiflash"}, {PLATFORM}),
    ],
)
def test_the_operator_says_which_plugins_are_loaded(
    monkeypatch: pytest.MonkeyPatch, said: str | None, algorithms: set[str], platforms: set[str]
) -> None:
    """`SGLANG_PLUGINS`: the way back to plain SGLang without taking anything off the machine."""
    monkeypatch.setenv("SGLANG_PLUGINS", said) if said else monkeypatch.delenv("SGLANG_PLUGINS", raising=False)
    ours = {"whiflash", PLATFORM}
    assert ours & plugins.load_plugins_by_group(plugins.GENERAL_PLUGINS_GROUP).keys() == algorithms
    assert ours & plugins.load_plugins_by_group(plugins.PLATFORM_PLUGINS_GROUP).keys() == platforms
