"""Stock SGLang on a phantom H100: its launcher's choices, its scheduler, FA3 and graphs, and our worker in it."""

import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import xgrammar
from adapters import ATTENTION, make_adapter
from expected import next_probabilities
from model_set import Models
from reference import ReferenceDrafters
from tiny_models import tiny_dflash, tiny_eagle3, tiny_target
from transformers import AutoTokenizer

from whiflash_train.target import TargetModel

if find_spec("sgl_kernel") is None or shutil.which("cc") is None:
    pytest.skip("without SGLang's operators for CUDA, or a C compiler", allow_module_level=True)

DRAW, LENGTHS = "sglang/srt/layers/sampler.py", "sglang/srt/speculative/eagle_utils.py"
"""SGLang waits when PyTorch draws samples in place of FlashInfer. It copies lengths from pageable memory twice a round,
for every speculative algorithm."""
SEGMENTS = "sglang/srt/lora/backend/triton_backend.py"
"""SGLang copies segments of adapters from pageable memory twice a prefill."""
RATED = "sglang/srt/layers/logprob_processor.py"
"""SGLang waits at two lines in a prefill whose request asks for log-probabilities; two requests of `served.py` do."""
NOT_OURS = re.compile(r"stream of the start may write again what .* uses: sglang/srt/mem_cache/allocator/token.py:\d+")
"""Races of SGLang without WHIFLASH, too: nobody uses the stream of the start while serving."""


ELSEWHERE = {
    "whiflash_kernels/dispatch.py": 1,  # Triton is forced on a CPU
    "whiflash_kernels/float8.py": 1,
    "whiflash_kernels/triton_kernels/attention.py": 1,
    "whiflash_kernels/triton_kernels/launch.py": 2,
    "whiflash_kernels/triton_kernels/verify.py": 1,
    "whiflash_sglang/engine/forward/adapted.py": 1,
    "whiflash_sglang/formats/packed.py": 1,
}
"""Places that ask for a card and that no server here reaches: how many of a file."""


MOST_LAUNCHES = {"whiflash": 15, "sglang": 9}
"""Launches of a pass with four requests that two drafters and copies draft for, by owner: a ratchet, never raised."""
BESIDE: dict[str, dict[str, int]] = {
    "grammar": {"whiflash": 2, "sglang": 2},
    "thinking": {"whiflash": 2, "sglang": 2},
    "all": {"whiflash": 2, "sglang": 1},
}
"""More if one of them has such a parameter, or all of them: a graph, masks, a copy of drafts that SGLang makes."""
MORE_THAN_DECODING = 4
"""Launches of a round without drafts beyond those of SGLang's decoding, at most: a ratchet, never raised."""
UPSTREAM = {"greedy": 34, "sampled": 54}
"""Launches of such a pass of SGLang 0.5.23's DFLASH; EAGLE3 has more (`docs/dev/findings.md`)."""


BESIDE_ROUNDS = {"write_req_to_token_pool_triton", "_small_copy_kernel", "_row_logsumexp_kernel"}
"""Kernels that SGLang compiles again without us, too: for prefills at odd slots, and for first log-probabilities."""


class Target(NamedTuple):
    """Checkpoints of a target and its drafters, and the target as it is."""

    target: Path
    eagle3: Path
    dflash: Path
    model: TargetModel

    @classmethod
    def made(cls, root: Path) -> "Target":
        path = tiny_target(root / "target", peaked=True, num_layers=4)
        model = TargetModel(path, device=torch.device("cpu"), dtype=torch.float32)
        return cls(path, tiny_eagle3(root / "eagle3", path), tiny_dflash(root / "dflash", path), model)

    def likeliest(
        self,
        prompt: Sequence[int],
        text: Sequence[int],
        grammar: dict[str, Any] | None = None,
        changed: dict[str, Any] | None = None,
    ) -> list[int]:
        """Return the likeliest token after `prompt` and each of `text` but the last: `text`, if it was decoded plainly.

        grammar: a parameter of SGLang's that names what may be said. changed: parameters that change logits.
        """
        final = self.model.forward([*prompt, *text]).final
        logits = torch.nn.functional.linear(final, self.model.head)[len(prompt) - 1 : -1]
        if grammar is not None:
            forbid(logits, self.target, text, grammar)
        if changed is not None:
            rows = [next_probabilities(row, text[:at], changed) for at, row in enumerate(logits)]
            logits = torch.stack(rows)
        likeliest: list[int] = logits.argmax(-1).tolist()
        return likeliest


