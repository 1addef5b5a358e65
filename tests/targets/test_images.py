"""Targets that are served with images: text is plain decoding's, whoever drafts and whatever shares a prefix.

An image's positions have ids that are no tokens and hash the image. Stock SGLang's plain decoding is the reference;
Hugging Face's class says how far logits are apart where two are alike.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from emulated import emulated_graphs
from engine import Engine, engine
from families import FAMILIES, tiny_family
from matrix import chosen, sampled
from oracle_arm import OracleArm
from overlap import overlapped
from pictures import IMAGE, VISION_START, Part, Picture, asking, prompt_of, words
from tiny_models import tiny_pair
from traffic import Arrival, play

from whiflash_sglang.engine.launch.refusals import IMAGES
from whiflash_sglang.records.core import PLACEHOLDERS, readable

POLICIES = ("ar", "diffusion", "lookup", "auto", "none")
QWEN = "Qwen2_5_VLForConditionalGeneration"
STEM = words(1, 10)
ASKED: Mapping[str, tuple[int, Sequence[Part]]] = {
    # Step of arrival, and what is asked. Chunks have 16 tokens.
    "cat": (0, [STEM, Picture(1), words(2, 8)]),
    "text": (0, [words(3, 30)]),
    "dog": (1, [STEM, Picture(2), words(2, 8)]),  # another image behind and before the same text
    "wide": (2, [words(4, 5), Picture(3, 8, 12), words(5, 3)]),  # chunks end in it
    "again": (12, [STEM, Picture(1), words(2, 8), words(6, 5)]),  # a prefix with an image is known
    "two": (13, [STEM, Picture(1), words(2, 8), Picture(2, 4, 8), words(7, 4)]),
    "last": (14, [words(8, 6), Picture(4, 8, 8)]),  # the prompt ends with an image's end
}
OPTIONS: dict[str, Any] = {"enable_multimodal": True, "max_running_requests": 4, "chunked_prefill_size": 16}


@dataclass(frozen=True)
class Seen:
    """Hugging Face's class, which is given the pictures of a prompt."""

    model: Any

    def outputs(self, parts: Sequence[Part], written: Sequence[int] = (), **options: Any) -> Any:
        """After a prompt and what was written behind it."""
        ids = [*prompt_of(parts), *written]
        pictures = [part for part in parts if isinstance(part, Picture)]
        if pictures:
            kind = self.model.config.model_type
            options["pixel_values"] = torch.cat([picture.pixels(kind) for picture in pictures])
            options["image_grid_thw"] = torch.cat([picture.grid for picture in pictures])
            options["mm_token_type_ids"] = torch.tensor([[int(id == IMAGE) for id in ids]])
        with torch.inference_mode():
            return self.model(torch.tensor([ids]), use_cache=False, **options)


def seeing(directory: Path, name: str) -> Seen:
    """Write a target of the class; the same weights in Hugging Face's class."""
    model = tiny_family(directory, FAMILIES[name]).model
    for config in (model.config, model.model.config):
        config.image_token_id, config.vision_start_token_id = IMAGE, VISION_START
    return Seen(model)


def arrivals(name: str, **params: Any) -> list[Arrival]:
    """`ASKED`, as the target's processor would hand it on."""
    kind = FAMILIES[name].kind
    made = []
    for rid, (step, parts) in ASKED.items():
        prompt, asked = asking(parts, kind, max_new_tokens=40, **params)
        made.append(Arrival(rid, step, prompt, asked))
    return made


@dataclass(frozen=True)
class Target:
    """Files of a target and Hugging Face's class. prompts, expected: what is `ASKED`, readable; plain decoding's."""

    name: str
    path: Path
    seen: Seen
    prompts: Mapping[str, Sequence[int]]
    expected: Mapping[str, list[int]]


