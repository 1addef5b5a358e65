"""`whiflash train data`: prompts in, the target's answers and features out, resumable at any sequence."""

import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from whiflash_sglang.embedded import ensure_target
from whiflash_sglang.errors import ConfigError
from whiflash_sglang.models.target import TargetModel, causal_attention, unknown
from whiflash_sglang.progress import progress
from whiflash_sglang.train.answers.generate import Answer, Generator, GrammarMasks, GroupShape
from whiflash_sglang.train.answers.prompts import PromptRow, balanced, check_ids, prepare, read_rows
from whiflash_sglang.train.answers.provenance import check_same_run
from whiflash_sglang.train.answers.store import FeatureStore, SequenceRecord, has_answers, open_stores
from whiflash_sglang.train.config import Data, Hardware, TrainConfig

if TYPE_CHECKING:
    from whiflash_sglang.train.answers.served import ServedTarget

_MIN_ANSWER = 4
_RESERVE = 2**30  # bytes left free on the disk


@dataclass(frozen=True)
class LoadedTarget:
    """The target with its tokenizer, template and grammar compiler, run by this package.

    capture: layers whose outputs are the features, ascending.
    """

    model: TargetModel
    tokenizer: PreTrainedTokenizerBase
    template: str | None
    masks: GrammarMasks
    eos_id: int
    capture: list[int]

    @property
    def hidden_size(self) -> int:
        """H."""
        return self.model.hidden_size

    def generator(self, settings: Data, *, seed: int, keep_loops: bool) -> Generator:
        """What answers prompts by `settings`."""
        return Generator(
            self.model,
            self.masks,
            groups=[GroupShape(slot.rows, slot.capacity) for slot in settings.slots],
            capture=self.capture,
            max_new_tokens=settings.max_new_tokens,
            eos_id=self.eos_id,
            temperature=settings.temperature,
            keep_loops=keep_loops,
            seed=seed,
        )

    def states(self, texts: Iterable[tuple[int, list[int]]]) -> Iterator[tuple[int, Tensor]]:
        """Features and final states [T, captured + 1, H] of texts, with their keys, one after the other."""
        device = self.model.device
        for key, text in texts:
            tokens = torch.tensor(text, device=device)
            attend = causal_attention(len(tokens), device, self.model.dtype)
            output = self.model.forward(
                tokens, torch.arange(len(tokens), device=device), attend, self.capture
            )
            yield key, torch.cat([output.features, output.final[:, None]], dim=1)

    def close(self) -> None:
        """It holds nothing but memory."""


Teacher: TypeAlias = "LoadedTarget | ServedTarget"
"""The target while data is made: it answers prompts, and gives the features of texts. The second is SGLang's."""


@dataclass
class DataSummary:
    """What a run did. elsewhere: prompts of this share that another shard of the work directory has answered."""

    sequences: int = 0
    elsewhere: int = 0
    answer_tokens: int = 0
    skipped: int = 0
    looped: int = 0
    stopped: str | None = None


def is_embedded(target: str) -> bool:
    """Whether a configuration or a manifest names the embedded target."""
    return target == "embedded" or target.startswith("embedded:")


def target_path(name: str) -> Path:
    """`embedded`, a local directory or a hub id → a local directory."""
    if is_embedded(name):
        return ensure_target()
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    files = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "*.tiktoken"]
    return Path(snapshot_download(name, allow_patterns=files))


def load_target(name: str, template: Path | None, capture: list[int], hardware: Hardware) -> LoadedTarget:
    """Load what generation needs. Raises `ConfigError` where the target cannot be used."""
    path = target_path(name)
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = TargetModel(path, device=torch.device(hardware.device), dtype=hardware.torch_dtype)
    last = model.num_layers - 1
    if capture[-1] >= last:
        raise ConfigError(f"capture {capture}: the layers that can be captured are 0 to {last - 1}")
    text = None if template is None else template.read_text(encoding="utf-8")
    eos_id = model.config["eos_token_id"]
    eos_id = eos_id[0] if isinstance(eos_id, list) else eos_id
    masks = GrammarMasks(tokenizer, model.vocab_size, eos_id)
    return LoadedTarget(model, tokenizer, text, masks, eos_id, capture)


@contextmanager
def teacher_of(config: TrainConfig, shard: str) -> Iterator[Teacher]:
    """The configuration's target, run by whom `data.source` says, for a shard of that name.

    Raises:
        ConfigError: it cannot be run so.
    """
    path = target_path(config.target)
    reason = unknown(path)
    if config.data.source == "own" and reason is not None:
        raise ConfigError(
            f"data.source own: this package's generator does not know {path}: {reason}; use sglang, or auto"
        )
    teacher: Teacher
    if config.data.source == "sglang" or reason is not None:
        from whiflash_sglang.train.answers.served import start

        teacher = start(config, path, shard)
    else:
        teacher = load_target(config.target, config.chat_template, config.capture, config.hardware)
    try:
        yield teacher
    finally:
        teacher.close()


