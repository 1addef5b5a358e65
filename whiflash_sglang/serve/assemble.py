"""Builds the parts of a worker from settings: drafters, router, policy, and the stages of a round."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Protocol

import torch

from whiflash_sglang.arms.base import Drafter, of_text, widest_of, with_kv
from whiflash_sglang.arms.block import DFlashArm
from whiflash_sglang.arms.chain import ChainArm, Eagle3Arm, MTPArm, ParallelArm
from whiflash_sglang.arms.lookup import LookupArm
from whiflash_sglang.arms.structure import StructureArm
from whiflash_sglang.arms.uno import UnoArm
from whiflash_sglang.cache.penalties import MOST_PENALISED, PenaltyRows
from whiflash_sglang.cache.tokens import SamplingRows, StopTable
from whiflash_sglang.checkpoints.bundle import verify
from whiflash_sglang.checkpoints.fit import block_size_of, target_layers
from whiflash_sglang.checkpoints.manifest import NeuralRouter
from whiflash_sglang.device.ranks import Ranks
from whiflash_sglang.drafts import arms
from whiflash_sglang.engine.forward import graphs, triton_backend
from whiflash_sglang.engine.forward.adapted import AdaptedTarget
from whiflash_sglang.engine.forward.sampling import scales_rates
from whiflash_sglang.engine.forward.target import Target
from whiflash_sglang.engine.scheduler import kv_budget
from whiflash_sglang.engine.scheduler.spec_worker import max_running_requests
from whiflash_sglang.errors import ConfigError
from whiflash_sglang.formats.eagle3 import Eagle3Drafter
from whiflash_sglang.formats.mtp import MTPDrafter
from whiflash_sglang.formats.packed import pack_modules, quantise_modules
from whiflash_sglang.formats.router import Layers, read_router
from whiflash_sglang.formats.table import read_draft
from whiflash_sglang.prices.costs import Costs
from whiflash_sglang.round.catch_up import DraftSync
from whiflash_sglang.round.draft import DraftStage
from whiflash_sglang.round.ends import GraphEnds
from whiflash_sglang.round.epilogue import Epilogue
from whiflash_sglang.round.forcing import Forcing
from whiflash_sglang.round.learning import Learner
from whiflash_sglang.round.planning import Planner, rows_of
from whiflash_sglang.round.signals import SignalReader
from whiflash_sglang.round.sources import DraftSources
from whiflash_sglang.routing.controller import Controller
from whiflash_sglang.routing.neural import NeuralPolicy
from whiflash_sglang.routing.policies import AutoPolicy, EntropyPolicy, Pinned, Policy, RandomPolicy
from whiflash_sglang.serve.lifecycle import Lifecycle
from whiflash_sglang.serve.metrics import Observed, Publisher
from whiflash_sglang.serve.verify import VerifyStage
from whiflash_sglang.settings.config import NO_ROUTER, Settings
from whiflash_sglang.spans.prediction import prediction_reader
from whiflash_sglang.spans.vocabulary import token_bytes, vocabulary_of
from whiflash_sglang.structure.spending import Spending


def build_drafters(settings: Settings, target: Target, spending: Spending, *, late: bool) -> dict[str, Drafter]:
    """Load the drafters' checkpoints, which were checked against the target when the arguments were read.

    late: as in `LookupArm`.

    The order of arms matters: tokens that a grammar forces come before copies, since they are surer. Without a
    tokenizer there are no grammars, and text is copied unchanged.

    Raises:
        CheckpointError: a file is missing or damaged. ConfigError: a file is not the bundle's, or this GPU has no fp8.
    """
    verify(settings.checksums)
    drafts = {arm: read_draft(path, arm) for arm, path in settings.drafters.items()}
    layers = {arm: target_layers(draft, target.shape.num_layers) for arm, draft in drafts.items()}
    captured = tuple(sorted({layer for wanted in layers.values() for layer in wanted}))
    models = {
        arm: draft.load(
            device=target.device,
            dtype=target.dtype,
            target_embedding=target.embedding,
            target_lm_head=target.lm_head,
            shared=target.shared,
        ).requires_grad_(False)
        for arm, draft in drafts.items()
    }
    for arm, model in models.items():
        (quantise_modules if arm in settings.quantised else pack_modules)(model)
    named = settings.drafters.get(arms.DIFFUSION)
    block = block_size_of(named, settings.block_size) if named else 0
    positions = target.context_len + max(block, settings.eagle_steps)
    drafters: list[Drafter] = []
    if arms.AR in models:
        steps = settings.eagle_steps
        drafters.append(chain_arm(models[arms.AR], captured, layers[arms.AR], steps, positions))
    if arms.DIFFUSION in models:
        vocabulary = None
        if settings.dflash_vocabulary == "eagle3":
            ids = torch.arange(models[arms.AR].draft_vocab_size, device=target.device)
            vocabulary = models[arms.AR].target_ids(ids)
        wanted = layers[arms.DIFFUSION]
        # A block starts from the target's embedding module, as in SGLang; EAGLE-3 normalises rows of its matrix.
        models[arms.DIFFUSION].embedding_scale = target.embedding_scale
        drafters.append(DFlashArm(models[arms.DIFFUSION], captured, wanted, block, positions, vocabulary))
    if settings.uno is not None:
        drafters.append(UnoArm(AdaptedTarget(target, settings.uno), settings.uno_drafts))
    if settings.structure.enabled and target.tokenizer is not None:
        words = vocabulary_of(target.tokenizer, target.shape.vocab_size)
        drafters.append(StructureArm(settings.structure, words, spending))
    if settings.lookup.enabled:
        drafters.append(LookupArm(settings.lookup, late))
    by_arm = {drafter.arm: drafter for drafter in drafters}
    for drafter in with_kv(by_arm).values():
        drafter.kv_dtype = kv_budget.draft_kv_dtype(target)
    return by_arm


def chain_arm(
    model: Eagle3Drafter | MTPDrafter, captured: tuple[int, ...], layers: tuple[int, ...], steps: int, positions: int
) -> ChainArm:
    """Make the arm `ar` of a loaded checkpoint, by its format; arguments as in `Eagle3Arm`."""
    if isinstance(model, MTPDrafter):
        return MTPArm(model, captured, layers, steps, positions)
    arm = Eagle3Arm if model.config.mask_token is None else ParallelArm
    return arm(model, captured, layers, steps, positions)


def load_router(settings: NeuralRouter | None, target: Target) -> Layers | None:
    """Load the router's weights to the target's device; None if the settings name no router. Raises CheckpointError."""
    if settings is None:
        return None
    return read_router(Path(settings.path), target.shape.hidden_size, target.device, settings.delta_sign)


def reserve(drafters: Mapping[str, Drafter], sync: DraftSync, target: Target, requests: int) -> kv_budget.Reservation:
    """Return the memory that a worker of `requests` requests will allocate, before SGLang sizes its pools."""
    widest, kv = widest_of(drafters) + 1, with_kv(drafters).values()
    parts = kv_budget.for_requests(target, requests, widest, GraphEnds.bytes_for(widest))
    parts["tables"] += torch.int64.itemsize  # the number by which graphs commit (`GraphEnds`)
    slots = requests + graphs.spare_slots(requests, widest)
    parts["attention"] = triton_backend.kept_bytes(target.runner, slots, widest)
    rows = kv_budget.request_rows(requests)
    parts["rings"] = sync.bytes_for(rows)
    parts["drafters"] = sum(drafter.bytes_for(rows) for drafter in of_text(drafters).values())
    vocabulary = target.shape.vocab_size
    captures = graphs.captures_passes(target.device)
    penalties = PenaltyRows(rows, vocabulary, min(requests, MOST_PENALISED) * captures, "meta")
    parts["penalties"] = sum(part.nbytes for part in penalties.few)
    if captures:
        most = graphs.most_rows(requests, widest)
        parts["masks and log-probabilities"] = GraphEnds.second_bytes(most, widest, vocabulary)
        parts["drafters"] += sync.captured_bytes(requests)
        # Passes are captured into the same memory, one at a time.
        parts["drafters"] += max((drafter.captured_bytes(requests) for drafter in kv), default=0)
    per_token = sum(drafter.kv_bytes_per_token() for drafter in kv)
    return kv_budget.reserve(parts, per_token=per_token, requests=requests, widest=widest, device=target.device)


def build_controller(
    settings: Settings, target: Target, drafters: Mapping[str, Drafter], *, heads: bool, overlaps: bool
) -> Controller:
    """Make the controller with its prices and policy. heads: as in `build_policy`. overlaps: as in `Costs`."""
    vocabulary = token_bytes(target.tokenizer) if target.tokenizer else ()
    costs = Costs(partial(rows_of, drafters), overlaps)
    return Controller(build_policy(settings, heads=heads), costs, vocabulary)


def build_policy(settings: Settings, *, heads: bool = False) -> Policy:
    """Make the policy of the settings; ConfigError if it is `neural` without a router. heads: the router has heads."""
    match settings.router:
        case "auto":
            passes = bool(settings.drafters or settings.uno)
            return AutoPolicy(heads=heads, passes=passes, measured=settings.measured)
        case "entropy":
            return EntropyPolicy(settings.entropy.tau, settings.entropy.min_dwell)
        case "ar" | "diffusion" | "lookup" | "uno" | "none":
            return Pinned(settings.router)
        case "random":
            return RandomPolicy()
        case "neural":
            if settings.neural is None:
                raise ConfigError(NO_ROUTER)
            return NeuralPolicy(settings.neural.threshold, settings.neural.min_dwell)


class Parts(Observed, Protocol):
    """The members of a worker that `Stages` reads. They exist once the KV pools do."""

    target: Target
    ranks: Ranks
    router: Layers | None
    spending: Spending
    publisher: Publisher
    overlaps: bool


class Stages:
    """The stages of a worker's rounds, and the lifecycle of its requests.

    They are built before graphs are captured: verification graphs commit their rows, unless texts are forced.
    """

    def __init__(self, parts: Parts) -> None:
        drafters, sync, quarantine = parts.drafters, parts.sync, parts.quarantine
        target, tokens, widest = parts.target, parts.tokens, widest_of(drafters) + 1
        stops = StopTable(len(tokens.data), target.device)
        rows = SamplingRows(len(tokens.data), target.random_seed, target.device)
        places = min(max_running_requests(), MOST_PENALISED) * graphs.captures_passes(target.device)
        penalties = PenaltyRows(len(tokens.data), target.shape.vocab_size, places, target.device)
        self.forcing: Forcing | None = None
        if parts.settings.force_recorded:
            width = tokens.data.shape[1]
            self.forcing = Forcing(len(tokens.data), width, target.shape.vocab_size, target.device)
        self.epilogue = Epilogue(sync.rings, tokens.data, stops, rows.data, penalties)
        self.signals = SignalReader(parts.router, rows.data, scales_rates)
        self.ends = GraphEnds(self.epilogue, self.signals, widest, lambda: parts.controller.policy.needs)
        if self.forcing is None:
            target.end_graphs_with(self.ends)
        sources = DraftSources(drafters, quarantine, target.shape.vocab_size, parts.spending)
        longest = parts.settings.lookup.prediction_tokens
        reader = prediction_reader(target.tokenizer, longest, target.shape.vocab_size)
        holders = of_text(drafters), sync, parts.controller, tokens, stops, rows, penalties
        figures = parts.tally, parts.publisher, parts.spool
        self.lifecycle = Lifecycle(*holders, reader, self.forcing, quarantine, *figures)
        self.planner = Planner(drafters, sync, parts.controller, parts.clock, quarantine, sources, parts.ranks)
        self.drafting = DraftStage(
            drafters=drafters,
            sync=sync,
            slot_table=target.slot_table,
            text=tokens.data,
            stops=stops.few,
            sampling=rows.data,
            sources=sources,
            quarantine=quarantine,
            rows_for=target.rows_for,
            overlaps=parts.overlaps,
        )
        self.verifier = VerifyStage(target, self.epilogue, self.ends, self.forcing, parts.spending)
        learns = drafters, parts.controller, parts.clock, parts.tally, quarantine, sources.proposers, parts.ranks
        self.learner = Learner(*learns, sync.verifying)
