"""The first rank's decisions reach the others, and a rank that did something else gets an error."""

from collections.abc import Callable
from typing import Any

import pytest

from whiflash_sglang.device.ranks import DivergedError, Message, Ranks


def pair() -> tuple[Ranks, Ranks]:
    """Two ranks of one thread: the first speaks before the second listens."""
    said: list[Message | None] = []

    def speak(message: Message | None) -> Any:
        said.append(message)
        return message

    def listen(message: Message | None) -> Any:
        assert message is None
        return said.pop(0)

    return Ranks(0, 2, speak), Ranks(1, 2, listen)


def never() -> Any:
    raise AssertionError("the first rank alone decides")


def test_the_first_decides() -> None:
    first, second = pair()
    assert first.leads
    assert not second.leads
    for value in (3, None, ["a", 0.5]):
        first.note("round", [1, 2])
        second.note("round", [1, 2])
        assert first.broadcast(lambda value=value: value) == value
        assert second.broadcast(never) == value


def test_alone_there_is_nobody_to_tell() -> None:
    alone = Ranks()
    assert alone.leads
    assert alone.broadcast(lambda: 5) == 5


@pytest.mark.parametrize(
    "astray",
    [
        lambda second: second.note("round", [1, 3]),
        lambda second: None,
        lambda second: (second.note("round", [1, 2]), second.note("round", [1, 2])),
    ],
)
def test_other_notes(astray: Callable[[Ranks], Any]) -> None:
    first, second = pair()
    first.note("round", [1, 2])
    astray(second)
    first.broadcast(lambda: 0)
    with pytest.raises(DivergedError, match="rank 1 of 2 did not commit what rank 0 did: before message 0 of rank 0"):
        second.broadcast(never)


def test_messages_of_another_place() -> None:
    first, second = pair()
    first.broadcast(lambda: 0)
    first.broadcast(lambda: 0)
    second.broadcast(never)
    second.broadcast(never)
    stranger = Ranks(1, 2, lambda _: [])
    with pytest.raises(DivergedError, match="rank 0 sent something else"):
        stranger.broadcast(never)


def test_ranks_need_a_way_to_talk() -> None:
    with pytest.raises(ValueError, match="2 ranks and no way"):
        Ranks(0, 2)
