"""The initial chances of copies that a bundle ships."""

import json
from pathlib import Path

import pytest

from whiflash_sglang.checkpoints.manifest import Lookup, embedded_bundle, load_manifest
from whiflash_sglang.copying.calibration import BUCKETS, Agreement
from whiflash_sglang.errors import ConfigError
from whiflash_sglang.settings.config import Flags, resolve


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
    assert resolve(Flags(lookup="off"), tmp_path).lookup == Lookup(seed=shipped.seed, enabled=False)
    (tmp_path / "whiflash.json").write_text(json.dumps({**manifest, "lookup": {"seed": [[0.5]]}}))
    with pytest.raises(ConfigError, match=r"'lookup'\.seed: .*8 rows"):
        resolve(Flags(), tmp_path)
