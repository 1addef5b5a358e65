"""`whiflash demo`: asks the embedded target two questions, and shows the drafters' shares and the speed over plain
decoding."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.progress import Progress
from rich.text import Text
from whiflash_sdk.hints import Hints
from whiflash_sdk.render import terminal
from whiflash_sdk.trace import ArmTotals, Trace, routing

from whiflash_lab.bench.fleet import fleet_of
from whiflash_lab.bench.prompts import Prompt
from whiflash_lab.bench.reference import GAPS, BestLogit, Comparison, ask_reference, compare
from whiflash_sglang.checkpoints.manifest import embedded_bundle, load_manifest
from whiflash_sglang.cli.options import show_table
from whiflash_sglang.embedded import STRICT_TOOLS, TARGET_NAME, embedded_arguments, ensure_target
from whiflash_sglang.errors import WhiflashError
from whiflash_sglang.files.equality import TopTwo, Verdict

TARGET = "SmolLM2-135M-Instruct, dequantised from Q4_1 to bfloat16"
REPEATS = 3
MAX_TOKENS = 160

WEATHER_TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Current weather of a city.",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "Name of the city"},
                "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
            },
            "required": ["city", "unit"],
        },
    },
}

QUESTIONS: dict[str, dict[str, Any]] = {
    "chat": {
        "messages": [{"role": "user", "content": "Write a Python function that checks whether a number is even."}]
    },
    "tool call": {
        "messages": [{"role": "user", "content": "What is the weather in Paris, in celsius?"}],
        "tools": [WEATHER_TOOL],
        "tool_choice": "required",
        # The call is the answer; the grammar would let so small a model invent what the tool said.
        "stop": ["</tool_call>"],
    },
}


@dataclass(frozen=True, slots=True)
class DemoAnswer:
    """The answers of both servers to one question.

    calls: tool calls, as a program would run them. Speeds are medians of interleaved runs, output tokens per second.
    """

    question: str
    text: str
    calls: list[str]
    trace: Trace
    plain_tokens_per_s: float
    whiflash_tokens_per_s: float
    comparison: Comparison

    @property
    def speedup(self) -> float:
        return self.whiflash_tokens_per_s / self.plain_tokens_per_s

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "target": TARGET, "trace": self.trace.model_dump()}


def run(router: str, log_dir: Path | None, progress: Progress) -> list[DemoAnswer]:
    """Start both servers, as `whiflash serve` starts one, ask every question of both, stop them."""
    model = ensure_target()
    common = [*embedded_arguments(set()), "--dtype", "bfloat16", "--max-total-tokens", "16384"]
    bundle = embedded_bundle()
    manifest = load_manifest(bundle)  # WHIFLASH reads it by itself; plain decoding has no bundle.
    common += ["--chat-template", str(bundle / str(manifest.chat_template))]
    common += ["--tool-call-parser", str(manifest.tool_call_parser)]
    arguments = {
        "plain": common,
        "whiflash": [*common, "--speculative-algorithm", "WHIFLASH", "--whiflash-router", router],
    }
    with fleet_of(progress, log_dir, STRICT_TOOLS) as fleet:
        starting = progress.add_task("starting both servers", total=None)
        failed = fleet.start(arguments)
        progress.remove_task(starting)
        if failed:
            raise WhiflashError("; ".join(f"{name} did not start: {why}" for name, why in failed.items()))
        plain, ours = (fleet.clients[name] for name in arguments)
        task = progress.add_task("asking both servers, in turn", total=len(QUESTIONS) * (REPEATS + 1))
        answers = [
            ask(name, question, plain, ours, model, lambda: progress.advance(task))
            for name, question in QUESTIONS.items()
        ]
        progress.remove_task(task)
    return answers


def ask(
    name: str,
    question: dict[str, Any],
    plain: httpx.Client,
    ours: httpx.Client,
    model: Path,
    on_step: Callable[[], None] = lambda: None,
) -> DemoAnswer:
    """Ask both servers a question: compare the answers, then time the servers in turn."""
    request = {"model": TARGET_NAME, "temperature": 0, "max_tokens": MAX_TOKENS, **question}
    prompt = Prompt(name, name, tuple(question["messages"]))
    whole = {**request, "no_stop_trim": True}
    reference = ask_reference(plain, prompt, MAX_TOKENS, {**GAPS, **whole})
    traced = {**Hints(trace="full").extra_body(), "return_output_ids_in_sglext": True}
    answer = _ask(ours, {**whole, **traced})
    trace = routing(answer)
    if trace is None:
        raise WhiflashError(
            f"{name}: the answer has no trace, so its drafters are unknown: the server's log has the reason "
            "(--log-dir keeps it)"
        )
    tokens = answer["sglext"]["output_ids"][0]
    best = BestLogit(model, "bfloat16")
    comparison = compare(
        reference.tokens, tokens, lambda at: TopTwo(best(reference, at), reference.gaps[at]), "bfloat16"
    )
    on_step()
    seconds: dict[httpx.Client, list[float]] = {plain: [], ours: []}
    for _ in range(REPEATS):
        for client in (plain, ours):
            began = time.perf_counter()
            _ask(client, request)
            seconds[client].append(time.perf_counter() - began)
        on_step()
    speeds = [
        len(written) / sorted(seconds[client])[REPEATS // 2]
        for client, written in ((plain, reference.tokens), (ours, tokens))
    ]
    message = answer["choices"][0]["message"]
    called = [call["function"] for call in message.get("tool_calls") or ()]
    calls = [f"{call['name']}({call['arguments']})" for call in called]
    return DemoAnswer(name, message.get("content") or "", calls, trace, speeds[0], speeds[1], comparison)


def _ask(client: httpx.Client, request: Mapping[str, Any]) -> dict[str, Any]:
    response = client.post("/v1/chat/completions", json=request)
    if response.status_code != 200:
        raise WhiflashError(f"{client.base_url} did not answer: {response.text[:500]}")
    answer: dict[str, Any] = response.json()
    return answer


def judge(answers: list[DemoAnswer]) -> None:
    """Raise WhiflashError when an answer differs from plain decoding's."""
    different = [a.question for a in answers if a.comparison.verdict is Verdict.DIFFERENT]
    if different:
        raise WhiflashError(
            f"answers to {', '.join(different)} differ from plain decoding's by more than a near tie, which is a "
            "fault: run it again with --log-dir, and report the output"
        )


