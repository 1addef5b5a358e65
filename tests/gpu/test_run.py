"""The runner of the GPU's parts, on parts that need no GPU."""

import json
import struct
from pathlib import Path
from typing import Any

import prune
import pytest
import run
from run import Part

PRINTS = 'import json, sys; json.dump({"device": sys.argv[1]}, open(sys.argv[2], "w"))'
REFUSES = 'import json, sys; json.dump({"why": "not on this card"}, open(sys.argv[1], "w")); sys.exit(77)'
PARTS = (
    Part("good", "", ("-c", PRINTS, "{device}", "{out}"), ()),
    Part("bad", "", ("-c", "raise SystemExit('no such card')"), ()),
    Part("endless", "", ("-c", "while True: pass"), ()),
    Part("elsewhere", "", ("-c", ""), ("a_package_that_nobody_has",)),
    Part("refused", "", ("-c", REFUSES, "{out}"), ()),
    Part("not-here", "", ("-c", ""), (), rehearsal=None),
)


@pytest.fixture
def records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(run, "PARTS", PARTS)
    return tmp_path


def status(records: Path, *arguments: str) -> dict[str, Any]:
    """Statuses in the records after a run, by part."""
    run.main(["--device", "cpu", "--records", str(records), *arguments])
    found = [json.loads(p.read_text()) for p in sorted((records / "rehearsal").glob("*.json"))]
    return {record["part"]: record["status"] for record in found if "part" in record}


def test_every_part_has_a_record_that_says_how_it_ended(records: Path) -> None:
    for name in ("good", "bad", "elsewhere", "refused"):
        status(records, "--only", name)
    found = status(records, "--only", "endless", "--seconds", "1")
    left_out = dict.fromkeys(("elsewhere", "refused"), "left out")
    assert found == {"good": "passed", "bad": "failed", "endless": "timed out", **left_out}
    good, bad, refused = (
        json.loads((records / "rehearsal" / f"{n}.json").read_text()) for n in ("good", "bad", "refused")
    )
    assert refused["why"] == "not on this card"
    assert good["versions"].keys() >= {"python", "torch"}
    assert good["figures"] == {"device": "cpu"}
    assert "no such card" in bad["tail"]
    assert "rehearsal on a CPU" in good["machine"]


def test_device_code_that_is_not_wanted_becomes_zeros_in_place(tmp_path: Path) -> None:
    bodies = {90: b"_INTERNAL_0a_12_kept_cu_", 80: b"_INTERNAL_0b_12_kept_cu_"}
    other = b"_INTERNAL_0c_12_other_cu_"
    listed = [*bodies.items(), (90, other), (90, b"compressed")]
    fat = b"".join(struct.pack("<HHIQQII", 2, 1, 32, len(b), 0, 0, sm) + b for sm, b in listed)
    whole = (
        b"ELF"
        + prune.MAGIC
        + struct.pack("<HHQ", 1, 16, len(fat))
        + fat
        + b"\0" * 8
        + prune.MAGIC
        + b"no header: its version is another"
    )
    (tmp_path / "in.so").write_bytes(whole)
    for sources, kept in (("kept|none", [bodies[90]]), ("", [bodies[90], other, b"compressed"])):
        wanted = whole
        for body in {body for _, body in listed} - set(kept):
            wanted = wanted.replace(body, bytes(len(body)))
        assert prune.prune(tmp_path / "in.so", tmp_path / "out.so", 90, sources) == sum(map(len, kept))
        assert (tmp_path / "out.so").read_bytes() == wanted


def test_parts_name_files_that_exist_and_every_test_of_the_kernels() -> None:
    import importlib

    real = importlib.reload(run)
    names = [part.name for part in real.PARTS]
    tests = [word for part in real.PARTS for word in part.command if word.startswith("kernels/tests/test_")]
    every = [path.relative_to(real.ROOT).as_posix() for path in real.ROOT.glob("kernels/tests/test_*.py")]
    assert sorted(tests) == sorted(every)
    places = [
        names.index(name) for name in ("fa3", "kernels-rounds", "overlap-triton", "serving-triton", "serving-fa4")
    ]
    assert places == sorted(places)
    assert places[:3] == [0, 1, 2]
    assert {part.name for part in real.PARTS if part.serves} > {"real", "real-own", "serving-triton"}
    assert len(set(names)) == len(names)
    for part in real.PARTS:
        for word in part.command:
            assert not word.endswith(".py") or (real.ROOT / word).exists(), word
