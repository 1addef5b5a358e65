"""Whose tokens a server keeps, and that they are the request's own."""

from collections.abc import Iterator
from typing import Any

import pytest
from engine import Engine, engine
from model_set import Models

from whiflash_sglang.copying.tenants import handle_of, tenant_of
from whiflash_sglang.telemetry.samples import Sample, files_of, read_samples


def hinted(hints: str) -> dict[str, Any]:
    return {"custom_params": {"whiflash": hints}}


def handle(salt: str) -> int:
    return handle_of(tenant_of(None, salt) or b"")


@pytest.fixture(scope="module")
def e(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    learning = str(tmp_path_factory.mktemp("learning"))
    with engine(models.target, whiflash=models.whiflash("auto", whiflash_learn=learning)) as started:
        yield started


def kept(e: Engine) -> list[Sample]:
    spool = e.worker.spool
    spool.flush()
    assert (spool.counts["dropped"], spool.counts["failed"]) == (0, 0), spool.counts
    files = files_of(spool._directory)
    found = [sample for file in files for sample in read_samples(file, spool._target)]
    for file in files:
        file.unlink()
    return found


def test_a_finished_request_is_kept_as_it_was(e: Engine) -> None:
    e.submit("plain", [1, 2, 3], max_new_tokens=9)
    e.submit("salted", [4, 5, 6], max_new_tokens=7, cache_salt="s")
    e.run()
    salted = Sample([4, 5, 6], e.output("salted"), [handle("s")])
    assert sorted(kept(e), key=lambda sample: sample.prompt) == [Sample([1, 2, 3], e.output("plain"), []), salted]
    state = e.worker.snapshot()["samples"]
    assert (state["written"], state["failing"]) == (2, False)


@pytest.mark.parametrize(
    "hints", ['{"learn": false}', '{"lookup": "off"}', '{"lookup": "context"}', '{"learn": 1}', "{"]
)
def test_who_does_not_consent_leaves_nothing(e: Engine, hints: str) -> None:
    """A malformed hint may have refused: an embedded engine serves the request, and keeps nothing of it."""
    before = e.worker.spool.counts["declined"]
    e.ask(f"quiet-{hints}", [1, 2, 3], **hinted(hints))
    assert kept(e) == []
    assert e.worker.spool.counts["declined"] == before + 1


def test_an_aborted_request_leaves_nothing(e: Engine) -> None:
    """Its client left, or somebody ended it."""
    e.submit("aborted", [7, 8, 9], max_new_tokens=200)
    for _ in range(8):
        e.step()
    e.abort("aborted")
    e.run()
    assert len(e.output("aborted")) > 4
    assert kept(e) == []


@pytest.mark.parametrize("steps", [0, 3, 1000])
def test_forgetting_reaches_who_waits_runs_or_has_ended(e: Engine, steps: int) -> None:
    """Samples of others stay only if they had ended."""
    e.submit(f"a{steps}", [1, 2, 3], cache_salt="a", max_new_tokens=40)
    e.submit(f"b{steps}", [3, 2, 1], cache_salt="b", max_new_tokens=40)
    assert all(e.step() for _ in range(steps)) is (steps < 1000)
    e.worker.forget(handle("a"))
    e.run()
    assert [sample.prompt for sample in kept(e)] == ([] if steps < 1000 else [[3, 2, 1]])


@pytest.mark.parametrize("streaming", [True, False])
def test_a_session_consents_as_its_strictest_turn(e: Engine, streaming: bool) -> None:
    """A later turn's prompt holds the earlier ones, whatever these said, and is forgotten by all their names."""
    name = f"strict{streaming}"
    e.open_session(name, streaming=streaming)
    e.ask(f"{name}a", [1, 2, 3], session={"id": name}, **hinted('{"learn": false}'))
    e.ask(f"{name}b", [4, 5, 6], session={"id": name, "rid": f"{name}a"})
    assert kept(e) == []
    other = f"open{streaming}"
    e.open_session(other, streaming=streaming)
    e.ask(f"{other}a", [1, 2, 3], session={"id": other}, cache_salt="s")
    e.ask(f"{other}b", [4, 5, 6], session={"id": other, "rid": f"{other}a"}, cache_salt="s")
    first, second = kept(e)
    assert second.prompt[:3] == first.prompt == [1, 2, 3]
    assert second.handles == first.handles == [handle("s")]
    for session in (name, other):
        e.close_session(session)


@pytest.mark.parametrize("streaming", [True, False])
def test_a_forgotten_turn_does_not_come_back(e: Engine, streaming: bool) -> None:
    name = f"gone{streaming}"
    e.open_session(name, streaming=streaming)
    e.ask(f"{name}a", [1, 2, 3], session={"id": name}, cache_salt="a")
    kept(e)
    e.worker.forget(handle("a"))
    e.ask(f"{name}b", [4, 5, 6], session={"id": name, "rid": f"{name}a"}, cache_salt="a")
    e.close_session(name)
    assert kept(e) == []


def test_a_turn_that_was_refused_counts_for_its_session(e: Engine) -> None:
    """Noted when it arrives: nobody knows what a session makes of it."""
    e.open_session("refused", streaming=False)
    e.submit("refused-1", [1, 2, 3], session={"id": "refused"}, max_new_tokens=40)
    e.step()
    e.submit("refused-2", [4], session={"id": "refused", "rid": "refused-1"}, **hinted('{"learn": false}'))
    e.run()
    e.close_session("refused")
    assert kept(e) == []
