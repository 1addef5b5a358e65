"""Flags of the command line, and the settings that they and a bundle resolve to. Imports no SGLang.

A *bundle* is a directory (or hub id) with `whiflash.json`: drafters, the router and its thresholds, given to SGLang's
own `--speculative-draft-model-path`. Without it, that path is a DFlash checkpoint and `--whiflash-eagle-draft` names
the EAGLE-3 one; or it is the only drafter. Without any drafter, rounds draft from texts only: copies and structure.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from whiflash_sglang.checkpoints import manifest
from whiflash_sglang.checkpoints.bundle import Bundle
from whiflash_sglang.checkpoints.manifest import MANIFEST, NAMES, PARTS, Manifest, NeuralRouter, Positive, Strict
from whiflash_sglang.drafts import arms
from whiflash_sglang.errors import ConfigError
from whiflash_sglang.formats.uno import CONFIG, adapter_in
from whiflash_sglang.telemetry.samples import Spooling, check_spool, samples_of

RouterName = Literal["auto", "entropy", "neural", "ar", "diffusion", "lookup", "uno", "none", "random"]
Model = TypeVar("Model", bound=BaseModel)
NO_UNO = "router 'uno' needs --whiflash-uno, or a bundle with the key 'uno'"
NO_MANIFEST = Manifest(schema_version=1, name="", target="")
"""Settings of a launch without a bundle."""
NO_PARTS = dict.fromkeys(("eagle3", "dflash", "uno", "router")) | {"dflash_vocabulary": "full", "quantization": {}}
NO_ROUTER = "--whiflash-router neural needs --whiflash-neural-router-path or a bundle with a router"


class Flags(Strict):
    """The user's values on the command line or in `Engine(...)`; None if none was given.

    Names and meanings of the first five are the published release's (arXiv 2606.07710). The rest of what can be set is
    in a bundle's manifest, and the thresholds of a policy in `PolicyChange`, too.
    Docstrings of fields are the help of the flags.
    """

    model_config = ConfigDict(use_attribute_docstrings=True)

    eagle_draft: str | None = None
    """EAGLE-3 checkpoint (directory or hub id), beside a DFlash draft path or instead of the bundle's."""
    drafters: Literal["df-e3", "none"] = "df-e3"
    """df-e3 (the paper's name): all drafters that are named. none: no drafter, also if a bundle names some."""
    router: RouterName | None = None
    """Policy: auto (most expected tokens a second), entropy or neural (the paper's rules), or one pinned arm.
    Default: auto; random is for tests."""
    neural_router_path: str | None = None
    """Neural router: hub id, directory or .safetensors file."""
    neural_router_threshold: Annotated[float, Field(allow_inf_nan=False)] | None = None
    """Threshold on the neural router's output (tokens of acceptance length)."""
    eagle_steps: Positive = 5
    """Longest EAGLE-3 chain."""
    block_size: Annotated[int, Field(ge=2)] | None = None
    """Longest DFlash block, bonus token included; at most the checkpoint's."""
    uno: str | None = None
    """Adapter (directory or hub id) under which the target drafts for itself (UNO), beside other drafters. A draft path
    may be one, too."""
    uno_drafts: Positive = 8
    """Most drafts of a pass of UNO, and so rows of it."""
    lookup: Literal["on", "off"] | None = None
    """The copying arm. Default: the bundle's, else on."""
    structure: Literal["on", "off"] | None = None
    """The arm of forced text. Default: the bundle's, else on."""
    force_recorded: Literal["on", "off"] = "off"
    """For benchmarks only: requests may force their answer's tokens, which then are not the target's."""
    trust_tenant_header: Literal["on", "off"] = "off"
    """on: a gateway's header X-WhiFlash-Tenant names the tenant of every request, in place of cache_salt and extra_key;
    a request without it is refused."""
    learn: str | None = None
    """Directory for token ids of finished requests, to train drafters on (docs/how-to/learning.md). Default:
    nothing is kept."""
    learn_mib: Positive | None = None
    """Most MiB of such samples on disk; the oldest go first. Default: 256."""
    learn_hours: Positive | None = None
    """Longest age of such samples, in hours. Default: 168."""
    untested_sglang: Literal["on", "off"] = "off"
    """on: start with an SGLang that was not tested, if it has every name that is used, and warn."""


