"""Whole rounds: a tiny target, both drafters, rings and every op, against plain decoding and one full pass."""

import random
from dataclasses import dataclass, field

import kernel_oracles as oracles
import pytest
import torch
from kernel_backends import BACKENDS, DEVICE, running
from kernel_tiny_models import CAPTURED, HIDDEN, MASK_TOKEN, MAX_POSITION, DFlash, Eagle3, Target
from kernel_tolerances import assert_close
from torch import Tensor
from whiflash_kernels import (
    BacklogRings,
    Committed,
    MixedBlock,
    Unparked,
    accept_and_commit,
    dflash_catch_up,
    eagle3_catch_up,
    park,
    prepare_mixed_block,
    router_mlp,
    routing_stats,
    unpark,
)

CAPACITY, WIDEST, ROUNDS = 12, 5, 9
ARMS = ("ar", "diffusion", "lookup", "none")


@dataclass
class Request:
    """Host side of one request; ``tokens`` ends with the bonus token, ``synced`` are both watermarks."""

    slot: int
    tokens: list[int]
    synced: dict[str, int] = field(default_factory=dict)

    @property
    def length(self) -> int:
        return len(self.tokens) - 1


class Engine:
    """A scheduler, a target and two drafters around the ops."""

    def __init__(self, prompts: list[list[int]], seed: int) -> None:
        self.random = random.Random(seed)
        self.target = Target(DEVICE)
        slots = 4 * len(prompts) * MAX_POSITION
        self.drafters = {"ar": Eagle3(self.target, slots), "diffusion": DFlash(self.target, slots)}
        self.rings = BacklogRings.allocate(8, CAPACITY, CAPTURED * HIDDEN, dtype=torch.float32, device=DEVICE)
        order = list(range(slots))
        self.random.shuffle(order)
        self.free = order
        self.req_to_token = torch.zeros(8, MAX_POSITION, dtype=torch.int32, device=DEVICE)
        self.router = [
            torch.randn(size, generator=torch.Generator().manual_seed(3)).to(DEVICE)
            for size in ((24, HIDDEN), (24,), (1, 24), (1,))
        ]
        self.accepted: list[int] = []
        request_slots = self.random.sample(range(8), len(prompts))
        self.requests = [
            self.prefill(slot, prompt) for slot, prompt in zip(request_slots, prompts, strict=True)
        ]
        self.continuations = [self.target.generate(prompt, 90) for prompt in prompts]

    def integers(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=DEVICE)

    def prefill(self, slot: int, prompt: list[int]) -> Request:
        """Target forward over the prompt, then both drafters' K and V; the last feature waits in the ring."""
        self.remap(slot)
        forward, length = self.target(prompt), len(prompt)
        tokens = [*prompt, int(forward.logits[-1].argmax())]
        positions = torch.arange(length, device=DEVICE)
        chosen = self.req_to_token[slot, :length].long()
        for arm in self.drafters:
            features = forward.features.view(length, CAPTURED, HIDDEN)[
                :, list(self.drafters[arm].chunks)
            ].flatten(1)
            self.ingest(arm, features, self.integers(tokens[1:]), positions, chosen)
        one = self.integers([1])
        park(
            self.rings,
            forward.features,
            self.integers(tokens[1:]),
            self.integers([slot]),
            self.integers([length - 1]),
            one,
            self.integers([length - 1]),
        )
        return Request(slot, tokens, {"ar": length, "diffusion": length})

    def remap(self, slot: int) -> None:
        """Give the request other KV slots, as the radix tree may, and move what both drafters hold there."""
        fresh = self.integers([self.free.pop() for _ in range(MAX_POSITION)])
        old = self.req_to_token[slot].long()
        for drafter in self.drafters.values():
            for pool in (*drafter.pools.k, *drafter.pools.v):
                pool[fresh] = pool[old]
        self.req_to_token[slot] = fresh.int()

    def ingest(
        self, arm: str, features: Tensor, next_tokens: Tensor, positions: Tensor, slots: Tensor
    ) -> Tensor:
        drafter = self.drafters[arm]
        if isinstance(drafter, Eagle3):
            return eagle3_catch_up(
                features, next_tokens, positions, slots, drafter.weights, self.target.rope, drafter.pools
            )
        return dflash_catch_up(features, positions, slots, drafter.weights, self.target.rope, drafter.pools)

    def catch_up(self, arm: str, chosen: list[Request]) -> tuple[Unparked, Tensor]:
        """Ingest the backlog of every chosen request in one padded batch."""
        packed = unpark(
            self.rings,
            self.integers([r.slot for r in chosen]),
            self.integers([r.synced[arm] for r in chosen]),
            self.integers([r.length for r in chosen]),
            self.req_to_token,
            rows=sum(r.length - r.synced[arm] for r in chosen) + 2,
            chunks=self.drafters[arm].chunks,
            chunk_width=HIDDEN,
        )
        fused = self.ingest(arm, packed.features, packed.next_tokens, packed.positions, packed.cache_slots)
        for request in chosen:
            request.synced[arm] = request.length
        return packed, fused

    def draft(self, index: int, arm: str) -> list[int]:
        request = self.requests[index]
        slots = self.req_to_token[request.slot].long()
        bonus, length = request.tokens[-1], request.length
        drafter = self.drafters.get(arm)
        if isinstance(drafter, DFlash):
            return drafter.draft(bonus, slots[:length], WIDEST - 1)
        if isinstance(drafter, Eagle3):
            feature = self.rings.features[request.slot, (length - 1) % CAPACITY].view(CAPTURED, HIDDEN)
            fused = torch.nn.functional.linear(
                feature[list(drafter.chunks)].reshape(1, -1), drafter.weights.fc
            )
            return drafter.draft(bonus, fused, slots, length - 1, 3)
        if arm == "lookup":  # copies the true continuation, wrong at one place or none
            drafts = self.continuations[index][length + 1 : length + 1 + self.random.randint(1, WIDEST - 1)]
            wrong = self.random.randint(0, WIDEST)
            return [MASK_TOKEN if i == wrong else token for i, token in enumerate(drafts)]
        return []

    def verify(self, block: MixedBlock) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, features and final hidden states of the packed rows; padding rows stay NaN."""
        rows = block.input_ids.shape[0]
        logits = torch.full((rows, self.target.embedding.shape[0]), torch.nan, device=DEVICE)
        features = torch.full((rows, CAPTURED * HIDDEN), torch.nan, device=DEVICE)
        hidden = torch.full((rows, HIDDEN), torch.nan, device=DEVICE)
        bounds = block.qo_indptr.tolist()
        for request, begin, end in zip(self.requests, bounds, bounds[1:], strict=False):
            forward = self.target(request.tokens[:-1] + block.input_ids[begin:end].tolist())
            logits[begin:end] = forward.logits[request.length :]
            features[begin:end] = forward.features[request.length :]
            hidden[begin:end] = forward.hidden[request.length :]
        return logits, features, hidden

    def round(self, routes: list[str]) -> None:
        """Catch up, draft, verify, commit and park for the whole batch."""
        for arm in self.drafters:
            chosen = [
                request
                for request, route in zip(self.requests, routes, strict=True)
                # The chosen drafter, and whoever would lose parked features to this round's commit.
                if route == arm or request.length + WIDEST - request.synced[arm] > CAPACITY
            ]
            if chosen:
                self.catch_up(arm, chosen)
        drafts = [self.draft(index, route) for index, route in enumerate(routes)]
        request_slots = self.integers([r.slot for r in self.requests])
        lengths = self.integers([r.length for r in self.requests])
        widths = [1 + len(d) for d in drafts]
        block = prepare_mixed_block(
            self.integers([r.tokens[-1] for r in self.requests]),
            self.integers([d + [-1] * (WIDEST - 1 - len(d)) for d in drafts]),
            self.integers(widths),
            lengths,
            request_slots,
            self.req_to_token,
            rows=sum(widths) + 1,
        )
        logits, features, hidden = self.verify(block)
        predictions = logits.nan_to_num().argmax(dim=-1)
        committed = accept_and_commit(predictions, block.input_ids, block.qo_indptr, lengths, stride=WIDEST)
        park(
            self.rings,
            features,
            predictions,
            request_slots,
            lengths,
            committed.accept_lens,
            block.qo_indptr[:-1],
            max_length=WIDEST,
        )
        self.check_signals(logits, hidden, block, committed)
        counts = committed.accept_lens.tolist()
        for request, tokens, count in zip(self.requests, committed.tokens.tolist(), counts, strict=True):
            request.tokens += tokens[:count]
        self.accepted += counts

    def check_signals(self, logits: Tensor, hidden: Tensor, block: MixedBlock, committed: Committed) -> None:
        last = block.qo_indptr[:-1] + committed.accept_lens - 1
        stats = routing_stats(logits, last)
        assert torch.equal(stats.argmax, committed.bonus)
        entropy = torch.tensor([oracles.routing_stats(row)[0] for row in logits[last]])
        assert_close(stats.entropy, entropy, "entropy", torch.float32)
        gains = router_mlp(hidden[last], *self.router)
        cpu = [weight.cpu() for weight in self.router]
        assert_close(gains, oracles.router(hidden[last].cpu(), *cpu), "router", torch.float32)

    def check_against_one_full_pass(self) -> None:
        """Both drafters' K and V equal those that one pass over the finished sequence writes."""
        for request in self.requests:
            forward = self.target(request.tokens[:-1])
            positions = torch.arange(request.length, device=DEVICE)
            slots = self.req_to_token[request.slot, : request.length].long()
            next_tokens = self.integers(request.tokens[1:])
            for arm, drafter in self.drafters.items():
                features = forward.features.view(-1, CAPTURED, HIDDEN)[:, list(drafter.chunks)].flatten(1)
                written = [pool[slots].clone() for pool in (*drafter.pools.k, *drafter.pools.v)]
                with running("torch"):
                    self.ingest(arm, features, next_tokens, positions, slots)
                expected = [pool[slots] for pool in (*drafter.pools.k, *drafter.pools.v)]
                for before, after in zip(written, expected, strict=True):
                    assert_close(before, after, "kv", torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", [0, 1])
def test_any_routes_change_neither_text_nor_caches(backend: str, seed: int) -> None:
    with running(backend):
        engine = Engine([[1, 5, 2], [7], [3, 3, 8, 0, 4, 11, 6]], seed)
        for step in range(ROUNDS):
            engine.round([engine.random.choice(ARMS) for _ in engine.requests])
            if step % 4 == 2:
                engine.remap(engine.requests[step % 3].slot)
        for arm in engine.drafters:
            engine.catch_up(arm, engine.requests)
    for request, plain in zip(engine.requests, engine.continuations, strict=True):
        assert request.tokens == plain[: len(request.tokens)]
    assert max(engine.accepted) > 2, "the drafts were never right: nothing beyond one token was committed"
    assert min(engine.accepted) == 1
    engine.check_against_one_full_pass()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("arm", ["ar", "diffusion"])
def test_a_late_switch_drafts_what_a_drafter_synced_every_round_drafts(backend: str, arm: str) -> None:
    prompts = [[1, 5, 2], [9, 4]]
    with running(backend):
        lazy, eager = Engine(prompts, 4), Engine(prompts, 4)
        for _ in range(3):
            lazy.round(["lookup", "lookup"])
            eager.catch_up(arm, eager.requests)
            eager.round(["lookup", "lookup"])
        assert [r.synced[arm] for r in lazy.requests] != [r.synced[arm] for r in eager.requests]
        lazy.catch_up(arm, lazy.requests)
        eager.catch_up(arm, eager.requests)
        assert [lazy.draft(i, arm) for i in range(2)] == [eager.draft(i, arm) for i in range(2)]
    assert [r.tokens for r in lazy.requests] == [r.tokens for r in eager.requests]
