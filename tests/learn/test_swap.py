"""Weights that are swapped between rounds: other drafts, the same text, and nothing that would make old KV wrong."""

import gc
import hashlib
import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from threading import Event
from typing import Any
from unittest.mock import patch

import pytest
import torch
from engine import Engine
from model_set import Models
from safetensors.torch import load_file
from swapping import PROMPTS, parameters, reads, serving, swap
from versioned import bundle_of, changed
from whiflash_kernels import packed

from whiflash_sglang.device.ranks import Ranks
from whiflash_sglang.errors import ConfigError
from whiflash_sglang.formats.eagle3 import Eagle3Config, Eagle3Drafter
from whiflash_sglang.formats.layers import AttentionShape
from whiflash_sglang.updates.swap import KINDS, LiveWeights, fingerprint, first_frozen_row, rewrite
from whiflash_sglang.updates.versions import path_of, publish


@pytest.fixture(scope="module")
def served_engine(models: Models, directory: Path, plain: list[list[int]]) -> Iterator[Engine]:
    """Begun when that of `plain` has ended: there is one engine at a time."""
    with serving(models, directory) as e:
        yield e


def test_text_stays_through_many_swaps_in_traffic(served_engine: Engine, plain: list[list[int]]) -> None:
    """In chunks of prompts, while requests run, at every step; drafts differ, so acceptance does. Nothing that was read
    for a swap is left in memory.
    """
    e, order = served_engine, random.Random(3)
    swaps = 0
    swap(e, 1)
    held = modules()

    def swapping() -> None:
        nonlocal swaps
        swap(e, order.randrange(4))
        swaps += 1

    while swaps < 60:
        e.start_over("random")
        assert e.generate(PROMPTS, swapping, max_new_tokens=60) == plain
        e.check_leaks()
        assert modules() == held
    assert e.worker.weights.swaps["taken"] == swaps + 1


def modules() -> int:
    """Drafters in memory, whoever holds them."""
    gc.collect()
    return sum(isinstance(thing, KINDS) for thing in gc.get_objects())


def test_what_serves_is_what_the_files_hold(served_engine: Engine, directory: Path, models: Models) -> None:
    e = served_engine
    before = parameters(e, "ar")
    swap(e, 2)
    file = load_file(path_of(directory, 2) / "eagle3" / "model.safetensors")
    live = parameters(e, "ar")
    assert torch.equal(live["lm_head.weight"], file["lm_head.weight"])
    assert torch.equal(live["layers.0.attention.out.weight"], file["midlayer.self_attn.o_proj.weight"])
    assert all(value is before[name] for name, value in live.items())
    assert e.worker.weights.used.version == 2
    assert e.worker.snapshot()["drafters"]["version"] == 2


def test_a_drafter_that_a_version_does_not_name_is_that_of_the_start(
    served_engine: Engine, models: Models
) -> None:
    swap(served_engine, 2)
    swap(served_engine, 3)
    start = load_file(models.eagle3 / "model.safetensors")
    assert torch.equal(parameters(served_engine, "ar")["lm_head.weight"], start["lm_head.weight"])


def test_other_weights_draft_other_tokens(served_engine: Engine) -> None:
    """So that a swap that did nothing would be seen."""
    accepted = []
    for number in (0, 2, 0):
        swap(served_engine, number)
        served_engine.start_over("diffusion")
        served_engine.generate(PROMPTS, max_new_tokens=60)
        names = list(served_engine.requests)[-len(PROMPTS) :]
        accepted.append([served_engine.rounds(name) for name in names])
    assert accepted[0] == accepted[2] != accepted[1]


def refused(e: Engine, number: int) -> str:
    before = {arm: {n: v.clone() for n, v in parameters(e, arm).items()} for arm in ("ar", "diffusion")}
    used = e.worker.weights.used
    with pytest.raises(ConfigError) as caught:
        swap(e, number)
    for arm, old in before.items():
        assert all(torch.equal(old[name], value) for name, value in parameters(e, arm).items())
    assert e.worker.weights.used == used
    assert e.worker.snapshot()["drafters"]["why"] == str(caught.value)
    return str(caught.value)


