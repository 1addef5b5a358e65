"""Every draft format that can be loaded: one table, one line for each family."""

from pathlib import Path
from typing import Any, NamedTuple

from whiflash_sglang.errors import CheckpointError
from whiflash_sglang.formats import eagle3, mtp, speculators
from whiflash_sglang.formats.config_json import read_json_config
from whiflash_sglang.formats.dflash import dflash, dflash2, domino, dspark, flashmap, xpress
from whiflash_sglang.formats.draft_format import DraftFormat, Json, pick

FORMATS: tuple[DraftFormat, ...] = (
    dflash.FORMAT,
    dspark.FORMAT,
    domino.FORMAT,
    dflash2.FORMAT,
    xpress.FORMAT,
    flashmap.FORMAT,
    eagle3.FORMAT,
    eagle3.DEEPSPEC,
    *speculators.FORMATS,
    *mtp.FORMATS,
)
_BY_KEY = {key: draft_format for draft_format in FORMATS for key in draft_format.keys}


class Draft(NamedTuple):
    """A checkpoint whose `config.json` was read: its format, and the configuration of that format's model."""

    path: Path
    format: DraftFormat
    config: Any

    def load(self, **options: Any) -> Any:
        """Load the drafter with its weights; `options` are those of `DFlashDrafter.load` and `Eagle3Drafter.load`."""
        return self.format.model.load(self.path, config=self.config, **options)


def read_draft(path: Path, arm: str | None = None, config: Json | None = None) -> Draft:
    """Read the format and configuration of the checkpoint directory `path`, only from its `config.json`.

    Args:
        arm: the arm it must be for; None: any. config: content of a `config.json` that is read instead.

    Raises:
        CheckpointError: naming the file and the key that is missing, unknown or does not fit.
    """
    config = read_json_config(path) if config is None else config
    try:
        among = _BY_KEY if arm is None else {key: f for key, f in _BY_KEY.items() if f.arm == arm}
        draft_format = pick(among, config, path)
        return Draft(path, draft_format, draft_format.read(path, config))
    except CheckpointError:
        raise
    except Exception as error:  # transformers' classes raise errors of their own for values of a wrong type
        raise CheckpointError(
            f"{path}/config.json has a value of another kind than its format gives it ({type(error).__name__}: "
            f"{error!s:.200}); fetch it again"
        ) from None
