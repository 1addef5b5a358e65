"""What drafters are, cost and need, judged from `config.json` files alone."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from whiflash_sglang.checkpoints.fit import TargetShape, check_fit, target_layers
from whiflash_sglang.checkpoints.hub import look_up
from whiflash_sglang.checkpoints.manifest import HUB, MANIFEST, PARTS, load_manifest
from whiflash_sglang.checkpoints.members import checksums, parts_of, verify
from whiflash_sglang.errors import WhiflashError
from whiflash_sglang.models.checkpoint import attention_shape, integer, read_json_config
from whiflash_sglang.models.draft_format import merged
from whiflash_sglang.models.formats import Draft, read_draft

BYTES = {"float32": 4, "float": 4}
"""Of an element of KV, by the target's dtype; 2 for all others."""


class Target(NamedTuple):
    """shape: what drafters must fit. kv_bytes: its KV of one token. element: bytes of one number of it."""

    shape: TargetShape
    kv_bytes: int
    element: int


class Judged(NamedTuple):
    """A drafter, whether it can be served, and what there is to say of it: one line."""

    name: str
    ok: bool
    detail: str


def read_target(said: str) -> Target:
    """A target from its directory or hub id. Raises WhiflashError naming what is missing."""
    config = look_up(said).config
    settings = read_json_config(config.parent)
    text = merged(config.parent, settings, "text_config")
    element = BYTES.get(str(text.get("dtype") or text.get("torch_dtype")), 2)
    layers = integer(text, "num_hidden_layers", config.parent)
    if text.get("kv_lora_rank"):  # latent attention keeps one vector of a token, and its rotated part
        numbers = sum(integer(text, key, config.parent) for key in ("kv_lora_rank", "qk_rope_head_dim"))
    else:
        _, kv_heads, head_dim = attention_shape(text, config.parent)
        numbers = 2 * kv_heads * head_dim
    return Target(TargetShape.read(config), layers * numbers * element, element)


def judge(said: str, target: Target | None) -> Iterator[Judged]:
    """A drafter, or all drafters of a bundle, by directory or hub id."""
    try:
        parts = _parts(said)
    except WhiflashError as error:
        yield Judged(said, False, _reason(error, said))
        return
    for name, place in parts.items():
        try:
            yield Judged(name, True, _describe(read_draft(look_up(place).config.parent), target))
        except WhiflashError as error:
            yield Judged(name, False, _reason(error, place))


def _reason(error: WhiflashError, place: str) -> str:
    """What `error` says of `place`, which the line names already."""
    return str(error).removeprefix(f"{place}: ")


def _parts(said: str) -> dict[str, str]:
    """Names and places of the drafters behind `said`; a bundle's files must be those that it was made with."""
    bundle = Path(said).expanduser()
    if not (bundle / MANIFEST).is_file():
        return {said: said}
    manifest = load_manifest(bundle)
    verify(checksums(bundle, manifest, parts_of(manifest)))
    places = {}
    for arm, value in manifest.drafters.items():
        part = PARTS[arm]
        if value.startswith(HUB):
            source = manifest.sources.get(part)
            at = f"@{source.revision}" if source and source.revision else ""
            places[f"{said}: {part}"] = value.removeprefix(HUB) + at
            continue
        places[f"{said}: {part}"] = str(bundle / value)
    return places


def _describe(draft: Draft, target: Target | None) -> str:
    config = draft.config
    element = target.element if target else 2
    _, kv_heads, head_dim = config.attention
    kv = 2 * config.num_layers * kv_heads * head_dim * element
    drafts = getattr(config, "max_drafts", None)
    parts = [f"{draft.format.name}, the {draft.format.arm} arm"]
    if drafts is not None:
        parts.append(f"{drafts} drafts a block")
    share = ""
    if target is not None:
        check_fit(draft, target.shape)
        share = f", {kv / target.kv_bytes:.1%} of the target's"
        layers = ", ".join(str(layer) for layer in target_layers(draft, target.shape.num_layers))
        own = draft.format.layers_key is None
        parts.append("reads what the target's head reads" if own else f"reads the outputs of layers {layers}")
    parts.append(f"{kv} bytes of KV a token{share}")
    return "; ".join(parts)