def only(part: str, value: float) -> Callable[[str, torch.Tensor], torch.Tensor]:
    return lambda name, tensor: tensor + value if part in name else tensor


@pytest.mark.parametrize(
    ("drafter", "part", "value", "said"),
    [
        ("eagle3", "fc.weight", 0.1, "fc.weight differs from what serves; cached draft KV was made with it"),
        ("eagle3", "k_proj", 0.1, "layers.0.attention.qkv.weight differs"),
        ("eagle3", "v_proj", 0.1, "layers.0.attention.qkv.weight differs"),
        ("eagle3", "input_layernorm", 0.1, "layers.0.embedding_norm.weight differs"),
        ("eagle3", "midlayer.hidden_norm", 0.1, "layers.0.hidden_norm.weight differs"),
        ("eagle3", "o_proj", float("nan"), "layers.0.attention.out.weight holds NaN or infinity"),
        ("dflash", "down_proj", float("inf"), "mlp.down.weight holds NaN or infinity"),
        ("dflash", "fc.weight", 0.1, "fc.weight differs"),
        ("dflash", "hidden_norm", 0.1, "hidden_norm.weight differs"),
        ("dflash", "layers.1.self_attn.k_proj", 0.1, "layers.1.attention.qkv.weight differs"),
        ("dflash", "layers.1.self_attn.v_proj", 0.1, "layers.1.attention.qkv.weight differs"),
        ("dflash", "k_norm", 0.1, "attention.k_norm.weight differs"),
        ("dflash", "q_norm", 0.1, ""),
        ("dflash", "input_layernorm", 0.1, ""),
        ("dflash", "q_proj", 0.1, ""),
        ("eagle3", "q_proj", 0.1, ""),
        ("eagle3", "post_attention_layernorm", 0.1, ""),
    ],
)
def test_what_must_stay_is_named(
    served_engine: Engine,
    models: Models,
    directory: Path,
    tmp_path: Path,
    drafter: str,
    part: str,
    value: float,
    said: str,
) -> None:
    made = changed(getattr(models, drafter), tmp_path / "made", only(part, value))
    number = publish(directory, bundle_of(models, tmp_path / "bundle", **{drafter: made}))
    if said:
        assert said in refused(served_engine, number)
    else:
        arms = {arm: served_engine.worker.drafters[arm].model for arm in ("ar", "diffusion")}
        before = fingerprint(arms)
        swap(served_engine, number)
        assert fingerprint(arms) == before, "stored draft KV of one version is the other's"


def test_another_configuration_or_a_torn_file_is_refused(
    served_engine: Engine, models: Models, directory: Path, tmp_path: Path
) -> None:
    wider = changed(models.dflash, tmp_path / "made", only("none", 0), {"block_size": 4})
    number = publish(directory, bundle_of(models, tmp_path / "bundle", dflash=wider))
    assert "has block_size 4, the drafter that serves has 8" in refused(served_engine, number)
    weights = path_of(directory, number) / "dflash" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    assert "is not the file that its bundle was made with" in refused(served_engine, number)
    assert "has no version 999" in refused(served_engine, 999)


def damaged(directory: Path, number: int, file: str, content: bytes) -> None:
    """Put anything into a file of a version, whose sum follows."""
    bundle = path_of(directory, number)
    (bundle / file).write_bytes(content)
    part, _, name = file.partition("/")
    if name:
        said = json.loads((bundle / "whiflash.json").read_text())
        said["sources"][part]["files"][name] = hashlib.sha256(content).hexdigest()
        (bundle / "whiflash.json").write_text(json.dumps(said))


MALFORMED = (
    ("rope_theta", '"x"'),
    ("rope_scaling", "[1]"),
    ("rope_scaling", '{"rope_type": "yarn", "factor": "x"}'),
    ("rms_norm_eps", "[1]"),
    ("rms_norm_eps", "NaN"),
    ("rms_norm_eps", "1e999"),
    ("num_attention_heads", str(10**12)),
    ("num_attention_heads", "0"),
    ("num_hidden_layers", str(10**9)),
    ("hidden_size", f"1{'0' * 400}"),
    ("intermediate_size", str(10**15)),
    ("vocab_size", "null"),
    ("architectures", "5"),
    ("architectures", "[[]]"),
    ("max_position_embeddings", '{"a": 1}'),
    ("extra", "[" * 100_000),
)


