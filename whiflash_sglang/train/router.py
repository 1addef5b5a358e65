"""Training the neural router: both drafters replayed from the same prefixes, regression on the difference.

ΔAL at an answer position is AL(EAGLE-3) - AL(DFlash) of a round that starts there (same-round counterfactuals);
the input is the target's state after the final norm at the last committed position.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from whiflash_sglang.models.router import ROUTER_FILE, Router
from whiflash_sglang.train.evaluate import ARMS, Replay


class RouterData(NamedTuple):
    """`states` [N, H] fp32; `delta` [N] EAGLE-3's accepted drafts minus DFlash's."""

    states: Tensor
    delta: Tensor


class RouterQuality(NamedTuple):
    """On held-out positions: R² of ΔAL; accuracy of its sign where it is not zero, of the router and of entropy."""

    r_squared: float
    sign_accuracy: float
    entropy_sign_accuracy: float


class RouterSettings(NamedTuple):
    """Optimisation of the MLP. `width` of its hidden layer, `batch` positions a step."""

    width: int = 256
    epochs: float = 3.0
    batch: int = 512
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    seed: int = 0


def router_data(answers: Sequence[Replay]) -> RouterData:
    """All positions before a loop."""
    states, deltas = [], []
    for answer in answers:
        first, second = (answer.accepted[arm][: answer.loop_from] for arm in ARMS)
        states.append(answer.final[: answer.loop_from].float())
        deltas.append(torch.from_numpy((first - second).astype(np.float32)))
    return RouterData(torch.cat(states), torch.cat(deltas))


class _Regression(nn.Module):
    def __init__(self, router: Router) -> None:
        super().__init__()
        self.router = router

    def forward(self, states: Tensor, delta: Tensor) -> dict[str, Tensor]:
        return {"loss": nn.functional.mse_loss(self.router(states), delta)}


def train_router(data: RouterData, out: Path, settings: RouterSettings) -> Router:
    """Fit by mean squared error and write `<out>/router.safetensors`; goes on from a killed run's checkpoint."""
    torch.manual_seed(settings.seed)
    model = _Regression(Router(data.states.shape[1], settings.width))
    arguments = TrainingArguments(
        output_dir=str(out / "trainer"),
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        lr_scheduler_type="cosine",
        save_steps=200,
        save_total_limit=1,
        logging_steps=50,
        seed=settings.seed,
        data_seed=settings.seed,
        use_cpu=not torch.cuda.is_available(),
        report_to=[],
        remove_unused_columns=False,
    )

    def collate(items: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        return {"states": torch.stack([x for x, _ in items]), "delta": torch.stack([y for _, y in items])}

    trainer = Trainer(model=model, args=arguments, train_dataset=TensorDataset(*data), data_collator=collate)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(arguments.output_dir) if out.exists() else None)
    out.mkdir(parents=True, exist_ok=True)
    model.router.save(out / ROUTER_FILE)
    return model.router


@torch.inference_mode()
def router_quality(router: Router, data: RouterData, entropy: Tensor) -> RouterQuality:
    """Figures on data that the router was not trained on.

    Entropy's sign accuracy is that of its best threshold on this very data, chosen in hindsight in its favour.
    """
    predicted = router(data.states).cpu()
    residual = (data.delta - predicted).square().sum()
    total = (data.delta - data.delta.mean()).square().sum()
    decided = data.delta != 0
    positive = data.delta[decided] > 0
    accuracy = ((predicted[decided] > 0) == positive).float().mean().item()
    order = entropy[decided].argsort()
    above = positive[order].flip(0).cumsum(0).flip(0)  # positives from the threshold on
    below = (~positive[order]).cumsum(0) - (~positive[order]).long()
    best = (above + below).max().item() / len(order)
    return RouterQuality(1 - (residual / total).item(), accuracy, best)


@torch.inference_mode()
def router_choices(router: Router, answer: Replay, threshold: float) -> dict[int, str]:
    """The arm of every position: EAGLE-3 where the predicted ΔAL exceeds `threshold`."""
    eagle3, dflash = ARMS
    predicted = router(answer.final.float()).tolist()
    return {position: eagle3 if value > threshold else dflash for position, value in enumerate(predicted)}


def write_calibration_plot(router: Router, data: RouterData, path: Path) -> None:
    """Predicted against measured ΔAL, the mean of each tenth of the predictions."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with torch.inference_mode():
        predicted = router(data.states).cpu()
    parts = predicted.argsort().chunk(10)
    points: list[Any] = [(predicted[part].mean().item(), data.delta[part].mean().item()) for part in parts]
    figure, axes = pyplot.subplots(figsize=(4, 4))
    axes.plot(*zip(*points, strict=True), "o-")
    axes.axline((0, 0), slope=1, linestyle="dotted", color="black")
    axes.set_xlabel("predicted ΔAL (EAGLE-3 - DFlash)")
    axes.set_ylabel("measured ΔAL")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
