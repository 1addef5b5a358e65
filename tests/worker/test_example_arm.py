"""The drafter of `docs/dev/add-a-drafter.md` serves: text is plain decoding's, and some of its drafts are right."""

from pathlib import Path

from engine import engine
from example_arm import ARM, AgainArm
from model_set import build_models
from plain import compare, plain_texts
from traffic import mixed, play


def test_a_drafter_of_fifty_lines_serves(tmp_path: Path) -> None:
    """The target repeats tokens, as the drafter expects of it."""
    models = build_models(tmp_path, peaked=True)
    arrivals = mixed(seed=3, count=8, shared=24, aborts=0.1, tokens=48)
    expected = plain_texts(models.target, arrivals)
    again, used = AgainArm(), set[str]()
    with engine(models.target, whiflash=models.whiflash("random"), arms=[again], max_running_requests=4) as e:
        found = play(e, arrivals, lambda: used.update(*(state.counts for state in e.states.values())))
        assert ARM in e.worker.snapshot()["arms"]
        assert not e.states, "nothing is kept of requests that ended"
    compare(models.reference.target, arrivals, expected, found)
    assert ARM in used, "rounds verified its drafts"
    assert sum(right for _, right in again.judged) > 0, "some of its drafts were right"
    assert any(right < known for known, right in again.judged), "others were not"
