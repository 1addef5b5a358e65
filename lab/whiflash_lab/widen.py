"""Widen a small trained pair: a target and its drafters of exactly the same function, at a large model's cost.

For machines that no large weights reach: answers, rounds and accepted drafts are the small pair's, a pass costs what
the wide shape costs. Nothing is trained or approximated; logits differ by the order of sums only.

The residual stream becomes `copies` equal copies of the small one:

- Weights that write to the stream have their rows repeated. A norm's mean square over equal copies is that of one, so
  its weight is repeated and its epsilon stays. (Zeros in place of copies would need weights scaled by the root of the
  ratio of widths, which bfloat16 rounds.)
- Weights that read the stream read the first copy. The columns of the others are noise in pairs R and -R, which cancel
  on equal copies. Noise has a weight's own deviation: GPUs multiply zeros faster than numbers.
- Each KV head keeps its query heads and gets further ones up to the new group, in pairs: both have the same noise for
  a query, and the output takes them with R and -R. Further KV heads have such query heads only, and further neurons
  are pairs of the same kind. Heads keep their size, and with it rotation and scale.
- Further layers consist of such heads and neurons. They follow the last one, so captured layers keep their numbers.

The target's head becomes a tensor of its own. The vocabulary stays: logits of further tokens would have to be below all
others. Drafters read one copy of each captured layer and have their own streams widened in the same way.
"""

import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from whiflash_sglang.checkpoints.manifest import MANIFEST
from whiflash_sglang.errors import UsageError
from whiflash_sglang.files.jsonl import read_json_file

