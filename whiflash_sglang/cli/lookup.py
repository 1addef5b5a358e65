"""`whiflash lookup-seed`: what a bundle's copying arm believes before it has seen anything."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from whiflash_sglang.cli.options import JsonFlag, for_tables
from whiflash_sglang.errors import WhiflashError

if TYPE_CHECKING:
    from rich.table import Table

    from whiflash_sglang.lookup.seed import Answer


class TokenFileError(WhiflashError):
    """A file of token ids cannot be used."""


def read_answers(path: Path) -> "Iterator[Answer]":
    """Sequences of a file that `whiflash train export` wrote, with their progress.

    Raises:
        TokenFileError: the file is missing or is not such a file.
    """
    import numpy as np

    from whiflash_sglang.lookup.seed import Answer
    from whiflash_sglang.progress import tracked

    try:
        with np.load(path) as file:
            tokens, lengths, prompts = (file[name] for name in ("tokens", "lengths", "prompt_lengths"))
    except (OSError, ValueError, KeyError) as error:
        raise TokenFileError(f"{path} is not a file of `whiflash train export`: {error}") from None
    ends = np.cumsum(lengths)
    columns = list(zip(ends.tolist(), lengths.tolist(), prompts.tolist(), strict=True))
    for end, length, prompt in tracked(columns, "copying from answers"):
        yield Answer(tokens[end - length : end].tolist(), prompt)


def register(app: typer.Typer) -> None:
    @app.command("lookup-seed")
    def lookup_seed(
        tokens: Annotated[
            Path, typer.Argument(help="Token ids (.npz), as `whiflash train export` writes them.")
        ],
        bundle: Annotated[
            Path | None,
            typer.Option(help="Bundle whose whiflash.json takes the result. Default: print only."),
        ] = None,
        as_json: JsonFlag = False,
    ) -> None:
        """Measure how often a copied token is right on a target's own answers, by match length and agreement.

        \b
        Example:
        whiflash lookup-seed training_data/smollm2-135m-instruct/tokens.npz --bundle my-bundle
        """
        import json

        from whiflash_sglang.checkpoints.manifest import Lookup, load_manifest
        from whiflash_sglang.lookup.seed import measure_seed

        settings = (load_manifest(bundle).lookup if bundle is not None else None) or Lookup()
        seed = measure_seed(read_answers(tokens), settings.max_width)
        if bundle is not None:
            from whiflash_sglang.train.bundle import update_manifest

            said = settings.model_dump(exclude_unset=True)
            update_manifest(bundle, {"lookup": {**said, "seed": seed}})
        if as_json:
            typer.echo(json.dumps(seed))
            return
        for_tables().print(_table(seed))


def _table(seed: tuple[tuple[float, ...], ...]) -> "Table":
    from rich.table import Table

    from whiflash_sglang.lookup.calibration import BUCKETS, Agreement

    table = Table("match length", *(agreement.name.lower() for agreement in Agreement))
    for length, chances in zip(BUCKETS, seed, strict=True):
        table.add_row(f"{length} or more", *(f"{chance:.0%}" for chance in chances))
    return table
