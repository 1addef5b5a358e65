"""`whiflash check`: checks of the installation, of drafters, of launch flags, and of a running server's texts."""

import json
from collections import Counter
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import typer

from whiflash_sglang.cli import LOOK
from whiflash_sglang.cli.elsewhere import check_of, missing
from whiflash_sglang.cli.options import AdminKeyOption, JsonFlag, authorization, say
from whiflash_sglang.engine.patching import Finding
from whiflash_sglang.errors import UsageError

ANSWER = 600.0
"""Timeout in seconds of an answer for --echo: the server makes many of them at once."""
PACKAGES = (
    "whiflash-sglang",
    "whiflash-kernels",
    "whiflash-sdk",
    "sglang",
    "torch",
    "triton",
    "transformers",
    "openai",
)


def findings() -> list[Finding]:
    """Check versions, that all modules import, SGLang's private names, the plugin's registration, and the platform."""
    import platform

    from whiflash_sglang.engine import patches
    from whiflash_sglang.engine.patching import check_registration, replaced_names, verify_names

    results = [Finding("python", True, platform.python_version())]
    for package in PACKAGES:
        try:
            results.append(Finding(package, True, version(package)))
        except PackageNotFoundError:
            results.append(Finding(package, False, "not installed"))
    results += patches.missing()
    results += verify_names()
    results.append(check_registration())
    results += [Finding(name, True, "replaced by this package") for name in replaced_names()]
    results += _platform()
    return results


def _drafts(drafts: list[str], model_path: str | None) -> list[Finding]:
    from whiflash_sglang.checkpoints.hub import check_place

    if model_path is not None:
        check_place(model_path)
    from whiflash_sglang.checkpoints.fit import judge, read_target

    target = None if model_path is None else read_target(model_path)
    return [Finding(*judged) for place in drafts for judged in judge(place, target)]


def _platform() -> list[Finding]:
    from whiflash_sglang.files.cpu import serves_here

    if not serves_here():
        return [Finding("platform", True, "an accelerator is there: SGLang's own platform serves it")]
    if (verify := check_of("platform")) is None:
        return [Finding("platform", False, f"no accelerator, and {missing('cpu')}")]
    return [Finding("platform", True, "no accelerator: the CPU platform of whiflash-cpu"), *verify()]


def check(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Also show passed checks.")] = False,
    model_path: Annotated[
        str | None, typer.Option("--model-path", help="Target of --draft or --recipe: hub id or directory.")
    ] = None,
    draft: Annotated[
        list[str] | None,
        typer.Option(
            "--draft",
            help="Check this bundle or drafter (hub id or directory) by its config.json: format, KV size, "
            "obstacles. May be repeated.",
        ),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(
            "--recipe",
            exists=True,
            dir_okay=False,
            help="Judge a launch and print it with WHIFLASH, ready to paste: a shell line or script, a Kubernetes or "
            "compose file, YAML or JSON lines. Needs neither SGLang nor a GPU; with --model-path the target's layers "
            "count, and SGLang reads them.",
        ),
    ] = None,
    echo: Annotated[
        str | None,
        typer.Option(
            "--echo",
            metavar="URL",
            help="Let this server repeat identifiers with every drafter and width, 12 requests at once, and compare "
            "each token with its plain decoding. Its policy stays; users wait longer meanwhile.",
        ),
    ] = None,
    sweeps: Annotated[
        int, typer.Option("--sweeps", min=1, max=1000, help="Times 12 prompts of --echo; each compares 25,000 tokens.")
    ] = 1,
    as_json: JsonFlag = False,
    api_key: AdminKeyOption = None,
) -> None:
    """Check versions, the plugin, the platform and every private SGLang name. Exit code 1 on any failure.

    --echo checks the texts of a running server. In float32 only ties may differ from plain decoding; else no more
    tokens than plain decoding itself changes between one request and 12 at once.

    \b
    Examples:
    whiflash check -v
    whiflash check --model-path Qwen/Qwen3-8B --draft z-lab/Qwen3-8B-DFlash-b16
    whiflash check --recipe serve.sh
    whiflash check --echo http://127.0.0.1:30000 --sweeps 4
    """
    from rich.console import Console
    from whiflash_sdk.render.aligned import printable

    if echo is not None:
        if recipe or draft or model_path:
            raise typer.BadParameter("--echo checks a server: leave --recipe, --draft and --model-path out")
        _check_echo(echo, sweeps, api_key, as_json=as_json)
        return
    if recipe is not None:
        if draft:
            raise typer.BadParameter("--recipe and --draft are two checks: run one, then the other")
        _check_recipes(recipe, model_path, as_json=as_json, verbose=verbose)
        return
    if model_path is not None and not draft:
        raise typer.BadParameter(
            "--model-path has no effect without --draft or --recipe: give one of them, or leave it out"
        )
    results = _drafts(draft, model_path) if draft else findings()
    verbose = verbose or bool(draft)
    failed = [f for f in results if not f.ok]
    if as_json:
        listed = [{"name": f.name, "ok": f.ok, "detail": f.detail} for f in results]
        typer.echo(json.dumps(listed, indent=2))
    else:
        console = Console(highlight=False, soft_wrap=True)
        for f in results if verbose else failed:
            mark = "[green]ok  [/]" if f.ok else "[red]FAIL[/]"
            console.print(mark, end=" ")
            console.print(printable(f"{f.name}: {f.detail}"), markup=False)
        console.print(
            f"{len(failed)} of {len(results)} failed" if failed else f"{len(results)} of {len(results)} right"
        )
    if failed:
        raise typer.Exit(1)


