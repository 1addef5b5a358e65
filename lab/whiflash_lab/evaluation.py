"""`whiflash lab evaluate`: a bundle against held-out prompts; answers in, table and JSON out."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from whiflash_sglang.checkpoints.manifest import load_manifest
from whiflash_sglang.drafts import arms
from whiflash_sglang.drafts.candidates import Forecast
from whiflash_sglang.formats.router import Router
from whiflash_sglang.records.request import Request
from whiflash_sglang.routing.controller import route
from whiflash_sglang.routing.neural import note
from whiflash_sglang.routing.policies import AutoPolicy
from whiflash_sglang.spans.hints import RequestHints
from whiflash_train.answers.data import answer_rows, target_path
from whiflash_train.answers.prompts import balanced, read_rows
from whiflash_train.answers.served import serve
from whiflash_train.answers.store import FeatureStore
from whiflash_train.config import Data, Hardware
from whiflash_train.origin import VocabularyMatrices
from whiflash_train.replay import JOINED, Pair, PairParts, Replay, ReplayLog, replay_answers
from whiflash_train.rounds import RoundTally
from whiflash_train.walk import LOOP, Choices, RouterWalk, choices_above, tabulate, walk

REPLAYED = {**JOINED, arms.LOOKUP: arms.LOOKUP, arms.NONE: arms.NONE}
"""The controller's arms → what is replayed in their place."""

ENTROPY_ROWS = 2048
"""Rows of logits that are held at a time."""


class KnownSignals(NamedTuple):
    """The controller's knowledge at every position: the target's entropy in nats [P], and the router's outputs [P][3]
    (ΔAL, accepted drafts of EAGLE-3, of DFlash), empty without heads.
    """

    entropy: Sequence[float]
    predicted: Sequence[Sequence[float]]


def auto_choices(answers: Sequence[Replay], known: Sequence[KnownSignals]) -> list[Choices]:
    """The arm of every round that `auto` comes to, answer by answer; it learns as it goes, as one server does.

    Drafts have their full length. Nothing costs anything, so `auto` seeks acceptance length alone.
    """
    policy = AutoPolicy(heads=any(one.predicted for one in known))
    chosen: list[Choices] = []
    for answer, one in zip(answers, known, strict=True):
        choices: dict[int, str] = {}
        for begin, end in ((0, answer.loop_from), (answer.loop_from, answer.positions)):
            run = _AutoRun(policy, answer, one, choices)
            walk(answer, run.choose, begin, end, RoundTally(), learn=run.learn)
        chosen.append(choices)
    return chosen


class _AutoRun:
    """One request under `auto`: the server's own decision of every round, kept in `choices`."""

    def __init__(
        self, policy: AutoPolicy, answer: Replay, known: KnownSignals, choices: dict[int, str]
    ) -> None:
        self._policy, self._answer, self._known = policy, answer, known
        self._state, self._choices = Request(answer.id, RequestHints()), choices

    def choose(self, position: int) -> str:
        answer, state = self._answer, self._state
        forecast: dict[str, Forecast | None] = {
            arm: None for arm, replayed in JOINED.items() if replayed in answer.accepted
        }
        if answer.copies[position] > 0:
            forecast[arms.LOOKUP] = Forecast(
                1 + float(answer.copies[position]), 1 + int(answer.proposed[position])
            )
        (arm,) = route(self._policy, [state], [forecast], None)
        if arm == arms.NONE and state.decision.promised:
            arm = arms.LOOKUP
        self._choices[position] = REPLAYED[arm]
        return REPLAYED[arm]

    def learn(self, ended: int, emitted: int) -> None:
        """Learn as a server does after a round: accepted tokens, and the signals at its end."""
        state, arm = self._state, self._state.previous or arms.NONE
        self._policy.observe(arm, state.decision, emitted)
        state.committed(arm, [0] * emitted)
        if ended < self._answer.positions:
            if "entropy" in self._policy.needs:
                state.entropy = self._known.entropy[ended]
            if self._known.predicted:
                note(state, self._known.predicted[ended])


@dataclass(frozen=True)
class EvaluationSettings:
    """How a bundle is evaluated.

    Attributes:
        limit: prompts used, balanced over the categories; None takes all.
        work: where answers and replays are kept for the next evaluation; None keeps nothing.
    """

    limit: int | None = None
    max_new_tokens: int = 160
    eagle_steps: int = 5
    seed: int = 1
    work: Path | None = None
    hardware: Hardware = field(default_factory=Hardware)


