"""From recorded messages to tokens with kinds, and arms walked through them."""

import io
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
from recorded_samples import FORMATS
from recorded_samples import TOOLS as OFFERED
from rich.console import Console
from tiny_models import tiny_target
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from whiflash_sglang.checkpoints.manifest import Lookup, embedded_bundle
from whiflash_sglang.errors import ConfigError
from whiflash_sglang.lab.recorded.benchmark import (
    BEST,
    RecordedSettings,
    evaluate_recorded,
    recorded_table,
    walk,
)
from whiflash_sglang.lab.recorded.conversation import (
    ARGUMENTS,
    CALL,
    CODE,
    PROSE,
    QUOTED,
    REASONING,
    Conversation,
    Renderer,
    Turn,
    call,
    conversation,
)
from whiflash_sglang.lab.recorded.drafting import PLAIN, Arm, ScopesArm, arms_of
from whiflash_sglang.train.rounds import Tally

ARMS = (
    "prompt-lookup",
    "suffix-own",
    "suffix",
    PLAIN,
    "lookup+forms",
    "lookup+memory",
    "lookup+forms+memory",
    "lookup+forms+scopes",
    "lookup+tools",
    "together",
)
BOUNDS = ("bound", "bound+memory", "bound+memory, 3", "bound+forms+memory")
LINE = "    return self.value + 1"
SOURCE = f"class A:\n{LINE}\n"
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": parameters}}
    for name, parameters in (
        (
            "write",
            {
                "type": "object",
                "properties": {"path": {"type": "string"}, "text": {"type": "string"}},
                "required": ["path", "text"],
            },
        ),
        ("done", {"type": "object", "properties": {}}),
    )
]
WRITE = call("write", json.dumps({"path": "new.py", "text": f"# new\n{LINE.strip()}\n"}))


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_target(tmp_path_factory.mktemp("recorded") / "target")


