"""Engines of their own: swaps under pressure, restarts, and a server that keeps nothing."""

import random
from pathlib import Path
from typing import Any

import torch
from engine import engine
from model_set import Models
from overlap import overlapped
from safetensors.torch import load_file
from swapping import PROMPTS, parameters, serving, swap

from whiflash_sglang.learn.versions import Served, path_of, record, served


def test_text_stays_through_retractions_and_chunks(
    models: Models, directory: Path, plain: list[list[int]]
) -> None:
    order = random.Random(4)
    with serving(models, directory, chunked_prefill_size=16, max_total_tokens=256) as e:
        for i, prompt in enumerate(PROMPTS):
            e.submit(f"r{i}-", prompt, max_new_tokens=60)
        e.run(lambda: swap(e, order.randrange(4)))
        assert [e.output(f"r{i}-") for i in range(len(PROMPTS))] == plain
        e.check_leaks()


def test_text_stays_with_a_round_of_lag(models: Models, directory: Path, plain: list[list[int]]) -> None:
    """A version is written where the scheduler takes its mail: while the forward before is still under way."""
    order = random.Random(5)
    whiflash = models.whiflash("random", whiflash_versions=str(directory))
    with overlapped(models.target, whiflash=whiflash, host_lengths=False, chunked_prefill_size=16) as e:
        ingest = e.scheduler.ingest_requests

        def ingesting() -> list[Any]:
            swap(e, order.randrange(4))
            return ingest()

        e.scheduler.ingest_requests = ingesting
        for i, prompt in enumerate(PROMPTS):
            e.submit(f"o{i}-", prompt, max_new_tokens=60)
        e.run()
        assert [e.output(f"o{i}-") for i in range(len(PROMPTS))] == plain
        assert not e.streams.races
        assert e.worker.weights.swaps["taken"] > 10


def test_a_restart_begins_with_what_was_served(models: Models, directory: Path) -> None:
    with serving(models, directory) as e:
        swap(e, 1)
        swap(e, 2)
    assert served(directory) == Served(2, 1)
    with serving(models, directory) as e:
        assert e.worker.weights.used == Served(2, 1)
        file = load_file(path_of(directory, 2) / "dflash" / "model.safetensors")
        assert torch.equal(parameters(e, "diffusion")["norm.weight"], file["norm.weight"])
    record(directory, Served(998, 0))
    with serving(models, directory) as e:
        assert e.worker.weights.used == Served(0, 0)
    record(directory, Served(0, 0))


def test_rows_that_were_copied_of_a_head_follow(models: Models, directory: Path) -> None:
    """A drafter that chooses from EAGLE-3's vocabulary keeps rows of its own head's matrix."""
    flags = models.whiflash("diffusion", whiflash_versions=str(directory))
    flags["whiflash_dflash_vocabulary"] = "eagle3"
    with engine(models.target, whiflash=flags) as e:
        arm = e.worker.kv_arms["diffusion"]
        head = arm._head.weight
        swap(e, 2)
        assert arm._head.weight is head
        assert torch.equal(head, arm._chosen().weight)


def test_without_the_flag_nothing_is_kept(models: Models) -> None:
    with engine(models.target, whiflash=models.whiflash("auto")) as e:
        e.submit("plain", [1, 2, 3])
        e.run()
        assert e.worker.spool is None
        assert "samples" not in e.worker.snapshot()