def evaluate_bundle(bundle: Path, prompts: Path, settings: EvaluationSettings) -> dict[str, Any]:
    """The figures of `tabulate`, with what they were measured on: the target answers the prompts (the first `limit`,
    balanced), and the bundle's drafters are replayed.

    Raises `WhiflashError` for a bundle and `ValueError` for prompts that cannot be used.
    """
    rows, manifest = read_rows(prompts), load_manifest(bundle)
    parts = PairParts.of_bundle(bundle, settings.eagle_steps)
    template = None if manifest.chat_template is None else bundle / manifest.chat_template
    if settings.hardware.threads:
        torch.set_num_threads(settings.hardware.threads)
    data = Data(prompts=[], tool_choice_required=1.0, max_new_tokens=settings.max_new_tokens)
    chosen = list(balanced(rows, {}, settings.seed))[: settings.limit]
    with tempfile.TemporaryDirectory() as scratch:
        work = settings.work or Path(scratch)
        with serve(
            target_path(manifest.target),
            manifest.target,
            parts.captured,
            data,
            settings.hardware,
            work=work,
            template=template,
            seed=settings.seed,
        ) as served:
            store = FeatureStore(work / "answers", hidden=served.hidden_size, layers=parts.captured)
            store.truncate_to_index()
            summary = answer_rows(chosen, served, store, keep_loops=True)
        target = VocabularyMatrices.read(work / "target", manifest.target, settings.hardware.torch_dtype)
        target = target.to(torch.device(settings.hardware.device))
        pair = Pair.load(parts, target)
        names = {row["id"] for row in chosen}
        answers = replay_answers(pair, store, names, ReplayLog(work / "replays", pair))
    return {
        "bundle": manifest.name,
        "prompts": len(chosen),
        "skipped": summary.skipped,
        "max_new_tokens": settings.max_new_tokens,
        "dtype": settings.hardware.dtype,
        **tabulate(answers, routers_of(bundle, answers, target)),
    }


def routers_of(bundle: Path, answers: Sequence[Replay], target: VocabularyMatrices) -> dict[str, RouterWalk]:
    """The entropy router at the bundle's own threshold, if there are two drafters, and `auto`, to which nothing costs
    anything. Raises `CheckpointError` where the bundle's neural router cannot be used.
    """
    manifest = load_manifest(bundle)
    tau, dwell = manifest.entropy.tau, manifest.entropy.min_dwell
    nats = [entropy_of(answer.final, target.head).tolist() for answer in answers]
    walks = {}
    if len(manifest.drafters) == 2:
        walks["entropy"] = RouterWalk([choices_above(one, tau) for one in nats], dwell)
    router = None
    if manifest.router is not None:
        router = Router.load(
            bundle / manifest.router.path,
            hidden_size=target.head.shape[1],
            device=target.head.device,
            dtype=torch.float32,
            delta_sign=manifest.router.delta_sign,
        )
    known = [
        KnownSignals(one, predictions(router, answer)) for one, answer in zip(nats, answers, strict=True)
    ]
    walks["auto-unpriced"] = RouterWalk(auto_choices(answers, known), copies=True)
    return walks


@torch.inference_mode()
def predictions(router: Router | None, answer: Replay) -> list[list[float]]:
    """ΔAL and both heads at every position [P][3]; empty where there is no router, or one without heads."""
    if router is None or router.heads is None:
        return []
    delta, accepted = router.predict(answer.final)
    rows: list[list[float]] = torch.cat([delta[:, None], accepted], dim=1).tolist()
    return rows


def figures_table(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows for a terminal."""
    overall = result["overall"]
    names, compared = list(overall["acceptance_length"]), list(overall["rounds_won"])
    groups = [*result["categories"].items(), ("overall", overall), (LOOP, result[LOOP])]
    rows = [
        [
            category,
            *(f"{figures['acceptance_length'][name]:.2f}" for name in names),
            *(f"{figures['rounds_won'][arm]:.0%}" for arm in compared),
        ]
        for category, figures in groups
        if figures is not None
    ]
    return ["category", *names, *(f"{arm} better" for arm in compared)], rows


@torch.inference_mode()
def entropy_of(states: Tensor, head: Tensor) -> Tensor:
    """Nats of the target's own distribution: `states` [N, H] after its final norm, `head` [V, H] → [N] fp32."""
    parts = []
    for rows in torch.split(states, ENTROPY_ROWS):
        log = F.linear(rows.to(head.device, head.dtype), head).float().log_softmax(-1)
        parts.append(-(log.exp() * log).sum(-1).cpu())
    return torch.cat(parts)
