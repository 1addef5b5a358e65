"""Flags, the bundle manifest, and what they resolve to. Imports no SGLang.

A *bundle* is a directory (or hub id) with `whiflash.json`: drafters, the router and its thresholds, given to SGLang's
own `--speculative-draft-model-path`. Without it, that path is a DFlash checkpoint and `--whiflash-eagle-draft` names
the EAGLE-3 one; or it is the only drafter.
"""

import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from whiflash_sglang import arms
from whiflash_sglang.checkpoints.drafter_set import NAMES, PARTS, check_arms, check_router
from whiflash_sglang.checkpoints.members import HUB, checksums, member
from whiflash_sglang.checkpoints.paths import check_members
from whiflash_sglang.errors import ConfigError
from whiflash_sglang.lookup.calibration import MatchCalibration, Seed
from whiflash_sglang.telemetry.trace_samples import TraceSampling, check_directory

MANIFEST = "whiflash.json"
EMBEDDED_BUNDLE = "smollm2-135m-instruct"

RouterName = Literal["auto", "entropy", "neural", "ar", "diffusion", "lookup", "copy-rule", "none", "random"]
Positive = Annotated[int, Field(gt=0)]
T = TypeVar("T")
DraftVocabulary = Literal["full", "eagle3"]
DeltaSign = Literal["ar-minus-diffusion", "diffusion-minus-ar"]
NO_ROUTER = "--whiflash-router neural needs --whiflash-neural-router-path or a bundle with a router"
Nats = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Rounds = Annotated[int, Field(ge=0, lt=2**31)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class EntropyRouter(_Strict):
    """tau: nats above which the diffusion drafter is left. min_dwell: rounds an arm is kept at least."""

    tau: Nats = 1.0
    min_dwell: Rounds = 2


class NeuralRouter(_Strict):
    """path: a .safetensors file or a directory. threshold: on the predicted ΔAL = AL(EAGLE-3) - AL(DFlash), in tokens.
    min_dwell: rounds an arm is kept at least. delta_sign: for files that do not say which way round they predict.
    """

    path: str
    threshold: Annotated[float, Field(allow_inf_nan=False)] = 0.0
    min_dwell: Rounds = 1
    delta_sign: DeltaSign | None = None


class Lookup(_Strict):
    """The copying arm.

    enabled: whether it is there. max_width: drafts at most. min_match: shortest suffix match worth copying from.
    seed: chances that a copied token is right before anything was seen, as `whiflash lookup-seed` measures them
    (default: the embedded bundle's). memory_mib: MiB of recent outputs of all tenants to copy from across requests, 0
    for none. memory_minutes: how old they may get. prediction_tokens: longest prediction that a request may bring.
    form_tokens: most tokens of emission forms (the prompt as it would be quoted in JSON or code) that are made for one
    request, 0 for none.
    """

    enabled: bool = True
    max_width: Positive = 16
    min_match: Positive = 1
    seed: tuple[tuple[Annotated[float, Field(gt=0, lt=1)], ...], ...] | None = None
    memory_mib: Annotated[int, Field(ge=0)] = 0
    memory_minutes: Positive = 30
    prediction_tokens: Positive = 16384
    form_tokens: Annotated[int, Field(ge=0)] = 32768

    @field_validator("seed")
    @classmethod
    def _fits(cls, seed: Seed | None) -> Seed | None:
        if seed is not None:
            MatchCalibration(seed)
        return seed


class Structure(_Strict):
    """The structure arm, for requests with a grammar.

    enabled: whether it is there. max_width: drafts at most.
    """

    enabled: bool = True
    max_width: Positive = 16


class Source(_Strict):
    """Where a part of a bundle is from.

    revision: the hub's commit. files: SHA-256 by name; those that lie in the bundle are compared whenever it is served.
    """

    revision: str | None = None
    files: dict[str, str] = {}


class Manifest(_Strict):
    """`whiflash.json`. Paths are relative to the bundle; "hub:owner/name" is fetched from the hub when the bundle is
    served, at the revision of its entry in `sources`.

    schema_version: of this format. name: what the bundle is called. target: the model that it was trained for.
    eagle3, dflash: directory of the checkpoint; one of the two may be left out. dflash_vocabulary: what the block
    drafter chooses from, the target's whole vocabulary or the reduced one of the EAGLE-3 checkpoint (frequency-ranked,
    arXiv 2502.14856), which is cheaper for a small target. router: the neural router. entropy: thresholds of the
    entropy router. lookup: the copying arm (default: on, with the embedded bundle's seed). structure: the arm of what
    grammars force (default: on). chat_template: a file, served where `--chat-template` names none. tool_call_parser:
    SGLang's name, in force where `--tool-call-parser` names none. sources: where target, eagle3, dflash and router are
    from, as `whiflash bundle create` found them.
    """

    schema_version: Literal[1]
    name: str
    target: str
    eagle3: str | None = None
    dflash: str | None = None
    dflash_vocabulary: DraftVocabulary = "full"
    router: NeuralRouter | None = None
    entropy: EntropyRouter = EntropyRouter()
    lookup: Lookup | None = None
    structure: Structure = Structure()
    chat_template: str | None = None
    tool_call_parser: str | None = None
    sources: dict[str, Source] = {}

    @property
    def drafters(self) -> Mapping[str, str]:
        """Arm → path of its checkpoint, of those that the bundle names."""
        return {arm: value for arm, part in PARTS.items() if (value := getattr(self, part))}


class Flags(_Strict):
    """What the user said on the command line or to `Engine(...)`; None where nothing was said.

    Names and meanings of the first six are the published release's (arXiv 2606.07710).
    """

    eagle_draft: str | None = None
    drafters: Literal["df-e3", "ddt-e3"] = "df-e3"
    router: RouterName | None = None
    neural_router_path: str | None = None
    neural_router_threshold: Annotated[float, Field(allow_inf_nan=False)] | None = None
    neural_router_sign: DeltaSign | None = None
    tree_budget: int | None = None
    entropy_threshold: Nats | None = None
    min_dwell: Rounds | None = None
    eagle_steps: Positive = 5
    block_size: Annotated[int, Field(ge=2)] | None = None
    dflash_vocabulary: DraftVocabulary | None = None
    lookup: Literal["on", "off"] | None = None
    lookup_memory_mib: Annotated[int, Field(ge=0)] | None = None
    lookup_prediction_tokens: Positive | None = None
    lookup_form_tokens: Annotated[int, Field(ge=0)] | None = None
    structure: Literal["on", "off"] | None = None
    backlog_tokens: Annotated[int, Field(ge=32)] = 64
    force_recorded: Literal["on", "off"] = "off"
    trace_sample: Annotated[float, Field(ge=0, le=1)] | None = None
    trace_dir: str | None = None
    trace_text: Literal["on", "off"] | None = None
    trace_mib: Positive | None = None


class Settings(_Strict):
    """Everything a worker needs to build itself: resolved paths and values, picklable.

    checksums: SHA-256 by file, of what the bundle tells of it.
    """

    eagle3: Path | None
    dflash: Path | None
    router: RouterName
    entropy: EntropyRouter
    neural: NeuralRouter | None
    lookup: Lookup
    structure: Structure
    eagle_steps: int
    block_size: int | None
    dflash_vocabulary: DraftVocabulary
    backlog_tokens: int
    force_recorded: bool = False
    traces: TraceSampling = TraceSampling()
    chat_template: Path | None = None
    tool_call_parser: str | None = None
    bundle: str | None = None
    checksums: Mapping[str, str] = {}

    @property
    def drafters(self) -> Mapping[str, Path]:
        """Arm → directory of its checkpoint: one of them, or both."""
        return {arm: path for arm, part in PARTS.items() if (path := getattr(self, part))}


def embedded_bundle() -> Path:
    """Directory of the bundle shipped with the package."""
    return Path(str(resources.files("whiflash_sglang"))) / "bundles" / EMBEDDED_BUNDLE


def parse_flags(given: dict[str, Any]) -> Flags:
    """Validate raw flag values.

    Raises:
        ConfigError: naming the flag and what it takes.
    """
    try:
        flags = Flags(**{key: value for key, value in given.items() if value is not None})
    except ValidationError as error:
        raise ConfigError(_first_problem(error, lambda name: flag_of(name))) from None
    if flags.drafters == "ddt-e3":
        raise ConfigError(
            "--whiflash-drafters ddt-e3 needs the tree drafter, which does not exist yet; use df-e3"
        )
    if flags.tree_budget is not None:
        raise ConfigError(
            "--ddtree-tree-budget belongs to the tree drafter, which does not exist yet; remove it"
        )
    return flags


def flag_of(field: str) -> str:
    """The command-line spelling of a `Flags` field."""
    return "--ddtree-tree-budget" if field == "tree_budget" else "--whiflash-" + field.replace("_", "-")


def load_manifest(bundle: Path) -> Manifest:
    """Read and validate `whiflash.json`.

    Raises:
        ConfigError: the file is missing, is not JSON, or has a wrong or unknown key, or a path that leaves the bundle;
            the key is named. It names no drafter, or what needs two beside one.
    """
    path = bundle / MANIFEST
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{bundle} is not a bundle: it has no {MANIFEST}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    try:
        manifest = Manifest.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(f"{path}: " + _first_problem(error, lambda name: f"key {name!r}")) from None
    if not manifest.drafters:
        raise ConfigError(f"{path} names no drafter: give key 'eagle3', key 'dflash', or both")
    if manifest.router is not None:
        check_arms(f"{path}: key 'router'", NAMES, manifest.drafters)
    if manifest.dflash_vocabulary == "eagle3":
        check_arms(f"{path}: key 'dflash_vocabulary': 'eagle3'", NAMES, manifest.drafters)
    named = {PARTS[arm]: value for arm, value in manifest.drafters.items()}
    named |= {"chat_template": manifest.chat_template or ""}
    named["router.path"] = manifest.router.path if manifest.router else ""
    check_members(bundle, {key: path for key, path in named.items() if path and not path.startswith(HUB)})
    return manifest


def resolve(flags: Flags, draft_path: Path | None, download_dir: str | None = None) -> Settings:
    """Turn flags and a local draft path into settings; fetch what a bundle names on the hub.

    Args:
        draft_path: a bundle or a checkpoint, already on disk. download_dir: where downloads are kept.

    Raises:
        ConfigError: a needed part is missing. CheckpointError: the only drafter is of no known format.
    """
    if draft_path is None:
        raise ConfigError(
            "WHIFLASH needs drafters: give a bundle or a checkpoint to --speculative-draft-model-path"
        )
    if not draft_path.is_dir():
        raise ConfigError(f"--speculative-draft-model-path {draft_path}: no such directory")
    manifest = load_manifest(draft_path) if (draft_path / MANIFEST).exists() else None
    drafters = _drafters(flags, manifest, draft_path, download_dir)
    for arm, path in drafters.items():
        if not (path / "config.json").is_file():
            raise ConfigError(f"the {NAMES[arm]} checkpoint {path} has no config.json")
    vocabulary = flags.dflash_vocabulary or (manifest.dflash_vocabulary if manifest else "full")
    if vocabulary == "eagle3":
        check_arms("--whiflash-dflash-vocabulary eagle3", NAMES, drafters)
    check_router(flags.router or "auto", drafters)
    if flags.neural_router_path:
        check_arms("--whiflash-neural-router-path", NAMES, drafters)
    entropy = manifest.entropy if manifest else EntropyRouter()
    entropy = EntropyRouter(
        tau=entropy.tau if flags.entropy_threshold is None else flags.entropy_threshold,
        min_dwell=entropy.min_dwell if flags.min_dwell is None else flags.min_dwell,
    )
    template = draft_path / manifest.chat_template if manifest and manifest.chat_template else None
    return Settings(
        eagle3=drafters.get(arms.AR),
        dflash=drafters.get(arms.DIFFUSION),
        router=flags.router or "auto",
        entropy=entropy,
        neural=_neural(flags, manifest, draft_path, download_dir),
        lookup=_lookup(flags, manifest),
        structure=_structure(flags, manifest),
        eagle_steps=flags.eagle_steps,
        block_size=flags.block_size,
        dflash_vocabulary=vocabulary,
        backlog_tokens=flags.backlog_tokens,
        force_recorded=flags.force_recorded == "on",
        traces=_traces(flags),
        chat_template=template,
        tool_call_parser=manifest.tool_call_parser if manifest else None,
        bundle=manifest.name if manifest else None,
        checksums=_checksums(flags, manifest, draft_path),
    )


def _drafters(
    flags: Flags, manifest: Manifest | None, draft_path: Path, download_dir: str | None
) -> dict[str, Path]:
    """Arm → its checkpoint. A path that is no bundle is one checkpoint, whose format says which arm it is for."""
    if manifest is not None:
        found = {
            arm: member(draft_path, manifest, PARTS[arm], download_dir=download_dir)
            for arm in manifest.drafters
            if not (arm == arms.AR and flags.eagle_draft)
        }
    elif flags.eagle_draft:
        found = {arms.DIFFUSION: draft_path}
    else:
        from whiflash_sglang.models.formats import read_draft

        found = {read_draft(draft_path).format.arm: draft_path}
    return {**found, **({arms.AR: Path(flags.eagle_draft)} if flags.eagle_draft else {})}


def _checksums(flags: Flags, manifest: Manifest | None, bundle: Path) -> dict[str, str]:
    """Of what is served from the bundle: a flag may name another file."""
    if manifest is None:
        return {}
    served = [PARTS[arm] for arm in manifest.drafters if not (arm == arms.AR and flags.eagle_draft)]
    if manifest.router is not None and flags.neural_router_path is None:
        served.append("router")
    return checksums(bundle, manifest, served)


class PolicyChange(_Strict):
    """What may change while serving; None leaves a value as it is.

    router: how rounds are routed from now on. entropy_threshold: nats above which `entropy` leaves DFlash. min_dwell:
    rounds that `entropy` and `neural` keep an arm at least. neural_router_threshold: predicted gain in tokens above
    which `neural` takes EAGLE-3.
    """

    model_config = ConfigDict(strict=True)

    router: RouterName | None = None
    entropy_threshold: Nats | None = None
    min_dwell: Rounds | None = None
    neural_router_threshold: Annotated[float, Field(allow_inf_nan=False)] | None = None


def changed(settings: Settings, change: Any) -> Settings:
    """`settings` after a `PolicyChange` given as a dictionary.

    Raises:
        ConfigError: naming the field that is wrong.
    """
    try:
        wanted = PolicyChange.model_validate(change)
    except ValidationError as error:
        raise ConfigError(_first_problem(error, lambda name: f"{name!r}")) from None
    entropy = EntropyRouter(
        tau=settings.entropy.tau if wanted.entropy_threshold is None else wanted.entropy_threshold,
        min_dwell=settings.entropy.min_dwell if wanted.min_dwell is None else wanted.min_dwell,
    )
    check_router(wanted.router or settings.router, settings.drafters)
    neural = settings.neural
    if neural is None and (wanted.router == "neural" or wanted.neural_router_threshold is not None):
        raise ConfigError(f"this server was started without a neural router: {NO_ROUTER}")
    if neural is not None:
        threshold, dwell = wanted.neural_router_threshold, wanted.min_dwell
        neural = neural.model_copy(
            update={
                "threshold": neural.threshold if threshold is None else threshold,
                "min_dwell": neural.min_dwell if dwell is None else dwell,
            }
        )
    return settings.model_copy(
        update={"router": wanted.router or settings.router, "entropy": entropy, "neural": neural}
    )


def _neural(
    flags: Flags, manifest: Manifest | None, draft_path: Path, download_dir: str | None
) -> NeuralRouter | None:
    shipped = manifest.router if manifest else None
    if flags.neural_router_path is None and shipped is None:
        if flags.router == "neural":
            raise ConfigError(NO_ROUTER)
        return None
    if flags.neural_router_path is None:
        path = member(draft_path, _need(manifest), "router", download_dir=download_dir)
        base = _need(shipped).model_copy(update={"path": str(path)})
    else:
        # Another file: the bundle's threshold and sign were made for its own.
        base = NeuralRouter(path=flags.neural_router_path)
    given = {
        "threshold": flags.neural_router_threshold,
        "delta_sign": flags.neural_router_sign,
        "min_dwell": flags.min_dwell,
    }
    return base.model_copy(update={key: value for key, value in given.items() if value is not None})


def _lookup(flags: Flags, manifest: Manifest | None) -> Lookup:
    given: dict[str, Any] = {
        "enabled": None if flags.lookup is None else flags.lookup == "on",
        "memory_mib": flags.lookup_memory_mib,
        "prediction_tokens": flags.lookup_prediction_tokens,
        "form_tokens": flags.lookup_form_tokens,
    }
    return lookup_of(manifest).model_copy(
        update={k: value for k, value in given.items() if value is not None}
    )


def _structure(flags: Flags, manifest: Manifest | None) -> Structure:
    said = manifest.structure if manifest else Structure()
    return said if flags.structure is None else said.model_copy(update={"enabled": flags.structure == "on"})


def _traces(flags: Flags) -> TraceSampling:
    if not flags.trace_sample:
        for field in ("trace_dir", "trace_text", "trace_mib"):
            if getattr(flags, field) is not None:
                raise ConfigError(
                    f"{flag_of(field)} does something only with --whiflash-trace-sample above 0"
                )
        return TraceSampling()
    if flags.trace_dir is None:
        raise ConfigError("--whiflash-trace-sample needs --whiflash-trace-dir, where the traces go")
    directory = Path(flags.trace_dir).absolute()
    check_directory(directory)
    mib = {} if flags.trace_mib is None else {"mib": flags.trace_mib}
    return TraceSampling(rate=flags.trace_sample, directory=directory, text=flags.trace_text == "on", **mib)


def lookup_of(manifest: Manifest | None) -> Lookup:
    """What a bundle says of the copying arm, with the embedded bundle's seed where it has none."""
    said = (manifest.lookup if manifest else None) or Lookup()
    if said.seed is not None:
        return said
    # Chances of a small model's answers are nearer to any other's than even odds, and are soon overwritten.
    return said.model_copy(update={"seed": _need(load_manifest(embedded_bundle()).lookup).seed})


def _need(value: T | None) -> T:
    if value is None:
        raise AssertionError("checked by the caller")
    return value


def _first_problem(error: ValidationError, spell: Any) -> str:
    problem = error.errors()[0]
    name = str(problem["loc"][0]) if problem["loc"] else "value"
    if problem["type"] == "extra_forbidden":
        nested = "".join(f".{part}" for part in problem["loc"][1:])
        return f"{spell(name)}{nested} is unknown; known: {', '.join(sorted(_known_keys(error)))}"
    where = ".".join(str(part) for part in problem["loc"][1:])
    return f"{spell(name)}{'.' + where if where else ''}: {problem['msg']} (got {problem['input']!r})"


def _known_keys(error: ValidationError) -> list[str]:
    """Keys of the model that the first problem's unknown key was given to."""
    models = {m.__name__: m for m in (Manifest, Flags, PolicyChange)}
    model: type[BaseModel] = models.get(error.title, Manifest)
    for part in error.errors()[0]["loc"][:-1]:
        annotation = model.model_fields[str(part)].annotation
        candidates = get_args(annotation) or (annotation,)
        model = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return list(model.model_fields)
