"""A target with more heads, for ranks that its own do not split over, is the same function: logits and features."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from loaded_scripts import load_script
from reference import ReferenceTarget
from safetensors.torch import load_file, save_file
from tiny_models import HEAD_DIM, HEADS, HIDDEN, KV_HEADS, tiny_target

pad_heads = load_script("pad_heads")

LAYERS = (0, 3, 5)


def with_biases(target: Path) -> Path:
    """Of queries, keys and values, as Qwen2 has them."""
    tensors = load_file(target / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    for name in [name for name in tensors if name.split(".")[-2] in pad_heads.ROWS]:
        tensors[name.replace("weight", "bias")] = torch.randn(len(tensors[name]), generator=generator)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    config |= {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize("ranks", [3, 4])
@pytest.mark.parametrize("made", [lambda target: target, with_biases])
def test_the_same_function_with_more_heads(tmp_path: Path, made: Callable[[Path], Path], ranks: int) -> None:
    source = made(tiny_target(tmp_path / "target"))
    out = pad_heads.write(source, tmp_path / "padded", ranks)
    config = json.loads((out / "config.json").read_text())
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (
        HEADS // KV_HEADS * ranks,
        ranks,
    )
    tokens = torch.randint(0, 320, (48,), generator=torch.Generator().manual_seed(2)).tolist()
    original, padded = ReferenceTarget(source), ReferenceTarget(out)
    assert padded.model.num_heads > original.model.num_heads
    expected, found = original.forward(tokens, LAYERS), padded.forward(tokens, LAYERS)
    torch.testing.assert_close(found.features, expected.features, rtol=1e-5, atol=1e-5)
    logits = original.model.logits(expected.final)
    torch.testing.assert_close(padded.model.logits(found.final), logits, rtol=1e-5, atol=1e-5)
    assert logits.std() > 0.1


def test_a_head_keeps_its_size_where_the_configuration_does_not_say_it(tmp_path: Path) -> None:
    """By default it is the hidden size over the heads, which are more now."""
    config = {"hidden_size": HIDDEN, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS}
    assert pad_heads.padded(config, 4)["head_dim"] == HEAD_DIM


def test_what_goes_with_a_target_goes_along(tmp_path: Path) -> None:
    source = tiny_target(tmp_path / "target")
    (source / "checksums.json").write_text("{}")
    out = pad_heads.write(source, tmp_path / "padded", 4)
    assert {path.name for path in source.iterdir()} - {path.name for path in out.iterdir()} == {
        "checksums.json"
    }


def test_heads_that_split_are_left(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="2 groups of heads split over 2 ranks as they are"):
        pad_heads.write(tiny_target(tmp_path / "target"), tmp_path / "padded", 2)
    assert not (tmp_path / "padded").exists()
