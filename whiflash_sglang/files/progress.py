"""Progress of a long command on stderr: a bar on a terminal, plain lines elsewhere (pipes, logs, CI)."""

import threading
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TaskID, TextColumn
from rich.text import Text

T = TypeVar("T")
SPEED_SECONDS = 600.0
"""Seconds of steps that the estimate of the remaining time is made from."""
LINE_SECONDS = 15.0


def progress() -> Progress:
    """Return a context manager that shows progress; call its `add_task`, `advance` and `remove_task`."""
    console = Console(stderr=True)
    if not console.is_terminal:
        return Lines(console)
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        Times(),
        console=console,
        transient=True,
        speed_estimate_period=SPEED_SECONDS,
    )


class Times(ProgressColumn):
    """Column with a task's time so far and, if it can be estimated, its remaining time."""

    def render(self, task: Task) -> Text:
        return Text(_times(task))


def tracked(items: Sequence[T], description: str) -> Iterator[T]:
    """Yield `items` one by one and show the progress."""
    with progress() as bar:
        # `bar.track` is not used: it counts only when a bar is drawn, and plain lines draw none.
        task = bar.add_task(description, total=len(items))
        for item in items:
            yield item
            bar.advance(task)


class Lines(Progress):
    """Progress in plain lines, where nothing can be overwritten: one when a task begins, one when it ends, and between
    them one every `seconds` with the finished part and the estimated remaining time.
    """

    def __init__(self, console: Console, seconds: float = LINE_SECONDS) -> None:
        super().__init__(console=console, disable=True, speed_estimate_period=SPEED_SECONDS)
        self._seconds = seconds
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        self._thread = threading.Thread(target=self._speak, name="progress", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()
        for task in self.tasks:
            self._say(_ended(task))

    def add_task(self, description: str, *args: Any, **options: Any) -> TaskID:
        self._say(f"{description} …")
        return super().add_task(description, *args, **options)

    def remove_task(self, task_id: TaskID) -> None:
        self._say(_ended(self._tasks[task_id]))
        super().remove_task(task_id)

    def _speak(self) -> None:
        while not self._over.wait(self._seconds):
            for task in self.tasks:
                if not task.finished:
                    self._say(f"{_done(task)}, {_times(task)}")

    def _say(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)


def _times(task: Task) -> str:
    spent = f"{_clock(task.elapsed)} so far"
    return spent if task.time_remaining is None else f"{spent}, about {_clock(task.time_remaining)} left"


def _ended(task: Task) -> str:
    return f"{_done(task)}, took {_clock(task.finished_time or task.elapsed)}"


def _done(task: Task) -> str:
    return task.description if task.total is None else f"{task.description}: {task.completed:g} of {task.total:g}"


def _clock(seconds: float | None) -> str:
    minutes, rest = divmod(round(seconds or 0), 60)
    return f"{minutes}:{rest:02}"