class Settings(Strict):
    """Everything a worker needs to build itself: resolved paths and values, picklable.

    drafters: arm → directory of its checkpoint, of `arms.PAIR` and in its order. uno: directory of the adapter that the
    target drafts under. checksums: SHA-256 by file, as the bundle lists them. target: the model that the bundle names,
    empty without one. quantised: arms in fp8. measured: arm → chance by place in a pass that a draft is right, from the
    bundle.
    """

    drafters: Mapping[str, Path]
    router: RouterName
    entropy: manifest.EntropyRouter
    neural: NeuralRouter | None
    lookup: manifest.Lookup
    structure: manifest.Structure
    eagle_steps: int
    block_size: int | None
    dflash_vocabulary: manifest.DraftVocabulary
    quantised: frozenset[str] = frozenset()
    uno: Path | None = None
    uno_drafts: int = 8
    force_recorded: bool = False
    trust_tenant_header: bool = False
    samples: Spooling = Spooling()
    target: str = ""
    chat_template: Path | None = None
    tool_call_parser: str | None = None
    bundle: str | None = None
    checksums: Mapping[str, str] = {}
    measured: Mapping[str, tuple[float, ...]] = {}


def parse_flags(given: dict[str, Any]) -> Flags:
    """Validate the flags' values. Raises ConfigError naming the flag and what it takes."""
    try:
        return Flags(**{key: value for key, value in given.items() if value is not None})
    except ValidationError as error:
        raise ConfigError(manifest.first_problem(error, Flags, flag_of)) from None


def flag_of(field: str) -> str:
    """Return the command-line spelling of a `Flags` field."""
    return "--whiflash-" + field.replace("_", "-")


def resolve(
    flags: Flags,
    draft_path: Path | None,
    download_dir: str | None = None,
    target_mtp: Callable[[], Path | None] = lambda: None,
) -> Settings:
    """Turn flags and a local draft path into settings; fetch what a bundle names on the hub.

    Args:
        draft_path: a bundle or a checkpoint, already on disk; None: no drafter but what the flags name. download_dir:
            where downloads are kept. target_mtp: gives the target's directory if it can draft by itself; asked if no
            autoregressive drafter is named.

    Raises:
        ConfigError: a needed part is missing. CheckpointError: the only drafter is of no known format.
    """
    if draft_path is not None and not draft_path.is_dir():
        raise ConfigError(f"--speculative-draft-model-path {draft_path}: no such directory")
    bundle, given = _open(flags, draft_path)
    served = [part for part in bundle.parts if part not in given]
    paths = {**{part: bundle.fetch(part, download_dir) for part in served}, **given}
    drafters = {arm: paths[part] for arm, part in PARTS.items() if part in paths}
    if flags.drafters != "none" and arms.AR not in drafters and (own := target_mtp()) is not None:
        drafters[arms.AR] = own
    for arm, path in drafters.items():
        if not (path / "config.json").is_file():
            raise ConfigError(f"the {NAMES[arm]} checkpoint {path} has no config.json: give the directory of a drafter")
    uno = adapter_in(paths["uno"]) if "uno" in paths else None
    if "uno" in paths and uno is None:
        raise ConfigError(f"UNO's adapter {paths['uno']} has no {CONFIG}: give a LoRA in PEFT's layout")
    if flags.router == arms.UNO and uno is None:
        raise ConfigError(NO_UNO)
    manifest.check_router(flags.router or "auto", drafters)
    if flags.neural_router_path:
        manifest.check_arms("--whiflash-neural-router-path", NAMES, drafters)
    said = bundle.manifest
    # The bundle's figures say nothing of a drafter that a flag names.
    measured = {arm: part for arm, part in PARTS.items() if part in said.acceptance and part not in given}
    return Settings(
        drafters={arm: drafters[arm] for arm in arms.PAIR if arm in drafters},
        router=flags.router or "auto",
        entropy=said.entropy,
        neural=_neural(flags, said, paths.get("router")),
        lookup=_switched(manifest.lookup_of(said), flags.lookup),
        structure=_switched(said.structure, flags.structure),
        eagle_steps=flags.eagle_steps,
        block_size=flags.block_size,
        dflash_vocabulary=said.dflash_vocabulary,
        quantised=said.quantised,
        uno=uno,
        uno_drafts=flags.uno_drafts,
        force_recorded=flags.force_recorded == "on",
        trust_tenant_header=flags.trust_tenant_header == "on",
        samples=_samples(flags),
        target=said.target,
        chat_template=bundle.directory / said.chat_template if said.chat_template else None,
        tool_call_parser=said.tool_call_parser,
        bundle=said.name or None,
        checksums=bundle.checksums(served),
        measured={arm: said.acceptance[part].chances for arm, part in measured.items()},
    )


def _open(flags: Flags, draft_path: Path | None) -> tuple[Bundle, dict[str, Path]]:
    """Return the bundle at the draft path, or one without parts, and the path of each part that comes from elsewhere:
    from a flag, or from a draft path that is a single checkpoint."""
    is_bundle = draft_path is not None and (draft_path / MANIFEST).exists()
    bundle = Bundle.load(draft_path) if draft_path and is_bundle else Bundle(Path(), NO_MANIFEST)
    if flags.drafters == "none":
        bundle = _without_drafters(flags, bundle, has_checkpoint=draft_path is not None and not is_bundle)
    named = {"eagle3": flags.eagle_draft, "uno": flags.uno, "router": flags.neural_router_path}
    given = {part: Path(place) for part, place in named.items() if place is not None}
    if draft_path is not None and not is_bundle:
        given.setdefault(_part_of(draft_path, beside=given), draft_path)
    return bundle, given


