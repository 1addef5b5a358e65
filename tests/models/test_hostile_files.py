"""Any value of any field, and any numbers in any tensor, are served or refused with a sentence, in bounded memory.

Fields are those that the formats' code reads, so a new field is asked here without being named.
"""

import json
import re
import resource
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import chosen_formats
import pytest
import torch
from matrix import sampled
from published import HIDDEN, VOCAB, block_trunk, decoder_layer, draw, target_tensors, write
from test_dspark import DEEPSPEC, SPECFORGE
from test_dspark import tensors as dspark_tensors
from test_eagle3_formats import AUX, PARALLEL, SGLANG, SPECULATOR, parallel_tensors
from test_eagle3_formats import tensors as chain_tensors
from test_mtp import GLM, MIMO, expert_tensors, mimo_tensors
from torch import Tensor

import whiflash_sglang.formats as formats
from whiflash_sglang.checkpoints.fit import TargetShape, check_fit
from whiflash_sglang.errors import CheckpointError
from whiflash_sglang.formats.checkpoint import read_weights
from whiflash_sglang.formats.table import read_draft
from whiflash_sglang.formats.uno import CONFIG, read_adapter

ROOM = 3 << 30
"""Bytes of address space beyond what the process has; every file here is smaller than one MB."""
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256, "rope_theta": 1e4}
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "rope_theta": 1e4}
LONG |= {"original_max_position_embeddings": 256, "factor": 4.0}
Weights = dict[str, Tensor]


def glm_tensors() -> Weights:
    prefix = f"model.layers.{GLM['num_hidden_layers']}."
    head = {f"{prefix}{name}.weight": torch.ones(HIDDEN) for name in ("enorm", "hnorm", "shared_head.norm")}
    head |= {f"{prefix}eh_proj.weight": torch.randn(HIDDEN, 2 * HIDDEN)}
    layer = {name: size for name, size in decoder_layer(prefix, head_norms=False).items() if ".mlp." not in name}
    return head | draw(layer) | {f"{prefix}mlp.{name}": value for name, value in expert_tensors().items()}


PLAIN = chosen_formats.BASE | {"architectures": ["DFlashDraftModel"], "dflash_config": chosen_formats.TRUNK}
FORMATS: dict[str, tuple[Mapping[str, Any], Callable[[], Weights]]] = {
    "DFlash": (PLAIN, lambda: draw(block_trunk(chosen_formats.LAYERS, 3))),
    "DSpark": (DEEPSPEC, dspark_tensors),
    "SpecForge DSpark": (SPECFORGE, dspark_tensors),
    "speculators DFlash": (chosen_formats.SPECULATOR, lambda: chosen_formats.reduced(draw(block_trunk(2, 3)))),
    "EAGLE-3": (SGLANG | AUX, lambda: chain_tensors(3, "midlayer.")),
    "EAGLE-3, yarn": (SGLANG | AUX | {"rope_scaling": YARN}, lambda: chain_tensors(3, "midlayer.")),
    "EAGLE-3, longrope": (SGLANG | AUX | {"rope_scaling": LONG}, lambda: chain_tensors(3, "midlayer.")),
    "speculators EAGLE-3": (SPECULATOR, lambda: chain_tensors(3, "layers.0.")),
    "P-EAGLE": (PARALLEL, parallel_tensors),
    "MiMo": (MIMO, mimo_tensors),
    "GLM": (GLM, glm_tensors),
    **chosen_formats.FORMATS,
}
SOURCES = "".join(path.read_text() for path in sorted(Path(formats.__path__[0]).rglob("*.py")))
READ = {*re.findall(r'\b\w+(?:\.get\(|\[|, )"([a-z]\w+)"', SOURCES)}
"""Fields that some format reads."""
ROPE = {"rope_theta", "factor", "partial_rotary_factor", "rope_dim", "original_max_position_embeddings"}
ROPE |= {"beta_fast", "beta_slow", "attention_factor", "short_factor", "long_factor", "rope_type", "type"}
NUMBERS = (2**62, 2**40, 2**28, 2**20, 10**6, 2**14, 3, 1, 0, -1, 1e308, 1e-320, 2.5)
OTHERS = (float("nan"), float("inf"), float("-inf"), True, "8", "", [], [3.0], [None], {}, {"a": 1}, None)
NOTED = SGLANG | AUX


