"""The configuration of a training run: one YAML or TOML file, every key checked."""

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from whiflash_sglang.checkpoints.manifest import embedded_bundle
from whiflash_sglang.errors import ConfigError
from whiflash_sglang.files.disk import read_text, read_yaml

Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Layers = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Hardware(_Strict):
    """device: where training runs. dtype: of matrix products. threads: CPU threads; 0 is torch's choice."""

    device: Literal["cpu", "cuda"] = "cpu"
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    threads: Annotated[int, Field(ge=0)] = 0

    @property
    def place(self) -> dict[str, Any]:
        """`device` and `dtype` as torch objects, for a model's constructor."""
        import torch

        return {"device": torch.device(self.device), "dtype": getattr(torch, self.dtype)}


class Data(_Strict):
    """Prompts and how the target answers them.

    Attributes:
        prompts: JSONL files, or `hf:NAME` for a Hugging Face data set with a `messages` column.
        engine: further arguments of SGLang's engine, e.g. {tp_size: 8, mem_fraction_static: 0.8}.
        category_weights: relative frequency of a category; 1 if not named.
        tool_choice_required: share of the rows with tools that must call one.
        max_new_tokens: longest answer.
        at_once: prompts that are answered at once.
        temperature: 0 is greedy.
        limit: most prompts.
        max_disk_gb: the run stops before the stored features exceed it.
    """

    prompts: list[str]
    engine: dict[str, Any] = {}
    category_weights: dict[str, Annotated[float, Field(ge=0)]] = {}
    tool_choice_required: Share = 0.85
    max_new_tokens: Positive = 256
    at_once: Positive = 48
    temperature: Annotated[float, Field(ge=0)] = 0.0
    limit: Positive | None = None
    max_disk_gb: Annotated[float, Field(gt=0)] = 20.0


class Loop(_Strict):
    """Optimisation of a drafter.

    Attributes:
        epochs: passes over the answers.
        answer_tokens: answer tokens in a batch.
        min_answer: shortest answer used, in tokens.
        learning_rate, weight_decay: of AdamW.
        warmup_share: share of the steps that warm up.
        clip: largest norm of the gradients.
        save_steps: steps between checkpoints.
        log_steps: steps between log lines.
    """

    epochs: Annotated[float, Field(gt=0)] = 3.0
    answer_tokens: Positive = 1024
    min_answer: Annotated[int, Field(ge=3)] = 4
    learning_rate: Annotated[float, Field(gt=0)] = 6e-4
    warmup_share: Share = 0.04
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    clip: Annotated[float, Field(gt=0)] = 1.0
    save_steps: Positive = 50
    log_steps: Positive = 10


class Eagle3(_Strict):
    """The autoregressive drafter: what it reads, its sizes, its training.

    Attributes:
        target_layers: captured layers that it reads.
        source_layer: layer of the target that it starts as, if these are Llama's. Default: one that adds nothing yet.
        intermediate_size: units of its MLP; by default the target's.
        draft_vocab_size: tokens that it drafts: those of `--start-from`, then the data's most frequent.
        steps: steps of the chain that training unrolls.
        decay: step j weighs decay ** j.
        loop: its optimisation.
    """

    target_layers: Layers
    source_layer: int | None = None
    intermediate_size: Positive | None = None
    draft_vocab_size: Positive
    steps: Positive = 5
    decay: Share = 0.8
    loop: Loop = Loop()


class _BlockSection(_Strict):
    """Settings that the training of all block drafters shares.

    Attributes:
        target_layers: captured layers that it reads.
        source_layers: layers of the target that its own start as, without biases.
        num_layers: its layers, if more than these; the further ones add nothing at first.
        mask_token_id: token that marks a place to be drafted.
        anchors_per_token: share of the answer tokens that start a block.
        gamma: position k of a block weighs exp(-(k-1)/gamma).
        frequent: most frequent tokens in the loss's softmax.
        sampled: random other tokens in the loss's softmax.
        vocabulary: the target's `full` one, or EAGLE-3's reduced one.
        loop: its optimisation.
    """

    target_layers: Layers
    source_layers: list[int] = []
    num_layers: Positive | None = None
    mask_token_id: Annotated[int, Field(ge=0)]
    anchors_per_token: Annotated[float, Field(gt=0, le=1)] = 0.25
    gamma: Annotated[float, Field(gt=0)] = 4.0
    frequent: Positive = 8192
    sampled: Annotated[int, Field(ge=0)] = 2048
    vocabulary: Literal["full", "eagle3"] = "full"
    loop: Loop = Loop()

    @property
    def depth(self) -> int:
        """Number of the drafter's layers."""
        return self.num_layers or len(self.source_layers)

    @model_validator(mode="after")
    def _has_layers(self) -> Self:
        if not len(self.source_layers) <= self.depth or not self.depth:
            raise ValueError(
                f"its layers are source_layers {self.source_layers} and num_layers {self.num_layers}: one of the two "
                "must say how many there are, and num_layers no fewer than source_layers"
            )
        return self


