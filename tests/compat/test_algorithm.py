"""What the algorithm fixes before the server starts."""

from types import SimpleNamespace

import pytest

from whiflash_sglang.compat import algorithm
from whiflash_sglang.config import Lookup
from whiflash_sglang.errors import ConfigError


def widths_of(monkeypatch: pytest.MonkeyPatch, *, backlog_tokens: int, copies: int) -> int:
    """Draft tokens that the KV reservation is computed from, with blocks of 8 and chains of 5."""
    settings = SimpleNamespace(eagle_steps=5, lookup=Lookup(max_width=copies), backlog_tokens=backlog_tokens)
    monkeypatch.setattr(algorithm, "settings_of", lambda _: settings)
    monkeypatch.setattr(algorithm, "widest_block", lambda _: 8)
    monkeypatch.setattr(algorithm, "resolving_view", lambda args: args)
    arguments = SimpleNamespace(max_running_requests=4)
    algorithm.WhiflashAlgorithm.handle_server_args(SimpleNamespace(), arguments)
    return int(arguments.speculative_num_draft_tokens)


def test_the_widest_arm_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    assert widths_of(monkeypatch, backlog_tokens=64, copies=24) == 25
    assert widths_of(monkeypatch, backlog_tokens=64, copies=2) == 8


def test_a_ring_that_one_round_could_overflow_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert widths_of(monkeypatch, backlog_tokens=34, copies=32) == 33
    with pytest.raises(ConfigError, match=r"--whiflash-backlog-tokens 33 .* at least 34"):
        widths_of(monkeypatch, backlog_tokens=33, copies=32)


@pytest.mark.parametrize("backend", ["outlines", "xgrammar", "llguidance"])
def test_a_grammar_backend_that_takes_nothing_back_is_refused(
    monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    monkeypatch.setattr(algorithm, "resolving_view", lambda args: args)
    arguments = SimpleNamespace(_whiflash=None, grammar_backend=backend, disaggregation_mode=None)
    if backend != "outlines":
        algorithm.validate(arguments)
        return
    with pytest.raises(ConfigError, match=r"--grammar-backend outlines .* use xgrammar or llguidance"):
        algorithm.validate(arguments)
