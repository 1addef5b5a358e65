"""Emission forms in the real scheduler: what a call quotes is copied through its ends of lines, for its own request."""

import json
import random
from collections.abc import Iterator
from typing import Any

import pytest
from engine import Engine, engine
from model_set import Models

from whiflash_sglang.compat.http.streamer import recording_of
from whiflash_sglang.lookup.forms import escaped
from whiflash_sglang.telemetry.trace import build_trace

FILE = "".join(f'def part_{i}(rows):\n    """Of "{i}"."""\n    return rows[{i * 7}]\n\n' for i in range(6))
CALL = (
    '<tool_call>\n{"name": "write", "arguments": {"path": "b.py", "text": "'
    + escaped(FILE)
    + '"}}\n</tool_call>'
)
SPANS = {"spans": [{"kind": "tool_call", "begin": "<tool_call>", "end": "</tool_call>"}]}
OPEN = {"spans": [{"kind": "json", "open": True}]}
FREE = [random.Random(seed).choices(range(256), k=20) * 2 for seed in range(3)]
TOKENS = 80


@pytest.fixture(scope="module")
def plain(models: Models) -> list[list[int]]:
    with engine(models.target) as e:
        return e.generate(FREE, max_new_tokens=TOKENS)


@pytest.fixture(scope="module")
def running(models: Models, plain: list[list[int]]) -> Iterator[Engine]:
    flags = models.whiflash("lookup", whiflash_force_recorded="on", whiflash_lookup_memory_mib=1)
    with engine(models.target, whiflash=flags, skip_tokenizer_init=False) as started:
        yield started


@pytest.fixture(autouse=True)
def fresh(running: Engine) -> None:
    running.start_over("lookup")


def encode(running: Engine, text: str) -> list[int]:
    return list(running.scheduler.tokenizer.encode(text, add_special_tokens=False))


