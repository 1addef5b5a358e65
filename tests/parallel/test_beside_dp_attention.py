"""DP attention beside host memory, sessions, other weights, and requests that arrive at a decode server."""

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from beside_dp_attention import COLD, play_arrived, play_keeping
from families import FAMILIES, tiny_family
from pictures import words
from ranks_at_work import on_ranks
from reference import Comparison
from safetensors.torch import load_file, save_file
from tensor_parallel import RANKS, Checkpoints
from tiny_models import save_tokenizer
from traffic import Arrival

pytestmark = pytest.mark.evidence

TALKS, FILLS, BACK = 60, 160, 540
"""Steps from which on a session talks, other texts evict what was asked, and some of that is asked again."""


def asked_of() -> list[list[Arrival]]:
    """The first rank is asked all, the second one prompt beside, and in the end what the first has in host memory."""
    asked = [Arrival("text", 0, tuple(words(3, 30))), Arrival("other", 1, tuple(words(4, 40)))]
    for number in range(2):
        session = {"session": {"id": "talk", **({"rid": "turn0"} if number else {})}}
        asked.append(Arrival(f"turn{number}", TALKS + 45 * number, tuple(words(9 + number, 12)), session))
    asked += [
        Arrival(f"fill{number}", FILLS + 45 * number, tuple(words(20 + number, 60)), {"max_new_tokens": 40})
        for number in range(8)
    ]
    asked.append(Arrival("back", BACK + 10, COLD))
    return [asked, [Arrival("peer", 8, tuple(words(5, 20))), replace(asked[-1], rid="cold")]]


def test_host_memory_a_session_and_other_weights(tmp_path: Path) -> None:
    """Text is plain decoding's. From host memory come as many right drafts as behind a prefill, and the head that the
    ranks share is gathered again when the target is given another one."""
    target, other = tmp_path / "target", tmp_path / "other"
    model = tiny_family(target, FAMILIES["Qwen3MoeForCausalLM"])
    checkpoints = Checkpoints.of(tmp_path, target)
    shutil.copytree(target, other)
    tensors = load_file(other / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"].flip(0).contiguous()
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    asked, work = asked_of(), partial(play_keeping, checkpoints)
    plain = on_ranks(RANKS, partial(work, None, asked, BACK, other))
    found = on_ranks(RANKS, partial(work, "random", asked, BACK, other))
    for share, wanted, here in zip(asked, plain, found, strict=True):
        Comparison(model).check_all(share, wanted.outputs, here.outputs)
        assert sum(right for _, right in here.rounds.values())
    first, second = found
    assert first.host["back"] > 20
    assert not second.host["cold"]
    assert first.rounds["back"] == second.rounds["cold"]


def test_requests_that_arrive(tmp_path: Path) -> None:
    """A decode server's ranks, one of which has nothing for most of the time."""
    target = tmp_path / "target"
    tiny_family(target, FAMILIES["Qwen3MoeForCausalLM"])
    save_tokenizer(target)
    plain, found = (
        on_ranks(RANKS, partial(play_arrived, target, whiflash, (3, 1)))
        for whiflash in (None, {"whiflash_drafters": "none"})
    )
    assert [outputs for outputs, _ in found] == [outputs for outputs, _ in plain]
    assert found[0][1]
