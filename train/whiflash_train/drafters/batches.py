"""Pack sequences into batches of about equal work, in an order fixed by the seed; attend to them; make labels.

A label is the target's distribution if the emitted token is its first choice, else the emitted token alone. Under a
grammar (or with sampling) the emitted token can differ from the first choice. Drafts are accepted by the emitted token,
so such positions get it as a hard label.
"""

import random
from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.data import Dataset

from whiflash_train.answers.store import FeatureStore, SequenceRecord, unique_answers


class SequenceSpan(NamedTuple):
    """Place of a sequence in a batch: index of its first token, of its first feature row, its length and its prompt's
    length in tokens.
    """

    token: int
    feature: int
    length: int
    prompt: int


class Batch(NamedTuple):
    """B packed sequences, in `spans`: `tokens` [N], `features` [N - B, captured, H], `final` [N - B, H]."""

    tokens: Tensor
    features: Tensor
    final: Tensor
    spans: list[SequenceSpan]


def unpack(tokens: Tensor, features: Tensor, final: Tensor, lengths: Tensor, prompts: Tensor) -> Batch:
    """Rebuild the batch from the tensors of a `SequenceBatches` item, which the trainer has moved to the device."""
    spans = []
    token = feature = 0
    for length, prompt in zip(lengths.tolist(), prompts.tolist(), strict=True):
        spans.append(SequenceSpan(token, feature, length, prompt))
        token += length
        feature += length - 1
    return Batch(tokens, features, final, spans)


