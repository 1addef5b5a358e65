"""The target's own answers to prompts: continuous batching over static KV slots, features kept as they pass.

Rows form groups of equal capacity, so that short answers take little memory. A finished row is refilled at once.
Every decode step is one packed forward over all rows. Attention reads one pool of keys and values in place, by the
kernel that serves on CPUs.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
import xgrammar
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from whiflash_kernels.cpu.paged_attention import CompiledAttention, compiled_attention, fits
from whiflash_kernels.processor import has_avx2
from whiflash_kernels.reference.paged_attention import PagedAttentionPlan

from whiflash_sglang.embedded import cache_root
from whiflash_sglang.jsonl import read_json
from whiflash_sglang.models.layers import Attend
from whiflash_sglang.models.target import TargetModel, causal_attention
from whiflash_sglang.train.answers.prompts import GrammarSpec, PromptRow
from whiflash_sglang.train.rounds import loop_start

LOOP_CHECK_EVERY = 16


class GrammarMasks:
    """Compiles grammars for one tokenizer and fills bit masks for rows of logits.

    They are the masks that SGLang 0.5.23 applies, built with the same xgrammar calls and settings.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int, eos_id: int) -> None:
        info = xgrammar.TokenizerInfo.from_huggingface(
            tokenizer, vocab_size=vocab_size, stop_token_ids=[eos_id]
        )
        self._compiler = xgrammar.GrammarCompiler(info)
        self._vocab_size = vocab_size

    def matcher(self, spec: GrammarSpec) -> xgrammar.GrammarMatcher:
        """A fresh matcher. Raises `RuntimeError` (xgrammar's) for a schema that it cannot compile."""
        if spec.kind == "json":
            compiled = self._compiler.compile_json_schema(
                spec.text, any_whitespace=True, max_whitespace_cnt=None
            )
        else:
            parts = read_json(spec.text)
            items = [
                xgrammar.StructuralTagItem(
                    begin=part["begin"], schema=json.dumps(part["schema"]), end=part["end"]
                )
                for part in parts["structures"]
            ]
            tag = xgrammar.StructuralTag.from_legacy_structural_tag(items, parts["triggers"])
            tag.format.at_least_one = True
            compiled = self._compiler.compile_structural_tag(tag)
        return xgrammar.GrammarMatcher(compiled)

    def apply(self, logits: Tensor, matchers: Sequence[xgrammar.GrammarMatcher | None]) -> None:
        """Mask `logits` [rows, V] in place: -inf where the row's grammar forbids the token."""
        constrained = [row for row, matcher in enumerate(matchers) if matcher and not matcher.is_terminated()]
        if not constrained:
            return
        bitmask = xgrammar.allocate_token_bitmask(len(constrained), self._vocab_size)
        for index, row in enumerate(constrained):
            matcher = matchers[row]
            assert matcher is not None
            matcher.fill_next_token_bitmask(bitmask, index)
        rows = torch.tensor(constrained, device=logits.device)
        masked = logits[rows].float()
        xgrammar.apply_token_bitmask_inplace(masked, bitmask.to(logits.device))
        logits[rows] = masked.to(logits.dtype)


class GroupShape(NamedTuple):
    """`rows` slots of `capacity` tokens each (prompt and answer together)."""

    rows: int
    capacity: int


class Answer(NamedTuple):
    """A finished generation: `tokens` prompt and answer, `states` [len(tokens) - 1, captured + 1, H]."""

    prompt: PromptRow
    tokens: list[int]
    states: Tensor
    looped: bool
    finished: bool


@dataclass
class _Slot:
    prompt: PromptRow
    tokens: list[int]
    matcher: xgrammar.GrammarMatcher | None


@dataclass
class _Group:
    """Rows of one capacity, `first` the first of them among all. states: [rows, capacity, captured + 1, H]."""

    shape: GroupShape
    first: int
    states: Tensor
    slots: list[_Slot | None]

    def fits(self, prompt: PromptRow, max_new: int) -> bool:
        return len(prompt.tokens) + max_new <= self.shape.capacity


