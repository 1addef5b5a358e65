"""Read and check the manifest of a bundle, `whiflash.json`. Imports no SGLang."""

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import Annotated, Final, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from whiflash_sglang.copying.calibration import MatchCalibration, Seed
from whiflash_sglang.drafts import arms
from whiflash_sglang.drafts.rates import continuing
from whiflash_sglang.errors import ConfigError
from whiflash_sglang.files.disk import roots_of
from whiflash_sglang.files.jsonl import read_json_file

PARTS: Final[Mapping[str, str]] = {arms.AR: "eagle3", arms.DIFFUSION: "dflash"}
"""Arm → key of its checkpoint in a manifest."""

NAMES: Final[Mapping[str, str]] = {arms.AR: "EAGLE-3", arms.DIFFUSION: "DFlash"}
"""Arm → the name of its drafter in messages."""

NEEDED: Final[Mapping[str, tuple[str, ...]]] = {
    "entropy": (arms.AR, arms.DIFFUSION),
    "neural": (arms.AR, arms.DIFFUSION),
    "ar": (arms.AR,),
    "diffusion": (arms.DIFFUSION,),
}
"""Router → arms that it requires. Other routers choose among the arms that are loaded."""


def check_router(router: str, there: Collection[str]) -> None:
    """Raise ConfigError if `router` needs an arm that is not in `there`, the arms that have a drafter."""
    check_arms(f"router {router!r}", NEEDED.get(router, ()), there)


def check_arms(what: str, needed: Collection[str], there: Collection[str]) -> None:
    """Raise ConfigError if `what` needs a drafter whose arm is not in `there`; the message names those it needs."""
    missing = [NAMES[arm] for arm in needed if arm not in there]
    if missing:
        has = " and ".join(NAMES[arm] for arm in NAMES if arm in there) or "none"
        raise ConfigError(f"{what} needs {' and '.join(NAMES[arm] for arm in needed)}; the drafters here are: {has}")


def check_members(bundle: Path, named: Mapping[str, str]) -> None:
    """Check the paths that a manifest names (`named`: key → path): no path may leave the bundle.

    A path is relative, climbs nowhere, and neither it nor a file in the directory that it names is a link out of the
    bundle. A snapshot of the hub's cache consists of links, into the `blobs` of its own repository.

    Raises:
        ConfigError: naming the key and the path.
    """
    roots = roots_of(bundle)
    for key, value in named.items():
        path = PurePosixPath(value)
        climbs = path.is_absolute() or ".." in path.parts or "\0" in value
        for member in [Path("/")] if climbs else _reached(bundle / value):
            if not any(member.is_relative_to(root) for root in roots):
                link = "" if climbs else f", a link to {member}"
                raise ConfigError(
                    f"{bundle}/whiflash.json: key {key!r}: {value!r}{link} is outside the bundle; a bundle names its "
                    "own files, relative to it"
                )


def _reached(path: Path) -> Iterator[Path]:
    """Yield the resolved path, and those of everything below it. A link that names itself stays: opening it fails."""
    yield Path(os.path.realpath(path))
    for directory, directories, files in os.walk(path):
        yield from (Path(os.path.realpath(Path(directory, name))) for name in (*directories, *files))


MANIFEST = "whiflash.json"
EMBEDDED_BUNDLE = "smollm2-135m-instruct"
HUB = "hub:"
"""Prefix of a part's path in the manifest. The rest of the path is a hub id."""

Positive = Annotated[int, Field(gt=0)]
DraftVocabulary = Literal["full", "eagle3"]
DeltaSign = Literal["ar-minus-diffusion", "diffusion-minus-ar"]
Nats = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Rounds = Annotated[int, Field(ge=0, lt=2**31)]


