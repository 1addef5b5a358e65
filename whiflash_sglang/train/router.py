"""`whiflash train --step router`: stored answers in, a router file, its report and its calibration plot out.

Both drafters are replayed from the same prefixes; the router learns by regression what they accept. ΔAL at an answer
position is AL(EAGLE-3) - AL(DFlash) of a round that starts there (same-round counterfactuals, arXiv 2606.07710); the
input is the target's state after the final norm at the last committed position. Two heads on the same hidden layer
learn the accepted drafts of each. Answers are split by their id, never positions: those of one answer resemble each
other.
"""

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from whiflash_sglang import arms
from whiflash_sglang.checkpoints.manifest import NAMES, check_arms
from whiflash_sglang.jsonl import read_json_file
from whiflash_sglang.models.router import ROUTER_FILE, Router
from whiflash_sglang.train.answers.provenance import Provenance, trained_on
from whiflash_sglang.train.answers.store import FeatureStore, open_stores
from whiflash_sglang.train.config import RouterTraining, TrainConfig
from whiflash_sglang.train.drafters.initialisation import origin_of
from whiflash_sglang.train.drafters.runner import last_checkpoint
from whiflash_sglang.train.replay import Pair, Parts, Replay, ReplayLog, Source, replay_answers
from whiflash_sglang.train.walk import RouterWalk, choices_above, tabulate


class RouterData(NamedTuple):
    """`states` [N, H] fp32, the target's; `accepted` [N, 2] fp32: drafts accepted of EAGLE-3 and of
    DFlash."""

    states: Tensor
    accepted: Tensor

    @property
    def delta(self) -> Tensor:
        """[N]: ΔAL."""
        return self.accepted[:, 0] - self.accepted[:, 1]


@dataclass(frozen=True)
class Split:
    """Answers that the router learns from, and those that it never sees."""

    learn: list[Replay]
    held_out: list[Replay]


def is_held_out(answer_id: str, share: float) -> bool:
    """Whether an answer belongs to the held-out `share`: decided by its id alone, so calibration finds the same."""
    return int(hashlib.sha256(answer_id.encode()).hexdigest(), 16) % 10_000 < share * 10_000


def split(answers: Sequence[Replay], share: float) -> Split:
    """Raises `ValueError` where one part would be empty."""
    parts = Split(
        [one for one in answers if not is_held_out(one.id, share)],
        [one for one in answers if is_held_out(one.id, share)],
    )
    if not parts.learn or not parts.held_out:
        raise ValueError(
            f"{len(answers)} answers leave none to learn from or none to hold out (router.held_out {share}): "
            "generate more with `whiflash train --step data`"
        )
    return parts


def router_data(answers: Sequence[Replay]) -> RouterData:
    """All positions before a loop."""
    states, accepted = [], []
    for answer in answers:
        states.append(answer.final[: answer.loop_from].float())
        lengths = [torch.from_numpy(answer.accepted[arm][: answer.loop_from]) for arm in arms.PAIR]
        accepted.append(torch.stack(lengths, dim=1).float())
    return RouterData(torch.cat(states), torch.cat(accepted))


class _Rows(Dataset[dict[str, Tensor]]):
    """Whole batches are gathered at once: positions are many and small."""

    def __init__(self, data: RouterData) -> None:
        self._data = data

    def __len__(self) -> int:
        return len(self._data.states)

    def __getitems__(self, rows: list[int]) -> dict[str, Tensor]:
        return {"states": self._data.states[rows], "accepted": self._data.accepted[rows]}


class _Regression(nn.Module):
    """Mean squared error of ΔAL and of both heads, on standardised states."""

    def __init__(self, router: Router, data: RouterData, dropout: float) -> None:
        super().__init__()
        self.router, self.dropout = router, dropout
        self.mean: Tensor
        self.deviation: Tensor
        self.register_buffer("mean", data.states.mean(0))
        self.register_buffer("deviation", data.states.std(0).clamp(min=1e-6))

    def forward(self, states: Tensor, accepted: Tensor) -> dict[str, Tensor]:
        """→ {"loss": scalar}."""
        states = F.dropout((states - self.mean) / self.deviation, self.dropout, self.training)
        delta, drafts = self.router.read(F.dropout(self.router.hidden(states), self.dropout, self.training))
        return {"loss": F.mse_loss(delta, accepted[:, 0] - accepted[:, 1]) + F.mse_loss(drafts, accepted)}


