"""Training's packed passes against drafting one token after the other, as a server would."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny_models import tiny_dflash, tiny_eagle3
from torch import Tensor

from whiflash_sglang.formats.dflash.dflash import DFlashDrafter
from whiflash_sglang.formats.dflash.dflash_config import LayerSpan
from whiflash_sglang.formats.eagle3 import Eagle3Drafter
from whiflash_train.drafters.batches import Batch, unpack
from whiflash_train.drafters.dflash import choose_anchors, run_blocks
from whiflash_train.drafters.eagle3 import plan_chains, unroll
from whiflash_train.origin import for_training
from whiflash_train.target import TargetModel

CAPTURE = [0, 1, 2, 3, 4]
LENGTHS, PROMPTS = [14, 9, 4], [5, 3, 3]


class Pair:
    """Both drafters of a tiny target, and a batch of three random sequences."""

    def __init__(self, path: Path, target: TargetModel, root: Path) -> None:
        options = for_training(target)
        self.eagle3 = Eagle3Drafter.load(tiny_eagle3(root / "eagle3", path), **options)
        self.dflash = DFlashDrafter.load(tiny_dflash(root / "dflash", path), **options)
        torch.manual_seed(0)
        rows = sum(LENGTHS) - len(LENGTHS)
        self.batch: Batch = unpack(
            torch.randint(0, 256, (sum(LENGTHS),)),
            torch.randn(rows, len(CAPTURE), 64),
            torch.randn(rows, 64),
            torch.tensor(LENGTHS),
            torch.tensor(PROMPTS),
        )


@pytest.fixture(scope="module")
def pair(path: Path, target: TargetModel, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(path, target, tmp_path_factory.mktemp("pair"))


def attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None = None) -> Tensor:
    share = q.shape[1] // k.shape[1]
    parts = (q, k.repeat_interleave(share, 1), v.repeat_interleave(share, 1))
    q, k, v = (part.transpose(0, 1)[None] for part in parts)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)[0].transpose(0, 1)


@torch.no_grad()
@pytest.mark.parametrize("own_drafts", [False, True])
def test_every_chain_equals_drafting_it_alone(pair: Pair, own_drafts: bool) -> None:
    columns, steps = [0, 2, 4], 4
    plan = plan_chains(pair.batch)
    packed = list(unroll(pair.eagle3, pair.batch, plan, columns, steps, own_drafts))
    row = 0
    for span in pair.batch.spans:
        tokens = pair.batch.tokens[span.token : span.token + span.length]
        features = pair.batch.features[span.feature : span.feature + span.length - 1, columns].flatten(1)
        fused = pair.eagle3.fuse(features)
        for root in range(span.prompt - 1, span.length - 2):
            cache = [pair.eagle3.keys_values(tokens[1 : root + 1], fused[:root], torch.arange(root))]

            def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, cache: list = cache) -> Tensor:
                cache.append((k, v))
                return attention(q, torch.cat([k for k, _ in cache]), torch.cat([v for _, v in cache]))

            hidden, drafted = fused[root : root + 1], tokens[root + 1 : root + 2]
            for step in range(min(steps, span.length - 2 - root)):
                place = root + step
                given = drafted if own_drafts else tokens[place + 1 : place + 2]
                hidden, logits_hidden = pair.eagle3(given, hidden, torch.tensor([place]), attend)
                expected = pair.eagle3.logits(logits_hidden)[0]
                torch.testing.assert_close(packed[step][row], expected, rtol=1e-4, atol=1e-4)
                drafted = pair.eagle3.target_ids(expected.argmax(-1, keepdim=True))
                assert pair.batch.tokens[plan.label_tokens[plan.label[row] + step]] == tokens[place + 2]
            row += 1
    assert row == len(plan.position)


@torch.no_grad()
@pytest.mark.parametrize("spans", [(), (LayerSpan(True, 3), LayerSpan(True))], ids=["whole", "windows"])
def test_every_block_equals_drafting_it_alone(
    pair: Pair, spans: tuple[LayerSpan, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pair.dflash, "config", replace(pair.dflash.config, spans=spans))
    columns = list(pair.dflash.config.target_layer_ids)
    blocks = choose_anchors(pair.batch, per_token=1.0)
    packed = run_blocks(pair.dflash, pair.batch, blocks, columns)
    row = 0
    for span in pair.batch.spans:
        features = pair.batch.features[span.feature : span.feature + span.length - 1, columns].flatten(1)
        fused = pair.dflash.fuse(features)
        for anchor in range(span.prompt, span.length - 1):
            keys, values = pair.dflash.keys_values(fused[:anchor], torch.arange(anchor))

            def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, keys=keys, values=values) -> Tensor:
                own, anchor = spans[layer] if spans else LayerSpan(), keys.shape[1]
                back = torch.arange(anchor, anchor + 8)[:, None] - torch.arange(anchor + 8)
                seen = (back >= 0) | torch.tensor(not own.causal)
                if own.window is not None:
                    seen &= back <= own.window
                return attention(q, torch.cat([keys[layer], k]), torch.cat([values[layer], v]), seen)

            inputs = torch.full((8,), pair.dflash.config.mask_token_id)
            inputs[0] = pair.batch.tokens[span.token + anchor]
            expected = pair.dflash(inputs[None], torch.arange(anchor, anchor + 8)[None], attend)[0]
            torch.testing.assert_close(packed[row], expected, rtol=1e-4, atol=1e-4)
            row += 1
    assert row == len(blocks.anchor)
