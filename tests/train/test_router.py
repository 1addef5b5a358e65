"""The router: files read by shape, a fit that recovers a known rule, figures worked out by hand."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import Trainer
from whiflash_kernels import router_mlp

from whiflash_sglang.errors import CheckpointError
from whiflash_sglang.lab.evaluation import deltas_of
from whiflash_sglang.models.router import AR_MINUS_DIFFUSION, DIFFUSION_MINUS_AR, Router
from whiflash_sglang.train.config import RouterTraining
from whiflash_sglang.train.replay import Replay
from whiflash_sglang.train.router import (
    RouterData,
    calibration_bins,
    fit,
    is_held_out,
    router_data,
    router_quality,
    run_key,
    split,
)
from whiflash_sglang.train.walk import choices_above

HIDDEN = 8


def load(path: Path, sign: str | None = None) -> Router:
    options = {"device": torch.device("cpu"), "dtype": torch.float32}
    return Router.load(path, hidden_size=HIDDEN, delta_sign=sign, **options)


@pytest.mark.parametrize("heads", [False, True])
def test_a_saved_router_is_the_same(tmp_path: Path, heads: bool) -> None:
    router = Router(HIDDEN, 5, heads=heads)
    router.save(tmp_path / "router.safetensors")
    states = torch.randn(3, HIDDEN)
    for place in (tmp_path, tmp_path / "router.safetensors"):
        again = load(place)
        assert torch.equal(again(states), router(states))
        if heads:
            assert torch.equal(again.predict(states)[1], router.predict(states)[1])
        else:
            with pytest.raises(CheckpointError, match="no heads"):
                again.predict(states)


def test_foreign_names_are_read_by_shape_and_need_a_sign(tmp_path: Path) -> None:
    first, second, bias = torch.randn(5, HIDDEN), torch.randn(1, 5), torch.randn(5)
    save_file(
        {"mlp.0.weight": first, "mlp.2.weight": second, "mlp.0.bias": bias}, tmp_path / "any.safetensors"
    )
    states = torch.randn(4, HIDDEN)
    expected = torch.nn.functional.gelu(states @ first.T + bias) @ second[0]
    torch.testing.assert_close(load(tmp_path, AR_MINUS_DIFFUSION)(states), expected)
    torch.testing.assert_close(load(tmp_path, DIFFUSION_MINUS_AR)(states), -expected)
    with pytest.raises(CheckpointError, match="bundle create --router-sign"):
        load(tmp_path)


def test_a_sign_that_contradicts_the_file(tmp_path: Path) -> None:
    Router(HIDDEN, 5).save(tmp_path / "router.safetensors")
    with pytest.raises(CheckpointError, match="names delta_sign ar-minus-diffusion, the settings name"):
        load(tmp_path, DIFFUSION_MINUS_AR)


def test_the_kernels_layers_and_the_folded_standardisation(tmp_path: Path) -> None:
    torch.manual_seed(0)
    router = Router(HIDDEN, 5, heads=True)
    states, mean, deviation = torch.randn(6, HIDDEN), torch.randn(HIDDEN), torch.rand(HIDDEN) + 0.5
    raw = router.standardised(mean, deviation)
    delta, accepted = raw.predict(states)
    torch.testing.assert_close((delta, accepted), router.predict((states - mean) / deviation))
    rows = router_mlp(states, *raw.layers())
    torch.testing.assert_close(rows, torch.cat([delta[:, None], accepted], 1))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"a": torch.zeros(5, HIDDEN + 1), "b": torch.zeros(1, 5)}, r"found a \[5, 9\], b \[1, 5\]"),
        ({"a": torch.zeros(5, HIDDEN), "b": torch.zeros(1, 6)}, "does not hold two linear layers"),
        ({"a": torch.zeros(5, HIDDEN)}, r"found a \[5, 8\]"),
        (
            {"a": torch.zeros(5, HIDDEN), "b": torch.zeros(1, 5), "heads.weight": torch.zeros(3, 5)},
            r"heads.weight \[3, 5\]",
        ),
    ],
)
def test_other_shapes_are_named(tmp_path: Path, tensors: dict[str, torch.Tensor], message: str) -> None:
    save_file(tensors, tmp_path / "r.safetensors")
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path / "r.safetensors")


def test_missing_damaged_and_wrongly_signed_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is missing"):
        load(tmp_path / "none.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"\x00" * 30)
    with pytest.raises(CheckpointError, match="damaged or truncated"):
        load(tmp_path / "bad.safetensors")
    good = {"a": torch.zeros(5, HIDDEN), "b": torch.zeros(1, 5)}
    save_file(good, tmp_path / "sign.safetensors", metadata={"delta_sign": "up"})
    with pytest.raises(CheckpointError, match="delta_sign 'up'"):
        load(tmp_path / "sign.safetensors")
    with pytest.raises(CheckpointError, match=r"has 2 \.safetensors files"):
        load(tmp_path)


def data_of(states: torch.Tensor, delta: torch.Tensor) -> RouterData:
    """EAGLE-3 accepts the gain where it is positive, DFlash where it is negative."""
    return RouterData(states, torch.stack([delta.clamp(min=0), (-delta).clamp(min=0)], 1))


def test_a_known_rule_is_recovered(tmp_path: Path) -> None:
    torch.manual_seed(0)
    states = torch.randn(3000, HIDDEN) * 7 + 3
    delta = torch.round(2 * (states[:, 0] - 3) / 7)
    learn, held = data_of(states[:2500], delta[:2500]), data_of(states[2500:], delta[2500:])
    settings = RouterTraining(width=32, epochs=12, batch=128, learning_rate=2e-2, dropout=0.0)
    router = fit(learn, held, tmp_path / "run", settings, seed=0)
    quality = router_quality(router, held, entropy=torch.rand(500))
    assert quality.r_squared > 0.9
    assert min(quality.r_squared_eagle3, quality.r_squared_dflash) > 0.8
    assert quality.best_sign_accuracy >= quality.sign_accuracy > 0.95
    assert quality.entropy_sign_accuracy < 0.7
    bins = calibration_bins(router, held)
    assert [part.predicted for part in bins] == sorted(part.predicted for part in bins)


def test_a_killed_fit_goes_on_to_the_same_router(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    data = data_of(torch.randn(400, HIDDEN), torch.randn(400).round())
    settings = RouterTraining(width=16, epochs=4, batch=64)
    whole = fit(data, data, tmp_path / "whole", settings, seed=3)
    original = Trainer.training_step

    def dies(self: Trainer, *args: object, **kwargs: object) -> torch.Tensor:
        if self.state.global_step == 17:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "training_step", dies)
        with pytest.raises(KeyboardInterrupt):
            fit(data, data, tmp_path / "killed", settings, seed=3)
    again = fit(data, data, tmp_path / "killed", settings, seed=3)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_entropys_accuracy_is_its_best_threshold() -> None:
    data = data_of(torch.zeros(5, HIDDEN), torch.tensor([-1.0, -1.0, 2.0, 0.0, 1.0]))
    entropy = torch.tensor([0.1, 0.9, 0.5, 0.0, 0.7])
    quality = router_quality(Router(HIDDEN, 2, heads=True), data, entropy)
    assert quality.entropy_sign_accuracy == pytest.approx(0.75)
    assert quality.majority_sign_accuracy == pytest.approx(0.5)
    assert quality.best_sign_accuracy == pytest.approx(0.5)  # every state is the same


def answer(name: str) -> Replay:
    accepted = {
        "ar": np.array([3, 0, 1, 5]),
        "diffusion": np.array([1, 2, 1, 0]),
        "lookup": np.zeros(4, int),
    }
    return Replay(name, "chat", accepted, torch.randn(4, HIDDEN), 3, *np.zeros((2, 4)))


def test_data_and_choices_follow_the_replay() -> None:
    one = answer("a")
    assert router_data([one]).delta.tolist() == [2, -2, 0]
    router = Router(HIDDEN, 2)
    with torch.no_grad():
        router.second.weight.zero_()
        router.second.bias.fill_(0.4)
    (deltas,) = deltas_of(router, [one])
    assert set(choices_above(deltas, 0.5).values()) == {"diffusion"}
    assert set(choices_above(deltas, 0.3).values()) == {"ar"}


def test_held_out_answers_are_whole_and_the_same_every_time() -> None:
    answers = [answer(f"r{i}") for i in range(200)]
    parts = split(answers, 0.2)
    assert 20 < len(parts.held_out) < 60
    assert {one.id for one in parts.held_out} == {one.id for one in answers if is_held_out(one.id, 0.2)}
    assert len(parts.learn) + len(parts.held_out) == 200
    keys = {run_key("pair", parts, RouterTraining(width=width), seed=0) for width in (5, 5, 7)}
    assert len(keys) == 2, "other settings are another run"
    with pytest.raises(ValueError, match="generate more"):
        split(answers[:1], 0.2)
