"""Progress where there is no terminal: lines on stderr, and stdout for the result alone."""

import io

import pytest
from rich.console import Console

from whiflash_sglang.files.progress import Lines, tracked


def test_work_says_what_it_does_and_how_far_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert [*tracked(["a", "b"], "copying from answers")] == ["a", "b"]
    output = capsys.readouterr()
    begins, ends = output.err.splitlines()
    assert begins == "copying from answers …"
    assert ends.startswith("copying from answers: 2 of 2, took ")
    assert output.out == ""


def test_between_begin_and_end_there_are_lines_with_an_estimate() -> None:
    out = Written("about")
    with Lines(Console(file=out, width=200), seconds=0.001) as bar:
        starting = bar.add_task("starting servers", total=None)
        bar.remove_task(starting)
        measuring = bar.add_task("measuring", total=4)
        bar.advance(measuring)
        bar.advance(measuring)
        out.seen.wait()
        bar.update(measuring, completed=4)
    lines = out.getvalue().splitlines()
    assert lines[0] == "starting servers …"
    assert any(line.startswith("measuring: 2 of 4, ") and line.endswith(" left") for line in lines)
    assert lines[-1].startswith("measuring: 4 of 4, took ")


class Written(io.StringIO):
    """`seen` is set once `wanted` was written."""

    def __init__(self, wanted: str) -> None:
        import threading

        super().__init__()
        self._wanted = wanted
        self.seen = threading.Event()

    def write(self, text: str) -> int:
        if self._wanted in text:
            self.seen.set()
        return super().write(text)