Made = Callable[[str], Target]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Targets by class, each made once."""

    def make(name: str) -> Target:
        path = tmp_path_factory.mktemp("target")
        seen = seeing(path, name)
        with engine(path, **OPTIONS) as e:
            expected = play(e, arrivals(name))
            ids = {rid: e.requests[rid].origin_input_ids for rid in expected}
        for rid, prompt in ids.items():
            assert (max(prompt) >= PLACEHOLDERS) is (rid != "text")
        return Target(name, path, seen, {rid: readable(prompt) for rid, prompt in ids.items()}, expected)

    return cache(make)


@dataclass(frozen=True)
class Served:
    """An engine that drafts at random, with an arm that is mostly right, and what plain decoding writes."""

    name: str
    seen: Seen
    engine: Engine
    oracle: OracleArm
    expected: Mapping[str, list[int]]

    def check(self, policy: str, asked: Sequence[Arrival]) -> None:
        """Texts are plain decoding's, as far as no two tokens are alike."""
        found = play(self.engine, [replace(a, rid=f"{policy} {a.rid}") for a in asked])
        for a in asked:
            wanted, written = self.expected[a.rid], found[f"{policy} {a.rid}"]
            first = next((i for i, both in enumerate(zip(wanted, written, strict=False)) if both[0] != both[1]), None)
            assert len(written) == len(wanted), f"{policy} {a.rid}"
            if first is not None:
                logits = self.seen.outputs(ASKED[a.rid][1], wanted[:first]).logits[0, -1]
                lead = float(logits[wanted[first]] - logits[written[first]])
                assert lead < 1e-4, f"{policy} {a.rid}: token {first} is wrong by {lead:.2e}"


@contextmanager
def serving(
    target: Target, root: Path, *, drafters: bool = True, layers: int = 1, start: Any = engine, **options: Any
) -> Iterator[Served]:
    flags: dict[str, Any] = {"whiflash_router": "random"}
    if drafters:
        flags |= tiny_pair(root, target.path, eagle3_layers=layers)
    oracle = OracleArm(0.9, seed=3)
    for rid, prompt in target.prompts.items():
        oracle.learn(prompt, target.expected[rid])
    with start(target.path, whiflash=flags, arms=[oracle], **{**OPTIONS, **options}) as e:
        yield Served(target.name, target.seen, e, oracle, target.expected)