class Strict(BaseModel):
    """Base of the manifest's models: unknown keys are errors, and values are frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class EntropyRouter(Strict):
    """tau: entropy in nats above which EAGLE-3 drafts, else DFlash. min_dwell: least rounds with an arm."""

    tau: Nats = 1.0
    min_dwell: Rounds = 2


class NeuralRouter(Strict):
    """path: a .safetensors file or a directory. threshold: on the predicted ΔAL = AL(EAGLE-3) - AL(DFlash), in tokens.
    min_dwell: least rounds with an arm. delta_sign: sign of the prediction, if the file does not name it.
    """

    path: str
    threshold: Annotated[float, Field(allow_inf_nan=False)] = 0.0
    min_dwell: Rounds = 1
    delta_sign: DeltaSign | None = None


class Lookup(Strict):
    """The copying arm.

    enabled: whether the arm is loaded. max_width: most drafts. min_match: shortest match to copy from, in tokens.
    seed: initial chances that a copied token is right, by match length and agreement (default: embedded bundle's).
    prediction_tokens: most tokens of a prediction; the rest is cut. answers: whose other answers are copied from: those
    of the request's group, with `tenant` also all newest ones of its tenant if it has no group, or `off`.
    """

    enabled: bool = True
    max_width: Positive = 16
    min_match: Positive = 1
    seed: tuple[tuple[Annotated[float, Field(gt=0, lt=1)], ...], ...] | None = None
    prediction_tokens: Positive = 16384
    answers: Literal["off", "group", "tenant"] = "group"

    @field_validator("seed")
    @classmethod
    def _fits(cls, seed: Seed | None) -> Seed | None:
        if seed is not None:
            MatchCalibration(seed)
        return seed


class Structure(Strict):
    """The structure arm, for requests with a grammar.

    enabled: whether the arm is loaded. max_width: most drafts.
    """

    enabled: bool = True
    max_width: Positive = 16


class Acceptance(Strict):
    """Measured acceptance of a drafter. length: tokens per round, bonus token included. drafts: of each round.

    prompts: on which it was measured.
    """

    length: Annotated[float, Field(ge=1, allow_inf_nan=False)]
    drafts: Annotated[int, Field(ge=1, le=64)]
    prompts: str

    @property
    def chances(self) -> tuple[float, ...]:
        """Each draft's chance to be accepted if all drafts before it are: one value for all, found by bisection so that
        the expected tokens of a round equal `length`.
        """
        return (continuing(self.length, self.drafts + 1),) * self.drafts


class Source(Strict):
    """The origin of a part of a bundle.

    revision: the hub's commit. files: file name → SHA-256. A server compares those of a part inside the bundle at every
    start, and only `config.json` of a part from the hub.
    """

    revision: str | None = None
    files: dict[Annotated[str, Field(pattern=r"^[^/\x00]*[^/\x00.][^/\x00]*$")], str] = {}


class Manifest(Strict):
    """`whiflash.json`. Paths are relative to the bundle; "hub:owner/name" is fetched from the hub when the bundle is
    served, at the revision of its entry in `sources`.

    schema_version: of this format. name: of the bundle. target: the model that the drafters were trained for.
    eagle3: directory of the EAGLE-3 checkpoint; without one a target's own next-token head drafts. dflash: directory of
    the block drafter's checkpoint; one of the two is enough. dflash_vocabulary: of the block drafter, `full` or
    EAGLE-3's reduced one, cheaper for a small target (arXiv 2502.14856). quantization: of a drafter's products. uno:
    directory of an adapter under which the target drafts for itself. router: the neural router. entropy: thresholds of
    the entropy router. lookup: the copying arm (default: on). structure: the arm of forced text (default: on).
    chat_template: a file, unless `--chat-template` names one. tool_call_parser: SGLang's name, unless
    `--tool-call-parser` names one. sources: origins of target, eagle3, dflash, uno and router. acceptance: of eagle3
    and dflash, from which `auto` begins.
    """

    schema_version: Literal[1]
    name: str
    target: str
    eagle3: str | None = None
    dflash: str | None = None
    dflash_vocabulary: DraftVocabulary = "full"
    quantization: dict[Literal["eagle3", "dflash"], Literal["fp8"]] = {}
    uno: str | None = None
    router: NeuralRouter | None = None
    entropy: EntropyRouter = EntropyRouter()
    lookup: Lookup | None = None
    structure: Structure = Structure()
    chat_template: str | None = None
    tool_call_parser: str | None = None
    sources: dict[str, Source] = {}
    acceptance: dict[Literal["eagle3", "dflash"], Acceptance] = {}

    @property
    def drafters(self) -> Mapping[str, str]:
        """Arm → path of its checkpoint, for the drafters that the bundle names."""
        return {arm: value for arm, key in PARTS.items() if (value := getattr(self, key))}

    @property
    def quantised(self) -> frozenset[str]:
        """The arms whose drafters use fp8 matrix products."""
        return frozenset(arm for arm, key in PARTS.items() if key in self.quantization)


def embedded_bundle() -> Path:
    """Return the directory of the bundle that is shipped with the package."""
    return Path(str(resources.files("whiflash_sglang"))) / "bundles" / EMBEDDED_BUNDLE


def load_manifest(bundle: Path) -> Manifest:
    """Read and validate `whiflash.json`.

    Raises:
        ConfigError: the file is missing, is not JSON, or has a wrong or unknown key, or a path that leaves the bundle;
            the message names the key. Or it names no drafter, or sets a key that needs two drafters beside only one.
    """
    path = bundle / MANIFEST
    try:
        raw = read_json_file(path)
    except FileNotFoundError:
        raise ConfigError(f"{bundle} is not a bundle: it has no {MANIFEST}") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    try:
        manifest = Manifest.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(f"{path}: " + first_problem(error, Manifest, lambda name: f"key {name!r}")) from None
    if not (manifest.drafters or manifest.uno):
        raise ConfigError(f"{path} names no drafter: give key 'eagle3', 'dflash' or 'uno', or several")
    if manifest.router is not None:
        check_arms(f"{path}: key 'router'", NAMES, manifest.drafters)
    check_arms(f"{path}: key 'quantization'", sorted(manifest.quantised), manifest.drafters)
    if manifest.dflash_vocabulary == "eagle3":
        check_arms(f"{path}: key 'dflash_vocabulary': 'eagle3'", NAMES, manifest.drafters)
    named = {PARTS[arm]: value for arm, value in manifest.drafters.items()}
    named |= {"chat_template": manifest.chat_template or "", "uno": manifest.uno or ""}
    named["router.path"] = manifest.router.path if manifest.router else ""
    check_members(bundle, {key: path for key, path in named.items() if path and not path.startswith(HUB)})
    return manifest


def lookup_of(manifest: Manifest) -> Lookup:
    """Return a bundle's settings of the copying arm; without a seed they get the embedded bundle's seed."""
    settings = manifest.lookup or Lookup()
    if settings.seed is not None:
        return settings
    # A small model's chances are a better start for another model than even odds, and counts soon overwrite them.
    shipped = load_manifest(embedded_bundle()).lookup or Lookup()
    return settings.model_copy(update={"seed": shipped.seed})


def first_problem(error: ValidationError, model: type[BaseModel], spell: Callable[[str], str]) -> str:
    """Return the first validation error of `model` in one line; `spell` writes a field's name as the user wrote it."""
    problem = error.errors()[0]
    name = str(problem["loc"][0]) if problem["loc"] else "value"
    if problem["type"] == "extra_forbidden":
        nested = "".join(f".{key}" for key in problem["loc"][1:])
        keys = ", ".join(sorted(_known_keys(model, problem["loc"])))
        return f"{spell(name)}{nested} is unknown; known: {keys}"
    where = ".".join([spell(name), *(str(key) for key in problem["loc"][1:])])
    if problem["type"] == "literal_error":
        return f"{where}: {problem['input']!r:.200} is not one of {problem['ctx']['expected']}"
    return f"{where}: {problem['msg']} (got {problem['input']!r:.200})"


def _known_keys(model: type[BaseModel], place: tuple[int | str, ...]) -> list[str]:
    """Return the valid keys of the (nested) model that contains the key at `place`."""
    for key in place[:-1]:
        annotation = model.model_fields[str(key)].annotation
        candidates = get_args(annotation) or (annotation,)
        model = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return list(model.model_fields)