def submit(
    running: Engine,
    prompt: str,
    answer: str = CALL,
    hints: dict[str, Any] = SPANS,
    salt: str | None = None,
    predicted: list[int] | None = None,
) -> str:
    """A request whose answer is forced."""
    name = f"f{len(running.requests):05d}"
    forced = encode(running, answer)
    running.submit(
        name,
        encode(running, f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"),
        max_new_tokens=len(forced),
        cache_salt=salt,
        custom_params={
            "whiflash": json.dumps({"lookup": "context", **hints}),
            "whiflash_forced": forced,
            **({} if predicted is None else {"whiflash_prediction": predicted}),
        },
    )
    return name


def rounds(running: Engine, name: str, answer: str = CALL) -> int:
    assert running.output(name) == encode(running, answer)
    return running.rounds(name)[0]


def ask(running: Engine, *args: Any, **more: Any) -> int:
    name = submit(running, *args, **more)
    running.run()
    return rounds(running, name, *args[1:2])


def test_a_quoted_file_takes_fewer_rounds(running: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of its 24 ends of lines, and each of its quotes, breaks a copy of the file as it stands."""
    drafter = running.worker.drafters["lookup"]
    with_forms = ask(running, FILE)
    assert running.worker.snapshot()["lookup"]["form_tokens"] == 0, "they go with their request"
    monkeypatch.setattr(drafter, "_form_tokens", 0)
    without = ask(running, FILE)
    assert with_forms < 0.7 * without


@pytest.mark.parametrize("text", ["\U0001f600", "\ud83d", "\ude00\ud83d"], ids=["emoji", "half", "halves"])
@pytest.mark.parametrize("begin", ["", "It says "], ids=["JSON", "JSON in text"])
def test_an_emoji_in_a_tool_result_leaves_the_arm(running: Engine, text: str, begin: str) -> None:
    """JSON writes it as two escapes, no text one by one. An agent's listing has numbers, the call has none."""
    lines = FILE.replace("part_3", f"part_{text}").splitlines()
    result = json.dumps({"output": "\n".join(f"{i}\t{line}" for i, line in enumerate(lines))})
    assert ask(running, begin + result) < 0.7 * ask(running, "Write it.")
    assert not any(running.worker.quarantine.left_out.values())


def test_a_marker_that_the_prefill_begins_opens_its_span(running: Engine) -> None:
    """Its first token is sampled before any round, and no round commits it."""
    name, spans = submit(running, FILE), []
    running.run(lambda: spans.extend(state.span for state in running.states.values() if state.rid == name))
    kinds = [span.kind if span else None for span in spans]
    assert "tool_call" in kinds[:12]
    assert kinds.count("tool_call") > len(kinds) / 2


def test_a_trace_says_what_the_forms_brought(running: Engine) -> None:
    """And with whom: the prediction that another request has beside it is that one's."""
    forms = submit(running, FILE, hints={**SPANS, "trace": "summary"})
    predicted = submit(running, "Write it.", hints={"trace": "summary"}, predicted=encode(running, CALL))
    running.run()
    found = {}
    for name in (forms, predicted):
        recording = recording_of(running.requests[name], None)
        assert recording is not None
        found[name] = build_trace(recording, "lookup", len(running.output(name)))["sources"]
    assert found[forms]["form"]["accepted"] > sum(own["accepted"] for own in found[forms].values()) / 2
    assert "prediction" not in found[forms]
    assert found[predicted].keys() <= {"prediction", "context"}
    assert found[predicted]["prediction"]["accepted"] > 0.8 * len(running.output(predicted))


def test_nothing_is_made_where_no_span_opens(running: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call's marker never comes: the prompt is not read, and its rounds are those without forms."""
    drafter, read = running.worker.drafters["lookup"], []
    prose = f"So I wrote: {escaped(FILE[:80])}"
    name = submit(running, FILE, prose)
    running.run(lambda: read.extend(e._forms for e in drafter._emissions()))
    assert read
    assert not any(read)
    monkeypatch.setattr(drafter, "_form_tokens", 0)
    assert rounds(running, name, prose) == ask(running, FILE, prose)


def test_beside_others_every_text_is_its_own(running: Engine, plain: list[list[int]]) -> None:
    """Free requests in whose answers JSON is open from the first token, one that quotes, and arms at random."""
    alone = ask(running, FILE)
    for router in ("lookup", "random", "auto"):
        running.worker.reconfigure({"router": router})
        quoting, names = submit(running, FILE), []
        for i, prompt in enumerate(FREE):
            names.append(f"{router}-free-{i}")
            custom = {"whiflash": json.dumps({"lookup": "context", **OPEN})}
            running.submit(names[-1], prompt, max_new_tokens=TOKENS, custom_params=custom)
        running.run()
        assert [running.output(name) for name in names] == plain
        assert rounds(running, quoting) == alone or router != "lookup"
    costs = running.worker.controller.costs
    assert costs.draft("lookup", 1) == costs.timings("lookup") == 0, "what only looks is never timed"
    running.check_leaks()


def test_what_another_tenant_s_prompt_holds_is_copied_by_nobody(running: Engine) -> None:
    """Beside it, after it in its row, and by a tenant of its own."""
    alone = ask(running, "Write it.", salt="mine")
    quoting = submit(running, FILE, salt="theirs")
    mine = submit(running, "Write it.", salt="mine")
    running.run()
    assert rounds(running, quoting) < 0.7 * alone
    assert rounds(running, mine) == alone
    for salt in ("mine", "theirs", None):
        assert ask(running, "Write it.", salt=salt) == alone


def test_a_request_that_begins_again_goes_on_with_its_forms(
    running: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SGLang's own switch retracts requests every third step."""
    from sglang.srt.managers import scheduler

    alone, without = ask(running, FILE), ask(running, "Write it.")
    monkeypatch.setattr(scheduler, "TEST_RETRACT", True)
    names = [submit(running, FILE) for _ in range(2)]
    running.run()
    assert sum(running.requests[name].retraction_count for name in names) > 0
    assert all(rounds(running, name) < (alone + without) / 2 for name in names)