def fit(learn: RouterData, held_out: RouterData, run: Path, settings: RouterTraining, seed: int) -> Router:
    """Fit by mean squared error; the epoch with the lowest error on the held-out answers is kept.

    `run`: checkpoints of this very training (same data, same settings); a killed one goes on from there.
    """
    torch.manual_seed(seed)
    model = _Regression(Router(learn.states.shape[1], settings.width, heads=True), learn, settings.dropout)
    arguments = TrainingArguments(
        output_dir=str(run),
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch,
        per_device_eval_batch_size=8192,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        lr_scheduler_type="cosine",
        warmup_steps=0.04,  # below 1: a share of all steps
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=False,
        label_names=["accepted"],
        prediction_loss_only=True,
        logging_strategy="epoch",
        seed=seed,
        data_seed=seed,
        use_cpu=not torch.cuda.is_available(),
        report_to=[],
        remove_unused_columns=False,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=_Rows(learn),
        eval_dataset=_Rows(held_out),
        data_collator=lambda batch: batch,
    )
    trainer.train(resume_from_checkpoint=last_checkpoint(Path(str(arguments.output_dir))))
    (run / "log.json").write_text(json.dumps(trainer.state.log_history))
    return model.router.cpu().standardised(model.mean.cpu(), model.deviation.cpu()).eval()


def run_key(digest: str, parts: Split, settings: RouterTraining, seed: int) -> str:
    """Names a training run: another pair of drafters, other answers or other settings are another run."""
    ids = [[one.id for one in answers] for answers in (parts.learn, parts.held_out)]
    text = json.dumps([digest, ids, settings.model_dump(), seed])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class RouterQuality(NamedTuple):
    """On positions that the router was not trained on.

    r_squared: of ΔAL; of the heads `r_squared_eagle3`, `r_squared_dflash`. sign_accuracy: where ΔAL is not zero, of
    the router at threshold 0; best_sign_accuracy, entropy_sign_accuracy: of the router and of entropy, each at its
    best threshold on this very data; majority_sign_accuracy: of always naming the drafter that is better more often.
    """

    r_squared: float
    r_squared_eagle3: float
    r_squared_dflash: float
    sign_accuracy: float
    best_sign_accuracy: float
    entropy_sign_accuracy: float
    majority_sign_accuracy: float


@torch.inference_mode()
def router_quality(router: Router, data: RouterData, entropy: Tensor) -> RouterQuality:
    """`entropy` [N]: the target's, at the same positions."""
    delta, accepted = router.predict(data.states)
    decided = data.delta != 0
    positive = data.delta[decided] > 0
    correct = (delta[decided] > 0) == positive
    share = positive.float().mean().item()
    return RouterQuality(
        _r_squared(delta, data.delta),
        _r_squared(accepted[:, 0], data.accepted[:, 0]),
        _r_squared(accepted[:, 1], data.accepted[:, 1]),
        correct.float().mean().item(),
        best_accuracy(delta[decided], positive),
        best_accuracy(entropy[decided], positive),
        max(share, 1 - share),
    )


def best_accuracy(signal: Tensor, positive: Tensor) -> float:
    """Accuracy of "positive if the signal is at least a threshold", for the threshold that is right most often.

    `signal` [N], `positive` [N] bool, N at least 1.
    """
    values, place = torch.unique(signal, return_inverse=True)
    positives = torch.bincount(place[positive], minlength=len(values))
    negatives = torch.bincount(place[~positive], minlength=len(values))
    above = F.pad(positives.flip(0).cumsum(0).flip(0), (0, 1))
    below = F.pad(negatives.cumsum(0), (1, 0))
    return (above + below).max().item() / len(positive)


def _r_squared(predicted: Tensor, measured: Tensor) -> float:
    residual = (measured - predicted).square().sum()
    return 1 - (residual / (measured - measured.mean()).square().sum()).item()


class Bin(NamedTuple):
    """A tenth of the positions, by prediction: mean predicted and mean measured ΔAL."""

    predicted: float
    measured: float


@torch.inference_mode()
def calibration_bins(router: Router, data: RouterData) -> list[Bin]:
    """Tenths of the predictions in ascending order."""
    predicted = router(data.states)
    parts: Any = predicted.argsort().chunk(10)
    return [Bin(predicted[part].mean().item(), data.delta[part].mean().item()) for part in parts]


