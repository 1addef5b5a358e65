"""The configuration of a training run: one YAML or TOML file, every key checked."""

import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import yaml  # type: ignore[import-untyped]
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from whiflash_sglang.errors import ConfigError

if TYPE_CHECKING:
    import torch

Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Hardware(_Strict):
    """device: cpu or cuda. dtype: of matrix products. threads: CPU threads, 0 for torch's choice."""

    device: Literal["cpu", "cuda"] = "cpu"
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    threads: Annotated[int, Field(ge=0)] = 0

    @property
    def torch_dtype(self) -> "torch.dtype":
        """The torch type of `dtype`."""
        import torch

        return torch.bfloat16 if self.dtype == "bfloat16" else torch.float32


class Slots(_Strict):
    """`rows` sequences generated at once, of at most `capacity` tokens each, prompt and answer together."""

    rows: Positive
    capacity: Positive


class Data(_Strict):
    """Prompts and how the target answers them.

    Attributes:
        source: who runs the target, for its answers and its features. `own` is this package's generator, which knows
            dense Llama, Qwen2 and Qwen3 alone; `sglang` is SGLang's offline engine, so whatever it serves; `auto` is
            the former where it knows the target, else the latter.
        engine: further arguments of that engine by their Python names, e.g. {tp_size: 8, mem_fraction_static: 0.8}.
        prompts: JSONL files, or a Hugging Face data set named `hf:<id>` with a `messages` column.
        category_weights: relative frequency of a category in every prefix of the data; 1 where not named.
        tool_choice_required: share of the rows with tools that must call one.
        temperature: 0 is greedy.
        shard: this process answers rows index, index + count, …; [index, count].
        max_disk_gb: the run stops before the cached features exceed it.
    """

    prompts: list[str]
    source: Literal["auto", "own", "sglang"] = "auto"
    engine: dict[str, Any] = {}
    category_weights: dict[str, Annotated[float, Field(ge=0)]] = {}
    tool_choice_required: Share = 0.85
    max_new_tokens: Positive = 256
    slots: list[Slots] = [Slots(rows=48, capacity=512)]
    temperature: Annotated[float, Field(ge=0)] = 0.0
    shard: tuple[int, int] = (0, 1)
    limit: Positive | None = None
    max_disk_gb: Annotated[float, Field(gt=0)] = 20.0


class Loop(_Strict):
    """Optimisation.

    Attributes:
        answer_tokens: answer tokens in a batch. save_steps: between checkpoints.
        category_weights: how often the answers of a category are held, on average; 1 where not named. They are drawn
            once for all epochs: of a category that weighs 0.5 half of the answers are left out.
    """

    category_weights: dict[str, Annotated[float, Field(ge=0, le=100)]] = {}
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
    """The autoregressive drafter.

    Attributes:
        target_layers: outputs that it reads, a subset of the captured ones.
        source_layer: the target's layer that it starts as. Not said: it starts as a layer that adds nothing yet, the
            only way where the target's layers are not Llama's or Qwen's.
        intermediate_size: of its MLP; the target's where it is not said.
        draft_vocab_size: tokens that it drafts, the data's most frequent ones. `--start-from` keeps a checkpoint's
            tokens, and adds the most frequent others where it has fewer.
    """

    target_layers: list[int]
    source_layer: int | None = None
    intermediate_size: Positive | None = None
    draft_vocab_size: Positive
    steps: Positive = 5
    decay: Share = 0.8
    loop: Loop = Loop()


class _Block(_Strict):
    """What block drafters begin as, and what of their training is alike.

    Attributes:
        target_layers: outputs that it reads, a subset of the captured ones.
        source_layers: the target's layers that its own start as, in their order.
        num_layers: how many it has, where that is more than `source_layers`; the others add nothing at first. Where the
            target's layers are not Llama's or Qwen's, all do.
        frequent, sampled: how many tokens the loss's softmax runs over.
        vocabulary: what the bundle lets it choose from: the target's whole vocabulary, or EAGLE-3's reduced one.
    """

    target_layers: list[int]
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
        """How many layers it has."""
        return self.num_layers or len(self.source_layers)

    @model_validator(mode="after")
    def _has_layers(self) -> Self:
        if not len(self.source_layers) <= self.depth or not self.depth:
            raise ValueError(
                f"its layers are source_layers {self.source_layers} and num_layers {self.num_layers}: one of the two "
                "must say how many there are, and num_layers no fewer than source_layers"
            )
        return self


class DFlash(_Block):
    """The block drafter."""

    block_size: Annotated[int, Field(ge=2)] = 8


