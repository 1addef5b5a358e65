"""Finds the subject of a benchmark: the embedded target and its bundle, or the user's own."""

import json
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from whiflash_lab.bench.arms import BAD, NO_LOOKUP, NO_STRUCTURE, VARIANTS, Subject, dtype_of
from whiflash_lab.bench.load import MODEL
from whiflash_sglang.checkpoints.bundle import Bundle
from whiflash_sglang.checkpoints.hub import fetch
from whiflash_sglang.checkpoints.manifest import MANIFEST, embedded_bundle, load_manifest
from whiflash_sglang.drafts.arms import AR, DIFFUSION
from whiflash_sglang.errors import ConfigError
from whiflash_sglang.files.cpu import serves_here


def write_variant(arm: str, bundle: Path, directory: Path) -> Path:
    """Write the changed bundle that `arm` serves (without lookup, without structure, bad drafters) to the new
    `directory`, and return that.

    Unchanged files are links to the bundle's, if the file system allows.
    """
    opened = Bundle.load(bundle)
    fields = opened.manifest.model_dump(mode="json", exclude_none=True)
    if arm in (NO_LOOKUP, BAD):
        fields["lookup"] = {"enabled": False}
    if arm in (NO_STRUCTURE, BAD):
        fields["structure"] = {"enabled": False}
    shutil.copytree(bundle, directory, copy_function=_link)
    if arm == BAD:
        for key in ("router", "sources"):  # they have checksums of the unshuffled drafters
            fields.pop(key, None)
        for part in opened.parts.keys() - {"router"}:
            fields[part] = f"shuffled-{part}"
            _shuffle(opened.fetch(part), directory / fields[part])
    (directory / MANIFEST).unlink()  # it may be a link to the bundle's file
    (directory / MANIFEST).write_text(json.dumps(fields), encoding="utf-8")
    return directory


def _link(source: str, target: str) -> str:
    try:
        os.link(os.path.realpath(source), target)
    except OSError:
        shutil.copy2(source, target)
    return target


def _shuffle(checkpoint: Path, place: Path) -> None:
    """Copy a drafter to `place` with every matrix shuffled: as slow as before, never right. ConfigError without one."""
    random = torch.Generator().manual_seed(0)
    shutil.copytree(checkpoint, place, copy_function=_link)
    files = sorted(place.glob("*.safetensors"))
    if not files:
        raise ConfigError(f"--arms {BAD}: {checkpoint} has no *.safetensors to shuffle; leave this arm out")
    for file in files:
        tensors = load_file(file)
        for name, tensor in tensors.items():
            if tensor.ndim > 1:
                tensors[name] = tensor.flatten()[torch.randperm(tensor.numel(), generator=random)].view_as(tensor)
        file.unlink()  # it may be a link to the bundle's file
        save_file(tensors, file)


CPU_KV_TOKENS = 16384
"""Tokens of the KV pool of a server on the CPU. Interleaved arms' servers share the machine's memory."""


def build_subject(
    model_path: str | None, bundle_path: str | None, extra: Sequence[str], scratch: Path, arms: Iterable[str]
) -> Subject:
    """Find target and bundle, and the arguments that every arm shares.

    Args:
        model_path, bundle_path: directories or hub ids; None: the embedded ones.
        extra: further server arguments, for every arm, perhaps `--dtype`. scratch: an existing directory that outlives
            the servers.
        arms: names of what is compared; those that serve a changed bundle get it under `scratch`.

    Raises:
        ConfigError: something is not there.
    """
    from whiflash_sglang.embedded import ensure_target
    from whiflash_sglang.formats.table import read_draft

    target = ensure_target() if model_path is None else fetch(model_path)
    bundle = embedded_bundle() if bundle_path is None else fetch(bundle_path)
    manifest = load_manifest(bundle)
    common = ["--served-model-name", MODEL]
    if manifest.chat_template:
        common += ["--chat-template", str(bundle / manifest.chat_template)]
    if manifest.tool_call_parser:
        common += ["--tool-call-parser", manifest.tool_call_parser]
    if serves_here():
        common += ["--device", "cpu", "--max-total-tokens", str(CPU_KV_TOKENS)]
    opened = Bundle(bundle, manifest)
    dflash, eagle3 = (opened.fetch(part) if part in opened.parts else None for part in ("dflash", "eagle3"))
    chain = read_draft(eagle3, AR) if eagle3 else None
    changed = VARIANTS.keys() & set(arms)
    return Subject(
        target=target,
        bundle=bundle,
        eagle3=eagle3,
        dflash=dflash,
        dtype=dtype_of(extra),
        common=(*common, *extra),
        variants={arm: write_variant(arm, bundle, scratch / arm) for arm in changed},
        block_format=None if dflash is None else read_draft(dflash, DIFFUSION).format,
        # SGLang would read a P-EAGLE checkpoint as EAGLE-3 and draft nonsense.
        chain_is_upstreams=not chain or (chain.format.upstream == "EAGLE3" and chain.config.mask_token is None),
    )
