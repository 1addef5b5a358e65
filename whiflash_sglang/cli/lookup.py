"""`whiflash lookup-seed`: what a bundle's copying arm believes before it has seen anything."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from whiflash_sglang.errors import WhiflashError
from whiflash_sglang.lookup.calibration import BUCKETS, Agreement
from whiflash_sglang.lookup.seed import Answer, measure_seed


class TokenFileError(WhiflashError):
    """A file of token ids cannot be used."""


def read_answers(path: Path) -> Iterator[Answer]:
    """Sequences of a file that `whiflash train export` wrote, with a progress bar.

    Raises:
        TokenFileError: the file is missing or is not such a file.
    """
    import numpy as np

    try:
        with np.load(path) as file:
            tokens, lengths, prompts = (file[name] for name in ("tokens", "lengths", "prompt_lengths"))
    except (OSError, ValueError, KeyError) as error:
        raise TokenFileError(f"{path} is not a file of `whiflash train export`: {error}") from None
    ends = np.cumsum(lengths)
    columns = zip(ends.tolist(), lengths.tolist(), prompts.tolist(), strict=True)
    for end, length, prompt in track(
        columns, description="copying from answers", total=len(ends), console=Console(stderr=True)
    ):
        yield Answer(tokens[end - length : end].tolist(), prompt)


def register(app: typer.Typer) -> None:
    @app.command("lookup-seed")
    def lookup_seed(
        tokens: Annotated[
            Path, typer.Argument(help="A .npz of token ids, as `whiflash train export` writes it.")
        ],
        bundle: Annotated[
            Path | None,
            typer.Option(help="Bundle whose whiflash.json takes the result; without it, print only."),
        ] = None,
        as_json: Annotated[bool, typer.Option("--json", help="Print the chances as JSON.")] = False,
    ) -> None:
        """Measure on a target's own answers how often a copied token is right, per match length and agreement.

        Example: whiflash lookup-seed training_data/smollm2-135m-instruct/tokens.npz --bundle my-bundle
        """
        from whiflash_sglang.config import Lookup, load_manifest
        from whiflash_sglang.train.bundle import update_manifest

        settings = (load_manifest(bundle).lookup if bundle is not None else None) or Lookup()
        seed = measure_seed(read_answers(tokens), settings.max_width)
        if bundle is not None:
            said = settings.model_dump(exclude_unset=True)
            update_manifest(bundle, {"lookup": {**said, "seed": seed}})
        if as_json:
            typer.echo(json.dumps(seed))
            return
        Console().print(_table(seed))


def _table(seed: tuple[tuple[float, ...], ...]) -> Table:
    table = Table("match length", *(agreement.name.lower() for agreement in Agreement))
    for length, chances in zip(BUCKETS, seed, strict=True):
        table.add_row(f"{length} or more", *(f"{chance:.0%}" for chance in chances))
    return table
