"""Another version of the drafters' weights, written into those that serve, between two rounds.

A thread reads a version, judges it and puts it beside what serves (`staging`), while rounds go on. Between two of them
only its numbers are copied: on a GPU to where captured passes read them, on a CPU the parameters take its memory. Draft
KV stays valid, because what it was made with must not change: in EAGLE-3 the features' fusion, the norms in front of
attention, K and V (of several layers all but the last one's rest), in block drafters the fusion, K and V of every
layer. Text stays the target's whatever is written: every draft is verified. Imports no SGLang.
"""

import logging
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict
from hashlib import blake2b
from math import inf, isfinite
from pathlib import Path
from threading import Thread, get_native_id
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from whiflash_kernels import packed

from whiflash_sglang.checkpoints.manifest import NAMES
from whiflash_sglang.device.ranks import Ranks
from whiflash_sglang.errors import ConfigError, WhiflashError
from whiflash_sglang.formats.eagle3 import Eagle3Drafter
from whiflash_sglang.formats.table import FORMATS, Draft, read_draft
from whiflash_sglang.updates.staging import Staged, Staging
from whiflash_sglang.updates.versions import VersionInUse, gain_of, path_of, read_version, record, served

logger = logging.getLogger("whiflash_sglang")

Load = Callable[[Draft], nn.Module]
"""A checkpoint whose configuration was read → its drafter on the CPU, in the dtype that serves."""

KINDS = tuple(dict.fromkeys(one.model for one in FORMATS if one.swappable))
"""Drafters whose weights may be replaced: of others nobody has said what their KV is made with."""

TARGETS = ("target_embedding", "target_lm_head")
"""Buffers that are the target's."""

NICE = 10
"""Niceness of a thread that reads a version: beside a server that uses every core it has a tenth of one's time."""

OUTCOMES = 64
"""Switches whose outcome is remembered for those who asked for them."""


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


class Reading(Thread):
    """A version that is read beside the rounds. why: it cannot be used; None: it can, as `staged`, with this gain."""

    def __init__(self, number: int, work: Callable[["Reading"], None]) -> None:
        super().__init__(name=f"version {number}", daemon=True)  # a server that ends waits for no disk
        self.number, self._work = number, work
        self.why: str | None = f"version {number} was not read"
        self.staged: dict[str, Staged] = {}
        self.gain: dict[str, float] = {}

    def run(self) -> None:
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, get_native_id(), NICE)  # on Linux the thread's alone
        self._work(self)


