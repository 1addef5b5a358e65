"""Another version of the drafters' weights, written into those that serve, between two rounds.

Parameters keep their addresses, so that captured passes read the new numbers. Draft KV that was written stays valid,
because what it was made with must not change: in EAGLE-3 the features' fusion, the norms in front of attention, K and V
(of several layers all but the last one's rest), in block drafters the fusion, K and V of every layer. Text stays the
target's whatever is written: every draft is verified. Imports no SGLang.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from whiflash_kernels import packed

from whiflash_sglang.checkpoints.manifest import NAMES
from whiflash_sglang.device.ranks import Ranks
from whiflash_sglang.errors import ConfigError, WhiflashError
from whiflash_sglang.learn.versions import Served, gain_of, path_of, read_version, record, served
from whiflash_sglang.models.dflash import DFlashDrafter
from whiflash_sglang.models.dspark import DSparkDrafter
from whiflash_sglang.models.eagle3 import Eagle3Drafter
from whiflash_sglang.models.formats import Draft, read_draft

logger = logging.getLogger("whiflash_sglang")

Load = Callable[[Draft], nn.Module]
"""A checkpoint whose configuration was read → its drafter on the CPU, in the dtype that serves."""

KINDS = (Eagle3Drafter, DFlashDrafter, DSparkDrafter)
"""Drafters whose weights may be replaced: of others nobody has said what their KV is made with."""

TARGETS = ("target_embedding", "target_lm_head")
"""Buffers that are the target's."""


class Versions(NamedTuple):
    """directory: of the versions. target: as of `read_version`. start: arm → checkpoint of version 0."""

    directory: Path
    target: str
    start: Mapping[str, Path]

    def named(self, number: int) -> dict[str, Path]:
        """Arm → checkpoint of the drafters that a version names; others go back to the start. Raises ConfigError."""
        named = read_version(self.directory, number, self.target) if number else {}
        if unknown := set(named) - set(self.start):
            raise ConfigError(f"version {number} has a drafter {NAMES[min(unknown)]}, the server has none")
        return named