def generate_data(config: TrainConfig) -> DataSummary:
    """Answer the configured prompts into `<work>/data/shard<i>of<n>`; goes on where a killed run stopped."""
    if config.hardware.threads:
        torch.set_num_threads(config.hardware.threads)
    index, count = config.data.shard
    rows = [row for source in config.data.prompts for row in read_prompts(source)]
    check_ids(rows)
    ordered = list(balanced(rows, config.data.category_weights, config.seed))[: config.data.limit][
        index::count
    ]
    shard = f"shard{index}of{count}"
    directory = config.work / "data" / shard
    if has_answers(directory):
        # Before the target is started: starting it writes what drafters of these data begin with.
        check_same_run(directory, _facts(config), begun=True)
    with teacher_of(config, shard) as target:
        store = FeatureStore(
            directory,
            vectors=len(config.capture) + 1,
            hidden=target.hidden_size,
            layers=config.capture,
        )
        check_same_run(store.path, _facts(config), begun=bool(store.records))
        store.truncate_to_index()
        elsewhere = {r.id for other in open_stores(config) if other.path != store.path for r in other.records}
        mine = [row for row in ordered if row["id"] not in elsewhere]
        summary = answer_rows(mine, target, config.data, store, seed=config.seed)
    summary.elsewhere = len(ordered) - len(mine)
    if not store.records and not summary.elsewhere:
        raise ValueError(
            f"none of {len(ordered)} prompts gave an answer ({summary.skipped} skipped, for the reasons above); "
            "longer prompts need data.slots of a larger capacity"
        )
    return summary


def _facts(config: TrainConfig) -> dict[str, Any]:
    """What decides an answer, rounding apart."""
    template = config.chat_template
    engine = {"data.engine": config.data.engine} if config.data.engine else {}
    return {
        "configuration": {
            **engine,
            **config.model_dump(mode="json", include={"target", "seed"}),
            "data": config.data.model_dump(
                mode="json", include={"temperature", "max_new_tokens", "tool_choice_required"}
            ),
            "chat_template": None if template is None else template.read_text(encoding="utf-8"),
            "hardware.dtype": config.hardware.dtype,
        }
    }


def answer_rows(
    rows: Sequence[dict[str, Any]],
    target: Teacher,
    settings: Data,
    store: FeatureStore,
    *,
    seed: int = 0,
    keep_loops: bool = False,
) -> DataSummary:
    """Generate answers to `rows` that `store` does not hold yet, and append them."""
    known = {record.id for record in store.records}
    summary = DataSummary(sequences=len(known))

    def prompts() -> Iterator[PromptRow]:
        for row in rows:
            if row["id"] not in known:
                yield prepare(row, target.tokenizer, target.template, settings.tool_choice_required)

    def skip(prompt: PromptRow, reason: str) -> None:
        summary.skipped += 1
        bar.console.print(f"skipped {prompt.category} {prompt.id}: {reason}", highlight=False)

    generator = target.generator(settings, seed=seed, keep_loops=keep_loops)
    with progress() as bar:
        task = bar.add_task("answering prompts", total=len(rows), completed=len(known))
        for answer in generator.run(prompts(), skip):
            bar.update(task, advance=1, description=f"{summary.answer_tokens:,} answer tokens")
            summary.stopped = _out_of_space(store, settings)
            if summary.stopped:
                break
            _keep(answer, store, summary)
    return summary


def read_prompts(source: str) -> list[dict[str, Any]]:
    """Rows of a JSONL file, or of a Hugging Face data set (`hf:<id>` with a `messages` column)."""
    if not source.startswith("hf:"):
        return read_rows(Path(source))
    from datasets import load_dataset

    rows = [dict(row) for row in load_dataset(source.removeprefix("hf:"), split="train")]
    if not rows or "messages" not in rows[0]:
        raise ConfigError(f"{source}: the data set needs a 'messages' column in the OpenAI format")
    for number, row in enumerate(rows):
        row.setdefault("id", f"{source}-{number}")
        row.setdefault("category", "chat")
    return rows


def _keep(answer: Answer, store: FeatureStore, summary: DataSummary) -> None:
    length = len(answer.tokens) - len(answer.prompt.tokens)
    if length < _MIN_ANSWER:
        return
    record = SequenceRecord(
        id=answer.prompt.id,
        category=answer.prompt.category,
        prompt_length=len(answer.prompt.tokens),
        length=len(answer.tokens),
        looped=answer.looped,
        finished=answer.finished,
        token_offset=0,
        feature_offset=0,
    )
    store.append(record, answer.tokens, answer.states)
    summary.sequences += 1
    summary.answer_tokens += length
    summary.looped += answer.looped


def _out_of_space(store: FeatureStore, settings: Data) -> str | None:
    if store.bytes_used > settings.max_disk_gb * 1e9:
        return f"data.max_disk_gb ({settings.max_disk_gb}) is reached; everything so far is kept"
    if shutil.disk_usage(store.path).free < _RESERVE:
        return f"less than {_RESERVE >> 30} GiB are free in {store.path}; everything so far is kept"
    return None
