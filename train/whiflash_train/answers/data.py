"""Answer prompts with the target and store answers and features (`whiflash train --step data`); a rerun continues."""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from whiflash_sglang.checkpoints.fit import TargetShape
from whiflash_sglang.checkpoints.hub import fetch
from whiflash_sglang.checkpoints.manifest import Manifest, Source
from whiflash_sglang.embedded import ensure_target
from whiflash_sglang.errors import ConfigError
from whiflash_sglang.files.progress import progress
from whiflash_train.answers.prompts import PromptRow, balanced, check_ids, check_row, prepare, read_rows
from whiflash_train.answers.provenance import check_same_run
from whiflash_train.answers.served import ServedTarget, serve
from whiflash_train.answers.store import FeatureStore, alone, has_answers, open_stores
from whiflash_train.config import Data, TrainConfig

_MIN_ANSWER = 4
SHARD = "shard0of1"
"""Name of the store. It dates from when several processes could share the prompts, so that older runs continue."""
FILES = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "*.tiktoken")
"""Files of a target that training reads."""
_RESERVE = 2**30  # bytes left free on the disk


@dataclass
class DataSummary:
    """Counts of a run. elsewhere: prompts that another shard has answered. stopped: why the run ended early."""

    sequences: int = 0
    elsewhere: int = 0
    answer_tokens: int = 0
    skipped: int = 0
    looped: int = 0
    stopped: str | None = None


def is_embedded(target: str) -> bool:
    """Whether a target's name is `embedded` or begins with `embedded:`."""
    return target == "embedded" or target.startswith("embedded:")


def target_path(name: str, bundle: Manifest | None = None) -> Path:
    """Return the local directory of `embedded`, a directory or a hub id, at the revision that a bundle for this target
    pins. Raises ConfigError if the hub fails."""
    pinned = bundle.sources.get("target", Source()).revision if bundle else None
    return ensure_target() if is_embedded(name) else fetch(name, revision=pinned, files=FILES)


@contextmanager
def shard_of(config: TrainConfig, shard: str) -> Iterator[tuple[ServedTarget, FeatureStore]]:
    """Yield the running target and the store `shard`, locked for this run. Raises ConfigError if one is unavailable."""
    path = target_path(config.target)
    config.check_masks(TargetShape.read(path / "config.json").vocab_size)
    served = serve(
        path,
        config.target,
        config.capture,
        config.data,
        config.hardware,
        work=config.work,
        template=config.chat_template,
        seed=config.seed,
        shard=shard,
    )
    with alone(config.work / "data"), served as target:
        store = FeatureStore(config.work / "data" / shard, hidden=target.hidden_size, layers=config.capture)
        store.truncate_to_index()
        yield target, store


def generate_data(config: TrainConfig) -> DataSummary:
    """Answer the configured prompts into `<work>/data/shard0of1`, continuing where a killed run stopped."""
    if config.hardware.threads:
        torch.set_num_threads(config.hardware.threads)
    rows = [row for source in config.data.prompts for row in read_prompts(source)]
    check_ids(rows)
    ordered = list(balanced(rows, config.data.category_weights, config.seed))[: config.data.limit]
    directory = config.work / "data" / SHARD
    if has_answers(directory):
        # Checked before the target starts, because its start overwrites the matrices that drafters begin with.
        check_same_run(directory, _facts(config), begun=True)
    with shard_of(config, SHARD) as (target, store):
        check_same_run(store.path, _facts(config), begun=bool(store.records))
        elsewhere = {r.id for other in open_stores(config) if other.path != store.path for r in other.records}
        mine = [row for row in ordered if row["id"] not in elsewhere]
        summary = answer_rows(mine, target, store)
    summary.elsewhere = len(ordered) - len(mine)
    if not store.records and not summary.elsewhere:
        raise ValueError(
            f"none of {len(ordered)} prompts gave an answer ({summary.skipped} skipped, for the reasons above)"
        )
    return summary


def _facts(config: TrainConfig) -> dict[str, Any]:
    """Return the settings on which the answers depend; those that change only rounding are left out."""
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
    rows: Sequence[dict[str, Any]], target: ServedTarget, store: FeatureStore, *, keep_loops: bool = False
) -> DataSummary:
    """Generate the answers to `rows` that `store` lacks, and append them. keep_loops: as in `target.answers`."""
    stored = {record.id for record in store.records}
    settings, summary = target.settings, DataSummary(sequences=len(stored))

    def prompts() -> Iterator[PromptRow]:
        for row in rows:
            if row["id"] not in stored:
                yield prepare(row, target.tokenizer, target.template, settings.tool_choice_required)

    def skip(prompt: PromptRow, reason: str) -> None:
        summary.skipped += 1
        bar.console.print(f"skipped {prompt.category} {prompt.id}: {reason}", highlight=False, markup=False)

    with progress() as bar:
        task = bar.add_task("answering prompts", total=len(rows), completed=len(stored))
        for answer in target.answers(prompts(), skip, keep_loops=keep_loops):
            bar.update(task, advance=1, description=f"{summary.answer_tokens:,} answer tokens")
            summary.stopped = _out_of_space(store, settings)
            if summary.stopped:
                break
            length = answer.record.length - answer.record.prompt_length
            if length >= _MIN_ANSWER:
                store.append(*answer)
                summary.sequences += 1
                summary.answer_tokens += length
                summary.looped += answer.record.looped
    return summary


def read_prompts(source: str) -> list[dict[str, Any]]:
    """Read the rows of a JSONL file, or of a Hugging Face data set (`hf:<id>` with a `messages` column)."""
    if not source.startswith("hf:"):
        return read_rows(Path(source))
    from datasets import load_dataset

    rows = [dict(row) for row in load_dataset(source.removeprefix("hf:"), split="train")]
    if not rows:
        raise ConfigError(f"{source} holds no prompts")
    for number, row in enumerate(rows):
        row["id"] = str(row.get("id", f"{source}-{number}"))
        row.setdefault("category", "chat")
        check_row(row, f"{source}, row {number}")
    return rows


def _out_of_space(store: FeatureStore, settings: Data) -> str | None:
    if store.bytes_used > settings.max_disk_gb * 1e9:
        return f"data.max_disk_gb ({settings.max_disk_gb}) is reached; everything so far is kept"
    if shutil.disk_usage(store.path).free < _RESERVE:
        return f"less than {_RESERVE >> 30} GiB are free in {store.path}; everything so far is kept"
    return None