@pytest.fixture(autouse=True)
def _bounded() -> Iterator[None]:
    """A file that asks for all memory gets a MemoryError here, which no test expects."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def served(path: Path, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> bool:
    """Whether a start loads such a file; otherwise it ends with a sentence of its path, not longer than a screen."""
    write(path, config, weights)
    embedding, head = target_tensors()
    sentence = ""
    try:
        draft = read_draft(path)
        check_fit(draft, TargetShape(HIDDEN, 12, VOCAB))
        draft.load(device=torch.device("cpu"), dtype=torch.float32, target_embedding=embedding, target_lm_head=head)
    except CheckpointError as error:
        sentence = str(error)
    assert not sentence or (str(path) in sentence and len(sentence) < 1000), sentence
    return not sentence


def changed(config: Mapping[str, Any], key: str, value: Any) -> Iterator[dict[str, Any]]:
    """The configuration with `key` set, wherever it is, or at the top and in each part of it."""
    yield {**config, key: value}
    for name, part in config.items():
        if isinstance(part, dict) and (key in part or name in ("rope_scaling", "rope_parameters")):
            yield {**config, name: {**part, key: value}}


@pytest.mark.parametrize("name", sampled(FORMATS, "EAGLE-3, yarn", "speculators DFlash"))
def test_any_value_of_any_field(name: str, tmp_path: Path) -> None:
    config, make = FORMATS[name]
    weights = make()
    assert served(tmp_path / "draft", config, weights), "the file itself is right"
    own = {key for part in (config, *config.values()) if isinstance(part, dict) for key in part}
    for key in sorted((READ & own) | (ROPE if "rope_scaling" in config else set()) | {"rope_theta"}):
        for value in (*NUMBERS, *OTHERS):
            for wrong in changed(config, key, value):
                served(tmp_path / "draft", wrong, weights)


def faults(weight: Tensor) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Numbers that make every draft worthless, and scales for them."""
    for number in ("nan", "inf"):
        damaged = weight.clone()
        damaged.view(-1)[-1] = float(number)
        yield damaged, None
    for kind in (torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fn):
        yield weight.to(kind), None
    eight = weight.to(torch.float8_e4m3fn)
    for scale in ("nan", "inf", "-inf", "0", "-1", "1e39"):
        scales = torch.ones(len(weight), 1, dtype=torch.float64)
        scales[-1] = float(scale)
        yield eight, scales.float()
    yield eight, torch.ones(len(weight), dtype=torch.int64)
    yield eight, torch.ones(1, dtype=torch.complex64)
    yield eight, torch.ones(len(weight) + 1, 1)
    short = weight.flatten()[:-1]
    for other in (weight.flatten()[0], weight[:0], short, short[None, None]):
        yield other.to(torch.float8_e4m3fn), torch.ones(1)
        yield other.contiguous(), None


@pytest.mark.parametrize("name", sampled(FORMATS, "FlashMap", "P-EAGLE"))
def test_any_numbers_in_any_tensor(name: str, tmp_path: Path) -> None:
    config, make = FORMATS[name]
    weights = make()
    unread = ("t2d", "layers.1.") + (() if name == "P-EAGLE" else ("embed_tokens",))
    for tensor, weight in weights.items():
        if any(part in tensor for part in unread) or (tensor == "lm_head.weight" and len(weight) == VOCAB):
            continue
        if not weight.is_floating_point():
            for wrong in (weight + 10**6, weight - VOCAB, weight.float() * float("nan"), weight[:3], weight[None]):
                assert not served(tmp_path / "draft", config, weights | {tensor: wrong.contiguous()}), tensor
            continue
        for wrong, scale in faults(weight):
            scales = {} if scale is None else {f"{tensor}_scale": scale}
            assert not served(tmp_path / "draft", config, {**weights, tensor: wrong, **scales}), (tensor, wrong, scale)


def test_a_wide_norm_with_as_many_scales_takes_no_square(tmp_path: Path) -> None:
    """40,000 numbers and 40,000 scales were multiplied to 6.4 GB."""
    wide = torch.ones(40_000)
    weights = chain_tensors(3, "midlayer.") | {"norm.weight": wide.to(torch.float8_e4m3fn)}
    assert not served(tmp_path / "draft", NOTED, weights | {"norm.weight_scale": wide})


PEFT = {"peft_type": "LORA", "bias": "none", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}
PEFT |= {"init_lora_weights": True, "lora_dropout": 0.05, "layers_to_transform": None, "loftq_config": {}}


def test_an_adapter_is_a_plain_lora_of_numbers(tmp_path: Path) -> None:
    """SGLang ignores what else PEFT may set, and its pool is as wide as `r`."""
    write(tmp_path, {}, {})

    def reads(changes: dict[str, Any]) -> bool:
        (tmp_path / CONFIG).write_text(json.dumps(PEFT | changes))
        try:
            return bool(read_adapter(tmp_path))
        except CheckpointError as error:
            return str(tmp_path) not in str(error)

    assert reads({})
    assert reads({"lora_alpha": 2.5, "init_lora_weights": "gaussian"})
    for key in ("r", "lora_alpha"):
        for value in (*NUMBERS[:4], 0, -1, 1e308, *OTHERS):
            assert not reads({key: value}), (key, value)
    assert not reads({"r": 2.5})
    for key in ("layers_to_transform", "exclude_modules", "use_qalora", "corda_config", "a_key_of_next_year"):
        assert not reads({key: ["x"]}), key
    for changes in (
        {"init_lora_weights": "pissa"},
        {"use_dora": True},
        {"peft_type": "IA3"},
        {"rank_pattern": {"q_proj": 4}},
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj", "lm_head"]},
    ):
        assert not reads(changes), changes


@pytest.mark.parametrize("named", [5, None, ["x"], {"a": 1}, "x" * 10**5])
def test_an_index_names_files(named: Any, tmp_path: Path) -> None:
    path = write(tmp_path, PLAIN, draw(block_trunk(chosen_formats.LAYERS, 3)))
    index = {"weight_map": {"a": named, "b": "model.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json") as refused:
        read_weights(path)
    assert len(str(refused.value)) < 1000
