"""What is benchmarked: the embedded target and its bundle, or the user's own."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from whiflash_sglang.arms import DIFFUSION
from whiflash_sglang.checkpoints.hub import fetch, member
from whiflash_sglang.checkpoints.manifest import embedded_bundle, load_manifest
from whiflash_sglang.device.cpu import serves_here
from whiflash_sglang.errors import ConfigError
from whiflash_sglang.lab.bench.arms import VARIANTS, Subject
from whiflash_sglang.lab.bench.load import MODEL
from whiflash_sglang.lab.bench.variants import write_variant

CPU_KV_TOKENS = 16384
"""KV pool of a server on the CPU. All servers share the machine's memory when arms are interleaved."""


def build_subject(
    model_path: str | None,
    bundle_path: str | None,
    dtype: str,
    extra: Sequence[str],
    scratch: Path,
    arms: Iterable[str],
    beside: Path | None = None,
) -> Subject:
    """Find target and bundle, and the arguments that every arm shares.

    Args:
        model_path, bundle_path: directories or hub ids; None: the embedded ones.
        extra: further server arguments, for every arm. scratch: an existing directory that outlives the servers.
        arms: names of what is compared; those that serve a changed bundle get it under `scratch`.
        beside: another checkout of this project, for the arms whose names ask for it.

    Raises:
        ConfigError: something is not there.
    """
    if beside is not None and not (beside / "whiflash_sglang" / "__init__.py").is_file():
        raise ConfigError(f"--beside {beside}: no checkout of this project")
    from whiflash_sglang.embedded import ensure_target
    from whiflash_sglang.models.formats import read_draft

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
    dflash = member(bundle, manifest, "dflash") if manifest.dflash else None
    changed = VARIANTS.keys() & {name.partition("@")[0] for name in arms}
    return Subject(
        target=target,
        bundle=bundle,
        eagle3=member(bundle, manifest, "eagle3") if manifest.eagle3 else None,
        dflash=dflash,
        dtype=dtype,
        common=(*common, *extra),
        variants={arm: write_variant(arm, bundle, scratch / arm) for arm in changed},
        beside=None if beside is None else beside.resolve(),
        block_format="" if dflash is None else read_draft(dflash, DIFFUSION).format.name,
    )