def _check_echo(url: str, sweeps: int, api_key: str | None, *, as_json: bool) -> None:
    """Run --echo and print its counts by drafter and width; exit code 1 if more tokens differ than allowed."""
    from functools import partial
    from itertools import islice

    import httpx

    from whiflash_sglang.cli import echo
    from whiflash_sglang.files.hosts import LIMITS, ServedArms, ServedType, Tokenized, ask, without_password
    from whiflash_sglang.files.progress import progress

    headers, named = authorization(api_key), without_password(url)
    with httpx.Client(headers=headers, timeout=ANSWER, limits=LIMITS) as client, progress() as bar:
        shown = ask(client, url, "/whiflash/capabilities", ServedArms)
        arms, tenant_header = shown["arms"], shown.get("tenant_header", False)
        over_http = partial(echo.over_http, client, url, tenant_header=tenant_header)
        dtype, texts = ask(client, url, "/server_info", ServedType)["dtype"], echo.prompts(seed=0)
        result = echo.Echo(over_http, arms, dtype, echo.LENGTH)
        steps = sweeps * (echo.AT_ONCE + len(arms) + 2)
        task = bar.add_task(f"{named} repeats identifiers", total=steps)
        for _ in range(sweeps):
            prompts = [
                (ask(client, url, "/tokenize", Tokenized, {"prompt": text})["tokens"], params)
                for text, params in islice(texts, echo.AT_ONCE)
            ]
            for _ in result.sweep(prompts):
                bar.advance(task)
    rows = result.rows()
    right = all(row["wrong"] <= row["allowed"] for row in rows)
    if as_json:
        told = {"url": named, "dtype": dtype, "right": right, "rows": rows, "wrong": result.wrong[:10]}
        typer.echo(json.dumps(told))
    else:
        for row in (rows[0], *(row.values() for row in rows)):
            say("".join(f"{cell!s:>10}" for cell in row))
        total = sum(row["tokens"] for row in rows)
        say(f"{len(result.wrong)} of {total:,} tokens are wrong ({dtype}): {'allowed' if right else 'TOO MANY'}")
    if not right:
        raise typer.Exit(1)


def _check_recipes(path: Path, model_path: str | None, *, as_json: bool, verbose: bool) -> None:
    """Print a verdict on each launch command in the file; exit code 1 unless all would start."""
    if (verdicts_in := check_of("recipe")) is None:
        raise UsageError(f"--recipe: {missing('lab')}")
    verdicts = verdicts_in(path, model_path)
    starting = sum(verdict.starts for _, verdict in verdicts)
    if as_json:
        typer.echo(json.dumps([_as_json(name, verdict) for name, verdict in verdicts], indent=2))
    else:
        for name, verdict in verdicts:
            say("\n".join(_lines(name, verdict, full=verbose or len(verdicts) == 1)))
        if len(verdicts) > 1:
            first = Counter(next(iter(verdict.obstacles)) for _, verdict in verdicts if not verdict.starts)
            parts = [f"{starting} of {len(verdicts)} start" + ("" if verbose else " (-v prints the commands)")]
            parts += [f"{count} stop first at {name}" for name, count in first.most_common()]
            typer.echo("; ".join(parts))
    if starting < len(verdicts):
        raise typer.Exit(1)


def _as_json(name: str, verdict: Any) -> dict[str, Any]:
    fields = ("starts", "obstacles", "replaced", "unread", "notes", "command")
    return {"recipe": name, **{key: getattr(verdict, key) for key in fields}}


def _lines(name: str, verdict: Any, *, full: bool) -> list[str]:
    """Return a verdict's lines; if `full`, the command that starts WHIFLASH, if there is one, after a shell comment."""
    if full and verdict.command:
        by = " by SGLang itself" if verdict.foreign and verdict.foreign == verdict.obstacles.keys() else ""
        first = "starts" if verdict.starts else f"refused{by} as it is; starts as below"
        return [f"# {name}: {first}", verdict.command]
    status = "starts " if verdict.starts else "refused"
    return [f"{status} {name}", *(f"  {sentence}" for sentence in verdict.obstacles.values())]


def register(app: typer.Typer, lab: typer.Typer) -> None:
    app.command(rich_help_panel=LOOK)(check)
