"""Asks plain decoding for reference answers, and compares every arm's answers with them."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx

from whiflash_lab.bench.arms import NONE
from whiflash_lab.bench.cells import Cell
from whiflash_lab.bench.load import TOKEN_IDS, RequestError, chat_body, error_of
from whiflash_lab.bench.prompts import Prompt
from whiflash_sglang.drafts.candidates import common_prefix
from whiflash_sglang.drafts.rounds import loop_start
from whiflash_sglang.files.equality import TopTwo, Verdict, is_tie
from whiflash_sglang.files.jsonl import NOT_AS_WRITTEN

logger = logging.getLogger("whiflash_sglang")


@dataclass(frozen=True, slots=True)
class Comparison:
    """The result of comparing two answers. position: of the first difference, None when identical. top_two: plain
    decoding's two best logits there, if they were asked for."""

    verdict: Verdict
    position: int | None = None
    top_two: TopTwo | None = None


def compare(
    plain: Sequence[int], other: Sequence[int], top_two_at: Callable[[int], TopTwo] | None, dtype: str
) -> Comparison:
    """Compare output tokens with plain decoding's.

    Args:
        top_two_at: returns plain decoding's two best logits for output token i; called only at the first difference.
            None: they are unknown, and there are no ties.
    """
    if list(plain) == list(other):
        return Comparison(Verdict.IDENTICAL)
    position = common_prefix(plain, other)
    if top_two_at is None or position >= len(plain) or position >= len(other):
        return Comparison(Verdict.DIFFERENT, position)
    top_two = top_two_at(position)
    return Comparison(Verdict.TIE if is_tie(top_two, dtype) else Verdict.DIFFERENT, position, top_two)


@dataclass(frozen=True, slots=True)
class Reference:
    """Plain decoding's answer to one prompt, or that of the first of several running servers.

    input_ids, tokens: of the prompt, empty if unknown, and of the answer, as in `Answer`. gaps: best minus second-best
    log-probability per token, which is the gap of their logits. text, calls: the answer's content and its tool calls.
    """

    prompt: Prompt
    input_ids: tuple[int, ...]
    tokens: tuple[int, ...]
    gaps: tuple[float, ...]
    text: str
    calls: tuple[Mapping[str, Any], ...] = ()

    @property
    def loops(self) -> bool:
        """Whether the answer ends in a repetition loop, which flatters every drafter."""
        words = self.tokens if self.input_ids else "".join(map(chr, self.tokens)).split()
        return loop_start(words) is not None


GAPS = {**TOKEN_IDS, "return_input_ids_in_sglext": True, "logprobs": True, "top_logprobs": 2}
"""Fields with which SGLang adds token ids and the log-probabilities of each position's two best tokens."""


def ask_reference(
    client: httpx.Client, prompt: Prompt, max_tokens: int, request: Mapping[str, Any] = GAPS
) -> Reference:
    """Ask plain decoding for an answer. request: further fields of the body, `GAPS` among them.

    Raises:
        RefusedError: the server does not take the request. RequestError: it could not answer it.
    """
    try:
        response = client.post("/v1/chat/completions", json=chat_body(prompt, max_tokens, request))
        if response.status_code != 200:
            raise error_of(prompt.id, response.status_code, response.text)
        answer = response.json()
        choice, known = answer["choices"][0], answer["sglext"]
        return Reference(
            prompt=prompt,
            input_ids=tuple(known["input_ids"]),
            tokens=tuple(known["output_ids"][0]),
            gaps=tuple(_gap(entry["top_logprobs"]) for entry in (choice.get("logprobs") or {}).get("content") or ()),
            text=choice["message"].get("content") or "",
            calls=tuple(choice["message"].get("tool_calls") or ()),
        )
    except RequestError:
        raise
    except (httpx.HTTPError, *NOT_AS_WRITTEN) as error:
        raise RequestError(f"prompt {prompt.id}: {type(error).__name__} {error}") from None


def _gap(best: Sequence[Mapping[str, Any]]) -> float:
    """Return the gap between the two best log-probabilities; infinite if a grammar allows only one token."""
    return float(best[0]["logprob"] - best[1]["logprob"]) if len(best) > 1 else float("inf")


