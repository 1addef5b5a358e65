"""Adapters (LoRA) on a phantom H100: SGLang's Triton kernels in captured rounds, under its overlap loop."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from shutil import which

import pytest
from adapters import ATTENTION, make_adapter
from model_set import Models
from reference import ReferenceDrafters
from tiny_models import tiny_dflash, tiny_eagle3, tiny_target

if find_spec("sgl_kernel") is None or which("cc") is None:
    pytest.skip("without SGLang's operators for CUDA, or a C compiler", allow_module_level=True)

ELSEWHERE = ("sglang/srt/speculative/eagle_utils.py", "sglang/srt/lora/backend/triton_backend.py")
"""SGLang copies from pageable memory: lengths twice a round, and segments of adapters twice a prefill."""

ALLOCATOR = "sglang/srt/mem_cache/allocator/token.py"
"""A race of SGLang's without WHIFLASH, too (`test_server.NOT_OURS`)."""


def test_replayed_rows_meet_their_requests_adapter(tmp_path: Path) -> None:
    """Each text is that of the target into which its adapter is merged; nothing waits for a width."""
    target = tiny_target(tmp_path / "target", peaked=True, num_layers=4)
    eagle3, dflash = tiny_eagle3(tmp_path / "eagle3", target), tiny_dflash(tmp_path / "dflash", target)
    models = Models(target, eagle3, dflash, ReferenceDrafters(target, eagle3, dflash))
    one = make_adapter(models, tmp_path, "one", seed=1, rank=4, modules=ATTENTION)
    two = make_adapter(models, tmp_path, "two", seed=2, rank=8)
    file, script = tmp_path / "found.json", str(Path(__file__).with_name("adapted.py"))
    command = [sys.executable, script, *map(str, (file, target, eagle3, dflash, one.path, two.path))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-6000:]
    found = json.loads(file.read_text())
    print({name: found[name] for name in ("rounds", "replays", "launches", "pageable", "waits_of_host")})
    of = {None: models, "one": one.models, "two": two.models}
    for rid, text in found["texts"].items():
        target_model = of[found["adapters"][rid]].reference.target.model
        prompt = found["prompts"][rid]
        logits = target_model.logits(target_model.forward([*prompt, *text]).final)
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == text, rid
    assert found["retracted"]
    assert found["replays"] > found["rounds"] == found["launches"]["fill_slots"]
    assert found["launches"]["_sgemm_lora_a_kernel"]
    assert not found["stalls"]
    assert not [race for race in found["races"] if not race.partition(": ")[2].startswith(ALLOCATOR)]
    assert not found["dangling"]
    assert not [site for site in found["pageable"] if not site.startswith(ELSEWHERE)]