class DFlash(_BlockSection):
    """The block drafter.

    Attributes:
        block_size: tokens that a block verifies, bonus token included.
    """

    block_size: Annotated[int, Field(ge=2)] = 8


class DSpark(_BlockSection):
    """The block drafter with a Markov and a confidence head.

    Attributes:
        sample_from_anchor: the bonus token's row drafts too. Default: yes, or as `--start-from`.
        markov_rank: rank of the Markov head; 0 for none.
        markov_head: its published type.
        confidence_head: whether it has one.
        confidence_of: it learns whether sampling (`overlap`) or greedy decoding (`choice`) accepts.
        cross_entropy: weight of the cross-entropy with the target's distribution.
        distance: weight of the L1 distance of the distributions.
        confidence: weight of the confidence head's error.
    """

    block_size: Annotated[int, Field(ge=3)] = 8
    sample_from_anchor: bool | None = None
    markov_rank: Annotated[int, Field(ge=0)] = 256
    markov_head: Literal["vanilla", "gated", "rnn"] = "vanilla"
    confidence_head: bool = True
    confidence_of: Literal["overlap", "choice"] = "overlap"
    cross_entropy: Annotated[float, Field(ge=0)] = 0.1
    distance: Annotated[float, Field(ge=0)] = 0.9
    confidence: Annotated[float, Field(ge=0)] = 1.0


class DraftLayers(_Strict):
    """Sizes of drafters' layers.

    Attributes:
        num_attention_heads, num_key_value_heads, head_dim, intermediate_size: instead of the target's.
    """

    num_attention_heads: Positive | None = None
    num_key_value_heads: Positive | None = None
    head_dim: Positive | None = None
    intermediate_size: Positive | None = None


class TrainConfig(_Strict):
    """A training configuration, the whole file.

    Attributes:
        target: `embedded`, a directory or a hub id.
        chat_template: a Jinja file, or `embedded`, instead of the target's own template.
        capture: layers of the target whose outputs are stored, ascending.
        work: directory for data, checkpoints and results.
        seed: of every random draw.
        hardware, data, draft_layers, eagle3, dflash, dspark: sections, below.
        block_drafter: the block drafter that the bundle takes.
    """

    target: str = "embedded"
    chat_template: Path | None = None
    capture: Layers
    work: Path
    seed: int = 0
    hardware: Hardware = Hardware()
    data: Data
    draft_layers: DraftLayers = DraftLayers()
    eagle3: Eagle3
    dflash: DFlash
    dspark: DSpark | None = None
    block_drafter: Literal["dflash", "dspark"] = "dflash"

    @field_validator("chat_template")
    @classmethod
    def _of_the_embedded_bundle(cls, path: Path | None) -> Path | None:
        return embedded_bundle() / "chat_template.jinja" if path == Path("embedded") else path

    def section(self, name: str) -> Any:
        """Return the section of a drafter. Raises `ConfigError` if the file lacks it."""
        if getattr(self, name) is None:
            raise ConfigError(
                f"the configuration has no section {name}, which holds this drafter's settings: add it, or train dflash"
            )
        return getattr(self, name)

    def check_masks(self, vocab_size: int) -> None:
        """Raise `ConfigError` if a block drafter's mask token is not one of the target's `vocab_size` tokens."""
        for name, section in (("dflash", self.dflash), ("dspark", self.dspark)):
            if section is not None and section.mask_token_id >= vocab_size:
                raise ConfigError(f"{name}.mask_token_id {section.mask_token_id}: the target has {vocab_size} tokens")


def load_config(path: Path) -> TrainConfig:
    """Read a .yaml, .yml or .toml file. Raises `ConfigError` naming the key that is wrong."""
    try:
        raw: Any = tomllib.loads(read_text(path)) if path.suffix == ".toml" else read_yaml(path)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid: {error}") from None
    try:
        config = TrainConfig.model_validate(raw)
    except ValidationError as error:
        wrong = ((".".join(map(str, one["loc"])) or "the file", one["msg"]) for one in error.errors())
        raise ConfigError(f"{path}: {'; '.join(f'{key}: {what}' for key, what in wrong)}") from None
    if config.capture != sorted(set(config.capture)):
        raise ConfigError(f"{path}: capture must be ascending and without repetition, got {config.capture}")
    for name in ("eagle3", "dflash", "dspark"):
        section = getattr(config, name)
        missing = [] if section is None else sorted(set(section.target_layers) - set(config.capture))
        if missing:
            raise ConfigError(f"{path}: {name}.target_layers {missing} are not in capture {config.capture}")
    return config
