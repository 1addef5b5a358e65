"""`whiflash bench`: measures WHIFLASH beside plain decoding and SGLang's own speculative arms. `whiflash lab simulate`:
estimates rates on a GPU from published figures."""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from whiflash_lab.bench import prompts as sources
from whiflash_lab.bench.arms import KNOWN, build_arms, check_names, those_with_drafters
from whiflash_lab.bench.prompts import GROUPS, SUITES, Prompt
from whiflash_lab.cli.widen import widen
from whiflash_sglang.cli import DECIDE
from whiflash_sglang.cli.options import MOST, Dtype, JsonFlag, OutOption, show_table, whole_numbers
from whiflash_sglang.errors import UsageError


def bench(
    quick: Annotated[bool, typer.Option(help="Four arms in under five minutes.")] = False,
    arms: Annotated[str | None, typer.Option(help=f"Comma-separated: {', '.join(KNOWN)}.")] = None,
    prompts: Annotated[str | None, typer.Option(help="JSON lines, or a JSON list.")] = None,
    suite: Annotated[
        str | None,
        typer.Option(help=f"Published prompt sets, comma-separated: {', '.join((*SUITES, *GROUPS))}."),
    ] = None,
    suite_dir: Annotated[Path | None, typer.Option(help="Folder with the files of --suite.")] = None,
    per_category: Annotated[
        int | None, typer.Option(min=1, max=MOST, help="Prompts of each category.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=2, max=MOST, help="Longest answer, in tokens.")
    ] = None,
    temperature: Annotated[
        float,
        typer.Option(min=0, max=2, help="Of every request; 0 is greedy. Sampled answers are not compared."),
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option(min=0.01, max=1, help="Of every request, with --temperature.")
    ] = 1.0,
    tools: Annotated[
        str | None,
        typer.Option(help="Send tools with every prompt: a JSON list of OpenAI's, or `sample` for 10."),
    ] = None,
    tool_choice: Annotated[
        Literal["required", "auto"] | None,
        typer.Option(help="Whether an answer must be a tool call. Default: as its row says, else required."),
    ] = None,
    strict: Annotated[
        bool, typer.Option(help="Make all tools strict: with `auto`, calls follow schemas.")
    ] = False,
    concurrency: Annotated[str, typer.Option(help="Requests in flight; comma-separated.")] = "1",
    repetitions: Annotated[int, typer.Option(min=1, max=1000, help="Most repetitions of the full set.")] = 3,
    minutes: Annotated[
        float | None, typer.Option(min=0, max=1e6, help="Start no repetition that would end later.")
    ] = None,
    interleave: Annotated[bool, typer.Option(help="Run all servers at once and ask prompts in turn.")] = True,
    restart: Annotated[bool, typer.Option(help="Start new servers for every repetition.")] = False,
    as_json: JsonFlag = False,
    out: OutOption = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the tables to this file.")] = None,
    plots: Annotated[Path | None, typer.Option(help="Draw the speed-up in this directory.")] = None,
    resume: Annotated[bool, typer.Option(help="Continue the interrupted run of the same --out.")] = False,
    model_path: Annotated[str | None, typer.Option(help="Target: directory or hub id.")] = None,
    bundle: Annotated[str | None, typer.Option(help="Drafters: directory or hub id.")] = None,
    dtype: Annotated[Dtype, typer.Option(help="Number format of every arm.")] = "bfloat16",
    server_args: Annotated[str, typer.Option(help="Further arguments for every server.")] = "",
    beside: Annotated[
        Path | None, typer.Option(help="Another checkout of this project, for arms such as auto@beside.")
    ] = None,
    recorded: Annotated[
        list[Path] | None, typer.Option(help="Replay recorded conversations instead of prompts.")
    ] = None,
    over: Annotated[str | None, typer.Option(help="Also compare every arm with this one.")] = None,
    log_dir: Annotated[Path | None, typer.Option(help="Keep the servers' logs in this directory.")] = None,
) -> None:
    """Measure WHIFLASH beside plain decoding, EAGLE3, DFLASH and NGRAM on this machine.

    Every greedy answer is compared with plain decoding's. Without --prompts a sample of 42 prompts is used.

    \b
    Examples:
    whiflash bench --quick
    whiflash bench --concurrency 1,4,8 --out report.json --markdown report.md
    whiflash bench --temperature 0.6 --top-p 0.95 --tools sample
    whiflash bench --recorded log.jsonl --arms auto,auto+prediction
    """
    import shlex
    import tempfile

    from whiflash_lab.bench.cells import Load
    from whiflash_lab.bench.command import Outputs, judge, run, scale_of
    from whiflash_lab.bench.runner import Plan

    loads = [Load(value=number) for number in whole_numbers("--concurrency", concurrency)]
    names = [name.strip() for name in (arms or "").split(",") if name.strip()]
    check_names(names, recorded=bool(recorded))
    if resume and out is None:
        raise UsageError("--resume continues the run that wrote --out FILE: give --out, too")
    others = {
        "--quick": quick,
        "--prompts": prompts,
        "--suite": suite,
        "--per-category": per_category,
        "--beside": beside,
        "--temperature": temperature,
        "--tools": tools,
        "--tool-choice": tool_choice,
        "--strict": strict,
    }
    refused = [name for name, value in others.items() if value]
    if recorded and refused:
        raise UsageError(f"--recorded plays whole files and takes no {', '.join(refused)}: remove it")
    if suite_dir and not suite:
        raise UsageError(f"--suite-dir {suite_dir} has the files of --suite: add it, or remove the directory")
    if beside and not any(name.endswith("@beside") for name in names):
        raise UsageError(
            f"--beside {beside} serves arms such as auto@beside: add one to --arms, or remove it"
        )
    if top_p != 1 and not temperature:
        raise UsageError(
            f"--top-p {top_p:g} changes nothing in greedy answers: add --temperature, or remove it"
        )
    scale = scale_of(quick, arms, per_category, max_tokens, minutes)
    if plots is not None and not any(load.is_alone for load in loads):
        raise UsageError(
            f"--plots {plots} draws requests that are asked one at a time: add 1 to --concurrency"
        )
    if restart and not interleave:
        raise UsageError("--restart needs all servers at once: remove --no-interleave, or --restart")
    if not interleave and (quick or minutes is not None):
        raise UsageError("--minutes and --quick bound interleaved runs: remove them, or --no-interleave")
    if suite and prompts:
        raise UsageError(f"--suite {suite} and --prompts {prompts} both name the prompts: remove one of them")
    suites = sources.suites_of(suite or "")
    asked: list[Prompt] = []
    if suites:
        asked = sources.read_suites(suites, suite_dir)
    elif not recorded:
        asked = sources.load_prompts(prompts or str(sources.shipped()))
    brought = sources.load_tools(tools) if tools else ()
    chosen = [
        sources.with_tools(prompt, brought, tool_choice, strict=strict)
        for prompt in sources.sample(asked, scale.per_category)
    ]
    try:
        extra = shlex.split(server_args)
    except ValueError as error:
        raise UsageError(f"--server-args {server_args}: {error}") from None
    from whiflash_sglang.checkpoints.hub import check_place

    for place in filter(None, (model_path, bundle, *(str(file.absolute()) for file in recorded or ()))):
        check_place(place)
    outputs = Outputs(as_json, out, markdown, plots)
    outputs.prepare()
    from whiflash_lab.bench.recorded import DEFAULT, read_talks, recorded_arms
    from whiflash_lab.bench.subject import build_subject

    with tempfile.TemporaryDirectory(prefix="whiflash-bench-") as scratch:
        served = [name.partition("+")[0] for name in names] if recorded else scale.arms
        subject = build_subject(model_path, bundle, dtype, extra, Path(scratch), served, beside)
        if recorded:
            talks, left_out = read_talks(recorded, subject, max_tokens, max(load.value for load in loads))
            chosen, measured = list(talks), recorded_arms(names or DEFAULT, subject, talks)
            longest = max(len(task.answer) for talk in talks for task in talk.tasks)
        else:
            left_out, longest = {}, scale.max_tokens
            measured = build_arms(scale.arms if arms else those_with_drafters(scale.arms, subject), subject)
        shown = [arm.name for arm in measured]
        if over is not None and over not in shown:
            raise UsageError(f"--over {over} is not measured, only {', '.join(shown)} are: add it to --arms")
        plan = Plan(
            subject=subject,
            arms=tuple(measured),
            prompts=tuple(chosen),
            loads=tuple(loads),
            repetitions=repetitions,
            max_tokens=longest,
            interleave=interleave,
            restart=restart,
            minutes=scale.minutes,
            over=over,
            recorded=tuple(path.name for path in recorded or ()),
            left_out=left_out,
            sampling={"temperature": temperature, "top_p": top_p} if temperature else {},
            tools={"number": len(brought), "choice": tool_choice or "of its row", "strict": strict}
            if tools
            else {},
            suites={name: f"{SUITES[name].source} ({SUITES[name].licence})" for name in suites},
        )
        journal = out or Path(scratch) / "report.json"
        cells = journal.with_name(f"{journal.name.removesuffix('.json')}.cells.jsonl")
        report = run(plan, cells, log_dir, resume=resume)
    outputs.publish(report)
    judge(report)


def simulate(
    requests: Annotated[
        str, typer.Option(help="Requests at once, with commas between them.")
    ] = "1,2,4,8,16,32,64,128,256",
    prompt: Annotated[int, typer.Option(min=1, max=MOST, help="Tokens of a prompt.")] = 512,
    answer: Annotated[int, typer.Option(min=1, max=1 << 17, help="Tokens of an answer.")] = 512,
    tools: Annotated[
        float,
        typer.Option(min=0, max=1, help="Share of requests that write tool calls; adds the host's time."),
    ] = 0.0,
    figures: Annotated[
        Path | None,
        typer.Option(
            exists=True, help="A record of tests/gpu/shaped.py: its H200 beside chains and stock plain."
        ),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Simulate tokens a second of Qwen3-8B on an H100: an estimate, no measurement.

    Prices and acceptance lengths are published ones. The first line names what is assumed. With --figures, print the
    tables of `results/simulated-h200.md` for these requests.

    \b
    Example:
    whiflash lab simulate --requests 1,8,64 --answer 256
    """
    from whiflash_lab.simulate import H100, METHODS, SimulatedLoad, assumed, table, tables_of_chains

    sizes = whole_numbers("--requests", requests)
    if figures is not None:
        for line in tables_of_chains(figures, sizes):
            typer.echo(line)
        return
    load = SimulatedLoad(1, prompt=prompt, answer=answer, tools=tools)
    line, results = assumed(H100, load), table(H100, sizes, load)
    if as_json:
        rates = [{"requests": r.requests, "method": r.method, "simulated": r.rate} for r in results]
        typer.echo(json.dumps({"assumed": line, "tokens_per_second": rates}))
        return
    typer.echo(line)
    found = {(result.requests, result.method): f"{result.rate:,.0f}" for result in results}
    rows = [[str(size), *(found[size, method] for method in METHODS)] for size in sizes]
    show_table(("requests", *METHODS), rows, "Simulated tokens a second (estimates)")


def register(app: typer.Typer, lab: typer.Typer) -> None:
    app.command(rich_help_panel=DECIDE)(bench)
    lab.command()(simulate)
    lab.command()(widen)