def _without_drafters(flags: Flags, bundle: Bundle, *, has_checkpoint: bool) -> Bundle:
    """Return the bundle without its drafters and router. Raises ConfigError if a flag or path names a drafter."""
    named = [flag_of(field) for field in ("eagle_draft", "uno") if getattr(flags, field)]
    named += ["--speculative-draft-model-path"] if has_checkpoint else []
    if named:
        raise ConfigError(f"--whiflash-drafters none leaves nothing for {named[0]}; remove one of the two")
    return replace(bundle, manifest=bundle.manifest.model_copy(update=NO_PARTS))


def _part_of(checkpoint: Path, beside: Collection[str]) -> str:
    """Return as which part of a bundle a single checkpoint serves: by its format, or as the block drafter if a flag
    names the EAGLE-3 one. beside: parts that flags name."""
    if adapter_in(checkpoint):
        return "uno"
    if "eagle3" in beside:
        return PARTS[arms.DIFFUSION]
    from whiflash_sglang.formats.table import read_draft

    return PARTS[read_draft(checkpoint).format.arm]


class PolicyChange(Strict):
    """The settings that may change while serving; None leaves a value as it is.

    router: policy from now on. entropy_threshold: nats above which `entropy` chooses EAGLE-3. min_dwell: least rounds
    with an arm under `entropy` and `neural`. neural_router_threshold: predicted gain in tokens above which `neural`
    takes EAGLE-3.
    """

    model_config = ConfigDict(strict=True)

    router: RouterName | None = None
    entropy_threshold: manifest.Nats | None = None
    min_dwell: manifest.Rounds | None = None
    neural_router_threshold: Annotated[float, Field(allow_inf_nan=False)] | None = None


def changed(settings: Settings, change: Any) -> Settings:
    """Return `settings` after a `PolicyChange`, given as a dictionary. Raises ConfigError naming the wrong field."""
    try:
        wanted = PolicyChange.model_validate(change)
    except ValidationError as error:
        raise ConfigError(manifest.first_problem(error, PolicyChange, repr)) from None
    if wanted.router == arms.UNO and settings.uno is None:
        raise ConfigError(NO_UNO)
    manifest.check_router(wanted.router or settings.router, settings.drafters)
    neural = settings.neural
    if neural is None and (wanted.router == "neural" or wanted.neural_router_threshold is not None):
        raise ConfigError(f"this server has no neural router, so its policy stays as it was: {NO_ROUTER}")
    if neural is not None:
        neural = _updated(neural, threshold=wanted.neural_router_threshold, min_dwell=wanted.min_dwell)
    entropy = _updated(settings.entropy, tau=wanted.entropy_threshold, min_dwell=wanted.min_dwell)
    return _updated(settings, router=wanted.router, entropy=entropy, neural=neural)


def _updated(model: Model, **values: Any) -> Model:
    """Return a copy of `model` with the values that are not None."""
    return model.model_copy(update={name: value for name, value in values.items() if value is not None})


def _switched(arm: Model, switch: str | None) -> Model:
    """Return a bundle's settings of an arm, switched by its flag. switch: `on`, `off`, or None to leave it as it is."""
    return _updated(arm, enabled=None if switch is None else switch == "on")


def _neural(flags: Flags, said: Manifest, path: Path | None) -> NeuralRouter | None:
    """Return the settings of the neural router whose file is at `path`; None without one."""
    if path is None:
        if flags.router == "neural":
            raise ConfigError(NO_ROUTER)
        return None
    base = NeuralRouter(path=str(path))
    if flags.neural_router_path is None and said.router is not None:
        # The bundle's threshold and sign were made for its own router, and apply to no other.
        base = _updated(said.router, path=str(path))
    return _updated(base, threshold=flags.neural_router_threshold)


def _samples(flags: Flags) -> Spooling:
    if flags.learn is None:
        for field in ("learn_mib", "learn_hours"):
            if getattr(flags, field) is not None:
                raise ConfigError(f"{flag_of(field)} does something only with --whiflash-learn")
        return Spooling()
    if flags.force_recorded == "on":
        raise ConfigError(
            "--whiflash-learn cannot learn from --whiflash-force-recorded: forced text is not the target's"
        )
    directory = samples_of(Path(flags.learn).absolute())
    check_spool(directory)
    return _updated(Spooling(directory=directory), mib=flags.learn_mib, hours=flags.learn_hours)