Weights = dict[str, Tensor]
LAYER = re.compile(r"(.*\.)self_attn\.q_proj\.weight")
"""Name of a layer's query projection; the group is the layer's prefix."""
ATTENTION = [f"self_attn.{name}_proj.weight" for name in "qkvo"]
MLP = [f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")]


@dataclass(frozen=True)
class Shape:
    """Sizes of the wide models. copies: copies of the residual stream. intermediate: neurons of a layer's MLP.

    layers: layers of the target. block_layers: layers of the block drafter. A chain drafter keeps its one layer.
    """

    copies: int = 8
    heads: int = 64
    kv_heads: int = 16
    intermediate: int = 12288
    layers: int = 34
    block_layers: int = 5


@dataclass(frozen=True)
class Model:
    """A small checkpoint: its configuration and tensors, on the device that computes the wide ones."""

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    @classmethod
    def read(cls, path: Path, device: torch.device) -> "Model":
        files = sorted(path.glob("*.safetensors"))
        tensors = {name: t.to(device) for file in files for name, t in load_file(file).items()}
        if biased := [name for name in tensors if re.search(r"_proj\.bias$", name) and "layers" in name]:
            raise UsageError(f"{path} has {biased[0]}: layers with biases are not widened, only Llama's are")
        return cls(read_json_file(path / "config.json"), tensors)

    @property
    def layers(self) -> list[str]:
        """Prefixes of the layers' tensor names, in the layers' order."""
        found = [match[1] for name in self.tensors if (match := LAYER.fullmatch(name))]
        return sorted(found, key=lambda prefix: [int(n) for n in re.findall(r"\d+", prefix)])

    def within(self, prefix: str) -> Weights:
        """Return the tensors whose names begin with `prefix`, named without it."""
        return {name.removeprefix(prefix): tensor for name, tensor in self.tensors.items() if name.startswith(prefix)}


@dataclass(frozen=True)
class Widening:
    """Widens one small checkpoint's tensors to `shape`. noise: generator on the device of these tensors."""

    shape: Shape
    model: Model
    noise: torch.Generator = field(repr=False)

    @property
    def hidden(self) -> int:
        """Width of the small residual stream."""
        return int(self.model.config["hidden_size"])

    def drawn(self, rows: int, columns: int, like: Tensor) -> Tensor:
        """Return noise [rows, columns] of a weight's deviation and dtype, so that its negative cancels it exactly."""
        values = torch.randn(rows, columns, device=like.device, generator=self.noise)
        return (values * like.float().std()).to(like.dtype)

    def writes(self, weight: Tensor) -> Tensor:
        """Repeat the rows of a weight whose output joins the residual stream, or a norm's weight, for each copy."""
        return torch.cat([weight] * self.shape.copies)

    def reads(self, weight: Tensor) -> Tensor:
        """Widen a weight that reads one residual stream, or several side by side. The first copy's columns stay; the
        columns of the other copies are noise that cancels."""
        parts: list[Tensor] = []
        pairs, odd = divmod(self.shape.copies - 1, 2)
        for part in weight.chunk(weight.shape[1] // self.hidden, dim=1):
            parts.append(part)
            for _ in range(pairs):
                noise = self.drawn(len(part), self.hidden, weight)
                parts += [noise, -noise]
            parts += [torch.zeros_like(part)] * odd
        return torch.cat(parts, 1)

    def idle(self, count: int, size: int, inputs: Sequence[Tensor], output: Tensor) -> tuple[list[Tensor], Tensor]:
        """Draw weights of `count` heads of `size` rows, or of neurons (size 1), in pairs whose outputs cancel.

        Returns: further rows for each of `inputs`, equal in a pair, and further columns for `output`, opposite in a
        pair. The last of an odd count has zeros in `output`.
        """
        pairs, odd = divmod(count, 2)
        rows = []
        for weight in inputs:
            twin = self.drawn(pairs * size, weight.shape[1], weight)
            rows.append(torch.cat([twin, twin, self.drawn(odd * size, weight.shape[1], weight)]))
        columns = self.drawn(len(output), pairs * size, output)
        return rows, torch.cat([columns, -columns, output.new_zeros(len(output), odd * size)], 1)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, o: Tensor, kept: int) -> list[Tensor]:
        """Return the projections q, k, v and o with more heads; `layer` then widens them to the wide residual stream.

        kept: KV heads that stay, with their query heads: all of the small model's, or none.
        """
        heads, kv_heads = (self.model.config[f"num_{kind}_heads"] for kind in ("attention", "key_value"))
        before, group, size = heads // kv_heads, self.shape.heads // self.shape.kv_heads, len(q) // heads
        queries, outputs = [], []
        for head in range(self.shape.kv_heads):
            here = before if head < kept else 0
            rows = slice(head * before * size, (head * before + here) * size)
            (more,), out = self.idle(group - here, size, [q], o)
            queries += [q[rows], more]
            outputs += [o[:, rows], out]
        k, v = (
            torch.cat([w[: kept * size], self.drawn((self.shape.kv_heads - kept) * size, w.shape[1], w)])
            for w in (k, v)
        )
        return [torch.cat(queries), k, v, torch.cat(outputs, 1)]

    def layer(self, prefix: str, *, empty: bool = False) -> Weights:
        """Return a widened layer's tensors, named without `prefix`. empty: all its heads and neurons add nothing."""
        small = self.model.within(prefix)
        kept = 0 if empty else self.model.config["num_key_value_heads"]
        q, k, v, o = (small.pop(name) for name in ATTENTION)
        q, k, v, o = self.attention(q, k, v, o, kept)
        gate, up, down = (small.pop(name) for name in MLP)
        neurons = 0 if empty else len(gate)
        rows, out = self.idle(self.shape.intermediate - neurons, 1, [gate, up], down)
        gate, up = (torch.cat([w[:neurons], more]) for w, more in zip((gate, up), rows, strict=True))
        down = torch.cat([down[:, :neurons], out], 1)
        norms = {
            name: self.writes(weight) if len(weight) == self.hidden else weight  # norms of a head stay
            for name, weight in small.items()
        }
        wide = [*map(self.reads, (q, k, v)), self.writes(o), self.reads(gate), self.reads(up), self.writes(down)]
        return norms | dict(zip((*ATTENTION, *MLP), wide, strict=True))

    def ends(self) -> Weights:
        """Return all tensors outside layers: embedding, head, norms, a drafter's input projection."""
        layers = tuple(self.model.layers)
        found = {name: t for name, t in self.model.tensors.items() if not name.startswith(layers)}
        if "model.embed_tokens.weight" in found:
            found.setdefault("lm_head.weight", found["model.embed_tokens.weight"])
        for name, weight in found.items():
            if name.endswith("norm.weight"):
                found[name] = self.writes(weight)
            elif name.endswith("embed_tokens.weight"):
                found[name] = torch.cat([weight] * self.shape.copies, 1)
            elif name == "fc.weight":
                found[name] = self.writes(self.reads(weight))
            elif name in ("lm_head.weight", "confidence_head.proj.weight"):
                # The confidence head reads a Markov embedding behind the stream.
                found[name] = torch.cat([self.reads(weight[:, : self.hidden]), weight[:, self.hidden :]], 1)
        return found

    def layers(self, count: int) -> Iterator[Weights]:
        """Yield each wide layer's tensors by name; layers after the small model's last one add nothing."""
        prefixes = self.model.layers
        for prefix in prefixes:
            yield {prefix + name: tensor for name, tensor in self.layer(prefix).items()}
        last = prefixes[-1]
        for number in range(len(prefixes), count):
            prefix = last.replace(f".{len(prefixes) - 1}.", f".{number}.")
            yield {prefix + name: tensor for name, tensor in self.layer(last, empty=True).items()}

    def write(self, out: Path, layers: int, **changes: Any) -> None:
        """Write the checkpoint to a new directory, one file per layer. changes: fields of `config.json`."""
        out.mkdir(parents=True)
        index = dict[str, str]()
        for number, weights in enumerate(chain([self.ends()], self.layers(layers))):
            file = f"model-{number:03}.safetensors"
            save_file({name: t.contiguous().cpu() for name, t in weights.items()}, out / file, {"format": "pt"})
            index |= dict.fromkeys(weights, file)
        (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
        config = {
            **self.model.config,
            "hidden_size": self.hidden * self.shape.copies,
            "num_hidden_layers": layers,
            "num_attention_heads": self.shape.heads,
            "num_key_value_heads": self.shape.kv_heads,
            "intermediate_size": self.shape.intermediate,
            "tie_word_embeddings": False,
            **changes,
        }
        (out / "config.json").write_text(json.dumps(config, indent=1))


def widen_pair(target: Path, bundle: Path, out: Path, shape: Shape) -> None:
    """Write the wide pair to `out/target` and `out/bundle`, computed on a GPU if there is one.

    The manifest has no digests of the small files, and no neural router, which would read a small stream.

    Raises:
        UsageError: a layer has biases.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    noise = torch.Generator(device).manual_seed(0)

    def small(path: Path) -> Widening:
        return Widening(shape, Model.read(path, device), noise)

    wide = out / "target"
    one = small(target)
    layers = max(shape.layers, len(one.model.layers))
    one.write(wide, layers)
    for file in target.iterdir():
        if not file.name.endswith((".safetensors", ".index.json")) and not (wide / file.name).exists():
            shutil.copy(file, wide)
    manifest = read_json_file(bundle / MANIFEST)
    width = {"target_hidden_size": shape.copies * one.hidden}
    small(bundle / manifest["eagle3"]).write(out / "bundle" / "eagle3", 1, **width)
    block = small(bundle / manifest["dflash"])
    blocks = max(shape.block_layers, len(block.model.layers))
    changes = {"num_target_layers": layers, "layer_types": ["full_attention"] * blocks}
    block.write(out / "bundle" / "dflash", blocks, **changes)
    for name in ("router", "sources"):
        manifest.pop(name, None)
    manifest |= {"name": f"{manifest['name']}-wide", "target": str(wide), "eagle3": "eagle3", "dflash": "dflash"}
    (out / "bundle" / MANIFEST).write_text(json.dumps(manifest, indent=1))
    if template := manifest.get("chat_template"):
        shutil.copy(bundle / template, out / "bundle" / template)