@pytest.mark.parametrize("drafter", ["eagle3", "dflash"])
def test_a_version_of_anything_is_refused_by_file(
    served_engine: Engine, models: Models, directory: Path, tmp_path: Path, drafter: str
) -> None:
    """Its configuration is compared before a module of its size is built, and whatever fails is an objection."""
    e = served_engine
    number = publish(directory, bundle_of(models, tmp_path / "bundle", **{drafter: getattr(models, drafter)}))
    file, manifest = f"{drafter}/config.json", path_of(directory, number) / "whiflash.json"
    config = json.loads((path_of(directory, number) / file).read_text())
    built: list[str] = []
    load = e.worker.weights._load
    e.worker.weights._load = lambda draft: built.append(draft.format.arm) or load(draft)
    for key, value in MALFORMED:
        damaged(directory, number, file, json.dumps({**config, key: "@"}).replace('"@"', value).encode())
        assert f"{path_of(directory, number) / file}" in refused(e, number), (key, value[:20])
    arm = {"dflash": "diffusion", "eagle3": "ar"}[drafter]
    assert arm not in built
    e.worker.weights._load = load
    for text in ("", "[]", "null", "5", "{", "\x00", '{"architectures": ["X"]}'):
        damaged(directory, number, file, text.encode())
        assert file in refused(e, number), text
    for content in (b"", b"\xff" * 64, (2**63 - 1).to_bytes(8, "little") + b"{}"):
        damaged(directory, number, f"{drafter}/model.safetensors", content)
        assert str(path_of(directory, number)) in refused(e, number), content[:8]
    damaged(directory, number, "whiflash.json", b"[" * 100_000)
    assert str(manifest) in refused(e, number)