@pytest.mark.parametrize("name", sampled(IMAGES, QWEN))
@pytest.mark.parametrize("drafters", sampled([True, False], True), ids=["drafters", "copies"])
def test_text_is_plain_decodings(
    made: Made, name: str, drafters: bool, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    """Under random routing, then under every policy, whose requests find prefixes with images."""
    policies = chosen(pytestconfig, POLICIES if drafters else ("lookup", "auto", "none"), "auto")
    with serving(made(name), tmp_path, drafters=drafters) as s:
        s.check("random", arrivals(name))
        s.engine.scheduler.flush_cache()
        for policy in policies:
            s.engine.worker.reconfigure({"router": policy})
            s.check(policy, arrivals(name))
        assert s.engine.requests["random again"].cached_tokens > len(prompt_of([STEM, Picture(1)]))
        # Their rows still hold images where these texts have not come yet.
        s.engine.generate([words(9, 3), words(3, 30)], frequency_penalty=0.5, max_new_tokens=40)
        s.engine.check_leaks()
        quarantine = s.engine.worker.quarantine
        assert not any((*quarantine.faults.values(), *quarantine.left_out.values())), "a placeholder was drafted"
    assert max(s.oracle.accepted) == s.oracle.max_drafts, "no full block was accepted"
    assert s.oracle.rejected > 0, "nothing was rejected"


@pytest.mark.parametrize("name", sampled([QWEN, "Qwen3VLForConditionalGeneration"], QWEN))
def test_rounds_that_overlap_are_replayed(
    made: Made, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a card: the device copies, the host plans a round ahead, and rounds are graphs."""
    options = {"context_length": 256, "max_total_tokens": 2048}
    with serving(made(name), tmp_path, start=partial(overlapped, host_lengths=False), **options) as s:
        with emulated_graphs(s.engine) as captured:
            s.check("random", arrivals(name))
            assert len(captured.backend.replayed) == s.engine.worker.clock.rounds
        assert not s.engine.streams.races
        assert not any(s.engine.worker.quarantine.faults.values()), "a placeholder was drafted"


def test_a_prefix_with_an_image_comes_back_from_the_host(made: Made, tmp_path: Path) -> None:
    """A drafter of several layers ingests images, too, and its KV follows."""
    host = {"enable_hierarchical_cache": True, "hicache_ratio": 6.0, "hicache_write_policy": "write_through"}
    with serving(made(QWEN), tmp_path, layers=2, max_total_tokens=448, **host) as s:
        s.check("first", arrivals(QWEN)[:3])
        s.engine.generate([words(seed, 60) for seed in range(20, 28)], max_new_tokens=40)
        s.check("later", arrivals(QWEN)[:3])
        cat, dog = (s.engine.requests[f"later {rid}"] for rid in ("cat", "dog"))
        assert cat.cached_tokens_host > len(prompt_of([STEM, Picture(1)]))
        # It finds the text before its image with the other.
        assert dog.cached_tokens_host > Picture(2).positions
        quarantine = s.engine.worker.quarantine
        assert not any((*quarantine.faults.values(), *quarantine.left_out.values()))
        assert "ar" not in quarantine


@pytest.mark.evidence
def test_requests_that_are_retracted_go_on(made: Made, tmp_path: Path) -> None:
    with serving(made(QWEN), tmp_path, retract=3) as s:
        s.check("random", arrivals(QWEN))
        assert sum(req.retraction_count for req in s.engine.requests.values()) > 5


@pytest.mark.evidence
def test_a_sessions_turns_have_images(made: Made, tmp_path: Path) -> None:
    """In the first turn, in the second, and in neither of the last two."""
    turns = [[words(9, 6), Picture(5)], [words(10, 4), Picture(6, 8, 8), words(11, 2)], [words(12, 5)], [words(13, 3)]]

    def converse(e: Engine) -> list[list[int]]:
        e.open_session("talk", streaming=False)
        for number, parts in enumerate(turns):
            prompt, asked = asking(parts, FAMILIES[QWEN].kind, max_new_tokens=20)
            before = {"rid": str(number - 1)} if number else {}
            e.ask(str(number), prompt, session={"id": "talk", **before}, **asked)
        e.close_session("talk")
        return [e.output(str(number)) for number in range(len(turns))]

    with serving(made(QWEN), tmp_path) as s:
        found = converse(s.engine)
    with engine(made(QWEN).path, **OPTIONS) as e:
        assert converse(e) == found


def test_draft_kv_of_images_is_one_passs(made: Made, tmp_path: Path) -> None:
    """A drafter of next tokens reads what the target read at an image's positions. Before one that the next chunk
    embeds it reads token 0."""
    with serving(made(QWEN), tmp_path) as s:
        e, ends, prefill = s.engine, set[int](), s.engine.worker.target.prefill

        def noting(batch: Any) -> Any:
            ends.update(prefix + count - 1 for prefix, count in zip(batch.prefix_lens, batch.extend_lens, strict=True))
            return prefill(batch)

        e.worker.target.prefill = noting
        for rid in ("cat", "wide", "two"):
            e.scheduler.flush_cache()
            ends.clear()
            parts = ASKED[rid][1]
            prompt, asked = asking(parts, FAMILIES[QWEN].kind, max_new_tokens=8)
            e.submit(f"kv {rid}", prompt, **asked)
            req = e.requests[f"kv {rid}"]
            while not req.output_ids:
                e.step()
            slots = e.worker.target.slot_table[req.kv.req_pool_idx, : len(prompt)].long()
            states = s.seen.outputs(parts, req.output_ids[:1], output_hidden_states=True).hidden_states
            for arm, drafter in (("ar", e.worker.drafters["ar"]), ("diffusion", e.worker.drafters["diffusion"])):
                layers = [states[layer + 1][0, :-1] for layer in drafter.captured_layers]
                fused = drafter.model.fuse(torch.cat(layers, -1))
                places = torch.arange(len(prompt))
                if arm == "ar":
                    k, v = drafter.model.keys_values(states[0][0, 1:], fused, places)
                    right = torch.tensor(
                        [p not in ends or prompt[(p + 1) % len(prompt)] != IMAGE for p in places.tolist()]
                    )
                else:
                    k, v = drafter.model.keys_values(fused, places)
                    right = places >= 0
                for pool, wanted in ((drafter.kv.k, k), (drafter.kv.v, v)):
                    wanted = wanted if wanted.dim() == 4 else wanted[None]
                    found = pool[:, slots][:, right]
                    torch.testing.assert_close(found, wanted[:, right], atol=1e-3, rtol=1e-3, msg=f"{arm} of {rid}")
            e.run()