class Generator:
    """Generates answers for a stream of prompts."""

    def __init__(
        self,
        target: TargetModel,
        masks: GrammarMasks,
        *,
        groups: Sequence[GroupShape],
        capture: Sequence[int],
        max_new_tokens: int,
        eos_id: int,
        temperature: float = 0.0,
        keep_loops: bool = False,
        seed: int = 0,
    ) -> None:
        """`temperature` 0 is greedy. Groups are tried in order of capacity. A row that falls into a loop ends
        there; its repetitions are cut off unless `keep_loops`."""
        self.target, self.masks, self.capture = target, masks, list(capture)
        self.max_new, self.eos_id, self.temperature = max_new_tokens, eos_id, temperature
        self.keep_loops = keep_loops
        self.random = torch.Generator(device=target.device).manual_seed(seed)
        self._allocate(sorted(groups, key=lambda shape: shape.capacity))

    def _allocate(self, shapes: Sequence[GroupShape]) -> None:
        target, count, slots = self.target, 0, 0
        self.groups: list[_Group] = []
        table = []  # where each row's tokens are in the pool; entries beyond a row's capacity are not read
        for rows, capacity in shapes:
            states = self._zeros(rows, capacity, len(self.capture) + 1, target.hidden_size)
            self.groups.append(_Group(GroupShape(rows, capacity), count, states, [None] * rows))
            starts = slots + capacity * torch.arange(rows, device=target.device)
            table.append(starts[:, None] + torch.arange(shapes[-1].capacity, device=target.device))
            count, slots = count + rows, slots + rows * capacity
        self._table = torch.cat(table).clamp_(max=slots - 1).int()
        pool = slots, target.num_kv_heads, target.head_dim
        self._keys = [self._zeros(*pool) for _ in range(target.num_layers)]
        self._values = [self._zeros(*pool) for _ in range(target.num_layers)]

    def _zeros(self, *sizes: int) -> Tensor:
        return torch.zeros(sizes, dtype=self.target.dtype, device=self.target.device)

    @torch.inference_mode()
    def run(
        self, prompts: Iterator[PromptRow], on_skip: Callable[[PromptRow, str], None]
    ) -> Iterator[Answer]:
        """Yield answers as they finish. Prompts too long for every group, or with a grammar that does not
        compile, are reported to `on_skip`."""
        waiting: dict[int, list[PromptRow]] = {index: [] for index in range(len(self.groups))}
        exhausted = False
        while True:
            for index, group in enumerate(self.groups):
                for row, slot in enumerate(group.slots):
                    while slot is None and (waiting[index] or not exhausted):
                        prompt = self._next_prompt(index, waiting, prompts, on_skip)
                        exhausted = exhausted or prompt is None
                        if prompt is None:
                            break
                        slot = self._start(group, row, prompt, on_skip)
                        answer = self._finished(group, row)
                        if answer is not None:
                            yield answer
                            slot = None
            if not any(slot for group in self.groups for slot in group.slots):
                return
            yield from self._step()

    def _next_prompt(
        self,
        index: int,
        waiting: dict[int, list[PromptRow]],
        prompts: Iterator[PromptRow],
        on_skip: Callable[[PromptRow, str], None],
    ) -> PromptRow | None:
        """The next prompt for group `index`; prompts met on the way wait for their own groups."""
        if waiting[index]:
            return waiting[index].pop(0)
        for prompt in prompts:
            home = next((i for i, group in enumerate(self.groups) if group.fits(prompt, self.max_new)), None)
            if home is None:
                on_skip(
                    prompt, f"{len(prompt.tokens)} prompt tokens leave no room for {self.max_new} new ones"
                )
            elif home == index:
                return prompt
            else:
                waiting[home].append(prompt)
        return None

    def _start(
        self, group: _Group, row: int, prompt: PromptRow, on_skip: Callable[[PromptRow, str], None]
    ) -> _Slot | None:
        try:
            matcher = None if prompt.grammar is None else self.masks.matcher(prompt.grammar)
        except RuntimeError as error:
            on_skip(prompt, f"grammar does not compile: {error}")
            return None
        tokens = torch.tensor(prompt.tokens, device=self.target.device)
        length = len(tokens)
        whole = causal_attention(length, tokens.device, self.target.dtype)
        places = self._table[group.first + row, :length]

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self._keys[layer][places] = k
            self._values[layer][places] = v
            return whole(layer, q, k, v)

        output = self.target.forward(tokens, torch.arange(length, device=tokens.device), attend, self.capture)
        group.states[row, :length] = torch.cat([output.features, output.final[:, None]], dim=1)
        slot = _Slot(prompt, list(prompt.tokens), matcher)
        group.slots[row] = slot
        self._emit([slot], self.target.logits(output.final[-1:]))
        return slot

    def _emit(self, slots: Sequence[_Slot | None], logits: Tensor) -> None:
        self.masks.apply(logits, [slot.matcher if slot else None for slot in slots])
        if self.temperature > 0:
            weights = (logits.float() / self.temperature).softmax(-1)
            chosen = torch.multinomial(weights, 1, generator=self.random)[:, 0]
        else:
            chosen = logits.max(-1).indices
        for slot, token in zip(slots, chosen.tolist(), strict=True):
            if slot is None:
                continue
            slot.tokens.append(token)
            if slot.matcher is not None and not slot.matcher.is_terminated():
                slot.matcher.accept_token(token)

    def _step(self) -> Iterator[Answer]:
        """One decode step of every row; yields the rows that it finished."""
        slots = [slot for group in self.groups for slot in group.slots]
        device = self.target.device
        tokens = torch.tensor([slot.tokens[-1] if slot else 0 for slot in slots], device=device)
        positions = torch.tensor([len(slot.tokens) - 1 if slot else 0 for slot in slots], device=device)
        output = self.target.forward(tokens, positions, self._decode_attention(positions), self.capture)
        states = torch.cat([output.features, output.final[:, None]], dim=1)
        for group in self.groups:
            rows = torch.arange(group.shape.rows, device=device)
            group.states[rows, positions[group.first + rows]] = states[group.first + rows]
        self._emit(slots, self.target.logits(output.final))
        for group in self.groups:
            for row in range(group.shape.rows):
                answer = self._finished(group, row)
                if answer is not None:
                    yield answer

    def _decode_attention(self, positions: Tensor) -> Attend:
        """Each row's newest token over that row's entries, planned once for all layers."""
        places = self._table.gather(1, positions[:, None])[:, 0]
        widths, lengths = [1] * len(positions), (positions + 1).tolist()
        kernel = _compiled() if fits(self._keys[0], self._keys[0], self._values[0]) else None
        plan = (
            PagedAttentionPlan.build(self._table, widths, lengths, causal=True, dtype=self.target.dtype)
            if kernel is None
            else kernel.plan(self._table, widths, lengths, causal=True)
        )

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = self._keys[layer], self._values[layer]
            keys[places] = k
            values[places] = v
            return plan.run(q, keys, values, q.shape[-1] ** -0.5)

        return attend

    def _finished(self, group: _Group, row: int) -> Answer | None:
        slot = group.slots[row]
        if slot is None:
            return None
        count = len(slot.tokens) - len(slot.prompt.tokens)
        ended = slot.tokens[-1] == self.eos_id
        done = ended or count >= self.max_new
        cut = None
        if done or count % LOOP_CHECK_EVERY == 0:
            answer = slot.tokens[len(slot.prompt.tokens) :]
            cut = loop_start(answer[:-1] if ended else answer)
        if not done and cut is None:
            return None
        group.slots[row] = None
        tokens = (
            slot.tokens if cut is None or self.keep_loops else slot.tokens[: len(slot.prompt.tokens) + cut]
        )
        states = group.states[row, : len(tokens) - 1].clone()
        return Answer(slot.prompt, tokens, states, looped=cut is not None, finished=ended)


@cache
def _compiled() -> CompiledAttention | None:
    """The compiled kernel, or None where this machine cannot have it: torch takes longer."""
    try:
        return compiled_attention(cache_root() / "compiled") if has_avx2() else None
    except OSError:
        return None
