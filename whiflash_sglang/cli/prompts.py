"""`whiflash train split` and `audit`: what may be learned from, and what the answers hold."""

import json
from pathlib import Path
from typing import Annotated

import typer

from whiflash_sglang.cli.options import JsonFlag, report
from whiflash_sglang.jsonl import write_whole
from whiflash_sglang.train.answers.held_out import USERS


def register(train_app: typer.Typer) -> None:
    train_app.command("split")(split_command)
    train_app.command("audit")(audit_command)


def split_command(
    train: Annotated[Path, typer.Argument(help="Training prompts (JSON lines).")],
    held_out: Annotated[Path, typer.Argument(help="Evaluation prompts (JSON lines).")],
    out: Annotated[Path, typer.Argument(help="Where to write the training prompts that are left.")],
    users: Annotated[str, typer.Option(help="Regular expression of the users that tasks belong to.")] = USERS,
    as_json: JsonFlag = False,
) -> None:
    """Leave out of the training prompts what shares a user, conversation, tool or schema with an evaluation prompt.

    \b
    Example:
    whiflash train split train_prompts.jsonl eval_prompts.jsonl kept.jsonl
    """
    from whiflash_sglang.train.answers.held_out import split
    from whiflash_sglang.train.answers.prompts import read_rows

    rows, evaluated = read_rows(train), read_rows(held_out)
    done = split(rows, evaluated, users)
    write_whole(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in done.kept))
    reasons = {f"dropped, {source}, {kind}": count for (source, kind), count in sorted(done.dropped.items())}
    report(
        {
            "training prompts": len(rows),
            "held-out prompts": len(evaluated),
            "kept": len(done.kept),
            "dropped": len(rows) - len(done.kept),
            **reasons,
        },
        as_json,
    )


def audit_command(
    tokens: Annotated[
        Path, typer.Argument(help="A .npz of token ids, as `whiflash train export` writes it.")
    ],
    prompts: Annotated[
        Path | None, typer.Option(help="Prompts (JSON lines), such as `split` left: count answers to others.")
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            help="The target (embedded, a directory or hub id): judge by its logits where answers part."
        ),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Count prompts that were answered more than once, and say where their answers part.

    \b
    Example:
    whiflash train audit training_data/smollm2-135m-instruct/tokens.npz --target embedded
    """
    import torch

    from whiflash_sglang.models.target import TargetModel
    from whiflash_sglang.train.answers.data import target_path
    from whiflash_sglang.train.answers.prompts import read_rows
    from whiflash_sglang.train.answers.tokens import Exported, compare_copies, judge

    exported = Exported(tokens)
    found = compare_copies(exported)
    result: dict[str, object] = {
        "sequences": len(exported.ids),
        "prompts": len(set(exported.ids)),
        **found.counts(),
    }
    if target is not None:
        result |= judge(
            exported,
            found,
            TargetModel(target_path(target), device=torch.device("cpu"), dtype=torch.bfloat16),
        )
    if prompts is not None:
        wanted = {row["id"] for row in read_rows(prompts)}
        result["answers to other prompts"] = sum(name not in wanted for name in exported.ids)
    report(result, as_json)
