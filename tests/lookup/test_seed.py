"""The table that a bundle ships, and the command that measures it."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from whiflash_sglang.checkpoints.manifest import Lookup, embedded_bundle, load_manifest
from whiflash_sglang.cli.app import app
from whiflash_sglang.copying.calibration import BUCKETS, EVEN_ODDS, Agreement, MatchCalibration
from whiflash_sglang.errors import ConfigError
from whiflash_sglang.settings.config import Flags, resolve
from whiflash_train.seed import AnsweredPrompt, measure_seed


def sometimes(chance: float, seed: int = 0, length: int = 4000) -> AnsweredPrompt:
    """A text of one prompt repeated, in which every token is replaced with a new one with `1 - chance`."""
    rng = random.Random(seed)
    unit = list(range(50))
    tokens = [*unit]
    while len(tokens) < length:
        tokens.append(unit[len(tokens) % 50] if rng.random() < chance else 1000 + len(tokens))
    return AnsweredPrompt(tokens, len(unit))


def test_measured_chances_are_those_of_the_text() -> None:
    seed = measure_seed([sometimes(0.9)])
    # A token is right with the text's own chance, however long the match is.
    for length in (4, 6, 9):
        assert seed[MatchCalibration.bucket(length)][Agreement.UNANIMOUS] == pytest.approx(0.9, abs=0.05)


def test_only_tokens_of_the_answer_are_asked_for() -> None:
    """The prefill gives its first: an answer of one token says nothing, whatever its prompt repeats."""
    prompt = [*range(20)] * 3
    assert measure_seed([AnsweredPrompt([*prompt, 0], len(prompt))]) == measure_seed([])
    assert measure_seed([AnsweredPrompt([*prompt, 0, 1], len(prompt))]) != measure_seed([])


def test_what_never_occurred_stays_at_even_odds() -> None:
    assert measure_seed([]) == tuple(tuple(row) for row in EVEN_ODDS)


def test_the_shipped_table_rises_with_length_and_agreement() -> None:
    shipped = load_manifest(embedded_bundle()).lookup
    assert shipped is not None
    assert shipped.seed is not None
    assert len(shipped.seed) == len(BUCKETS)
    alone = [row[Agreement.ALONE] for row in shipped.seed]
    assert alone == sorted(alone)
    assert all(row[Agreement.UNANIMOUS] > row[Agreement.ALONE] > row[Agreement.CONTESTED] for row in shipped.seed)


def test_a_bundle_without_a_table_takes_the_embedded_one(tmp_path: Path) -> None:
    for name in ("eagle3", "dflash"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    manifest = {"schema_version": 1, "name": "b", "target": "t", "eagle3": "eagle3", "dflash": "dflash"}
    (tmp_path / "whiflash.json").write_text(json.dumps(manifest))
    shipped = load_manifest(embedded_bundle()).lookup
    assert shipped is not None
    assert resolve(Flags(), tmp_path).lookup == Lookup(seed=shipped.seed)
    flags = Flags(lookup="off")
    assert resolve(flags, tmp_path).lookup == Lookup(seed=shipped.seed, enabled=False)
    (tmp_path / "whiflash.json").write_text(json.dumps({**manifest, "lookup": {"seed": [[0.5]]}}))
    with pytest.raises(ConfigError, match=r"'lookup'\.seed: .*8 rows"):
        resolve(Flags(), tmp_path)


def test_the_command_measures_and_keeps_what_the_bundle_says(tmp_path: Path) -> None:
    answers = [sometimes(0.8, seed, 400) for seed in range(3)]
    tokens = tmp_path / "tokens.npz"
    np.savez(
        tokens,
        tokens=np.concatenate([answer.tokens for answer in answers]).astype(np.uint16),
        lengths=[len(answer.tokens) for answer in answers],
        prompt_lengths=[answer.prompt_length for answer in answers],
        ids=list("abc"),
    )
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    manifest = {"schema_version": 1, "name": "b", "target": "t", "eagle3": "e", "dflash": "d"}
    (bundle / "whiflash.json").write_text(json.dumps({**manifest, "lookup": {"max_width": 8}}))
    run = CliRunner().invoke(app, ["lab", "lookup-seed", str(tokens), "--bundle", str(bundle), "--json"])
    assert run.exit_code == 0, run.output
    lookup = json.loads((bundle / "whiflash.json").read_text())["lookup"]
    wanted = [list(row) for row in measure_seed(answers, 8)]
    assert lookup == {"max_width": 8, "seed": wanted}
    assert json.loads(run.stdout.splitlines()[-1]) == wanted


def test_a_file_that_is_no_export_is_named(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.npz"
    wrong.write_text("no archive")
    run = CliRunner().invoke(app, ["lab", "lookup-seed", str(wrong)])
    assert run.exit_code == 1
    assert "wrong.npz holds no answers' token ids" in str(run.exception)
