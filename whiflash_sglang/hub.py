"""Checkpoints and bundles on disk, from a directory or a hub id."""

from pathlib import Path

from whiflash_sglang.config import EMBEDDED_BUNDLE, embedded_bundle
from whiflash_sglang.errors import ConfigError


def fetch(path: str) -> Path:
    """The local directory of `path`: a directory as it is, `embedded:NAME`, or a hub id through huggingface_hub.

    Raises:
        ConfigError: neither a directory nor something the hub (or its offline cache) knows.
    """
    if path == f"embedded:{EMBEDDED_BUNDLE}":
        return embedded_bundle()
    local = Path(path).expanduser()
    if local.is_dir():
        return local
    if local.is_absolute() or path.startswith((".", "~")) or path.count("/") != 1:
        raise ConfigError(f"{path}: no such directory, and not a hub id of the form owner/name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(path))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        first = str(error).splitlines()[0]
        raise ConfigError(f"{path}: not a directory here, and the hub gave nothing: {first}") from None


def default_bundle_for(model_path: str) -> Path | None:
    """The shipped bundle where `model_path` is the embedded target's directory, else None."""
    from whiflash_sglang.embedded import TARGET_NAME

    path = Path(model_path)
    is_embedded = path.parent.name == "targets" and path.name.startswith(f"{TARGET_NAME}-")
    return embedded_bundle() if is_embedded else None
