"""Engines of their own: swaps under pressure, restarts, and a server that keeps nothing."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engine import engine
from model_set import Models
from overlap import overlapped
from safetensors.torch import load_file
from swapping import PROMPTS, parameters, serving, swap
from tiny_models import tiny_target
from versioned import trained, version

from whiflash_sglang.formats.table import read_draft
from whiflash_sglang.updates import swap as learn_swap
from whiflash_sglang.updates.versions import VersionInUse, path_of, record, served
from whiflash_train.config import DSpark
from whiflash_train.drafters.dspark import go_on_from
from whiflash_train.target import TargetModel


def test_text_stays_through_retractions_and_chunks(
    models: Models, directory: Path, plain: list[list[int]]
) -> None:
    order = random.Random(4)
    with serving(models, directory, chunked_prefill_size=16, max_total_tokens=256) as e:
        assert e.generate(PROMPTS, lambda: swap(e, order.randrange(4)), max_new_tokens=60) == plain
        e.check_leaks()


def test_text_stays_with_a_round_of_lag(
    models: Models, directory: Path, plain: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A version is written where the scheduler takes its mail: while the forward before is still under way."""
    monkeypatch.setattr(learn_swap, "may_move", lambda parameter: False)  # as on a GPU, where rounds are late
    order = random.Random(5)
    whiflash = models.whiflash("random", whiflash_versions=str(directory))
    with overlapped(models.target, whiflash=whiflash, host_lengths=False, chunked_prefill_size=16) as e:
        ingest = e.scheduler.ingest_requests

        def ingesting() -> list[Any]:
            swap(e, order.randrange(4))
            return ingest()

        e.scheduler.ingest_requests = ingesting
        assert e.generate(PROMPTS, max_new_tokens=60) == plain
        assert not e.streams.races
        assert e.worker.weights.swaps["taken"] > 10


def test_a_restart_begins_with_what_was_served(models: Models, directory: Path) -> None:
    with serving(models, directory) as e:
        swap(e, 1)
        swap(e, 2)
    assert served(directory) == VersionInUse(2, 1)
    with serving(models, directory) as e:
        assert e.worker.weights.used == VersionInUse(2, 1)
        file = load_file(path_of(directory, 2) / "dflash" / "model.safetensors")
        assert torch.equal(parameters(e, "diffusion")["norm.weight"], file["norm.weight"])
    record(directory, VersionInUse(998, 0))
    with serving(models, directory) as e:
        assert e.worker.weights.used == VersionInUse(0, 0)
    record(directory, VersionInUse(0, 0))


def test_rows_that_were_copied_of_a_second_matrix_follow(models: Models, tmp_path: Path) -> None:
    """A drafter that chooses from EAGLE-3's vocabulary keeps rows of its own matrices; the first one stays."""
    target = TargetModel(models.target, device=torch.device("cpu"), dtype=torch.float32)
    trunk = read_draft(models.dflash).config
    settings = DSpark(
        markov_rank=8,
        target_layers=list(trunk.target_layer_ids),
        num_layers=trunk.num_layers,
        mask_token_id=trunk.mask_token_id,
    )
    go_on_from(models.dflash, target, settings).save(tmp_path / "dspark", torch.float32)
    pair = replace(models, dflash=tmp_path / "dspark")
    version(pair, tmp_path / "versions", tmp_path / "made", trained(0.5, 1))
    keys = {"dflash_vocabulary": "eagle3"}
    flags = pair.whiflash("diffusion", keys, whiflash_versions=str(tmp_path / "versions"))
    with engine(models.target, whiflash=flags) as e:
        arm = e.worker.kv_arms["diffusion"]
        weight, matrix = arm._head.weight, arm._head.matrix
        before = weight.clone(), matrix.clone()
        swap(e, 1)
        now = arm.model.head.within(arm._head.kept)
        assert (arm._head.weight is weight, arm._head.matrix is matrix) == (True, True)
        assert torch.equal(weight, now.weight)
        assert torch.equal(matrix, now.matrix)
        assert (torch.equal(weight, before[0]), torch.equal(matrix, before[1])) == (True, False)
        e.update_target(tiny_target(tmp_path / "other", seed=5))
        assert arm._head.weight is weight
        assert torch.equal(weight, arm.model.head.within(arm._head.kept).weight)
        assert not torch.equal(weight, before[0])


def test_without_the_flag_nothing_is_kept(models: Models) -> None:
    with engine(models.target, whiflash=models.whiflash("auto")) as e:
        e.ask("plain", [1, 2, 3])
        assert e.worker.spool is None
        assert "samples" not in e.worker.snapshot()