@pytest.fixture(scope="module")
def tokenizer(target: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(target)


@pytest.fixture(scope="module")
def renderer(tokenizer: PreTrainedTokenizerBase) -> Renderer:
    return Renderer(tokenizer, (embedded_bundle() / "chat_template.jinja").read_text())


def spoken(name: str = "one", tools: object = None) -> Conversation:
    messages = [
        {"role": "system", "content": "Help."},
        {"role": "user", "content": f"Mend this:\n{SOURCE}"},
        {"role": "assistant", "content": "So:\n```\nx = 1\n```\n", "reasoning_content": "Let me see"},
        {"role": "user", "content": "Write it."},
        {"role": "assistant", "content": "I will.", "tool_calls": [WRITE, call("done", "{}")]},
        {"role": "tool", "content": "written"},
        {"role": "assistant", "content": "RoundResult. I will."},
    ]
    return conversation("here", name, "agents", messages, tools)


def texts_of(turn: Turn, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """What was written of every kind."""
    found: dict[str, list[int]] = {}
    for token, kind in zip(turn.answer, turn.kinds, strict=True):
        found.setdefault(kind, []).append(token)
    return {kind: tokenizer.decode(tokens) for kind, tokens in found.items()}


def test_turns_are_the_template_s(renderer: Renderer, tokenizer: PreTrainedTokenizerBase) -> None:
    turns = list(renderer.turns(spoken()))
    assert [turn.number for turn in turns] == [1, 2, 3]
    assert tokenizer.decode(turns[0].prompt).endswith(f"{SOURCE}<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.decode(turns[2].answer) == "RoundResult. I will.<|im_end|>"
    assert tokenizer.decode(turns[2].prompt).endswith("</tool_response><|im_end|>\n<|im_start|>assistant\n")
    for turn in turns:
        whole = tokenizer.encode(tokenizer.decode(turn.prompt), add_special_tokens=False)
        assert turn.prompt == whole, "tokens that are kept from turn to turn are those of the whole prompt"


def test_kinds(renderer: Renderer, tokenizer: PreTrainedTokenizerBase) -> None:
    first, second, third = renderer.turns(spoken())
    assert texts_of(first, tokenizer) == {
        REASONING: "<think>\nLet me see\n</think>",
        PROSE: "\n\nSo:\n\n<|im_end|>",
        CODE: "```\nx = 1\n```",
    }
    written = texts_of(second, tokenizer)
    assert written[PROSE] == "I will."
    assert written[QUOTED] == LINE.strip()
    assert written[ARGUMENTS] == '{"path": "new.py", "text": "# new\\n\\n"}{}'
    assert written[CALL].startswith(
        '\n<tool_call>\n{"name": "write", "arguments": }\n</tool_call>\n<tool_call>'
    )
    assert set(third.kinds) == {PROSE}


def test_a_template_that_renders_answers_elsewhere_is_named(tokenizer: PreTrainedTokenizerBase) -> None:
    template = "{% for m in messages %}{{ loop.length }}{{ m['content'] }}{% endfor %}"
    with pytest.raises(ConfigError, match="one, answer 2: the chat template does not render"):
        list(Renderer(tokenizer, template).turns(spoken()))


class Told:
    """Drafts what it is told to, from the position that the text has reached."""

    def __init__(self, drafts: dict[int, Sequence[int]]) -> None:
        self.drafts, self.at = drafts, 0
        self.seen: list[int] = []

    def begin(self, turn: Turn) -> None:
        self.at, self.seen = 0, []

    def extend(self, tokens: Sequence[int]) -> None:
        self.at += len(tokens)
        self.seen += tokens

    def propose(self, limit: int) -> Sequence[int]:
        return self.drafts.get(self.at, ())[:limit]


def turn_of(answer: Sequence[int], kinds: Sequence[str], number: int = 1) -> Turn:
    return Turn(spoken(), number, [9], list(answer), list(kinds))


def test_rounds_commit_what_agrees_and_one_token_more() -> None:
    answer = [1, 2, 3, 4, 5, 6, 7, 8]
    turn = turn_of(answer, [PROSE] * 4 + [CODE] * 4)
    # 1 | 2 3 (4) | (5) | 6 7 (8): three rounds, 3 of the first 7 tokens prose.
    told = Told({1: [2, 3, 9], 4: [9, 9], 5: [6, 7, 8, 9]})
    done = walk([turn], {"told": told}, {})
    tallies = {cell.kind: tally for cell, tally in done.tallies["told"].items()}
    assert told.seen == answer
    assert tallies == {PROSE: Tally(1.0, 3, 3.0), CODE: Tally(2.0, 4, 5.0)}
    assert (done.turns, done.tokens) == (1, 8)


def test_a_round_is_shared_out_to_the_kinds_of_its_tokens() -> None:
    turn = turn_of([1, 2, 3, 4, 5], [PROSE, PROSE, CODE, CODE, CODE])
    done = walk([turn], {"told": Told({1: [2, 3, 4, 5]})}, {})
    tallies = {cell.kind: tally for cell, tally in done.tallies["told"].items()}
    assert tallies == {PROSE: Tally(0.25, 1, 1.0), CODE: Tally(0.75, 3, 3.0)}
    assert tallies[PROSE].acceptance_length == tallies[CODE].acceptance_length == 4


def test_the_best_takes_the_arm_that_accepts_most_and_the_narrower_of_equals() -> None:
    turn = turn_of([1, 2, 3, 4, 5, 6, 7], [PROSE] * 7)
    arms = {"wide": Told({1: [2, 3, 9, 9], 4: [5, 9]}), "narrow": Told({1: [2, 3], 4: [5, 6, 9]})}
    done = walk([turn], {}, arms)
    (tally,) = done.tallies[BEST].values()
    # 2 3 (4) by the narrow one's two drafts, 5 6 (7) by its three.
    assert tally == Tally(2.0, 6, 5.0)
    assert all(arm.seen == turn.answer for arm in arms.values())


def test_turns_are_counted_in_groups() -> None:
    turns = [turn_of([1, 2], [PROSE] * 2, number) for number in (1, 2, 3, 4, 5, 8, 9, 40)]
    done = walk(turns, {"told": Told({})}, {})
    counted = Counter({cell.turns: tally.tokens for cell, tally in done.tallies["told"].items()})
    assert counted == {1: 1, 2: 1, 3: 2, 5: 2, 9: 1, 33: 1}


@pytest.mark.parametrize("name", ARMS)
def test_a_kept_text_drafts_what_a_fresh_one_does(renderer: Renderer, name: str) -> None:
    """Turns of one conversation keep their common text; where another conversation comes between, it is read anew."""

    class Fresh:
        """Shows the arm a strange prompt before each turn, so that nothing is kept."""

        def __init__(self, arm: Arm) -> None:
            self.arm = arm

        def begin(self, turn: Turn) -> None:
            self.arm.begin(Turn(turn.conversation, 1, [255], [], []))
            self.arm.begin(turn)

        def extend(self, tokens: Sequence[int]) -> None:
            self.arm.extend(tokens)

        def propose(self, limit: int) -> Sequence[int]:
            return self.arm.propose(limit)

    make = arms_of(Lookup(), renderer.vocabulary)[name]
    turns = [turn for one in (spoken("one", TOOLS), spoken("two")) for turn in renderer.turns(one)]
    done = walk(turns, {"kept": make(), "fresh": Fresh(make())}, {})
    assert done.tallies["kept"] == done.tallies["fresh"]


def test_calls_are_sketched_from_the_tools_that_were_offered(renderer: Renderer) -> None:
    """Inside calls that nothing constrains, and nowhere else; without tools the arm copies as it would alone."""
    make = arms_of(Lookup(), renderer.vocabulary)
    for tools in (TOOLS, None):
        turns = list(renderer.turns(spoken("one", tools)))
        done = walk(turns, {name: make[name]() for name in (PLAIN, "lookup+tools")}, {})
        rounds = {
            name: {cell.kind: round(tally.rounds, 6) for cell, tally in tallies.items() if cell.turns == 2}
            for name, tallies in done.tallies.items()
        }
        assert (sum(rounds["lookup+tools"].values()) < 0.8 * sum(rounds[PLAIN].values())) == bool(tools)
        assert rounds["lookup+tools"][CALL] < rounds[PLAIN][CALL] or not tools
        assert (rounds["lookup+tools"] == rounds[PLAIN]) == (not tools)


def test_every_span_of_an_answer_is_kept_and_judged_in_its_scope(renderer: Renderer) -> None:
    arm = arms_of(Lookup(), renderer.vocabulary)["lookup+forms+scopes"]()
    assert isinstance(arm, ScopesArm)
    assert arm._memory is not None
    walk((turn for name in ("one", "two") for turn in renderer.turns(spoken(name))), {"walked": arm}, {})
    kept = {tuple(json.loads(name)[1:]) for name in arm._memory.held()}
    assert kept == {("agents", None, block) for block in (None, "tool_call", "code")}
    assert set(arm._learns._scopes) == {("agents", block) for block in (None, "tool_call", "code")}


def test_the_benchmark(target: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    template = (embedded_bundle() / "chat_template.jinja").read_text()
    (bundle / "template.jinja").write_text(template)
    manifest = {"schema_version": 1, "name": "tiny", "target": str(target), "eagle3": "e", "dflash": "d"}
    (bundle / "whiflash.json").write_text(json.dumps({**manifest, "chat_template": "template.jinja"}))
    paths = []
    for name in ("tau-bench", "swe-agent"):
        paths.append(tmp_path / f"{name}.json")
        paths[-1].write_text(json.dumps([FORMATS[name]] * 2))
    offered = tmp_path / "tools.json"
    offered.write_text(json.dumps(OFFERED))
    settings = RecordedSettings(bundle=bundle, tools=offered)
    result = json.loads(json.dumps(evaluate_recorded(paths, settings)))
    assert (result["conversations"], result["answers"]) == (4, 8)
    assert set(result["categories"]) == {"tau-bench", "SWE-agent"}
    lengths = result["overall"]["acceptance_length"]
    assert set(lengths) == {*ARMS, *BOUNDS, BEST}
    assert lengths["lookup+tools"] > lengths[PLAIN] < lengths["bound"] <= lengths["bound+memory"]
    assert lengths["bound+memory, 3"] < lengths["bound+memory"]
    for memory in ("lookup+memory", "lookup+forms+scopes"):
        assert lengths[memory] > lengths[PLAIN], "the second conversation repeats the first"
    assert result["ratios"]["overall"]["lookup+memory"]["ratio"] == pytest.approx(
        lengths["lookup+memory"] / lengths[PLAIN], abs=1e-3
    )
    for figures in result["kinds"].values():
        assert figures["tokens"] > 0
    for group in ("kinds", "calls"):
        assert sum(figures["tokens"] for figures in result[group].values()) == result["overall"]["tokens"]
    inside = ("tool call", "arguments", "arguments, quoted")
    assert result["calls"]["inside calls"]["tokens"] == sum(
        figures["tokens"] for kind, figures in result["kinds"].items() if kind in inside
    )
    assert result["ratios"]["inside calls"]["lookup+tools"]["ratio"] > 1
    shown = Console(width=300, file=io.StringIO(), record=True)
    shown.print(recorded_table(result))
    assert "lookup+memory" in shown.export_text()

    about = tmp_path / "prompts.jsonl"
    about.write_text(
        json.dumps({"messages": [{"role": "user", "content": "Of Mia Li, mia_li_3668."}]}) + "\n"
    )
    only = evaluate_recorded(paths, RecordedSettings(bundle, limit=3, about=about, arms=[PLAIN]))
    assert only["conversations"] == 3
    assert set(only["overall"]["acceptance_length"]) == {PLAIN}
    about.write_text(json.dumps({"messages": [{"role": "user", "content": "Of another user"}]}) + "\n")
    with pytest.raises(ConfigError, match="no recorded conversation shares a user"):
        evaluate_recorded(paths, RecordedSettings(bundle, about=about))
    with pytest.raises(ConfigError, match="arm 'x' is not one of"):
        evaluate_recorded(paths, RecordedSettings(bundle, arms=["x"]))