def show(answers: Sequence[DemoAnswer], console: Console) -> None:
    """Print answers and tables; if `console` has no colours, each drafter's name precedes its text."""
    console.print(f"Target: {TARGET}")
    colour = console.color_system is not None and not console.no_color
    for answer in answers:
        console.rule(f"[bold]{answer.question}[/]")
        # The trace clocks one answer, the table repeated ones beside plain decoding: only the table shows speeds.
        trace = answer.trace.model_copy(update={"seconds": None, "gain": None})
        console.print(Text.from_ansi(terminal(trace, answer.text, title=answer.question, colour=colour)))
        for call in answer.calls:
            console.print(f"call: {call}\n", markup=False, highlight=False)
    speeds = []
    for a in answers:
        rates = (f"{rate:.1f}" for rate in (a.plain_tokens_per_s, a.whiflash_tokens_per_s))
        lengths = (f"{a.speedup:.2f}", f"{a.trace.acceptance_length:.2f}")
        speeds.append([a.question, *rates, *lengths, str(a.trace.switches), _verdict(a.comparison)])
    show_table(
        ("question", "plain", "WHIFLASH", "ratio", "acceptance length", "switches", "answer"),
        speeds,
        "Output tokens per second, medians, interleaved with plain decoding",
        console,
    )
    rows = []
    for arm in sorted({arm for a in answers for arm in a.trace.arms}):
        total = ArmTotals.sum(a.trace.arms[arm] for a in answers if arm in a.trace.arms)
        rows.append([arm, str(total.rounds), str(total.tokens), f"{total.acceptance_length:.2f}"])
    show_table(
        ("drafter", "rounds", "tokens", "acceptance length"),
        rows,
        "Tokens per target forward, bonus token included",
        console,
    )
    ties = sum(a.comparison.verdict is Verdict.TIE for a in answers)
    counted = f"{ties} {'tie' if ties == 1 else 'ties'} (rounding decided between two tokens)"
    console.print(f"{len(answers)} answers compared with plain decoding, {counted}.")


def _verdict(comparison: Comparison) -> str:
    if comparison.verdict is Verdict.IDENTICAL:
        return "identical"
    gap = "" if comparison.top_two is None else f", gap {comparison.top_two.gap:.3f}"
    return f"{comparison.verdict.value} at token {comparison.position}{gap}"