class DSpark(_Block):
    """The block drafter with a Markov and a confidence head.

    Attributes:
        block_size: tokens that a block verifies, the bonus token's included, as of `dflash`.
        sample_from_anchor: the bonus token's row drafts too. Not said: it does, unless a checkpoint is gone on from
            in which it does not.
        markov_rank: of the Markov head, 0 for none. markov_head: its published type.
        confidence_of: what the confidence head learns: how much of the target's and the drafter's distributions
            `overlap`, which is how often a sampled token accepts a draft, or whether the first `choice` is right.
        cross_entropy, distance, confidence: weights of the loss's terms. distance: L1 of the distributions.
        weights: of a block's positions: exp(-(k-1)/`gamma`), or D-PACE's, `smoothing` the chances by that much.
    """

    block_size: Annotated[int, Field(ge=3)] = 8
    sample_from_anchor: bool | None = None
    markov_rank: Annotated[int, Field(ge=0)] = 256
    markov_head: Literal["vanilla", "gated", "rnn"] = "vanilla"
    confidence_head: bool = True
    confidence_of: Literal["overlap", "choice"] = "overlap"
    weights: Literal["exponential", "dpace"] = "exponential"
    smoothing: Share = 0.5
    cross_entropy: Annotated[float, Field(ge=0)] = 0.1
    distance: Annotated[float, Field(ge=0)] = 0.9
    confidence: Annotated[float, Field(ge=0)] = 1.0


class DraftLayers(_Strict):
    """Sizes of drafters' layers, in the place of what the target's `config.json` says under the same names."""

    num_attention_heads: Positive | None = None
    num_key_value_heads: Positive | None = None
    head_dim: Positive | None = None
    intermediate_size: Positive | None = None


class RouterTraining(_Strict):
    """The neural router.

    Attributes:
        answers: stored answers that both drafters are replayed over, at most.
        held_out: share of the answers (by their id) that choose the epoch, give the report and calibrate.
        width: of the MLP's hidden layer. batch: positions in a step.
        dropout: of inputs and hidden units, while training.
        judge_confidences: report beside it what a router is worth that reads both drafters' confidences as well, which
            no server knows before a round; none is written.
        eagle_steps: drafts of an EAGLE-3 round, as in the server.
    """

    answers: Positive = 1500
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.15
    eagle_steps: Positive = 5
    width: Annotated[int, Field(ge=2)] = 256
    epochs: Positive = 10
    batch: Positive = 512
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.35
    judge_confidences: bool = False


class TrainConfig(_Strict):
    """The whole file.

    Attributes:
        target: `embedded`, a Hugging Face directory or a hub id.
        chat_template: a Jinja file instead of the target's own template.
        capture: target layers whose outputs are cached, ascending; both drafters read subsets of them.
        work: directory for data, checkpoints and results.
        draft_layers: sizes of drafters' layers, for a target that SGLang alone knows: heads and MLPs of experts or of
            latent attention are seldom a drafter's.
        block_drafter: which of the two the router learns beside EAGLE-3 and the bundle takes.
    """

    target: str = "embedded"
    chat_template: Path | None = None
    capture: list[int]
    work: Path
    seed: int = 0
    hardware: Hardware = Hardware()
    data: Data
    draft_layers: DraftLayers = DraftLayers()
    eagle3: Eagle3
    dflash: DFlash
    dspark: DSpark | None = None
    block_drafter: Literal["dflash", "dspark"] = "dflash"
    router: RouterTraining = RouterTraining()

    @property
    def block(self) -> DFlash | DSpark:
        """The section of `block_drafter`. Raises `ConfigError` where there is none."""
        return self.dflash if self.block_drafter == "dflash" else self.dspark_section()

    @property
    def origin(self) -> Path:
        """Where SGLang tells what drafters take over from the target."""
        return self.work / "target"

    def dspark_section(self) -> DSpark:
        """`dspark`. Raises `ConfigError` where the file has none."""
        if self.dspark is None:
            raise ConfigError("the configuration has no section dspark")
        return self.dspark


def load_config(path: Path) -> TrainConfig:
    """Read a .yaml, .yml or .toml file. Raises `ConfigError` naming the key that is wrong."""
    try:
        text = path.read_text(encoding="utf-8")
        raw: Any = tomllib.loads(text) if path.suffix == ".toml" else yaml.safe_load(text)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path} is not valid: {error}") from None
    try:
        config = TrainConfig.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "the file"
        raise ConfigError(f"{path}: {place}: {first['msg']} ({error.error_count()} problem(s))") from None
    if config.capture != sorted(set(config.capture)):
        raise ConfigError(f"{path}: capture must be ascending and without repetition, got {config.capture}")
    for name in ("eagle3", "dflash", "dspark"):
        section = getattr(config, name)
        missing = [] if section is None else sorted(set(section.target_layers) - set(config.capture))
        if missing:
            raise ConfigError(f"{path}: {name}.target_layers {missing} are not in capture {config.capture}")
    return config
