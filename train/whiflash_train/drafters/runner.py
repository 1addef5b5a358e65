"""Train drafters with transformers' Trainer: seeded, with checkpoints from which a killed run continues."""

import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from whiflash_sglang.files.jsonl import read_json_file
from whiflash_train.answers.provenance import begun, check_same_run, checkpoint_digest, data_digest
from whiflash_train.answers.store import FeatureStore, alone, open_stores
from whiflash_train.config import DFlash, DSpark, Eagle3, Loop, TrainConfig
from whiflash_train.drafters import dflash as dflash_training
from whiflash_train.drafters import dspark as dspark_training
from whiflash_train.drafters import eagle3 as eagle3_training
from whiflash_train.drafters.batches import EvenRows, SequenceBatches, token_frequencies
from whiflash_train.drafters.initialisation import check_start, choose_draft_vocabulary, go_on_from, origin_of
from whiflash_train.origin import Origin, for_training


class _LoggingTrainer(Trainer):  # type: ignore[misc]
    """A Trainer that pads CPU products (`EvenRows`) and adds the model's `metrics` to every log line."""

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        with EvenRows():
            return super().training_step(*args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        model: Any = self.model
        super().log({**logs, **model.metrics}, *args, **kwargs)


def train_drafter(name: str, config: TrainConfig, target_path: Path, start_from: Path | None = None) -> Path:
    """Train a drafter on the data so far; returns the directory of its checkpoint, in SGLang's format.

    Args:
        name: key of `BUILDERS`, and name of the drafter's section in the configuration.

    Raises:
        ConfigError: there is no such section, `start_from` has another shape, or another run trains this drafter.
    """
    settings = config.section(name)
    stores, loop = open_stores(config), settings.loop
    target = origin_of(config, target_path, stores)
    if config.hardware.threads:
        torch.set_num_threads(config.hardware.threads)
    torch.manual_seed(config.seed)
    run = config.work / name
    batches = SequenceBatches(stores, loop.answer_tokens, loop.min_answer, config.seed)
    with alone(run):
        resumed = last_checkpoint(run / "trainer")
        facts = _facts(name, config, stores, start_from)
        check_same_run(run / "trainer", facts, begun=resumed is not None)
        began, record = time.monotonic(), begun(config, stores)
        model: Any = BUILDERS[name](config, settings, target, stores, start_from)
        model.train()
        trainer = _LoggingTrainer(
            model=model,
            args=_arguments(config, loop, run / "trainer", len(batches)),
            train_dataset=batches,
            data_collator=lambda items: items[0],
        )
        trainer.train(resume_from_checkpoint=resumed)
        out = run / "checkpoint"
        model.drafter.save(out)
        record |= {"wall_seconds": round(time.monotonic() - began, 1), "log": trainer.state.log_history}
        record["answer_tokens"] = batches.answer_tokens
        (out / "provenance.json").write_text(json.dumps(record, indent=1) + "\n")
        return out


def _eagle3(
    config: TrainConfig, settings: Eagle3, target: Origin, stores: list[FeatureStore], start: Path | None
) -> nn.Module:
    frequencies = token_frequencies(stores, target.vocab_size)
    if start is None:
        chosen = choose_draft_vocabulary(frequencies, settings.draft_vocab_size)
        drafter = eagle3_training.initialise(target, settings, chosen)
    else:
        drafter = go_on_from(start, target, settings, frequencies)
    columns = [config.capture.index(layer) for layer in settings.target_layers]
    return eagle3_training.Eagle3Training(
        drafter, target.head, columns=columns, steps=settings.steps, decay=settings.decay
    )


def _block(
    config: TrainConfig, settings: DFlash | DSpark, target: Origin, stores: list[FeatureStore], start: Path | None
) -> nn.Module:
    drafter: Any
    config.check_masks(target.vocab_size)
    if start is None and isinstance(settings, DSpark):
        drafter = dspark_training.initialise(target, settings)
    elif start is None:
        width = settings.block_size
        drafter = dflash_training.initialise(target, settings, block_size=width, section="dflash")
    elif isinstance(settings, DSpark):
        drafter = dspark_training.go_on_from(start, target, settings)
    else:
        draft = check_start(start, "dflash", settings, target.num_layers)
        sized = replace(draft.config, block_size=settings.block_size)
        drafter = draft._replace(config=sized).load(**for_training(target))
    drafter.embedding_scale = target.embedding_scale
    options: dict[str, Any] = {
        "columns": [config.capture.index(layer) for layer in settings.target_layers],
        "frequent": choose_draft_vocabulary(token_frequencies(stores, target.vocab_size), settings.frequent),
        "sampled": settings.sampled,
        "anchors_per_token": settings.anchors_per_token,
    }
    if isinstance(settings, DSpark):
        return dspark_training.DSparkTraining(drafter, settings, **options)
    return dflash_training.DFlashTraining(drafter, gamma=settings.gamma, **options)


BUILDERS: Mapping[str, Callable[..., nn.Module]] = {"eagle3": _eagle3, "dflash": _block, "dspark": _block}
"""Drafter → function that makes its training module (initial drafter and loss)."""


def last_checkpoint(directory: Path) -> str | None:
    """Return the last complete checkpoint of a killed run in `directory`; None if there is none.

    A checkpoint without a readable state, which is written last, is incomplete and removed; the previous one remains.
    """
    checkpoints = directory.glob("checkpoint-*")
    for checkpoint in sorted(checkpoints, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
        try:
            read_json_file(checkpoint / TRAINER_STATE_NAME, finite=False)
        except (OSError, ValueError):
            shutil.rmtree(checkpoint)
        else:
            return str(checkpoint)
    return None


def _facts(name: str, config: TrainConfig, stores: list[FeatureStore], start_from: Path | None) -> dict[str, Any]:
    """Return the facts that determine a run's weights: data, settings, start. Threads and directories are left out."""
    settings = config.model_dump(mode="json", include={"target", "capture", "seed", "draft_layers", name})
    return {
        "data": {store.path.name: data_digest(store) for store in stores},
        "configuration": {**settings, "hardware": config.hardware.model_dump(mode="json", exclude={"threads"})},
        "--start-from": checkpoint_digest(start_from),
    }


def _arguments(config: TrainConfig, loop: Loop, directory: Path, batches: int) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(directory),
        num_train_epochs=loop.epochs,
        per_device_train_batch_size=1,
        learning_rate=loop.learning_rate,
        weight_decay=loop.weight_decay,
        adam_beta2=0.95,
        max_grad_norm=loop.clip,
        lr_scheduler_type="cosine",
        warmup_steps=round(loop.warmup_share * loop.epochs * batches),
        bf16=config.hardware.dtype == "bfloat16",
        use_cpu=config.hardware.device == "cpu",
        logging_steps=loop.log_steps,
        save_steps=loop.save_steps,
        save_total_limit=1,
        seed=config.seed,
        data_seed=config.seed,
        report_to=[],
        remove_unused_columns=False,
    )