class LiveWeights:
    """The weights of the neural drafters of a server, which all processes that serve a model write, or none.

    Args:
        models: by arm. versions: that they may be given. load: reads a checkpoint. written: called when weights were
            written, for what was copied of them. ranks: the processes. behind: a context in which what is issued to the
            device runs behind the forward that is under way.

    Attributes:
        used: the version that serves. gain: as of `gain_of` it. swaps: versions that were taken, and refused, since the
            start. why: of the last refusal. outcomes: ticket → why a switch was refused, empty if it was not; of those
            that ended last.
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
        self.used, self.gain = VersionInUse(), gain_of(versions.directory, 0)
        self.swaps = {"taken": 0, "refused": 0}
        self.why = ""
        self.outcomes: dict[str, str] = {}
        self._models, self._versions = models, versions
        self._load, self._written, self._ranks, self._behind = load, written, ranks, behind
        self._asked: deque[tuple[int, str]] = deque()
        self._reading: Reading | None = None
        self._staging = Staging(
            {
                arm: {key: live.get_parameter(key)[rows] for key, rows in changing(live).items()}
                for arm, live in models.items()
                if type(live) in KINDS
            }
        )

    def snapshot(self) -> dict[str, Any]:
        """State for `GET /whiflash/state`."""
        loading = self._asked[0][0] if self._asked else None
        return {**self.used._asdict(), "gain": self.gain, "loading": loading, **self.swaps, "why": self.why}

    def restore(self) -> None:
        """Begin with the version that was served last; with version 0 where that cannot be used, as the log says."""
        used = self._ranks.broadcast(self._served_last)
        if not used.version:
            return
        reading = self._begun(used.version)
        reading.join()
        why = self._ranks.objection(reading.why)
        if why is None:
            self._write(used, reading)
        else:
            logger.warning("WHIFLASH: the server begins with its own drafters, version 0: %s", why)

    def ask(self, number: int, ticket: str = "") -> None:
        """Draft with a version once it is read, and those that were asked for before have had their turn.

        Called in all processes alike. ticket: the name of its outcome.
        """
        self._asked.append((number, ticket))
        if self._reading is None:
            self._reading = self._begun(number)

    def advance(self) -> bool:
        """Called between two rounds, in all processes alike: whether a switch ended, taken or refused.

        A version is taken when every process has read it, so all draft with it from the same round on, and after a
        restart.
        """
        reading = self._reading
        if reading is None or self._ranks.objection("not yet" if reading.is_alive() else None) is not None:
            return False
        number, ticket = self._asked.popleft()
        why = self._ranks.objection(reading.why)
        if why is None:
            before = self.used.before if number == self.used.version else self.used.version
            self._write(VersionInUse(number, before), reading)
            self._remember()
        else:
            logger.warning("WHIFLASH: version %d is refused: %s", number, why)
        self.swaps["taken" if why is None else "refused"] += 1
        self.why = self.outcomes[ticket] = why or ""
        if len(self.outcomes) > OUTCOMES:
            del self.outcomes[next(iter(self.outcomes))]
        self._reading = self._begun(self._asked[0][0]) if self._asked else None
        return True

    def _begun(self, number: int) -> Reading:
        reading = Reading(number, self._read)
        reading.start()
        return reading

    def _remember(self) -> None:
        if not self._ranks.leads:
            return
        try:
            record(self._versions.directory, self.used)
        except OSError as error:
            logger.warning(
                "WHIFLASH: version %d serves, but a restart will not begin with it: %s: %s",
                self.used.version,
                self._versions.directory,
                error.strerror,
            )

    def _served_last(self) -> VersionInUse:
        try:
            return served(self._versions.directory)
        except (ConfigError, OSError) as error:
            logger.warning("WHIFLASH: the server begins with its own drafters, version 0: %s", error)
            return VersionInUse()

    def _read(self, reading: Reading) -> None:
        """Put a version beside what serves in this process; or say why it cannot be used.

        Its files may hold anything, and a rank that left here would leave the others waiting: every failure is one.
        """
        number = reading.number
        place = path_of(self._versions.directory, number)
        try:
            named = self._versions.named(number)
            with torch.no_grad(), self._staging.beside():
                for arm, live in self._models.items():
                    if arm not in named and type(live) not in KINDS:
                        continue  # it never had other weights
                    check_kind(arm, live)
                    path = named.get(arm, self._versions.start[arm])
                    place = path / "config.json"
                    draft = read_draft(path, arm)
                    check_sizes(f"version {number}: {place}", live, draft.format.model, draft.config)
                    place = path
                    candidate = self._load(draft).requires_grad_(False)  # what wants gradients is not packed
                    check_fits(f"version {number}: {path}", live, candidate)
                    parameters = {key: candidate.get_parameter(key) for key in changing(live)}
                    packed.pack(
                        [v for key, v in parameters.items() if packed.is_packed(live.get_parameter(key))],
                        at_most=inf,
                    )
                    reading.staged[arm] = self._staging.stage(arm, parameters)
            reading.gain = gain_of(self._versions.directory, number)
            reading.why = None
        except (WhiflashError, OSError) as error:
            reading.why = str(error)
        except Exception as error:
            logger.warning("WHIFLASH: version %d cannot be read", number, exc_info=True)
            reason = next(iter(str(error).splitlines()), "")
            reading.why = f"version {number}: {place} cannot be read: {type(error).__name__}: {reason:.200}"

    @torch.no_grad()
    def _write(self, used: VersionInUse, reading: Reading) -> None:
        left: list[Any] = []
        with self._behind(), self._staging.read():
            for arm, staged in reading.staged.items():
                left += write(self._models[arm], staged)
            self._written()
        self.used, self.gain = used, reading.gain
        # To give so much memory back takes as long as the copy: not in a round, and piece by piece.
        left += [value for staged in reading.staged.values() for value in staged.values()]
        reading.staged = {}
        Thread(target=_drop, args=(left,), daemon=True).start()


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
        if found.numel() and not all(map(isfinite, torch.stack(torch.aminmax(found)).tolist())):
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


def changing(model: nn.Module) -> dict[str, slice]:
    """Names of the parameters that may change, and which of their rows."""
    first = {key: first_frozen_row(model, key) for key, _ in model.named_parameters()}
    return {key: slice(row) for key, row in first.items() if row != 0}


def write(live: nn.Module, staged: Staged) -> list[Tensor | None]:
    """Give the parameters that serve the numbers that may change; the others are equal, and are left.

    Returns the tensors that nobody reads any more.
    """
    left: list[Tensor | None] = []
    for key, rows in changing(live).items():
        held, value = live.get_parameter(key), staged[key]
        if rows == slice(None) and may_move(held):
            left.append(held.data)
            held.data = value.data
        else:
            held[rows].copy_(value[rows])
        left.append(packed.follow(held, value))
    return left


def may_move(parameter: Tensor) -> bool:
    """Whether a parameter may have its numbers elsewhere: on a CPU nobody has captured their address.

    A view of one may only be kept of a part that must stay.
    """
    return parameter.device.type == "cpu"


def _drop(left: list[Any]) -> None:
    while left:
        left.pop()


def rewrite(held: Tensor, value: Tensor) -> None:
    """Write into a tensor that serves, whose packed copy follows."""
    held.copy_(value)
    packed.follow(held, value)