def test_a_failure_of_any_kind_is_an_objection(
    served_engine: Engine, directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A start goes on with its own drafters."""
    weights = served_engine.worker.weights
    served_last = weights._versions.directory / "current.json"
    before = served_last.read_text()
    with patch.object(weights, "_load", side_effect=MemoryError("no memory")):
        swap_failed = refused(served_engine, 1)
        served_last.write_text('{"version": 1, "before": 0}')
        try:
            weights.restore()
        finally:
            served_last.write_text(before)
    assert f"{path_of(directory, 1)}/eagle3 cannot be read: MemoryError: no memory" in swap_failed
    assert "begins with its own drafters" in caplog.text


def test_using_what_serves_keeps_what_was_before(served_engine: Engine) -> None:
    for number, before in ((1, None), (2, 1), (2, 1), (1, 2)):
        swap(served_engine, number)
        assert before in (None, served_engine.worker.weights.used.before)


def test_earlier_layers_of_a_chain_stay_and_the_last_one_may_change() -> None:
    """An earlier layer's output for entry p is in the later layers' K and V of it; in a block drafter only the target's
    output is.
    """
    shape = AttentionShape(2, 1, 8)
    rope = {"rope_type": "default", "rope_theta": 1e4}
    chain = Eagle3Drafter(
        Eagle3Config(16, 16, 32, shape, 2, 64, None, 3, (), rope), torch.zeros(64, 16), torch.zeros(64, 16)
    )
    frozen = {name: first_frozen_row(chain, name) for name, _ in chain.named_parameters()}
    assert {first for name, first in frozen.items() if name.startswith("layers.0.")} == {0}
    assert frozen["layers.1.attention.out.weight"] is None
    assert frozen["layers.1.attention.qkv.weight"] == shape.heads * shape.head_dim
    assert frozen["layers.1.mlp.down.weight"] is None


def test_packed_copies_are_made_again() -> None:
    """A copy that stayed would go on drafting with the weights of before; one that went would cost time only."""
    weight, other, rows = (torch.randn(size, 64).bfloat16() for size in (64, 64, 3))
    if not packed.packable(weight):
        pytest.skip("this processor packs nothing")
    packed.pack([weight], at_most=weight.nbytes)
    rewrite(weight, other)
    assert packed.is_packed(weight)
    assert torch.equal(packed.linear(rows, weight), torch.nn.functional.linear(rows, other))


def of_two(weights: LiveWeights, gather: Callable[[str | None], Sequence[str | None]]) -> LiveWeights:
    """The first of two processes."""
    return LiveWeights(
        weights._models,
        weights._versions,
        load=weights._load,
        written=lambda: None,
        ranks=Ranks(0, 2, lambda message: message, gather),
        behind=weights._behind,
    )


def test_no_rank_writes_where_one_objects(directory: Path, served_engine: Engine) -> None:
    """Nor while one still reads: then all go on."""
    theirs = ["not yet", None, "rank 1 cannot read it"]
    mine: list[str | None] = []

    def gather(own: str | None) -> Sequence[str | None]:
        mine.append(own)
        return [own, theirs[len(mine) - 1]]

    two = of_two(served_engine.worker.weights, gather)
    two.ask(1, "a")
    reads(two)
    assert not two.advance()
    assert two.outcomes == {}
    assert two.advance()
    assert two.outcomes == {"a": "rank 1 cannot read it"}
    assert mine == [None, None, None]
    assert two.used.version == 0


class Held:
    """In place of a `load`: it begins when `until` is set, after `then`."""

    def __init__(self, weights: LiveWeights) -> None:
        self.began, self.until, self.then = Event(), Event(), lambda: None
        self._weights: Any = weights
        self._load = weights._load

    def __enter__(self) -> "Held":
        self._weights._load = self
        return self

    def __call__(self, draft: Any) -> Any:
        self.began.set()
        self.until.wait()
        self.then()
        return self._load(draft)

    def __exit__(self, *_: object) -> None:
        self.until.set()
        self._weights._load = self._load


def test_rounds_go_on_while_versions_are_read_one_after_the_other(
    served_engine: Engine, plain: list[list[int]]
) -> None:
    """A switch asked for while another version is read has its turn, also if the other is refused."""
    e, weights = served_engine, served_engine.worker.weights
    swap(e, 0)
    e.start_over("random")
    names = [f"b{i}-" for i in range(len(PROMPTS))]
    for name, prompt in zip(names, PROMPTS, strict=True):
        e.submit(name, prompt, max_new_tokens=60)
    with Held(weights) as held:
        weights.ask(1, "first")
        weights.ask(999, "second")
        weights.ask(2, "third")
        held.began.wait()
        for _ in range(8):
            assert e.step()
            e.worker.between_rounds()
        assert (weights.used.version, weights.snapshot()["loading"]) == (0, 1)
    served = []

    def between() -> None:
        e.worker.between_rounds()
        served.append(weights.used.version)

    e.run(between)
    while len(weights._asked):
        reads(weights)
        between()
    assert [e.output(name) for name in names] == plain
    assert list(dict.fromkeys(served))[-2:] == [1, 2]
    assert (weights.outcomes["first"], weights.outcomes["third"]) == ("", "")
    assert "has no version 999" in weights.outcomes["second"]
    assert (weights.used.before, weights.snapshot()["loading"]) == (1, None)


def test_a_version_that_vanishes_while_it_is_read_is_refused(
    served_engine: Engine, models: Models, directory: Path, tmp_path: Path
) -> None:
    number = publish(directory, bundle_of(models, tmp_path / "bundle", dflash=models.dflash))
    with Held(served_engine.worker.weights) as held:
        held.then = lambda: shutil.rmtree(path_of(directory, number), ignore_errors=True)
        held.until.set()
        assert str(path_of(directory, number)) in refused(served_engine, number)


def test_a_server_that_ends_waits_for_no_version() -> None:
    """A disk that does not answer must not keep its process."""
    code = """
from threading import Event
from whiflash_sglang.updates.swap import Reading

reading = Reading(1, lambda _: Event().wait())
reading.start()
"""
    done = subprocess.run(
        [sys.executable, "-c", code], timeout=120, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
