"""`whiflash demo`: two real questions, who drafted what, and how fast that was against plain decoding."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from openai import OpenAI
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text
from whiflash_sdk.hints import Hints
from whiflash_sdk.render import terminal
from whiflash_sdk.trace import Trace, routing

from whiflash_sglang.config import embedded_bundle
from whiflash_sglang.embedded import ensure_target
from whiflash_sglang.equality import Comparison, TopTwo, Verdict, compare
from whiflash_sglang.errors import WhiflashError
from whiflash_sglang.server import Server

TARGET = "SmolLM2-135M-Instruct, dequantised from Q4_1 to bfloat16"
REPEATS = 3
MAX_TOKENS = 160

WEATHER_TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Current weather of a city.",
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
        "messages": [
            {
                "role": "user",
                "content": "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips "
                "in May. How many clips did she sell altogether in April and May?",
            }
        ]
    },
    "tool call": {
        "messages": [{"role": "user", "content": "What is the weather in Paris, in celsius?"}],
        "tools": [WEATHER_TOOL],
        "tool_choice": "required",
    },
}


@dataclass(frozen=True, slots=True)
class Answer:
    """One question, asked of both servers. Speeds are medians of interleaved runs, output tokens per second."""

    question: str
    text: str
    trace: Trace
    plain_tokens_per_s: float
    whiflash_tokens_per_s: float
    comparison: Comparison

    @property
    def speedup(self) -> float:
        return self.whiflash_tokens_per_s / self.plain_tokens_per_s


def register(app: typer.Typer) -> None:
    @app.command()
    def demo(
        as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
        router: Annotated[str, typer.Option(help="Router to show, as --whiflash-router takes it.")] = "auto",
        log_dir: Annotated[
            Path | None, typer.Option(help="Keep the servers' logs in this directory.")
        ] = None,
    ) -> None:
        """Start a server on the embedded model, ask it a chat question and a tool call, and show who drafted what.

        A second server decodes plainly beside it: its answers must be the same, and its speed is the comparison.

        Example: whiflash demo
        """
        console = Console(stderr=as_json)
        console.print(f"Target: {TARGET}")
        answers = run(router, log_dir, console)
        if as_json:
            typer.echo(json.dumps([_as_json(answer) for answer in answers], indent=2))
        else:
            for answer in answers:
                _show(answer, console)
            _summary(answers, console)
        _judge(answers)


def run(router: str, log_dir: Path | None, console: Console) -> list[Answer]:
    """Start both servers, ask every question of both, stop them."""
    model = ensure_target()
    template = str(embedded_bundle() / "chat_template.jinja")
    common = [
        "--model-path",
        str(model),
        "--served-model-name",
        "demo",
        "--dtype",
        "bfloat16",
        "--device",
        "cpu",
    ]
    common += ["--max-total-tokens", "16384", "--tool-call-parser", "hermes", "--chat-template", template]
    speculative = ["--speculative-algorithm", "WHIFLASH", "--whiflash-router", router]
    if log_dir is not None:
        log_dir.mkdir(parents=True, exist_ok=True)
    logs = [None if log_dir is None else log_dir / f"{name}.log" for name in ("plain", "whiflash")]
    with (
        _waiting(console, "starting plain decoding", Server(common, log=logs[0])) as plain,
        _waiting(console, "starting WHIFLASH", Server(common + speculative, log=logs[1])) as ours,
        _spinner(console, "asking both servers, in turn"),
    ):
        return [ask(name, question, plain, ours, model) for name, question in QUESTIONS.items()]


def ask(name: str, question: dict[str, Any], plain: Server, ours: Server, model: Path) -> Answer:
    """Warm up, compare, then time both servers in turn."""
    request = {"model": "demo", "temperature": 0, "max_tokens": MAX_TOKENS, **question}
    clients = {
        server: OpenAI(base_url=f"{server.base_url}/v1", api_key="none", max_retries=0)
        for server in (plain, ours)
    }
    ids = {"return_output_ids_in_sglext": True, "return_input_ids_in_sglext": True}
    reference = clients[plain].chat.completions.create(
        **request, logprobs=True, top_logprobs=2, extra_body=ids
    )
    answer = clients[ours].chat.completions.create(
        **request, extra_body={**ids, **Hints(trace=True).extra_body()}
    )
    trace = routing(answer)
    if trace is None:
        raise WhiflashError("the server's answer carries no routing trace")
    plain_ids, our_ids = _output_ids(reference), _output_ids(answer)
    comparison = compare(plain_ids, our_ids, _top_two(reference, model), "bfloat16")
    seconds: dict[Server, list[float]] = {plain: [], ours: []}
    for _ in range(REPEATS):
        for server in (plain, ours):
            began = time.perf_counter()
            clients[server].chat.completions.create(**request)
            seconds[server].append(time.perf_counter() - began)
    speeds = [len(plain_ids) / sorted(seconds[server])[REPEATS // 2] for server in (plain, ours)]
    return Answer(name, _text_of(answer), trace, speeds[0], speeds[1], comparison)


def _output_ids(response: Any) -> list[int]:
    return list(response.sglext["output_ids"][0])


def _top_two(reference: Any, model: Path) -> Callable[[int], TopTwo]:
    """Plain decoding's own gap from its log-probabilities; the logit's size, which a log-probability lacks, from a
    forward of the same weights."""

    def at(position: int) -> TopTwo:
        import torch

        from whiflash_sglang.models.target import TargetModel, causal_attention

        first, second = reference.choices[0].logprobs.content[position].top_logprobs[:2]
        tokens = [*reference.sglext["input_ids"], *_output_ids(reference)[:position]]
        target = TargetModel(model, device=torch.device("cpu"), dtype=torch.bfloat16)
        ids, positions = torch.tensor(tokens), torch.arange(len(tokens))
        attend = causal_attention(len(ids), target.device, target.dtype)
        final = target.forward(ids, positions, attend, ()).final
        return TopTwo(float(target.logits(final[-1]).max()), first.logprob - second.logprob)

    return at


def _text_of(response: Any) -> str:
    message = response.choices[0].message
    calls = [f"{call.function.name}({call.function.arguments})" for call in message.tool_calls or ()]
    return (message.content or "") + "".join(calls)


def _show(answer: Answer, console: Console) -> None:
    console.rule(f"[bold]{answer.question}[/]")
    console.print(Text.from_ansi(terminal(answer.trace, answer.text, title=answer.question)))


def _summary(answers: list[Answer], console: Console) -> None:
    table = Table(title="Against plain decoding, interleaved in this run (output tokens per second, medians)")
    for column in ("question", "plain", "WHIFLASH", "ratio", "acceptance length", "switches", "answer"):
        table.add_column(column, justify="left" if column in ("question", "answer") else "right")
    for a in answers:
        table.add_row(
            a.question,
            f"{a.plain_tokens_per_s:.1f}",
            f"{a.whiflash_tokens_per_s:.1f}",
            f"{a.speedup:.2f}",
            f"{a.trace.acceptance_length:.2f}",
            str(a.trace.switches),
            _verdict(a.comparison),
        )
    console.print(table)
    arms = Table(title="Acceptance length per drafter (tokens per target forward, bonus token included)")
    for column in ("drafter", "rounds", "tokens", "acceptance length"):
        arms.add_column(column, justify="left" if column == "drafter" else "right")
    totals: dict[str, list[int]] = {}
    for a in answers:
        for arm, total in a.trace.arms.items():
            entry = totals.setdefault(arm, [0, 0])
            entry[0] += total.rounds
            entry[1] += total.tokens
    for arm, (rounds, tokens) in sorted(totals.items()):
        arms.add_row(arm, str(rounds), str(tokens), f"{tokens / rounds:.2f}")
    console.print(arms)
    ties = sum(a.comparison.verdict is Verdict.TIE for a in answers)
    console.print(
        f"{len(answers)} answers compared with plain decoding, {ties} ties (rounding decided between two tokens)."
    )


def _verdict(comparison: Comparison) -> str:
    if comparison.verdict is Verdict.IDENTICAL:
        return "identical"
    gap = "" if comparison.top_two is None else f", gap {comparison.top_two.gap:.3f}"
    return f"{comparison.verdict.value} at token {comparison.position}{gap}"


def _judge(answers: list[Answer]) -> None:
    """Raise WhiflashError when an answer differs from plain decoding's."""
    different = [a.question for a in answers if a.comparison.verdict is Verdict.DIFFERENT]
    if different:
        raise WhiflashError(f"answers differ from plain decoding's: {', '.join(different)}")


def _as_json(answer: Answer) -> dict[str, Any]:
    return {
        "question": answer.question,
        "target": TARGET,
        "text": answer.text,
        "trace": answer.trace.model_dump(),
        "plain_tokens_per_s": answer.plain_tokens_per_s,
        "whiflash_tokens_per_s": answer.whiflash_tokens_per_s,
        "comparison": asdict(answer.comparison),
    }


@contextmanager
def _waiting(console: Console, text: str, server: Server) -> Iterator[Server]:
    """Enter `server` while a spinner turns; the spinner ends when the server is ready."""
    with ExitStack() as stack:
        with _spinner(console, text):
            stack.enter_context(server)
        yield server


@contextmanager
def _spinner(console: Console, text: str) -> Iterator[None]:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        bar.add_task(text, total=None)
        yield
