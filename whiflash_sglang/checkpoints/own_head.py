"""A target that brings its own next-token head needs no other autoregressive drafter. Imports no SGLang."""

import logging
from pathlib import Path

from whiflash_sglang import arms
from whiflash_sglang.checkpoints.hub import fetch, look_up
from whiflash_sglang.errors import CheckpointError, ConfigError
from whiflash_sglang.models.checkpoint import holds, read_json_config
from whiflash_sglang.models.draft_format import merged
from whiflash_sglang.models.formats import read_draft

logger = logging.getLogger("whiflash_sglang")

_COUNTS = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers")
"""Keys of `config.json` that say of how many layers a head is."""


def own_head(target: str, revision: str | None = None, download_dir: str | None = None) -> Path | None:
    """Where the head of a target can be read from: the target's own directory, as of any drafter.

    None where it has none, or one that is not served: then the log says why.

    Args:
        target: directory or hub id. download_dir: where downloads are kept.
    """
    try:
        config = look_up(f"{target}@{revision}" if revision else target).config
        if not _has_one(config.parent):
            return None
        head = read_draft(config.parent, arms.AR)
        path = fetch(target, revision=revision, download_dir=download_dir)
        if not holds(path, head.config.prefix):
            raise CheckpointError(f"{path} has no tensors {head.config.prefix}*")
    except CheckpointError as error:
        logger.warning("WHIFLASH: the target's own next-token head is not used: %s", error)
        return None
    except ConfigError:
        return None  # No target that we can read: SGLang says so, or knows better.
    return path


def _has_one(path: Path) -> bool:
    text = merged(path, read_json_config(path), "text_config")
    return any(text.get(key) for key in _COUNTS)
