"""A learner beside a server: when it learns, what it offers, when it rolls back, and how much of a core it takes."""

import json
import random
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from whiflash_sglang.cli.app import app
from whiflash_sglang.errors import ServerRefusedError
from whiflash_sglang.telemetry.lengths import Lengths
from whiflash_sglang.updates.samples import Sample, check_spool, files_of, samples_of, write_file
from whiflash_train.config import TrainConfig
from whiflash_train.learner import watch
from whiflash_train.learner.guard import FILE, LEAST, MOST, Guard, change
from whiflash_train.learner.once import STATUS, Learning, Outcome, Pace, status_of, write_status
from whiflash_train.learner.watch import POLL, Watch, progress_of


class Machine:
    """A server with drafters, as its state shows it: requests end with tokens a round around a length."""

    def __init__(self) -> None:
        self.version, self.before, self.used = 0, 0, list[int]()
        self.lengths = {"ar": Lengths(), "diffusion": Lengths(), "lookup": Lengths()}
        self._draw = random.Random(0)
        self.gone, self.sums = False, dict[str, int]()

    def state(self) -> dict[str, Any]:
        if self.gone:
            raise ServerRefusedError("it does not answer")
        drafters = {"version": self.version, "before": self.before}
        lengths = {arm: asdict(sums) | self.sums for arm, sums in self.lengths.items()}
        return {"lengths": lengths, "drafters": drafters}

    def use(self, version: int) -> dict[str, Any]:
        self.version, self.before = version, self.version
        self.used.append(version)
        return self.state()

    def serves(self, requests: int, length: float, arm: str = "ar") -> None:
        for _ in range(requests):
            rounds = self._draw.randrange(10, 40)
            self.lengths[arm].add(round(rounds * self._draw.gauss(length, 0.3)), rounds)


def switched(machine: Machine, directory: Path, before: float, requests: int = 200) -> Guard:
    """A guard that has switched a server to version 1."""
    guard = Guard(machine, directory)
    assert guard.look() is None
    machine.serves(requests, before)
    guard.switch(1)
    return guard


def test_a_version_that_accepts_less_is_left(tmp_path: Path) -> None:
    machine = Machine()
    guard = switched(machine, tmp_path, 2.4)
    machine.serves(200, 2.0)
    drop = guard.look()
    assert drop is not None
    assert (drop.version, drop.now, machine.used) == (1, 0, [1, 0])
    assert list(drop.changes) == ["eagle3"]
    assert drop.changes["eagle3"].low < 2.0 / 2.4 < drop.changes["eagle3"].high < 1
    machine.serves(200, 1.0)
    assert guard.look() is None
    assert machine.used == [1, 0]


@pytest.mark.parametrize(
    ("before", "after", "requests"),
    [(2.4, 2.4, 200), (2.4, 2.7, 200), (2.4, 2.0, LEAST - 1), (2.4, 2.39, 200), (2.4, 2.0, MOST + 1)],
)
def test_a_version_stays_without_evidence(tmp_path: Path, before: float, after: float, requests: int) -> None:
    """As good, better, too few requests, within the interval; and what has served well may meet other traffic."""
    machine = Machine()
    guard = switched(machine, tmp_path, before)
    machine.serves(requests, after)
    assert guard.look() is None
    assert machine.used == [1]


def test_few_requests_before_a_switch_are_no_evidence(tmp_path: Path) -> None:
    machine = Machine()
    guard = switched(machine, tmp_path, 2.4, LEAST - 1)
    machine.serves(200, 1.5)
    assert guard.look() is None


def test_a_guard_that_was_killed_goes_on(tmp_path: Path) -> None:
    machine = Machine()
    switched(machine, tmp_path, 2.4)
    machine.serves(100, 2.0)
    assert Guard(machine, tmp_path).look() is not None
    assert machine.version == 0


def test_a_server_that_began_again_is_compared_with_what_was_before(tmp_path: Path) -> None:
    machine = Machine()
    guard = switched(machine, tmp_path, 2.4)
    machine.lengths = {arm: Lengths() for arm in machine.lengths}
    machine.serves(100, 2.4)
    assert guard.look() is None
    machine.serves(400, 1.8)
    assert guard.look() is not None


def test_what_somebody_else_switched_to_is_theirs(tmp_path: Path) -> None:
    machine = Machine()
    guard = switched(machine, tmp_path, 2.4)
    machine.use(2)
    machine.serves(200, 1.2)
    assert guard.look() is None
    machine.serves(200, 1.0)
    assert guard.look() is None
    assert machine.version == 2


def test_the_interval_covers_ratios_of_equal_traffic() -> None:
    """99 in 100 times; fifty draws may miss it a few times at most."""
    misses = 0
    for seed in range(200):
        draw, halves = random.Random(seed), (Lengths(), Lengths())
        for half in halves:
            for _ in range(100):
                rounds = draw.randrange(5, 60)
                half.add(round(rounds * max(1.0, draw.gauss(2.0, 0.6))), rounds)
        found = change(*halves)
        misses += not found.low <= 1 <= found.high
    assert misses <= 6


def outcome(version: int | None, present: int = 0, until: float = 0.0) -> Outcome:
    counts = {"learned": 100, "judged": 16, "tokens": 2400}
    return Outcome(present=present, version=version, **counts, seconds=1.0, until=until, drafters={})


