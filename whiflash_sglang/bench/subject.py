"""What is benchmarked: the embedded target and its bundle, or the user's own."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from whiflash_sglang.bench.arms import Subject
from whiflash_sglang.bench.load import MODEL
from whiflash_sglang.config import MANIFEST, Manifest, embedded_bundle, load_manifest
from whiflash_sglang.hub import fetch

CPU_KV_TOKENS = 16384
"""KV pool of a server on the CPU. All servers share the machine's memory when arms are interleaved."""


def build_subject(
    model_path: str | None,
    bundle_path: str | None,
    dtype: str,
    extra: Sequence[str],
    scratch: Path,
    *,
    bad_drafters: bool = False,
) -> Subject:
    """Find target and bundle, and the arguments that every arm shares.

    Args:
        model_path, bundle_path: directories or hub ids; None: the embedded ones.
        extra: further server arguments, for every arm. scratch: an existing directory that outlives the servers.
        bad_drafters: also make the bundle whose drafters know nothing.

    Raises:
        ConfigError: something is not there.
    """
    from whiflash_sglang.embedded import ensure_target
    from whiflash_sglang.platform import activate

    target = ensure_target() if model_path is None else fetch(model_path)
    bundle = embedded_bundle() if bundle_path is None else fetch(bundle_path)
    manifest = load_manifest(bundle)
    common = ["--served-model-name", MODEL]
    if manifest.chat_template:
        common += ["--chat-template", str(bundle / manifest.chat_template)]
    if manifest.tool_call_parser:
        common += ["--tool-call-parser", manifest.tool_call_parser]
    if activate() is not None:
        common += ["--device", "cpu", "--max-total-tokens", str(CPU_KV_TOKENS)]
    return Subject(
        target=target,
        bundle=bundle,
        eagle3=bundle / manifest.eagle3,
        dflash=bundle / manifest.dflash,
        bundle_without_lookup=_without_lookup(bundle, manifest, scratch / "bundle-without-lookup"),
        bad_bundle=_with_bad_drafters(bundle, manifest, scratch / "bad-bundle") if bad_drafters else None,
        dtype=dtype,
        common=(*common, *extra),
    )


def _with_bad_drafters(bundle: Path, manifest: Manifest, directory: Path) -> Path:
    """The bundle without lookup and router, and with every matrix of its drafters shuffled: as slow, never right."""
    _without_lookup(bundle, manifest, directory)
    fields = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    fields.pop("router", None)
    random = torch.Generator().manual_seed(0)
    for part in ("eagle3", "dflash"):
        shutil.copytree(fields[part], directory / part)
        fields[part] = part
        for file in (directory / part).glob("*.safetensors"):
            save_file({name: _shuffled(value, random) for name, value in load_file(file).items()}, file)
    (directory / MANIFEST).write_text(json.dumps(fields), encoding="utf-8")
    return directory


def _shuffled(tensor: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    if tensor.ndim < 2:
        return tensor
    return tensor.flatten()[torch.randperm(tensor.numel(), generator=random)].view_as(tensor).contiguous()


def _without_lookup(bundle: Path, manifest: Manifest, directory: Path) -> Path:
    """A manifest that names the same checkpoints and switches the lookup arm off."""
    fields = manifest.model_dump(mode="json", exclude_none=True)
    fields["lookup"] = {"enabled": False}
    for key in ("eagle3", "dflash", "chat_template"):
        if key in fields:
            fields[key] = str((bundle / fields[key]).resolve())
    if "router" in fields:
        fields["router"]["path"] = str((bundle / fields["router"]["path"]).resolve())
    directory.mkdir()
    (directory / MANIFEST).write_text(json.dumps(fields), encoding="utf-8")
    return directory
