"""Find checkpoints and bundles: a local directory, or a hub id at a revision."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from whiflash_sglang.checkpoints.manifest import EMBEDDED_BUNDLE, embedded_bundle
from whiflash_sglang.errors import ConfigError


def fetch(
    path: str, *, revision: str | None = None, download_dir: str | None = None, files: Sequence[str] | None = None
) -> Path:
    """Return the local directory of `path`: an existing directory, the bundle `embedded:NAME`, or a hub download.

    Hub ids go to huggingface_hub, or to ModelScope if `SGLANG_USE_MODELSCOPE` is set, as in SGLang.

    Args:
        revision: branch, tag or commit of a hub id; None: its main branch.
        download_dir: where downloads are kept; None: the hub's own cache.
        files: patterns of those that are downloaded; None: all.

    Raises:
        ConfigError: neither a directory nor something the hub (or its offline cache) knows.
    """
    if (local := check_place(path)) is not None:
        return local
    download = _from_modelscope if _uses_modelscope() else _from_hugging_face
    chosen: dict[str, Any] = {"allow_patterns": files} if files else {}
    return Path(download(path, revision=revision, cache_dir=download_dir, **chosen))


class Found(NamedTuple):
    """The result of `look_up`. name: the place as given, without @revision. config: path of its `config.json` on disk.
    hub: whether the place is a hub id; revision: the commit on the hub, None for a directory.
    """

    name: str
    config: Path
    hub: bool
    revision: str | None


def look_up(place: str, *, config: bool = True) -> Found:
    """Look up a directory or hub id ("owner/name" or "owner/name@revision") and fetch only its `config.json`.

    Args:
        config: whether the place must have a `config.json`; a router does not need one.

    Raises:
        ConfigError: neither a directory with that file nor something the hub knows.
    """
    if (local := check_place(place)) is not None:
        if local.is_file() and not config:
            return Found(place, local.resolve(), False, None)
        if config and not (local / "config.json").is_file():
            raise ConfigError(f"{local} has no config.json: give the directory of a checkpoint")
        return Found(str(local.resolve()), local.resolve() / "config.json", False, None)
    name, _, revision = place.partition("@")
    if config and not _uses_modelscope():
        found = Path(_from_hugging_face(name, revision=revision or None, file="config.json"))
    else:
        found = fetch(name, revision=revision or None) / "config.json"
    return Found(name, found, True, found.parent.name)


def check_place(place: str) -> Path | None:
    """Return the file, the directory or the bundle `embedded:NAME` that `place` is; None for a hub id.

    Raises:
        ConfigError: it is none of these.
    """
    if place == f"embedded:{EMBEDDED_BUNDLE}":
        return embedded_bundle()
    local = Path(os.path.expanduser(place))
    if local.exists():
        return local
    if place.startswith((".", "~", "/")) or place.partition("@")[0].count("/") != 1:
        why = "no such directory, and not a hub id of the form owner/name or owner/name@revision"
        raise ConfigError(f"{place}: {why}")
    return None


def _uses_modelscope() -> bool:
    return os.environ.get("SGLANG_USE_MODELSCOPE", "").lower() in ("1", "true", "yes", "y", "t", "on")


def _from_hugging_face(path: str, *, revision: str | None, file: str | None = None, **chosen: Any) -> str:
    from httpx import HTTPError
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        if file is not None:
            return str(hf_hub_download(path, file, revision=revision))
        return str(snapshot_download(path, revision=revision, **chosen))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, HTTPError, OSError) as error:
        raise _gave_nothing(path, revision, error) from None


def _from_modelscope(path: str, *, revision: str | None, **chosen: Any) -> str:
    try:
        from modelscope.hub.snapshot_download import snapshot_download
    except ImportError:
        raise ConfigError(
            f"{path}: SGLANG_USE_MODELSCOPE is set, but modelscope is not installed; install it or unset the variable"
        ) from None
    try:
        return str(snapshot_download(path, revision=revision, **chosen))
    except Exception as error:  # ModelScope's errors have no common base class
        raise _gave_nothing(path, revision, error) from None


def _gave_nothing(path: str, revision: str | None, error: Exception) -> ConfigError:
    first = next(iter(str(error).splitlines()), type(error).__name__)
    at = f" at revision {revision}" if revision else ""
    return ConfigError(
        f"{path}{at}: not a directory here, and the hub gave nothing ({first}): check the name, the network, HF_TOKEN"
    )


def default_bundle_for(model_path: str) -> Path | None:
    """Return the shipped bundle if `model_path` is the embedded target's directory, else None."""
    from whiflash_sglang.embedded import TARGET_NAME

    path = Path(model_path)
    is_embedded = path.parent.name == "targets" and path.name.startswith(f"{TARGET_NAME}-")
    return embedded_bundle() if is_embedded else None