class Scene:
    """A watch whose passes are made up: each takes the next outcome, and learns from all samples there are."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch, *outcomes: Outcome) -> None:
        self.machine, self.said, self.time = Machine(), list[dict[str, Any]](), 0.0
        self.directory, self.between = directory, lambda: None
        left = list(outcomes)
        check_spool(samples_of(directory))

        def learn(_: Learning, pace: Pace) -> Outcome:
            self.between()
            self.wait(POLL)
            pace.rest()
            found = left.pop(0).model_copy(update={"until": time.time()})
            write_status(directory, found.model_dump())
            return found

        monkeypatch.setattr(watch, "learn_once", learn)
        config = TrainConfig.model_construct()
        learning = Learning(directory, Path("bundle"), config, 100, 8, 1e-3, None)
        guard = Guard(self.machine, directory)
        self.watch = Watch(learning, guard, self.said.append, now=lambda: self.time, sleep=self.wait)

    def wait(self, seconds: float) -> None:
        self.time += seconds

    def requests(self, count: int) -> None:
        write_file(samples_of(self.directory), "t", [Sample([1], [2], []) for _ in range(count)], time.time())


def test_it_learns_when_there_is_something_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(tmp_path, monkeypatch, outcome(None), outcome(None))
    scene.requests(15)
    assert scene.watch.step() is None
    scene.requests(1)
    assert scene.watch.step() is not None
    assert progress_of(tmp_path)["new_samples"] == 0
    assert scene.watch.step() is None
    scene.requests(16)
    last = files_of(samples_of(tmp_path))[-1].path
    last.with_name(last.name.replace("-", "-9", 1)).touch(mode=0o600)  # of a writer whose disk was full
    assert len(files_of(samples_of(tmp_path))) == 4
    assert progress_of(tmp_path)["new_samples"] == 16
    assert scene.watch.step() is not None
    assert len(scene.said) == 2


def test_a_clock_that_was_ahead_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the last pass's date nor that of a sample, which waits until then."""
    scene = Scene(tmp_path, monkeypatch)
    scene.requests(16)
    tomorrow = time.time() + 86400
    write_file(samples_of(tmp_path), "t", [Sample([1], [2], [])], tomorrow)
    write_status(tmp_path, {"until": tomorrow})
    assert progress_of(tmp_path)["new_samples"] == 16


def test_a_better_version_is_offered_and_watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(tmp_path, monkeypatch, outcome(1))
    scene.requests(16)
    scene.watch.look()
    scene.machine.serves(100, 2.4)
    scene.watch.step()
    assert scene.machine.version == 1
    scene.machine.serves(100, 1.8)
    scene.wait(POLL - 1)
    scene.watch.look()
    assert scene.machine.version == 1
    scene.wait(1)
    scene.watch.look()
    assert scene.machine.version == 0
    assert (scene.said[-1]["rolled_back"], scene.said[-1]["serves"]) == (1, 0)
    assert status_of(tmp_path)["rolled_back"] == 1
    json.dumps(scene.said)


def test_a_version_that_began_with_another_one_is_not_offered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = Scene(tmp_path, monkeypatch, outcome(3))
    scene.requests(16)
    scene.watch.look()
    scene.between = lambda: scene.machine.use(2)
    scene.watch.step()
    assert scene.machine.used == [2]
    assert scene.said[-1]["not_offered"] == 3


def test_a_silent_server_is_said_once_and_learning_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = Scene(tmp_path, monkeypatch, outcome(1), outcome(2))
    scene.machine.gone = True
    for _ in range(2):
        scene.requests(16)
        scene.watch.step()
    assert [next(iter(fact)) for fact in scene.said] == ["server", "present", "present"]
    scene.machine.gone = False
    scene.wait(POLL)
    scene.watch.look()
    assert scene.machine.version == 0


@pytest.mark.parametrize(
    "spoil",
    [
        lambda scene: scene.machine.sums.update(of_a_newer_server=1),
        lambda scene: (scene.directory / FILE).mkdir(),
        lambda scene: (scene.directory / STATUS).mkdir(),
    ],
)
def test_a_look_at_the_server_that_fails_ends_no_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Scene], object]
) -> None:
    """Nor does a rollback that cannot be noted."""
    scene = Scene(tmp_path, monkeypatch)
    scene.watch._guard = switched(scene.machine, tmp_path, 2.4)
    scene.machine.serves(200, 2.0)
    (tmp_path / FILE).unlink()
    spoil(scene)
    scene.watch._pace.rest()
    assert scene.machine.version == 0


def test_what_a_watch_learns_is_on_stdout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = iter([16])
    monkeypatch.setattr(watch, "new_samples", lambda _: next(looks))
    monkeypatch.setattr(watch, "learn_once", lambda *_: print("noise") or outcome(None))
    ran = CliRunner().invoke(app, ["learn", str(tmp_path), "--config", "tiny", "--watch", "--json"])
    assert json.loads(ran.stdout) == outcome(None).model_dump()


@pytest.mark.parametrize(("share", "slept"), [(0.1, 18.0), (0.5, 2.0), (1.0, 0.0), (None, 0.0)])
def test_a_share_of_a_core_is_kept(share: float | None, slept: float) -> None:
    """Each of ten steps uses two seconds of a core; as long as it waits for somebody else it uses nothing."""
    clock = {"used": 0.0, "now": 0.0, "slept": 0.0}

    def sleep(seconds: float) -> None:
        clock["now"] += seconds
        clock["slept"] += seconds

    pace = Pace(share, used=lambda: clock["used"], now=lambda: clock["now"], sleep=sleep)
    for _ in pace.each(range(10)):
        clock["used"] += 2.0
        clock["now"] += 2.0
    assert clock["slept"] == pytest.approx(10 * slept)
    clock["used"] += 1.0
    clock["now"] += 100.0
    pace.rest()
    assert clock["slept"] == pytest.approx(10 * slept)
