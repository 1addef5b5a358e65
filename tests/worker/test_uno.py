"""UNO: the target drafts for itself, under an adapter that is random here. Texts beside others: `test_plain_text.py`.

SGLang's own worker of it takes only CUDA (`arg_groups/speculative_hook.py`), so the pass is compared with its formula:
one row of the target itself, then rows of noise under the adapter, all causal.
"""

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from adapters import Adapter
from engine import engine
from model_set import Models
from reference import Comparison, ReferenceTarget
from safetensors.torch import load_file, save_file

from whiflash_sglang.checkpoints.fit import judge
from whiflash_sglang.checkpoints.manifest import load_manifest
from whiflash_sglang.cli.serve_line import ServeLine
from whiflash_sglang.engine.algorithm import widest_block
from whiflash_sglang.engine.forward.adapted import AdaptedTarget
from whiflash_sglang.errors import CheckpointError, ConfigError
from whiflash_sglang.formats.uno import CONFIG, adapter_in, read_adapter
from whiflash_sglang.records.core import DraftBatch
from whiflash_sglang.settings.config import changed, parse_flags, resolve

PROMPTS = [random.Random(seed).choices(range(256), k=9 + 5 * seed) for seed in range(3)]
DRAFTS, CONTEXT = 5, 48
Pass = tuple[list[int], list[int], torch.Tensor]
"""A request's text with its bonus token, the noise behind it, and the logits of both rows."""