def forbid(logits: torch.Tensor, target: Path, text: Sequence[int], grammar: dict[str, Any]) -> None:
    """Mask `logits` [tokens, V] of each token of `text` by a grammar, as xgrammar has it with its defaults."""
    tokenizer = AutoTokenizer.from_pretrained(target)
    info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=logits.shape[1])
    compiler = xgrammar.GrammarCompiler(info)
    ((kind, form),) = grammar.items()
    matcher = xgrammar.GrammarMatcher(getattr(compiler, f"compile_{kind}")(form))
    allowed = xgrammar.allocate_token_bitmask(1, logits.shape[1])
    for row, token in zip(logits, text, strict=True):
        matcher.fill_next_token_bitmask(allowed)
        xgrammar.apply_token_bitmask_inplace(row[None], allowed)
        assert matcher.accept_token(token)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    return Target.made(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def by_attention(target: Target, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    file = tmp_path_factory.mktemp("found") / "found.json"
    return served(file, "fa3,triton", target.target, target.eagle3, target.dflash)


@pytest.fixture(scope="module")
def found(by_attention: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return by_attention["fa3"]


def served(file: Path, attentions: str, *models: Path) -> dict[str, dict[str, Any]]:
    """SGLang asks for a card when it is imported, so this is a process of its own."""
    script = str(Path(__file__).parent / "served.py")
    command = [sys.executable, script, str(file), attentions, *map(str, models)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-6000:]
    result: dict[str, dict[str, Any]] = json.loads(file.read_text())
    for attention, found in result.items():
        names = ("rounds", "launches", "stalls", "pageable", "waits_of_host", "races")
        print(attention, {name: found[name] for name in names})
    return result


def test_the_scheduler_waits_for_nothing(found: dict[str, Any]) -> None:
    """In prefills, rounds, aborts, retractions and ends of requests, with results that are a round late."""
    check_waits(found)


def check_waits(found: dict[str, Any], elsewhere: tuple[str, ...] = (LENGTHS,)) -> None:
    assert not [site for site in found["stalls"] if not site.startswith((DRAW, RATED))]
    prefills = 2 + found["retracted"]
    assert {site: n for site, n in found["stalls"].items() if site.startswith(RATED) and n > prefills} == {}
    assert not [site for site in found["pageable"] if not site.startswith(elsewhere)]
    assert not [site for site in found["waits_of_host"] if site.startswith("whiflash")]
    assert not [race for race in found["races"] if not NOT_OURS.fullmatch(race)]
    assert not found["dangling"]


def test_all_arms_and_graphs_drafted_and_verified(found: dict[str, Any]) -> None:
    assert found["attention"] == "fa3"
    assert found["retracted"] > 0
    assert found["together"] > 4
    assert all(found["rounds"][arm] for arm in ("ar", "diffusion", "lookup", "none")), found["rounds"]
    verified = found["launches"]["prepare_mixed_block"]
    assert found["replays"] > verified  # every verification, and drafters' passes


def check_texts(found: dict[str, Any], target: Target) -> None:
    for rid, text in found["texts"].items():
        assert text == target.likeliest(found["prompts"][rid], text, changed=found["changed"].get(rid)), rid


def test_text_is_plain_decodings(found: dict[str, Any], target: Target) -> None:
    """Also where each replay spoils what graphs captured later hold."""
    check_texts(found, target)
    for name, grammar in found["constrained"]["grammars"].items():
        text = found["constrained"]["texts"][name]
        assert text == target.likeliest(tuple(name.encode()), text, grammar), name


def test_a_grammar_takes_the_overlap_from_nobody(found: dict[str, Any]) -> None:
    constrained = found["constrained"]
    assert constrained["overlapped"] > 0
    assert constrained["not overlapped"] == 0
    assert not [site for site in constrained["stalls"] if site.startswith("whiflash")]
    assert constrained["alone"] == "length", "its token is a filler, which no grammar refuses before it has ended"


def test_places_that_ask_for_a_card_are_reached(found: dict[str, Any]) -> None:
    assert found["missed"] == ELSEWHERE


def test_what_waits_or_races_in_a_round_is_seen(found: dict[str, Any]) -> None:
    assert min(found["planted"].values()) > 0, found["planted"]


def test_with_triton_attention(target: Target, by_attention: dict[str, dict[str, Any]]) -> None:
    found = by_attention["triton"]
    check_waits(found)
    assert (found["attention"], found["launches"]["extend_attention_fwd"] > 0) == ("triton", True)
    check_texts(found, target)


@pytest.mark.parametrize("kind", ["greedy", "sampled", *BESIDE])
def test_launches_of_a_steady_pass(found: dict[str, Any], kind: str) -> None:
    """All launches of a pass: ours and SGLang's. Sampling is in the graph."""
    owners, launches = Counter[str](), found["passes"][kind]
    for launch, count in sorted(launches.items(), key=lambda one: one[0].split()[-1]):
        print(f"{count} x {launch}")
        owners[next(owner for owner in MOST_LAUNCHES if owner in launch.split()[-1])] += count
    print(dict(owners))
    assert launches.keys() >= {"fill_slots whiflash_kernels/dispatch.py:54"}, "nothing was counted"
    assert not [launch for launch in launches if launch.startswith(("sample_rows", "park"))]
    more = BESIDE.get(kind, {})
    assert all(owners[owner] <= most + more.get(owner, 0) for owner, most in MOST_LAUNCHES.items()), owners
    assert owners.total() < UPSTREAM.get(kind, 34)


@pytest.mark.evidence
def test_a_round_without_drafts_beside_sglangs_decoding() -> None:
    """Each layer calls FA3 where decoding calls it, and all make its schedule once (`docs/dev/findings.md`)."""
    command = [sys.executable, str(Path(__file__).parent / "plain_pass.py"), "fa3"]
    table = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    print(table := table[table.index("| launches |") :])
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    assert not [name for name, *_ in rows if name.startswith("in a graph: fa3 ")]
    assert [counts for name, *counts in rows if name.startswith("in a graph: plan")] == [[*"001111"]]
    decoding, _, *ours = map(int, rows[-1][1:])
    assert max(ours) - decoding <= MORE_THAN_DECODING


def test_a_thinking_budget_beside_seven_requests_launches_nothing(found: dict[str, Any]) -> None:
    """Until it may end in a round, which the host knows before the forward."""
    assert found["passes"]["budget"] == found["passes"]["eight"]


def test_serving_compiles_nothing_of_sglangs_for_rounds(found: dict[str, Any]) -> None:
    """That a first request has not, for any number of requests and rows. Ours: `kernels/tests/test_aot.py`."""
    assert {kernel for kernel, _ in found["compiled"]} <= BESIDE_ROUNDS, found["compiled"]


@pytest.mark.evidence
def test_without_a_drafter(target: Target, tmp_path: Path) -> None:
    found = served(tmp_path / "found.json", "fa3", target.target)["fa3"]
    check_waits(found)
    assert set(found["rounds"]) == {"lookup", "none", "structure"}
    assert found["rounds"]["lookup"] * found["rounds"]["none"] > 0
    assert not {"park", "unpark", "claim_backlogs"} & found["launches"].keys()  # nothing is captured or kept
    check_texts(found, target)


@pytest.mark.evidence
def test_replayed_rows_meet_their_requests_adapter(target: Target, tmp_path: Path) -> None:
    """Each text is that of the target into which its adapter is merged; nothing waits for a width."""
    pair = target.eagle3, target.dflash
    models = Models(target.target, *pair, ReferenceDrafters(target.target, *pair))
    one = make_adapter(models, tmp_path, "one", seed=1, rank=4, modules=ATTENTION)
    two = make_adapter(models, tmp_path, "two", seed=2, rank=8)
    found = served(tmp_path / "found.json", "fa3", *target[:3], one.path, two.path)["fa3"]
    check_waits(found, (LENGTHS, SEGMENTS))
    of = {None: target.model, **{each.name: each.models.reference.target.model for each in (one, two)}}
    for rid, text in found["texts"].items():
        its = target._replace(model=of[found["adapters"][rid]])
        assert text == its.likeliest(found["prompts"][rid], text, changed=found["changed"].get(rid)), rid
    assert found["retracted"]
    assert found["replays"] > found["launches"]["prepare_mixed_block"] == found["launches"]["fill_slots"]
    assert found["launches"]["_sgemm_lora_a_kernel"]
