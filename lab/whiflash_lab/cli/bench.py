"""`whiflash bench`: measures WHIFLASH beside plain decoding and SGLang's own speculative arms, or servers that run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from whiflash_lab.bench import arms as ways
from whiflash_lab.bench import prompts as sources
from whiflash_lab.cli.replay import replay
from whiflash_lab.cli.simulate import simulate
from whiflash_sglang.cli import DECIDE
from whiflash_sglang.cli.options import MOST, authorization, make_place, whole_numbers
from whiflash_sglang.errors import UsageError

RUNNING = "Servers that run already"


def bench(
    arms: Annotated[
        str | None, typer.Option(help=f"Comma-separated: {', '.join(ways.KNOWN)}. Default: {', '.join(ways.DEFAULT)}.")
    ] = None,
    prompts: Annotated[
        str | None, typer.Option(help="Bodies of chat completions, as JSON lines or a JSON list.")
    ] = None,
    recorded: Annotated[list[Path] | None, typer.Option(help="Replay recorded agents instead of prompts.")] = None,
    agents: Annotated[int | None, typer.Option(min=1, max=MOST, help="Recorded agents at a time. Default: 1.")] = None,
    longest_wait: Annotated[
        float | None, typer.Option(min=0, help="Most seconds of a recorded tool. Default: 30.")
    ] = None,
    kv_share: Annotated[
        float | None, typer.Option(min=0, help="KV pool over what the recorded agents' longest contexts need.")
    ] = None,
    per_category: Annotated[int | None, typer.Option(min=1, max=MOST, help="Prompts of each category.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=2, max=MOST, help="Longest answer, in tokens. Default: 160, or as recorded.")
    ] = None,
    concurrency: Annotated[str | None, typer.Option(help="Requests in flight; comma-separated. Default: 1.")] = None,
    repetitions: Annotated[int, typer.Option(min=1, max=1000, help="Repetitions of the full set.")] = 3,
    interleave: Annotated[bool, typer.Option(help="Run all servers at once and ask prompts in turn.")] = True,
    out: Annotated[
        Path | None, typer.Option(help="Write the report to this file, as JSON, and beside it as Markdown.")
    ] = None,
    model_path: Annotated[str | None, typer.Option(help="Target: directory or hub id.")] = None,
    bundle: Annotated[str | None, typer.Option(help="Drafters: directory or hub id.")] = None,
    server_args: Annotated[str, typer.Option(help="Further arguments for every server.")] = "",
    url: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=URL",
            help="Measure this server in place of starting one; may be repeated. Others are compared with the first.",
            rich_help_panel=RUNNING,
        ),
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="WHIFLASH_API_KEY",
            help="Key of these servers. Prefer WHIFLASH_API_KEY, which other users cannot read.",
            show_default=False,
            rich_help_panel=RUNNING,
        ),
    ] = None,
) -> None:
    """Measure WHIFLASH beside plain decoding, EAGLE3, DFLASH and NGRAM on this machine.

    Every greedy answer is compared with plain decoding's. Without --prompts a sample of 42 prompts is used.
    With --url it asks servers that run already, SGLang's or another's chat completions. That needs neither torch nor
    SGLang here.

    \b
    Examples:
    whiflash bench --per-category 1 --repetitions 1 --max-tokens 64
    whiflash bench --concurrency 1,4,8 --out report.json
    whiflash bench --prompts bodies.jsonl --model-path MODEL --bundle BUNDLE --no-interleave
    whiflash bench --recorded log.jsonl --agents 8 --kv-share 0.5 --arms none+sessions,auto,auto+sessions
    whiflash bench --url plain=http://127.0.0.1:30000 --url ours=http://127.0.0.1:30008 --prompts bodies.jsonl
    """
    import tempfile

    from whiflash_lab.bench.cells import Load
    from whiflash_lab.bench.command import judge, publish, run
    from whiflash_lab.bench.fleet import environment
    from whiflash_lab.bench.runner import Plan
    from whiflash_lab.bench.running import arms_of

    loads = [Load(value=number) for number in whole_numbers("--concurrency", concurrency or str(agents or 1))]
    names = [name.strip() for name in (arms or "").split(",") if name.strip()]
    ways.check_names(names, recorded=bool(recorded))
    others = {"--prompts": prompts, "--per-category": per_category, "--concurrency": concurrency}
    own = {"--agents": agents, "--longest-wait": longest_wait, "--kv-share": kv_share}
    if recorded:
        _refuse("--recorded plays whole files, --agents at a time, and takes no {}: remove it", others)
    else:
        _refuse("{}: for --recorded FILE only, which is missing", own)
    if url:
        started: dict[str, object] = {"--arms": arms, "--recorded": recorded or None, "--model-path": model_path}
        started |= {"--bundle": bundle, "--server-args": server_args or None}
        started |= {"--no-interleave": None if interleave else True}
        _refuse(
            "--url measures servers that run already, with their own models and flags, each prompt in turn; it takes "
            "no {}: remove it",
            started,
        )
    if kv_share is not None and not kv_share <= MOST:  # NaN is neither
        raise UsageError(f"--kv-share {kv_share}: give a number, such as 0.5")
    measured, headers = arms_of(url or ()), authorization(api_key)
    chosen = [] if recorded else sources.sample(sources.load_prompts(prompts or str(sources.shipped())), per_category)
    extra = ways.server_words(server_args)
    ways.dtype_of(extra)
    environment(extra)
    from whiflash_sglang.checkpoints.hub import check_place

    for place in filter(None, (model_path, bundle, *(str(file.absolute()) for file in recorded or ()))):
        check_place(place)
    if out is not None:
        if out.suffix != ".json" and not out.is_dir():
            raise UsageError(
                f"--out {out}: the report is JSON, with a page beside it that ends with .md: give FILE.json"
            )
        for file in (out, out.with_suffix(".md")) if out.suffix else (out,):
            make_place("--out", file)
    with tempfile.TemporaryDirectory(prefix="whiflash-bench-") as scratch:
        subject, left_out, longest = None, dict[str, str](), max_tokens or 160
        if not url:
            from whiflash_lab.bench.recorded import read_talks, recorded_arms, with_pool
            from whiflash_lab.bench.subject import build_subject

            served = [name.partition("+")[0] for name in names] or list(ways.DEFAULT)
            subject = build_subject(model_path, bundle, extra, Path(scratch), served)
            measured = (
                [] if recorded else ways.build_arms(names or ways.those_with_drafters(ways.DEFAULT, subject), subject)
            )
        if subject and recorded:
            talks, left_out = read_talks(recorded, subject, max_tokens)
            if kv_share is not None:
                subject = with_pool(subject, talks, loads[0].value, kv_share)
            chosen, measured = list(talks), recorded_arms(names or ["auto"], subject, talks)
            longest = max(len(one.turn.answer) or one.turn.free for talk in talks for one in talk.tasks)
        plan = Plan(
            subject=subject,
            arms=tuple(measured),
            prompts=tuple(chosen),
            base=measured[0].name if url else ways.NONE,
            loads=tuple(loads),
            repetitions=repetitions,
            max_tokens=longest,
            interleave=interleave,
            recorded=tuple(path.name for path in recorded or ()),
            longest_wait=0 if not recorded else 30 if longest_wait is None else longest_wait,
            left_out=left_out,
        )
        report = run(plan, headers)
    publish(report, out)
    judge(report)


def _refuse(sentence: str, options: Mapping[str, object]) -> None:
    """Raise UsageError if one of these options is given. sentence: names them in place of its braces."""
    if given := [name for name, value in options.items() if value is not None]:
        raise UsageError(sentence.format(", ".join(given)))


def register(app: typer.Typer, lab: typer.Typer) -> None:
    app.command(rich_help_panel=DECIDE)(bench)
    lab.command()(replay)
    lab.command()(simulate)