class LiveWeights:
    """The weights of the neural drafters of a server, which all processes that serve a model write, or none.

    Args:
        models: by arm. versions: that they may be given. load: reads a checkpoint. written: called when weights were
            written, for what was copied of them. ranks: the processes. behind: a context in which what is issued to the
            device runs behind the forward that is under way.

    Attributes:
        used: the version that serves. gain: as of `gain_of` it. swaps: versions that were taken, and refused, since the
            start. why: of the last refusal.
    """

    def __init__(
        self,
        models: Mapping[str, nn.Module],
        versions: Versions,
        *,
        load: Load,
        written: Callable[[], object],
        ranks: Ranks,
        behind: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self.used, self.gain = Served(), gain_of(versions.directory, 0)
        self.swaps = {"taken": 0, "refused": 0}
        self.why = ""
        self._models, self._versions = models, versions
        self._load, self._written, self._ranks, self._behind = load, written, ranks, behind
        self._prepared: tuple[int, dict[str, nn.Module]] | None = None

    def snapshot(self) -> dict[str, Any]:
        """For `GET /whiflash/state`."""
        return {**self.used._asdict(), "gain": self.gain, **self.swaps, "why": self.why}

    def restore(self) -> None:
        """Begin with the version that was served last; with version 0 where that cannot be used, as the log says."""
        used = self._ranks.broadcast(self._served_last)
        if not used.version:
            return
        try:
            self.prepare(used.version)
            self._write(used)
        except ConfigError as error:
            logger.warning("WHIFLASH: the server begins with its own drafters, version 0: %s", error)

    def prepare(self, number: int) -> None:
        """Read a version and compare it with what serves, in every process. Nothing changes yet.

        Raises:
            ConfigError: at least one of them cannot use it.
        """
        self._prepared = None
        why = self._ranks.objection(self._read(number))
        if why is not None:
            self._prepared, self.why = None, why
            self.swaps["refused"] += 1
            raise ConfigError(why)

    def use(self, number: int) -> None:
        """Draft with the version that was prepared from the next round on, and after a restart."""
        before = self.used.before if number == self.used.version else self.used.version
        self._write(Served(number, before))
        self.swaps["taken"] += 1
        self.why = ""
        if self._ranks.leads:
            try:
                record(self._versions.directory, self.used)
            except OSError as error:
                logger.warning(
                    "WHIFLASH: version %d serves, but a restart will not begin with it: %s: %s",
                    number,
                    self._versions.directory,
                    error.strerror,
                )

    def _served_last(self) -> Served:
        try:
            return served(self._versions.directory)
        except (ConfigError, OSError) as error:
            logger.warning("WHIFLASH: the server begins with its own drafters, version 0: %s", error)
            return Served()

    def _read(self, number: int) -> str | None:
        """Prepare it in this process; or why it cannot be used.

        Its files may hold anything, and a rank that left here would leave the others waiting: every failure is one.
        """
        found = {}
        place = path_of(self._versions.directory, number)
        try:
            named = self._versions.named(number)
            for arm, live in self._models.items():
                if arm not in named and type(live) not in KINDS:
                    continue  # it never had other weights
                check_kind(arm, live)
                path = named.get(arm, self._versions.start[arm])
                place = path / "config.json"
                draft = read_draft(path, arm)
                check_sizes(f"version {number}: {place}", live, draft.format.model, draft.config)
                place = path
                candidate = self._load(draft)
                check_fits(f"version {number}: {path}", live, candidate)
                found[arm] = candidate
        except (WhiflashError, OSError) as error:
            return str(error)
        except Exception as error:
            logger.warning("WHIFLASH: version %d cannot be read", number, exc_info=True)
            reason = next(iter(str(error).splitlines()), "")
            return f"version {number}: {place} cannot be read: {type(error).__name__}: {reason:.200}"
        self._prepared = number, found
        return None

    @torch.no_grad()
    def _write(self, used: Served) -> None:
        if self._prepared is None or self._prepared[0] != used.version:
            raise ValueError(f"version {used.version} was not prepared")
        _, found = self._prepared
        self._prepared = None
        with self._behind():
            for arm, candidate in found.items():
                write(self._models[arm], candidate)
            self._written()
        self.used, self.gain = used, gain_of(self._versions.directory, used.version)


def check_kind(arm: str, live: nn.Module) -> None:
    """Raise ConfigError for a drafter whose weights cannot be replaced."""
    if type(live) not in KINDS:
        raise ConfigError(
            f"the weights of a {type(live).__name__} ({arm}) cannot be replaced while it serves; only those of "
            f"{', '.join(kind.__name__ for kind in KINDS)}"
        )


def check_sizes(name: str, live: nn.Module, kind: type[nn.Module], config: Any) -> None:
    """Whether a drafter of this kind and configuration, which need not be built, may take the place of `live`.

    Raises:
        ConfigError: naming the key that differs.
    """
    if type(live) is not kind:
        raise ConfigError(f"{name} is a {kind.__name__}, a {type(live).__name__} serves")
    here, there = asdict(cast("Any", live).config), asdict(config)
    if here != there:
        key = next(key for key in here if here[key] != there[key])
        raise ConfigError(f"{name} has {key} {there[key]!r:.200}, the drafter that serves has {here[key]!r}")


def check_fits(name: str, live: nn.Module, candidate: nn.Module) -> None:
    """Whether `candidate` may take the place of `live`, whose draft KV stays.

    Raises:
        ConfigError: another kind, another configuration, NaN or infinity, or a part changed that must stay; named.
    """
    check_sizes(name, live, type(candidate), cast("Any", candidate).config)
    parameters = dict(candidate.named_parameters())
    for key, value in live.named_parameters():
        found = parameters[key]
        if found.shape != value.shape:
            raise ConfigError(f"{name}: {key} is {list(found.shape)}, {list(value.shape)} serves")
        if not torch.isfinite(found).all():
            raise ConfigError(f"{name}: {key} holds NaN or infinity")
    for key, now, then in frozen(live, candidate):
        if (now is None) != (then is None) or (
            now is not None and then is not None and not torch.equal(now.to(then), then)
        ):
            raise ConfigError(
                f"{name}: {key} differs from what serves; cached draft KV was made with it, so it must stay. Restart "
                "the server with this checkpoint instead"
            )


def frozen(live: nn.Module, candidate: nn.Module) -> Iterator[tuple[str, Tensor | None, Tensor | None]]:
    """Names of the parts that must stay, with their values in both."""
    parameters = dict(candidate.named_parameters())
    for key, value in live.named_parameters():
        first = first_frozen_row(live, key)
        if first is not None:
            yield key, value[first:], parameters[key][first:]
    buffers = dict(candidate.named_buffers())
    for key, buffer in live.named_buffers():
        if key not in TARGETS:
            yield key, buffer, buffers.get(key)


def fingerprint(models: Mapping[str, nn.Module]) -> str:
    """Equal for drafters, by arm, whose draft KV is interchangeable: versions of one pair have the same one."""
    digest = blake2b(digest_size=8)
    for arm, model in models.items():
        digest.update(f"{arm} {type(model).__name__} {cast('Any', model).config}".encode())
        if type(model) in KINDS:
            parts = [(key, value) for key, value, _ in frozen(model, model)]
        else:
            parts = [*model.named_parameters(), *model.named_buffers()]
        for key, value in parts:
            if value is not None and key not in TARGETS:
                digest.update(f"{key} {tuple(value.shape)} {value.dtype}".encode())
                digest.update(value.detach().reshape(-1).view(torch.uint8).cpu().numpy().data)
    return digest.hexdigest()


def first_frozen_row(model: nn.Module, name: str) -> int | None:
    """The row from which on a parameter must stay; None: it may change, all of it.

    The one list of what cached draft KV is made with, for whoever writes weights and for whoever trains them.
    """
    layers: Any = model.layers
    part, _, rest = name.partition(".")
    if part in ("fc", "fc_norm", "input_norm", "hidden_norm"):
        return 0
    if part != "layers":
        return None
    number, _, rest = rest.partition(".")
    layer = layers[int(number)]
    chain = isinstance(model, Eagle3Drafter)
    if chain and int(number) < len(layers) - 1:
        return 0
    if chain and rest.startswith(("embedding_norm.", "hidden_norm.")):
        return 0
    if rest.startswith("attention.k_norm."):
        return 0
    return int(layer.attention.query_size) if rest.startswith("attention.qkv.") else None


def write(live: nn.Module, candidate: nn.Module) -> None:
    """Copy a candidate's parameters into those that serve, and make packed copies of these again."""
    parameters = dict(candidate.named_parameters())
    for key, value in live.named_parameters():
        rewrite(value, parameters[key])


def rewrite(held: Tensor, value: Tensor) -> None:
    """Write into a tensor that serves, whose packed copy follows."""
    was_packed = packed.is_packed(held)
    packed.unpack([held])
    held.copy_(value)
    if was_packed:
        packed.pack([held], at_most=held.nbytes)
