"""An enlarged EAGLE-3 drafter drafts what it drafted, and can then learn more."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from whiflash_sglang.errors import ConfigError
from whiflash_sglang.formats.eagle3 import Eagle3Drafter
from whiflash_train.config import DFlash, Eagle3
from whiflash_train.drafters import dflash
from whiflash_train.drafters.eagle3 import initialise
from whiflash_train.drafters.initialisation import enlarged, go_on_from
from whiflash_train.target import TargetModel

SETTINGS = Eagle3(target_layers=[1, 3, 4], source_layer=5, draft_vocab_size=40)


def trained(target: TargetModel, ids: Tensor) -> Eagle3Drafter:
    """With weights of its own everywhere."""
    torch.manual_seed(1)
    drafter = initialise(target, SETTINGS, ids)
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return drafter


def drafts(drafter: Eagle3Drafter, width: int) -> tuple[Tensor, Tensor]:
    """State and logits of a step that attends to itself."""
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, 200, (7,), generator=generator)
    fused = drafter.fuse(torch.randn(7, 3 * width, generator=generator))

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return v.repeat_interleave(q.shape[1] // v.shape[1], 1)

    hidden, logits_hidden = drafter(tokens, fused, torch.arange(7), attend)
    return hidden, drafter.logits(logits_hidden)


@settings(max_examples=20, deadline=None)
@given(
    before=st.sets(st.integers(0, 199), min_size=3, max_size=60),
    after=st.sets(st.integers(0, 199), min_size=3, max_size=60),
    wider=st.integers(0, 70),
)
def test_it_drafts_what_it_drafted(target: TargetModel, before: set[int], after: set[int], wider: int) -> None:
    old, new = torch.tensor(sorted(before)), torch.tensor(sorted(after))
    drafter = trained(target, old)
    size = drafter.config.intermediate_size + wider
    larger = enlarged(drafter, target, new, size)
    assert (larger.config.intermediate_size, larger.draft_vocab_size) == (size, len(new))
    assert torch.equal(larger.target_ids(torch.arange(len(new))), new)
    hidden, logits = drafts(drafter, target.hidden_size)
    wide_hidden, wide_logits = drafts(larger, target.hidden_size)
    torch.testing.assert_close(wide_hidden, hidden, rtol=1e-5, atol=1e-5)
    common = sorted(before & after)
    columns = [torch.searchsorted(ids, torch.tensor(common, dtype=torch.int64)) for ids in (old, new)]
    torch.testing.assert_close(wide_logits[:, columns[1]], logits[:, columns[0]], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("drift", [0.0, 3.0])
def test_new_tokens_are_chosen_as_the_target_would(target: TargetModel, drift: float) -> None:
    """An offset common to all rows of a trained head is not a token's own: new ones neither win nor lose by it."""
    drafter = initialise(target, SETTINGS, torch.arange(0, 200, 2))
    torch.manual_seed(3)
    common = torch.randn(target.hidden_size)
    with torch.no_grad():
        drafter.get_parameter("lm_head.weight").add_(drift * common)
    larger = enlarged(drafter, target, torch.arange(200), drafter.config.intermediate_size)
    states = torch.randn(64, target.hidden_size)
    found = larger.logits(states)
    torch.testing.assert_close(found, states @ (target.head[:200].float() + drift * common).T, rtol=1e-4, atol=1e-3)


def test_new_units_learn(target: TargetModel) -> None:
    drafter = trained(target, torch.arange(50))
    old = drafter.config.intermediate_size
    larger = enlarged(drafter, target, torch.arange(50), old + 16)
    drafts(larger, target.hidden_size)[1].square().sum().backward()
    down = larger.get_parameter("layers.0.mlp.down.weight").grad
    assert down is not None
    assert bool((down[:, old:] != 0).any())


def test_a_checkpoint_goes_on(target: TargetModel, tmp_path: Path) -> None:
    """Its tokens stay; the most frequent others join them, and of more than are asked for the most frequent stay."""
    known = torch.arange(40) * 3
    trained(target, known).save(tmp_path / "start", torch.float32)
    often = torch.arange(target.vocab_size, 0, -1)
    assert torch.equal(go_on_from(tmp_path / "start", target, SETTINGS, often).target_ids(torch.arange(40)), known)
    asked = SETTINGS.model_copy(update={"draft_vocab_size": 60, "intermediate_size": 512})
    other = go_on_from(tmp_path / "start", target, asked, often)
    others = [token for token in range(200) if token % 3 or token >= 120][:20]
    assert other.target_ids(torch.arange(60)).tolist() == sorted(known.tolist() + others)
    assert other.config.intermediate_size == 512
    other.save(tmp_path / "enlarged")
    assert go_on_from(tmp_path / "enlarged", target, asked, often).config == other.config
    fewer = SETTINGS.model_copy(update={"draft_vocab_size": 10})
    assert go_on_from(tmp_path / "start", target, fewer, often).target_ids(torch.arange(10)).tolist() == [
        *range(0, 30, 3)
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"intermediate_size": 8}, "eagle3.intermediate_size 8 is less than"),
        ({"target_layers": [1, 3, 5]}, r"has \(1, 3, 4\), eagle3.target_layers asks for \(1, 3, 5\)"),
    ],
)
def test_what_does_not_fit_is_refused(
    target: TargetModel, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    trained(target, torch.arange(40)).save(tmp_path / "start")
    with pytest.raises(ConfigError, match=message):
        go_on_from(tmp_path / "start", target, SETTINGS.model_copy(update=change), torch.ones(target.vocab_size))


def test_head_norms_are_copied_or_refused(target: TargetModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of Qwen3: a block drafter has both norms, EAGLE-3 has none."""
    norms = {name: torch.nn.RMSNorm(16) for name in ("q_norm", "k_norm")}
    for name, norm in norms.items():
        torch.nn.init.normal_(norm.weight)
        monkeypatch.setattr(target.layers[5].self_attn, name, norm, raising=False)
    settings = DFlash(target_layers=[1], source_layers=[5], mask_token_id=3)
    layer = dflash.initialise(target, settings, block_size=4, section="dflash").layers[0]
    assert all(torch.equal(getattr(layer.attention, name).weight, norm.weight) for name, norm in norms.items())
    with pytest.raises(ConfigError, match=r"eagle3\.source_layer 5: .* attention\.q_norm\.weight, .*leave eagle3"):
        initialise(target, SETTINGS, torch.arange(40))
