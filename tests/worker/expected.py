"""The exact distribution of the next tokens under a request's sampling parameters, written from their definitions.

Independent of SGLang's sampler: probabilities are computed in double precision from the reference target.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from reference import ReferenceTarget
from scipy.stats import chi2

OTHER = -1
"""Stands for every token that is too rare for a branch of its own; it ends a path."""

Tokens = tuple[int, ...]


def next_probabilities(logits: torch.Tensor, generated: Sequence[int], params: Mapping[str, Any]) -> torch.Tensor:
    """[V] float64, the distribution of the token after `generated`. logits: [V], the target's raw ones."""
    x = logits.double().clone()
    counts = Counter(generated)
    for token, count in counts.items():
        x[token] -= params.get("frequency_penalty", 0.0) * count + params.get("presence_penalty", 0.0)
        repetition = params.get("repetition_penalty", 1.0)
        x[token] = x[token] * repetition if x[token] < 0 else x[token] / repetition
    if len(generated) < params.get("min_new_tokens", 0):
        x[list(params["stop_token_ids"])] = -torch.inf
    for token, bias in (params.get("logit_bias") or {}).items():
        x[int(token)] += bias
    p = (x / params.get("temperature", 1.0)).softmax(-1)
    ordered, ids = p.sort(descending=True)
    keep = torch.ones_like(p, dtype=torch.bool)
    if params.get("top_k"):
        keep[params["top_k"] :] = False
    whole = ordered[keep].sum() if params.get("sequential") else 1.0
    keep &= ordered.cumsum(0) - ordered <= params.get("top_p", 1.0) * whole
    keep &= ordered >= params.get("min_p", 0.0) * ordered[0]
    filtered = torch.zeros_like(p).scatter_(0, ids, ordered * keep)
    return filtered / filtered.sum()


def joint(
    target: ReferenceTarget, prompt: Sequence[int], params: Mapping[str, Any], length: int, rare: float
) -> dict[Tokens, float]:
    """Probabilities of the continuations of `prompt`, as the leaves of a tree.

    A leaf is a path of `length` tokens likelier than `rare`, or a shorter one that ends in `OTHER`.
    """
    leaves: dict[Tokens, float] = {}
    open_nodes: list[tuple[Tokens, float]] = [((), 1.0)]
    while open_nodes:
        path, reach = open_nodes.pop()
        p = next_probabilities(target.next_logits([*prompt, *path]), path, params) * reach
        likely = torch.nonzero(p > rare).flatten().tolist()
        for token in likely:
            if len(path) + 1 == length:
                leaves[(*path, token)] = float(p[token])
            else:
                open_nodes.append(((*path, token), float(p[token])))
        leaves[(*path, OTHER)] = max(reach - float(p[likely].sum()), 0.0)
    return leaves


@dataclass(frozen=True)
class ChiSquare:
    """A goodness-of-fit test. p_value: of a deviation at least this large, were the expectation true."""

    statistic: float
    freedom: int
    p_value: float
    samples: int


def goodness_of_fit(samples: Sequence[Sequence[int]], expected: Mapping[Tokens, float]) -> ChiSquare:
    """Pearson's chi-square of continuations against their leaves; leaves expected below 5 are taken together."""
    size = len(samples)
    nodes = {leaf[:end] for leaf in expected for end in range(len(leaf) + 1)}
    observed = Counter(_leaf_of(tuple(sample), nodes) for sample in samples)
    impossible = sum(observed[leaf] for leaf, p in expected.items() if p * size < 1e-6)
    if impossible:
        return ChiSquare(float("inf"), len(expected), 0.0, size)
    kept = [leaf for leaf, p in expected.items() if p * size >= 5]
    cells = [(observed[leaf], size * expected[leaf]) for leaf in kept]
    rest = size - sum(found for found, _ in cells), size - sum(wanted for _, wanted in cells)
    if rest[1] >= 5:
        cells.append(rest)
    statistic = sum((found - wanted) ** 2 / wanted for found, wanted in cells)
    freedom = max(len(cells) - 1, 1)
    return ChiSquare(statistic, freedom, float(chi2.sf(statistic, freedom)), size)


def _leaf_of(sample: Tokens, nodes: set[Tokens]) -> Tokens:
    for end in range(1, len(sample) + 1):
        if sample[:end] not in nodes:
            return (*sample[: end - 1], OTHER)
    return sample