REPORT = "report.json"
_HEAD_ROWS = 2048


@dataclass(frozen=True)
class TrainedRouter:
    """`directory` holds the router file, its report and its provenance."""

    directory: Path
    report: dict[str, Any]


def choose_answers(stores: Sequence[FeatureStore], checkpoints: Collection[Path], limit: int) -> list[Source]:
    """Stored answers, those first that no checkpoint was trained on: there drafters accept what they will accept
    later, elsewhere a little more. Raises `ValueError` where there are none.
    """
    known: dict[str, Source] = {}
    later: dict[str, Source] = {}
    for store in stores:
        count = max(trained_on(path, store) for path in checkpoints)
        known |= {record.id: Source(store, record) for record in store.records[:count]}
        later |= {record.id: Source(store, record) for record in store.records[count:]}
    # A prompt that two shards answered counts once, and as known where either answer was trained on.
    fresh = [source for name, source in later.items() if name not in known]
    if not fresh and not known:
        raise ValueError("there is no data yet: run `whiflash train --step data` first")
    order = torch.randperm(len(known), generator=torch.Generator().manual_seed(0)).tolist()
    trained = list(known.values())
    return [*fresh, *(trained[index] for index in order)][:limit]


def train_router(config: TrainConfig, target_path: Path, drafters: Parts) -> TrainedRouter:
    """Replay both drafters, fit, and judge on held-out answers. Every part goes on where a killed run stopped.

    Raises:
        WhiflashError: a checkpoint does not fit. ValueError: there are too few answers.
    """
    check_arms("a router", NAMES, drafters.checkpoints)
    settings = config.router
    if config.hardware.threads:
        torch.set_num_threads(config.hardware.threads)
    stores = open_stores(config)
    target = origin_of(config, target_path, stores, **config.hardware.place)
    provenance = Provenance.start(config, stores)
    pair = Pair.load(drafters, target)
    sources = choose_answers(stores, drafters.checkpoints.values(), settings.answers)
    work = config.work / "router"
    answers = replay_answers(pair, sources, ReplayLog(work, pair))
    parts = split(answers, settings.held_out)
    learn, held_out = router_data(parts.learn), router_data(parts.held_out)
    run = work / "runs" / run_key(pair.digest, parts, settings, config.seed)
    router = fit(learn, held_out, run, settings, config.seed)
    entropy = entropy_of(held_out.states, target.head)
    report = {
        "answers": {"learn": len(parts.learn), "held_out": len(parts.held_out)},
        "positions": {"learn": len(learn.states), "held_out": len(held_out.states)},
        **_judge(router, parts.held_out, held_out, entropy),
    }
    out = work / "checkpoint"
    out.mkdir(parents=True, exist_ok=True)
    router.save(out / ROUTER_FILE)
    (out / REPORT).write_text(json.dumps(report, indent=1) + "\n")
    log = read_json_file(run / "log.json", finite=False)
    provenance.finish(out, {"log": log, "drafters": pair.digest})
    return TrainedRouter(out, report)


@torch.inference_mode()
def _judge(router: Router, answers: Sequence[Replay], data: RouterData, entropy: Tensor) -> dict[str, Any]:
    """Quality of the regression, and what routing by it is worth at threshold 0, without dwell."""
    quality = router_quality(router, data, entropy)
    deltas = [router(one.final.float()).tolist() for one in answers]
    walks = {"neural": RouterWalk([choices_above(one, 0) for one in deltas])}
    figures: Mapping[str, Any] = tabulate(answers, walks)
    keys = ("acceptance_length", "rounds_won", "oracle_gain_share")
    return {
        **quality._asdict(),
        "calibration": [part._asdict() for part in calibration_bins(router, data)],
        "overall": {key: figures["overall"][key] for key in keys},
        "categories": {name: part["acceptance_length"] for name, part in figures["categories"].items()},
    }


@torch.inference_mode()
def entropy_of(states: Tensor, head: Tensor) -> Tensor:
    """Nats of the target's own distribution: `states` [N, H] after its final norm, `head` [V, H] → [N] fp32."""
    parts = []
    for part in torch.split(states, _HEAD_ROWS):
        log = F.linear(part.to(head.device, head.dtype), head).float().log_softmax(-1)
        parts.append(-(log.exp() * log).sum(-1).cpu())
    return torch.cat(parts)
