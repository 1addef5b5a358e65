"""A target's states and logits are transformers' own; what drafters may begin as is known of three architectures."""

import json
import shutil
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from tiny_models import tiny_target
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM

from whiflash_lab.bench.cells import Answer, Cell, Load
from whiflash_lab.bench.prompts import Prompt
from whiflash_lab.bench.reference import BestLogit, Reference, differences
from whiflash_sglang.files.equality import Verdict
from whiflash_train.target import TargetModel, unknown


def test_states_are_layers_outputs_and_what_the_head_reads(tmp_path: Path) -> None:
    path = tiny_target(tmp_path / "target")
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    ours = TargetModel(path, device=torch.device("cpu"), dtype=torch.float32)
    tokens = torch.randint(0, 90, (50,), generator=torch.Generator().manual_seed(0))
    outputs: list[torch.Tensor] = []
    for index in (0, 3):
        theirs.model.layers[index].register_forward_hook(lambda *given: outputs.append(given[2]))
    with torch.no_grad():
        expected = theirs(tokens[None])
    found = ours.forward(tokens, capture=[0, 3])
    for place, output in enumerate(outputs):
        torch.testing.assert_close(found.features[:, place], output.view(50, -1))
    torch.testing.assert_close(torch.nn.functional.linear(found.final, ours.head), expected.logits[0])
    torch.testing.assert_close(ours.next_logits(tokens), expected.logits[0, -1])
    assert ours.states(tokens.tolist(), [0, 3]).shape == (50, 3, ours.hidden_size)


def test_ties_of_other_targets_are_judged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """`whiflash bench` measured for hours and ended without a report, where an answer of such a target differed."""
    config = Gemma2Config(
        vocab_size=90,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
    )
    Gemma2ForCausalLM(config).save_pretrained(tmp_path / "gemma")
    assert unknown(tmp_path / "gemma")
    shape = json.loads((tmp_path / "gemma" / "config.json").read_text())
    unread = {
        "unheard": {"architectures": ["Unheard"], "model_type": "unheard"},
        "quantised": shape | {"quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8"}},
        "cut": shape | {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3},
    }
    for name, content in unread.items():
        shutil.copytree(tmp_path / "gemma", tmp_path / name)
        (tmp_path / name / "config.json").write_text(json.dumps(content))
    reference = Reference(Prompt("p", "chat", ()), (1, 2), (5, 6, 7), (9.0, 0.0, 9.0), "")
    answer = Answer(prompt="p", seconds=1, ttft=0.1, tokens=(5, 9), forwards=1)
    cell = Cell(load=Load(value=1), arm="auto", repetition=0, seconds=1, answers=(answer,))
    for name in ("gemma", *unread):
        best = BestLogit(tmp_path / name, "bfloat16")
        (found,) = differences([cell], {"p": reference}, best, "bfloat16")
        assert (found.verdict, found.position) == (Verdict.TIE, 1)
    assert BestLogit(tmp_path / "gemma", "bfloat16")(reference, 1) != 0
    assert caplog.text.count("does not run here") == len(unread)
    assert all(why in caplog.text for why in ("unheard", "is quantised", "lacks tensors"))


def test_who_interrupts_the_comparison_keeps_the_report(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    reference = Reference(Prompt("p", "chat", ()), (1, 2), (5, 6, 7), (9.0, 0.0, 9.0), "")
    monkeypatch.setattr("whiflash_train.target.TargetModel", Mock(side_effect=KeyboardInterrupt))
    best = BestLogit(tmp_path, "float32")
    assert (best(reference, 1), best(reference, 2), best.lost) == (0.0, 0.0, "interrupted")
