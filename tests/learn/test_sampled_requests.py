"""Whose tokens a server keeps, and that they are the request's own."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engine import Engine, engine
from model_set import Models

from whiflash_sglang.copying.tenants import handle_of, tenant_of
from whiflash_sglang.updates.samples import Sample, files_of, read_samples


def hinted(hints: str) -> dict[str, Any]:
    return {"custom_params": {"whiflash": hints}}


def handle(salt: str) -> int:
    tenant = tenant_of(None, salt)
    assert tenant is not None
    return handle_of(tenant)


@pytest.fixture(scope="module")
def served(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Engine, Path]]:
    learning = tmp_path_factory.mktemp("learning")
    with engine(models.target, whiflash=models.whiflash("auto", whiflash_learn=str(learning))) as e:
        yield e, learning / "samples"


def kept(served: tuple[Engine, Path]) -> list[Sample]:
    e, directory = served
    e.worker.spool.flush()
    counts = e.worker.spool.counts
    assert (counts["dropped"], counts["failed"]) == (0, 0), counts
    found = [s for file in files_of(directory) for s in read_samples(file.path, e.worker.spool._target)]
    for file in files_of(directory):
        file.path.unlink()
    return found


def test_a_finished_request_is_kept_as_it_was(served: tuple[Engine, Path]) -> None:
    e, _ = served
    e.submit("plain", [1, 2, 3], max_new_tokens=9)
    e.submit("salted", [4, 5, 6], max_new_tokens=7, cache_salt="s")
    e.run()
    salted = Sample([4, 5, 6], e.output("salted"), [handle("s")])
    found = sorted(kept(served), key=lambda sample: sample.prompt)
    assert found == [Sample([1, 2, 3], e.output("plain"), []), salted]


@pytest.mark.parametrize(
    "hints", ['{"learn": false}', '{"lookup": "off"}', '{"lookup": "context"}', '{"learn": 1}', "{"]
)
def test_who_does_not_consent_leaves_nothing(served: tuple[Engine, Path], hints: str) -> None:
    """A malformed hint may have refused: an embedded engine serves the request, and keeps nothing of it."""
    e, _ = served
    before = e.worker.spool.counts["declined"]
    e.submit(f"quiet-{hints}", [1, 2, 3], **hinted(hints))
    e.run()
    assert kept(served) == []
    assert e.worker.spool.counts["declined"] == before + 1


def test_an_aborted_request_leaves_nothing(served: tuple[Engine, Path]) -> None:
    """Its client left, or somebody ended it."""
    e, _ = served
    e.submit("aborted", [7, 8, 9], max_new_tokens=200)
    for _ in range(3):
        e.step()
    e.abort("aborted")
    e.run()
    assert len(e.output("aborted")) > 4
    assert kept(served) == []


@pytest.mark.parametrize("steps", [0, 3, 1000])
def test_forgetting_reaches_who_waits_runs_or_has_ended(served: tuple[Engine, Path], steps: int) -> None:
    """Samples of others stay only if they had ended."""
    e, _ = served
    e.submit(f"a{steps}", [1, 2, 3], cache_salt="a", max_new_tokens=40)
    e.submit(f"b{steps}", [3, 2, 1], cache_salt="b", max_new_tokens=40)
    assert all(e.step() for _ in range(steps)) is (steps < 1000)
    e.worker.forget(handle("a"))
    e.run()
    assert [sample.prompt for sample in kept(served)] == ([] if steps < 1000 else [[3, 2, 1]])


def test_the_state_and_metrics_say_what_was_kept(served: tuple[Engine, Path]) -> None:
    e, _ = served
    state = e.worker.snapshot()["samples"]
    assert state["written"] > 0
    assert state["failing"] is False


@pytest.mark.parametrize("streaming", [True, False])
def test_a_session_consents_as_its_strictest_turn(served: tuple[Engine, Path], streaming: bool) -> None:
    """A later turn's prompt holds the earlier ones, whatever these said, and is forgotten by all their names."""
    e, _ = served
    name = f"strict{streaming}"
    e.open_session(name, streaming=streaming)
    e.submit(f"{name}a", [1, 2, 3], session={"id": name}, **hinted('{"learn": false}'))
    e.run()
    e.submit(f"{name}b", [4, 5, 6], session={"id": name, "rid": f"{name}a"})
    e.run()
    assert kept(served) == []
    other = f"open{streaming}"
    e.open_session(other, streaming=streaming)
    e.submit(f"{other}a", [1, 2, 3], session={"id": other}, cache_salt="s")
    e.run()
    e.submit(f"{other}b", [4, 5, 6], session={"id": other, "rid": f"{other}a"}, cache_salt="s")
    e.run()
    first, second = kept(served)
    assert second.prompt[:3] == first.prompt == [1, 2, 3]
    assert second.handles == first.handles == [handle("s")]
    for session in (name, other):
        e.close_session(session)


@pytest.mark.parametrize("streaming", [True, False])
def test_a_forgotten_turn_does_not_come_back(served: tuple[Engine, Path], streaming: bool) -> None:
    e, _ = served
    name = f"gone{streaming}"
    e.open_session(name, streaming=streaming)
    e.submit(f"{name}a", [1, 2, 3], session={"id": name}, cache_salt="a")
    e.run()
    kept(served)
    e.worker.forget(handle("a"))
    e.submit(f"{name}b", [4, 5, 6], session={"id": name, "rid": f"{name}a"}, cache_salt="a")
    e.run()
    e.close_session(name)
    assert kept(served) == []


def test_a_turn_that_was_refused_counts_for_its_session(served: tuple[Engine, Path]) -> None:
    """Noted when it arrives: nobody knows what a session makes of it."""
    e, _ = served
    e.open_session("refused", streaming=False)
    e.submit("refused-1", [1, 2, 3], session={"id": "refused"}, max_new_tokens=40)
    e.step()
    e.submit("refused-2", [4], session={"id": "refused", "rid": "refused-1"}, **hinted('{"learn": false}'))
    e.run()
    e.close_session("refused")
    assert kept(served) == []