@dataclass(frozen=True, slots=True)
class Difference:
    """An answer that differs from plain decoding's.

    position: of the first difference. gap: between plain decoding's two best logits there. of_plain: whether plain
    decoding at the same load first differs from its own reference at the same position.
    """

    arm: str
    load: str
    prompt: str
    verdict: Verdict
    position: int
    gap: float | None
    of_plain: bool = False


def differences(
    cells: Sequence[Cell],
    references: Mapping[str, Reference],
    best_logit: Callable[[Reference, int], float] | None,
    dtype: str,
    base: str = NONE,
) -> list[Difference]:
    """Compare the measured answers to greedy prompts with their references. Equal answers of an arm under a load count
    once.

    References were asked one by one. At a position at which plain decoding under a load differs from its reference,
    every arm may.

    Args:
        references: by prompt. best_logit: returns the logit of a reference's own token at a position; None if logits
            are unknown. dtype: decides what counts as a tie. base: arm that gave the references.
    """
    judged_by_answer: dict[tuple[str, str, str, tuple[int, ...]], Difference] = {}
    by_plain: set[tuple[str, str, int]] = set()
    for cell in sorted(cells, key=lambda cell: cell.arm != base):
        for answer in cell.answers:
            reference = references[answer.prompt]
            key = (cell.arm, cell.load.label, answer.prompt, answer.tokens)
            if key in judged_by_answer or reference.prompt.sampling or answer.tokens == reference.tokens:
                continue

            def top_two_at(position: int, reference: Reference = reference) -> TopTwo:
                assert best_logit is not None
                return TopTwo(best_logit(reference, position), reference.gaps[position])

            judged = compare(reference.tokens, answer.tokens, best_logit and top_two_at, dtype)
            assert judged.position is not None  # the tokens differ
            gap = None if judged.top_two is None else judged.top_two.gap
            place = (cell.load.label, answer.prompt, judged.position)
            if cell.arm == base:
                by_plain.add(place)
            of_plain = place in by_plain and cell.arm != base
            judged_by_answer[key] = Difference(*key[:3], judged.verdict, judged.position, gap, of_plain)
    return list(judged_by_answer.values())


class BestLogit:
    """Computes the logit of plain decoding's own token by a forward of the target here; servers give no logits."""

    def __init__(self, target: Path, dtype: str) -> None:
        self._target, self._dtype = target, dtype
        self._known: dict[tuple[str, tuple[int, ...]], float] = {}
        self.lost = ""
        """Reason why the target cannot run here; empty if it can."""

    def __call__(self, reference: Reference, position: int) -> float:
        """Return the logit of the reference's token at `position`, 0 if the target cannot run here: then no bfloat16
        gap is a tie, and answers count as different."""
        key = (reference.prompt.id, reference.tokens[: position + 1])
        if key not in self._known and not self.lost:
            text = [*reference.input_ids, *reference.tokens[:position]]
            try:
                self._known[key] = float(self._model.next_logits(text)[reference.tokens[position]])
            except (Exception, KeyboardInterrupt, SystemExit) as error:  # a report is made whatever ends this
                self.lost = (str(error) or type(error).__name__) if isinstance(error, Exception) else "interrupted"
                logger.warning("%s does not run here, so no difference counts as a tie: %s", self._target, error)
        return self._known.get(key, 0.0)

    @cached_property
    def _model(self) -> Any:
        """The target. Raises `MemoryError` if the weights have no room, and the errors of `TargetModel`."""
        import torch

        from whiflash_sglang.formats.packed import free_memory
        from whiflash_train.target import TargetModel

        dtype = getattr(torch, self._dtype)
        # Checkpoints have two bytes a value.
        needed = sum(f.stat().st_size for f in self._target.glob("*.safetensors")) * dtype.itemsize // 2
        if needed > (free := free_memory()):
            raise MemoryError(f"its weights take {needed >> 20} MiB, of {free >> 20} MiB that are free")
        return TargetModel(self._target, device=torch.device("cpu"), dtype=dtype)