def attend_before(
    anchors: Tensor,
    spans: SequenceOf[SequenceSpan],
    counts: SequenceOf[int],
    q: Tensor,
    own: tuple[Tensor, Tensor],
    context: tuple[Tensor, Tensor],
    *,
    hidden: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """Compute the attention of drafts to their sequence's entries before an anchor, and to o entries of their own.

    Args:
        anchors: [A] position in the sequence, where w rows of a draft begin. counts: anchors by sequence of `spans`.
        q: [A, w, Hq, D]. own: keys and values [A, o, Hkv, D]. context: keys and values [features, Hkv, D].
        hidden: [w, o] bool, own entries that a row does not see; None: it sees all.
        window: entries before its own that a row sees; None: all.

    Returns:
        [A · w, Hq, D].
    """
    (keys, values), (own_keys, own_values), device = context, own, q.device
    offsets = torch.arange(q.shape[1], device=device)[:, None]
    grouped = q.view(*q.shape[:2], keys.shape[1], -1, q.shape[-1]) * q.shape[-1] ** -0.5
    beside = torch.einsum("abhgd,achd->habgc", grouped, own_keys).float()
    if hidden is not None:
        beside = beside.masked_fill(hidden[:, None], float("-inf"))
    mixed = []
    start = 0
    for span, count in zip(spans, counts, strict=True):
        rows, known = slice(start, start + count), span.length - 1
        start += count
        if not count:
            continue
        entries, anchor = slice(span.feature, span.feature + known), anchors[rows, None, None]
        places = torch.arange(known, device=device)
        unseen = places >= anchor
        if window is not None:
            unseen = unseen | (places < anchor + offsets - window)
        scores = torch.einsum("abhgd,chd->habgc", grouped[rows], keys[entries]).float()
        scores = scores.masked_fill(unseen[:, :, None], float("-inf"))
        weights = torch.cat([scores, beside[:, rows]], dim=-1).softmax(-1).to(values.dtype)
        out = torch.einsum("habgc,chd->abhgd", weights[..., :known], values[entries])
        mixed.append(out + torch.einsum("habgc,achd->abhgd", weights[..., known:], own_values[rows]))
    return torch.cat(mixed).flatten(2, 3).flatten(0, 1)


class SequenceBatches(Dataset[dict[str, Tensor]]):
    """A data set whose item i is batch i of one epoch; the trainer shuffles the items every epoch.

    Sequences of similar length are batched together, up to `answer_tokens` answer tokens and four times as
    many tokens in all, so that a long agent prompt does not dominate memory.
    """

    def __init__(self, stores: SequenceOf[FeatureStore], answer_tokens: int, min_answer: int, seed: int) -> None:
        """Batch the stored answers of at least `min_answer` tokens. Raises ValueError if there are none."""
        entries = [entry for entry in unique_answers(stores) if entry[1].length - entry[1].prompt_length >= min_answer]
        if not entries:
            raise ValueError("no training data: run `whiflash train --step data` first")
        random.Random(seed).shuffle(entries)
        entries.sort(key=lambda entry: entry[1].length // 64)
        self.batches: list[list[tuple[FeatureStore, SequenceRecord]]] = [[]]
        answers = total = 0
        for store, record in entries:
            answer = record.length - record.prompt_length
            full = answers + answer > answer_tokens or total + record.length > 4 * answer_tokens
            if self.batches[-1] and full:
                self.batches.append([])
                answers = total = 0
            self.batches[-1].append((store, record))
            answers += answer
            total += record.length
        self.answer_tokens = sum(record.length - record.prompt_length for _, record in entries)

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        sequences = [store.read(record) for store, record in self.batches[index]]
        return {
            "tokens": torch.cat([sequence.tokens for sequence in sequences]),
            "features": torch.cat([sequence.features for sequence in sequences]),
            "final": torch.cat([sequence.final for sequence in sequences]),
            "lengths": torch.tensor([sequence.record.length for sequence in sequences]),
            "prompts": torch.tensor([sequence.record.prompt_length for sequence in sequences]),
        }


def token_frequencies(stores: SequenceOf[FeatureStore], vocab_size: int) -> Tensor:
    """Count how often each token occurs in the answers: [V] int64."""
    counts = torch.zeros(vocab_size, dtype=torch.int64)
    for store, record in unique_answers(stores):
        answer = store.read_tokens(record)[record.prompt_length :]
        counts += torch.bincount(answer, minlength=vocab_size)
    return counts


ROWS = 64
"""Rows of CPU products are padded to a multiple of this, so a training has a few dozen sizes, not thousands."""


class EvenRows(TorchFunctionMode):
    """Makes `torch.nn.functional.linear` pad a CPU input [..., H] with rows of zeros, and cut them off its result."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is not F.linear or not args or args[0].device.type != "cpu":
            return func(*args, **(kwargs or {}))
        inputs: Tensor = args[0]
        flat = inputs.reshape(-1, inputs.shape[-1])
        rows = len(flat)
        filled = F.pad(flat, (0, 0, 0, -rows % ROWS))
        product: Tensor = F.linear(filled, *args[1:], **(kwargs or {}))
        return product[:rows].view(*inputs.shape[:-1], product.shape[-1])


class Labels(NamedTuple):
    """Labels over a reduced vocabulary of size K.

    `weights` [N, K]: rows sum to 1 (soft or one-hot). `ids` [N]: the emitted token's index in the vocabulary, -1 if
    it is not in it; such rows do not count.
    """

    weights: Tensor
    ids: Tensor

    @property
    def counted(self) -> Tensor:
        """[N] bool: whether the row's emitted token is in the reduced vocabulary."""
        return self.ids >= 0


@torch.no_grad()
def make_labels(final: Tensor, emitted: Tensor, head: Tensor, index_of: Tensor, bias: Tensor | None) -> Labels:
    """Make the labels of N positions.

    Args:
        final: [N, H] the target's states after the final norm.
        emitted: [N] token ids that followed.
        head: [K, H] rows of the target's head. bias: [K] added to the logits (sampling correction), or None.
        index_of: [V] id → index among the K rows, -1 if absent.
    """
    logits = F.linear(final.to(head.dtype), head).float()
    if bias is not None:
        logits += bias
    ids = index_of[emitted]
    weights = logits.softmax(-1)
    forced = (~first_choice(weights, ids) & (ids >= 0)).nonzero()[:, 0]
    weights[forced] = 0.0
    weights[forced, ids[forced]] = 1.0
    return Labels(weights, ids)


class _SoftCrossEntropy(torch.autograd.Function):
    """Cross-entropy that stores only its gradient in the logits' dtype: a third of the plain memory traffic."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        wide = logits.to(torch.float32, copy=True)
        normaliser = wide.logsumexp(-1)
        loss: Tensor = normaliser - torch.linalg.vecdot(labels, wide)
        ctx.save_for_backward(wide.sub_(normaliser[:, None]).exp_().sub_(labels).to(logits.dtype))
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (difference,) = ctx.saved_tensors
        return difference * grads[0][:, None].to(difference.dtype), None


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute -sum(labels · log softmax(logits)) by row: [N, K], [N, K] → [N] fp32. `labels` rows sum to 1."""
    loss: Tensor = _SoftCrossEntropy.apply(logits, labels)
    return loss


def first_choice(logits: Tensor, ids: Tensor) -> Tensor:
    """Whether each index in `ids` [N] has the largest logit of its row in `logits` [N, K]: [N] bool, False for -1."""
    chosen = logits.gather(-1, ids.clamp(min=0)[:, None])[:, 0]
    return (ids >= 0) & (chosen >= logits.amax(-1))


def index_map(ids: Tensor, vocab_size: int) -> Tensor:
    """Return the inverse of `ids` [K]: token id → its index, [V] int64, -1 for other tokens."""
    index = torch.full((vocab_size,), -1, dtype=torch.int64, device=ids.device)
    index[ids] = torch.arange(len(ids), device=ids.device)
    return index
