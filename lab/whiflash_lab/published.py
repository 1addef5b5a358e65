"""Reads `published.yaml`: targets with drafters, GPUs, and figures that others published, with their sources.

Lengths are tokens per round, bonus token included. They belong to the checkpoints that the source names, which may
differ from those that are listed.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, NamedTuple

from pydantic import AliasChoices, AliasPath, BaseModel, BeforeValidator, Field, TypeAdapter, ValidationError

from whiflash_sglang.errors import CheckpointError, UsageError
from whiflash_sglang.files.disk import read_yaml
from whiflash_sglang.formats.config_json import layers_with_kv, misfit, read_json_config
from whiflash_sglang.formats.draft_format import merged


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
    a dense model. expert_bytes, weight_bytes: bytes of an expert's parameter, and of another in the mean. width:
    elements of a token's query per layer, as a mean in which layers with a window count as 0. heads: of attention.
    kv_heads: of KV, 1 for a latent. draft_kv: bytes per token in a layer of its drafters. weights: their type, as text.
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
    kv_heads: int = 8
    draft_kv: float = 4096.0
    weight_bytes: float = 2.0
    weights: str = "bf16"


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


_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_USED = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_top_k", "moe_k")
_Q, _GROUP = "quantization_config", ("config_groups", "group_0", "weights", "num_bits")
_BITS = {"bf16": 16, "fp8": 8, "fbgemm_fp8": 8, "mxfp4": 4.25}  # a parameter's, if the configuration has none
# A number, or a list with one for each layer, as Hunyuan has it.
_OfFirstLayer = Annotated[int | None, BeforeValidator(lambda n: n[0] if isinstance(n, list) and n else n)]


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
    full_attention_interval: int | None = None
    max_position_embeddings: int = 1 << 30
    tie_word_embeddings: bool = False
    kv_lora_rank: int | None = None
    qk_rope_head_dim: int = 0
    experts: _OfFirstLayer = Field(None, validation_alias=AliasChoices(*_EXPERTS))
    used: _OfFirstLayer = Field(None, validation_alias=AliasChoices(*_USED))
    moe_intermediate_size: _OfFirstLayer = None
    method: str = Field("bf16", validation_alias=AliasPath(_Q, "quant_method"))
    bits: int | None = Field(None, gt=0, validation_alias=AliasChoices(AliasPath(_Q, "bits"), AliasPath(_Q, *_GROUP)))

    def shape(self) -> Shape:
        """Return the model's sizes. Embeddings count 16 bits a parameter, and all but the experts with MXFP4."""
        layers, hidden, heads = self.num_hidden_layers, self.hidden_size, self.num_attention_heads
        head, grouped = self.head_dim or -(-hidden // heads), self.num_key_value_heads or heads
        with_kv = layers_with_kv(vars(self), layers)
        full = (self.layer_types or []).count("full_attention") or with_kv
        slot = 2 * (self.kv_lora_rank + self.qk_rope_head_dim if self.kv_lora_rank else 2 * grouped * head)
        experts, used = (self.experts or 0, self.used or 0) if (self.experts or 0) > 1 else (0, 0)
        expert = layers * 3 * hidden * (self.moe_intermediate_size or self.intermediate_size)
        dense = 0 if experts else 3 * hidden * self.intermediate_size
        linear = layers * (2 * hidden * head * (heads + grouped) + dense)
        embeddings = self.vocab_size * hidden * (1 if self.tie_word_embeddings else 2)
        bits, always = self.bits or _BITS.get(self.method, 16), linear + embeddings
        weights = "bf16" if bits == 16 else f"{bits:g}-bit" + " experts" * (self.method == "mxfp4")
        if not self.bits and self.method not in _BITS:
            weights += f" (ASSUMED, since nothing says the bits of its {self.method:.40})"
        sizes = with_kv * slot, self.max_position_embeddings, 0 if used == experts else experts, used, bits / 8
        attention = heads * head * full // layers, heads, 1 if self.kv_lora_rank else grouped, slot
        of_weights = ((16 if self.method == "mxfp4" else bits) * linear + 16 * embeddings) / always / 8, weights
        return Shape(always + expert * experts, always + expert * used, layers, *sizes, *attention, *of_weights)


def of_directory(directory: Path) -> PublishedTarget | None:
    """Return a target without drafters by its directory's `config.json`; None for no directory. Raises UsageError."""
    if not directory.is_dir():
        return None
    try:
        config = _Config.model_validate(merged(directory, read_json_config(directory), "text_config"))
        if (config.experts or 0) > 1 and not config.used:
            missing = f"it has {config.experts} experts, but no number of those that a token uses"
            raise misfit(directory, f"{missing}: add {_USED[0]} (other names: {', '.join(_USED[1:])})")
    except CheckpointError as error:
        raise UsageError(str(error)) from None
    except ValidationError as error:
        said = error.errors()[0]
        key = ".".join(map(str, said["loc"]))
        raise UsageError(f"{directory}/config.json: {key}: {said['msg']}: is it a language model's?") from None
    return PublishedTarget(str(directory), config.shape(), (), ())
