"""Reads `published.yaml`: targets with drafters, GPUs, and figures that others published, with their sources.

Lengths are tokens per round, bonus token included. They belong to the checkpoints that the source names, which may
differ from those that are listed.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from pydantic import AliasChoices, BaseModel, Field, TypeAdapter, ValidationError

from whiflash_sglang.errors import CheckpointError, UsageError
from whiflash_sglang.files.disk import read_yaml
from whiflash_sglang.formats.config_json import read_json_config


class Gpu(NamedTuple):
    """A GPU's data sheet. flops: bf16 operations per second. bandwidth: bytes per second. memory: bytes. host: bytes
    per second from host memory, assumed to be four fifths of PCIe's.
    """

    name: str
    flops: float
    bandwidth: float
    memory: float
    host: float = 50e9


class Acceptance(NamedTuple):
    """Published acceptance. lengths: data set → arm → tokens per round. drafts: arm → drafts of a published round."""

    lengths: Mapping[str, Mapping[str, float]]
    drafts: Mapping[str, int]
    source: str


class Ratio(NamedTuple):
    """A published ratio of tokens per second over plain decoding, or plain decoding's rate, by number of requests.

    what: the method, engine, device and data. estimated: the same ratios by `advise`. using: inputs of the estimate: a
    card, an arm, tokens and drafts of a round, tokens of a prompt.
    """

    what: str
    by_requests: Mapping[int, str]
    estimated: Mapping[int, float] = {}
    using: tuple[str, str, float, int, int] | None = None

    @property
    def shown(self) -> str:
        """Text with the published figures, and in brackets how far an estimate is off."""
        off = {at: f" ({rate / float(self.by_requests[at]) - 1:+.0%})" for at, rate in self.estimated.items()}
        rates = ", ".join(f"{rate} at {at}{off.get(at, '')}" for at, rate in self.by_requests.items())
        return f"{self.what}: {rates}"


class Shape(NamedTuple):
    """Sizes of a model. parameters, active: with all experts, and with those that a token uses. kv: bytes per token of
    context. positions: tokens of the longest text. experts, used: experts of a layer, and those that a token uses, 0 in
    a dense model. expert_bytes: bytes of an expert's parameter. width: elements of a token's query per layer, as a mean
    in which layers with a window count as 0. heads: of attention.
    """

    parameters: float
    active: float
    layers: int
    kv: int
    positions: int = 1 << 30
    experts: int = 0
    used: int = 0
    expert_bytes: float = 2.0
    width: int = 4096
    heads: int = 32


class PublishedTarget(NamedTuple):
    """A target. eagle3, block: hub ids of its drafters, first those that `acceptance` describes. ratios: published."""

    name: str
    shape: Shape
    eagle3: tuple[str, ...]
    block: tuple[str, ...]
    acceptance: Acceptance = Acceptance({}, {}, "")
    ratios: tuple[Ratio, ...] = ()
    parsers: str = ""


class Facts(NamedTuple):
    """Contents of the file. copies: gains of copies and forced text in our reports. lost: costs of WHIFLASH."""

    cards: dict[str, Gpu]
    copies: tuple[str, ...]
    lost: tuple[str, ...]
    targets: tuple[PublishedTarget, ...]


FACTS = TypeAdapter(Facts).validate_python(read_yaml(Path(__file__).with_suffix(".yaml")))
KNOWN = FACTS.targets


def known(target: str) -> PublishedTarget | None:
    """Return the target with this last part of its hub id or directory, ignoring case, or None."""
    name = target.lower().rstrip("/").split("/")[-1]
    return next((entry for entry in KNOWN if entry.name.lower().split("/")[1] == name), None)


class _Config(BaseModel):
    """The sizes in a target's `config.json`."""

    num_hidden_layers: int = Field(gt=0)
    hidden_size: int = Field(gt=0)
    num_attention_heads: int = Field(gt=0)
    vocab_size: int = Field(gt=0)
    intermediate_size: int = 0
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    layer_types: list[str] | None = None
    max_position_embeddings: int = 1 << 30
    tie_word_embeddings: bool = False
    kv_lora_rank: int | None = None
    qk_rope_head_dim: int = 0
    experts: int = Field(0, validation_alias=AliasChoices("num_experts", "num_local_experts", "n_routed_experts"))
    num_experts_per_tok: int = 0
    moe_intermediate_size: int | None = None

    def shape(self) -> Shape:
        """Return the sizes of a model of 16-bit weights. Layers that do not see the whole context keep no KV."""
        layers, hidden, heads = self.num_hidden_layers, self.hidden_size, self.num_attention_heads
        head, grouped = self.head_dim or -(-hidden // heads), self.num_key_value_heads or heads
        full = (self.layer_types or []).count("full_attention") or layers
        slot = self.kv_lora_rank + self.qk_rope_head_dim if self.kv_lora_rank else 2 * grouped * head
        expert = 3 * hidden * (self.moe_intermediate_size or self.intermediate_size)
        dense = 0 if self.experts else 3 * hidden * self.intermediate_size
        always = layers * (2 * hidden * head * (heads + grouped) + dense)
        always += self.vocab_size * hidden * (1 if self.tie_word_embeddings else 2)
        of_experts = layers * expert * self.experts
        active = always + layers * expert * self.num_experts_per_tok * bool(self.experts)
        used = self.num_experts_per_tok if self.experts else 0
        sizes = full * slot * 2, self.max_position_embeddings, 0 if used == self.experts else self.experts, used
        return Shape(always + of_experts, active, layers, *sizes, width=heads * head * full // layers, heads=heads)


def of_directory(directory: Path) -> PublishedTarget | None:
    """Return a target without drafters by its directory's `config.json`; None without that file. Raises UsageError."""
    file = directory.expanduser() / "config.json"
    if not file.is_file():
        return None
    try:
        config = read_json_config(file.parent)
        shape = _Config.model_validate(config.get("text_config", config)).shape()
    except CheckpointError as error:
        raise UsageError(str(error)) from None
    except ValidationError as error:
        said = error.errors()[0]
        key = ".".join(map(str, said["loc"])) or "text_config"
        raise UsageError(f"{file}: {key}: {said['msg']}: is it a language model's?") from None
    return PublishedTarget(str(directory), shape, (), ())