@contextmanager
def adapted_behind(target: ReferenceTarget, adapter: Path, clean: int) -> Iterator[None]:
    """Rows of the target behind the first `clean` are computed with the adapter's factors."""
    weights, config = load_file(adapter / "adapter_model.safetensors"), read_adapter(adapter)

    def add(a: torch.Tensor, b: torch.Tensor, _: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        more = config["lora_alpha"] / config["r"] * (args[0] @ a.T @ b.T)
        more[:, :clean] = 0
        return output + more

    hooks = []
    for name, module in target.model._model.named_modules():
        a, b = (weights.get(f"base_model.model.{name}.lora_{factor}.weight") for factor in "AB")
        if a is not None:
            hooks.append(module.register_forward_hook(partial(add, a, b)))
    assert len(hooks) == len(weights) / 2
    yield
    for hook in hooks:
        hook.remove()


def test_drafts_are_the_formulas(models: Models, adapters: dict[str, Adapter], monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of every pass, from texts of different lengths; the first draft is always right, and text is plain's."""
    path, target, passes = adapters["one"].path, models.reference.target, list[Pass]()
    logits_of = AdaptedTarget.logits

    def logits(self: AdaptedTarget, batch: DraftBatch, noise: torch.Tensor) -> torch.Tensor:
        found = logits_of(self, batch, noise)
        of_each = found.view(len(batch), -1, self.vocabulary).clone()
        for row, n, ids, own in zip(batch.rows.tolist(), batch.starts.tolist(), noise.tolist(), of_each, strict=True):
            passes.append((e.worker.tokens.data[row, : n + 1].tolist(), ids, own))
        return found

    with engine(models.target) as e:
        plain = e.generate(PROMPTS, max_new_tokens=CONTEXT)
    flags = {"draft": path, "whiflash_router": "uno", "whiflash_uno_drafts": DRAFTS}
    with engine(models.target, whiflash=flags, context_length=CONTEXT) as e:
        assert e.worker.controller.costs.draft("uno", 1) > 0, "its pass is timed at the start"
        assert (e.worker.reservation.per_token, e.worker.sync.arms) == (0, ()), "it has no KV of its own"
        monkeypatch.setattr(AdaptedTarget, "logits", logits)
        found = e.generate(PROMPTS, max_new_tokens=CONTEXT)
        rounds = [e.rounds(rid) for rid in e.requests]
        e.check_leaks()
        arm, served, forward = e.worker.drafters["uno"], e.worker.target, Mock(wraps=e.worker.target.forward)
        monkeypatch.setattr(served, "forward", forward)
        last, none = torch.tensor([CONTEXT - 2]), torch.tensor([0])
        at_the_end = DraftBatch(none, last, none, none, served.slot_table, CONTEXT, none)
        logits_of(arm.model, at_the_end, none.expand(1, 3))
        positions = forward.call_args.args[1].positions.tolist()
        assert positions == [CONTEXT - 2, *[CONTEXT - 1] * 3], "rotations end with the context"
    comparison = Comparison(target)
    for prompt, wanted, text in zip(PROMPTS, plain, found, strict=True):
        comparison.check(prompt, wanted[: len(text)], text, str(prompt))
    assert all(accepted >= verified - 1 for verified, accepted in rounds), "the first draft is the target's"
    inside = [each for each in passes if len(each[0]) + len(each[1]) <= CONTEXT]
    assert {DRAFTS - 1} < {len(ids) for _, ids, _ in passes}
    assert len({tuple(ids) for _, ids, _ in inside}) > 10, "noise differs by position"
    changed_rows = 0
    for text, ids, own in inside:
        with adapted_behind(target, path, len(text)):
            wanted_logits = F.linear(target.forward([*text, *ids]).final, target.model.head)[len(text) - 1 :]
        torch.testing.assert_close(own, wanted_logits, atol=1e-4, rtol=1e-4)
        itself = F.linear(target.forward([*text, *ids]).final, target.model.head)[len(text) - 1 :]
        changed_rows += int((own[1:] - itself[1:]).abs().amax(-1).gt(0.01).sum())
    assert changed_rows > 10, "the adapter changes what the noise's rows say"


def test_an_adapter_of_another_target_is_refused(models: Models, adapters: dict[str, Adapter], tmp_path: Path) -> None:
    factors = load_file(adapters["one"].path / "adapter_model.safetensors")
    wider = {name: torch.cat([factor, factor], -1) for name, factor in factors.items()}
    save_file(wider, tmp_path / "adapter_model.safetensors")
    (tmp_path / CONFIG).write_bytes((adapters["one"].path / CONFIG).read_bytes())
    with (
        pytest.raises(CheckpointError, match=f"the adapter {tmp_path} does not fit the target"),
        engine(models.target, whiflash={"draft": tmp_path, "whiflash_router": "uno"}),
    ):
        pass


def test_where_an_adapter_is_named(models: Models, adapters: dict[str, Adapter], tmp_path: Path) -> None:
    """As draft path, by the flag beside others, in a bundle, or beside the weights of a published target."""
    path, bundle = adapters["one"].path, tmp_path / "bundle"
    alone = resolve(parse_flags({}), path)
    assert (alone.uno, alone.drafters, widest_block(alone)) == (path, {}, 17)
    given = {"uno": str(path), "uno_drafts": "20", "eagle_draft": str(models.eagle3)}
    beside = resolve(parse_flags(given), models.dflash)
    assert (beside.uno, list(beside.drafters), widest_block(beside)) == (path, ["ar", "diffusion"], 21)
    (tmp_path / "adapter").symlink_to(path)
    assert adapter_in(tmp_path) == tmp_path / "adapter" == resolve(parse_flags({}), tmp_path).uno
    (bundle / "a").mkdir(parents=True)
    (bundle / "a" / CONFIG).write_bytes((path / CONFIG).read_bytes())
    manifest = {"schema_version": 1, "name": "tiny", "target": "t", "uno": "a"}
    (bundle / "whiflash.json").write_text(json.dumps(manifest))
    assert (resolve(parse_flags({}), bundle).uno, load_manifest(bundle).drafters) == (bundle / "a", {})
    assert resolve(parse_flags({"drafters": "none"}), bundle).uno is None
    for place in (path, bundle):
        assert [each[1:] for each in judge(str(place), None)] == [(True, "an adapter of rank 4, the uno arm")]
    words = ["--model-path", "OWNER/MODEL", "--node-rank", "1"]
    ServeLine.read([*words, "--speculative-draft-model-path", str(path)]).check()
    with pytest.raises(ConfigError, match="--whiflash-uno /nowhere: no such directory"):
        ServeLine.read([*words, "--whiflash-uno", "/nowhere"]).check()
    assert changed(alone, {"router": "uno"}).router == "uno"
    with pytest.raises(ConfigError, match="router 'uno' needs"):
        changed(resolve(parse_flags({}), models.dflash), {"router": "uno"})
    for wrong, message in (
        ({"uno": str(models.target)}, f"UNO's adapter {models.target} has no adapter_config.json"),
        ({"router": "uno"}, "router 'uno' needs --whiflash-uno"),
        ({"uno": str(path), "drafters": "none"}, "leaves nothing for --whiflash-uno"),
    ):
        with pytest.raises(ConfigError, match=message):
            resolve(parse_flags(wrong), None)
