"""The runner of the GPU's parts, on parts that need no GPU."""

import json
import struct
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import kit
import prune
import pytest
import run
from run import Part

PRINTS = 'import json, sys; json.dump({"device": sys.argv[1]}, open(sys.argv[2], "w"))'
REFUSES = 'import json, sys; json.dump({"why": "not on this card"}, open(sys.argv[1], "w")); sys.exit(77)'
SLEEPS = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(print("servers ended", flush=True)))
print("waiting", flush=True)
time.sleep(1000)
"""
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


def test_a_part_that_is_ended_may_end_its_servers_first() -> None:
    part = subprocess.Popen([sys.executable, "-c", SLEEPS], stdout=subprocess.PIPE, start_new_session=True)
    assert part.stdout is not None
    assert part.stdout.readline() == b"waiting\n"
    run.end(part)
    assert part.stdout.read() == b"servers ended\n"


def test_what_is_done_is_not_done_again_unless_the_code_changed(
    records: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status(records, "--only", "good") == {"good": "passed"}
    status(records, "--only", "good")
    assert capsys.readouterr().out.count("done before") == 1
    status(records, "--only", "good", "--again")
    monkeypatch.setattr(run, "digest", lambda: "another")
    status(records, "--only", "good")
    assert capsys.readouterr().out.count("done before") == 0


def test_a_page_says_how_parts_ended_and_which_check_failed(records: Path) -> None:
    for name in ("good", "bad", "refused"):
        status(records, "--only", name)
    record = records / "rehearsal" / "good.json"
    failed = {"checks": {"waits": {"status": "failed", "why": "a wait"}, "greedy": {"status": "passed"}}}
    record.write_text(json.dumps(json.loads(record.read_text()) | {"status": "failed", "figures": failed}))
    page = run.page(records / "rehearsal").splitlines()
    assert [line.split(" | ")[1] for line in page[2:]] == ["failed", "failed", "left out"]
    assert page[2].endswith("| waits: a wait |")
    assert "no such card" in page[3]
    assert "not on this card" in page[4]
    assert "| bad | failed |" in (records / "rehearsal" / run.PAGE).read_text()


def test_what_failed_is_tried_again_before_all_others(
    records: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "PARTS", (PARTS[0], PARTS[1]))
    status(records, "--only", "bad")
    capsys.readouterr()
    assert status(records) == {"bad": "failed", "good": "passed"}
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()[:2]] == [
        ["bad", "failed"],
        ["good", "passed"],
    ]
    status(records, "--within", "1", "--again")
    assert capsys.readouterr().out.count("not begun") == 2


MEET = """
import pathlib, sys, time
pathlib.Path(sys.argv[1]).touch()
while not pathlib.Path(sys.argv[2]).exists(): time.sleep(0.01)
"""


def test_parts_run_side_by_side_and_their_records_come_back(
    records: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = str(records / "a"), str(records / "b")
    pair = (Part("good", "", ("-c", MEET, a, b), ()), Part("bad", "", ("-c", MEET, b, a), ()))
    monkeypatch.setattr(run, "PARTS", pair)
    monkeypatch.setattr(run, "machine", lambda _: "a card")
    archive, kept, there = records / "records.tgz", records / "kept", records / "there"
    assert (
        run.main(["--jobs", "2", "--only", "good,bad", "--records", str(there), "--pack", str(archive)]) == 0
    )
    assert run.main(["--keep", str(archive), "--records", str(kept)]) == 0
    assert sorted(path.name for path in kept.iterdir()) == ["README.md", "bad.json", "good.json"]
    assert "a card" in (kept / run.PAGE).read_text()
    record = json.loads((kept / "good.json").read_text()) | {"machine": "rehearsal on a CPU"}
    for name in ("good", "bad"):
        (there / f"{name}.json").write_text(json.dumps(record))
    run.pack(there, archive)
    assert run.main(["--keep", str(archive), "--records", str(kept)]) == 1
    assert "no record of a card" in capsys.readouterr().err


def test_a_tree_that_a_machine_refuses_is_named_with_its_bytes() -> None:
    kit.check_size(41_000_000, 1_000_000)
    with pytest.raises(
        SystemExit, match=r"sparse-checkout.*27,000,000 .*41,000,000.* 68,000,000 .* 67,108,864"
    ):
        kit.check_size(41_000_000, 27_000_000)
    assert 100_000 < kit.travels() < 5_000_000


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


def test_pieces_of_the_pair_are_joined_once_all_are_there(tmp_path: Path) -> None:
    whole = tmp_path / "whole.tar.xz"
    with tarfile.open(tmp_path / "kit.tar.xz", "w:xz") as packed:
        info = tarfile.TarInfo("tests/gpu/run.py")
        packed.addfile(info)
        packed.addfile(tarfile.TarInfo(f"{run.CACHE}/prices"))  # what an earlier part left there
    with tarfile.open(whole, "w:xz") as packed:
        packed.addfile(tarfile.TarInfo(f"{run.WHEELS}/wheel"))
    data = whole.read_bytes()
    for number in range(run.PIECES):
        assert not (tmp_path / "gpu-kit" / run.WHEELS / "wheel").exists()
        (tmp_path / f"pair-{number}").write_bytes(
            data[number * 50 : (number + 1) * 50 if number < 2 else None]
        )
        assert run.run_kit(tmp_path / "kit.tar.xz", ["--kit", str(tmp_path / "kit.tar.xz")]) == 0
    assert (tmp_path / "gpu-kit" / run.WHEELS / "wheel").exists()
    assert run.PIECES == kit.PAIR


def test_parts_name_files_that_exist_and_every_test_of_the_kernels() -> None:
    import importlib

    real = importlib.reload(run)
    names = [part.name for part in real.PARTS]
    tests = [word for part in real.PARTS for word in part.command if word.startswith("kernels/tests/test_")]
    every = [path.relative_to(real.ROOT).as_posix() for path in real.ROOT.glob("kernels/tests/test_*.py")]
    assert sorted(tests) == sorted(every)
    places = [
        names.index(name)
        for name in ("fa3", "kernels-rounds", "overlap-triton", "serving-triton", "serving-fa4")
    ]
    assert places == sorted(places)
    assert places[:3] == [0, 1, 2]
    assert {part.name for part in real.PARTS if part.serves} > {"real", "real-own", "serving-triton"}
    assert len(set(names)) == len(names)
    for part in real.PARTS:
        for word in part.command:
            assert not word.endswith(".py") or (real.ROOT / word).exists(), word
