"""`whiflash lab replay`: tokens a round that a log's own text would bring, without a model."""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from whiflash_sglang.cli.options import JsonFlag, say_prose, show_table


def replay(
    logs: Annotated[list[Path], typer.Argument(exists=True, dir_okay=False, help="Recorded conversations.")],
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            file_okay=False,
            help="Your model's directory; its weights are not read. Default: the embedded model's.",
        ),
    ] = None,
    parser: Annotated[
        str | None, typer.Option(help="Your server's --tool-call-parser. Without it no text of calls is forced.")
    ] = None,
    answers: Annotated[
        Literal["off", "group", "tenant"],
        typer.Option(help="Copy from other answers of the same task, of all that have none, too, or of none."),
    ] = "group",
    drafts: Annotated[int, typer.Option(min=1, max=64, help="Most drafts of a round.")] = 16,
    as_json: JsonFlag = False,
) -> None:
    """Count the tokens a round that copies and forced text bring on a log, by source. Needs no model and no GPU.

    The recorded text counts as greedy text. The second table has tool calls that are known before they are written.

    \b
    Example:
    whiflash lab replay log.jsonl --tokenizer MODEL --parser qwen25
    """
    from transformers import AutoTokenizer

    from whiflash_lab.conversations import Renderer, read_recorded, renderer_of
    from whiflash_lab.replay import Walk, curve, known_ahead, replayed
    from whiflash_sglang.checkpoints.manifest import Lookup, Structure, embedded_bundle, load_manifest
    from whiflash_sglang.embedded import ensure_target
    from whiflash_sglang.files.progress import tracked
    from whiflash_sglang.spans.vocabulary import vocabulary_of

    recorded = [conversation for log in logs for conversation in read_recorded(log)]
    embedded = load_manifest(embedded_bundle())
    if tokenizer is None:
        tokenizer, renderer = ensure_target(), renderer_of(ensure_target(), embedded_bundle())
        parser = parser or embedded.tool_call_parser
    else:
        renderer = Renderer(AutoTokenizer.from_pretrained(tokenizer))
    vocabulary = vocabulary_of(AutoTokenizer.from_pretrained(tokenizer))
    seed = embedded.lookup.seed if embedded.lookup else None
    lookup = Lookup(max_width=drafts, seed=seed, answers=answers)
    walk = Walk(vocabulary, lookup, Structure(max_width=drafts), parser)
    sums = replayed(walk, tracked(recorded, "replaying conversations"), renderer)
    chances = curve(walk.guesses)
    ahead = [known_ahead(walk.guesses, walk.calls, least) for least in (0.5, 0.8, 0.95)]
    if as_json:
        by_category = {name: each.as_json() for name, each in sums.items()}
        calls = {"calls": walk.calls, "curve": chances, "ahead": ahead}
        typer.echo(json.dumps({"by_category": by_category, "known_calls": calls}))
        return
    sources = sorted({source for each in sums.values() for source in each.accepted})
    rows = [
        [name, *(f"{each[key]:,}" for key in ("answers", "tokens")), f"{each['tokens_per_round']:.2f}"]
        + [f"{each['drafts_per_round'].get(source, 0.0):.2f}" for source in sources]
        + [f"{each['rows_per_round']:.1f}"]
        for name, each in ((name, each.as_json()) for name, each in sums.items())
    ]
    header = ["", "answers", "tokens", "a round", *(f"+ {source}" for source in sources), "rows"]
    show_table(header, rows, f"Tokens a round, up to {drafts} drafts, one request after the other; of them by source")
    if not walk.guesses:
        return
    typer.echo()
    lines = []
    for row in chances:
        least = f"from {row['least']:.0%}" if row["least"] else "not known"
        shown = (f"{row[name]:.2f}" for name in ("chance", "right"))
        lines.append([least, f"{row['rounds']:,}", *shown, f"{row['left']:.0f}"])
    title = f"The rest of a call, guessed whole in each round inside one of {walk.calls:,} calls"
    show_table(["chance", "rounds", "mean chance", "right", "tokens left"], lines, title)
    typer.echo()
    for one in ahead:
        say_prose(
            f"With a chance of {one['least']:g} or more, {one['calls']:.0%} of calls are known before their end, "
            f"{one['right']:.0%} of these rightly, {one['left']:.0f} tokens (median) ahead."
        )
