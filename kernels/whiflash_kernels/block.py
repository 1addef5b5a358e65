"""Building and committing verification blocks whose requests have different routes and widths."""

from torch import Tensor

from whiflash_kernels.dispatch import implementation
from whiflash_kernels.structs import Committed, MixedBlock


def prepare_mixed_block(
    bonus: Tensor,
    drafts: Tensor,
    widths: Tensor,
    seq_lens: Tensor,
    request_slots: Tensor,
    req_to_token: Tensor,
    *,
    rows: int | None = None,
    pad_slot: int = 0,
) -> MixedBlock:
    """Pack a verification's token ids, positions and KV slots, request after request.

    Request b owns rows qo_indptr[b] : qo_indptr[b] + widths[b]; its row i holds token
    (bonus[b] if i == 0 else drafts[b, i - 1]) at position seq_lens[b] + i and slot
    req_to_token[request_slots[b], position].

    Args:
        bonus: [B] int64, the last committed token of each request.
        drafts: [B, D] int64, each request's drafts from column 0; columns past ``widths[b] - 1`` are not
            read. D may be 0.
        widths: [B] int64 or int32 in 0..D + 1: 1 verifies the bonus token alone, 0 gives no rows.
        seq_lens: [B] int64 or int32, committed tokens that have KV.
        request_slots: [B] int64 or int32.
        req_to_token: [slots, context] int32 (or int64), last dimension contiguous.
        rows: None packs exactly sum(widths) rows, which on a GPU reads that sum back to the host; a number
            fixes the rows, pads, and is graph-capturable.
        pad_slot: KV slot of padding rows; SGLang reserves slot 0 for writes nobody reads.

    Returns:
        `MixedBlock`.

    Raises:
        ValueError: ``drafts`` does not belong to the batch, or (torch) the widths exceed ``rows``; on a GPU
            what exceeds is left out.

    Grid: (rows / block), one launch; each program counts cumulative widths in registers.
    Numerics: integers.
    Fallback: torch.
    Compared: SGLang's ``prepare_dflash_draft_block`` has one width for the batch; FlashInfer's ragged helpers
    need ``qo_indptr`` beforehand and give no ids.
    """
    if drafts.ndim != 2 or drafts.shape[0] != bonus.shape[0]:
        raise ValueError(f"drafts must be [{bonus.shape[0]}, D] to match bonus, got {tuple(drafts.shape)}")
    arguments = (bonus, drafts, widths, seq_lens, request_slots, req_to_token, rows, pad_slot)
    return implementation(bonus, "block").prepare_mixed_block(*arguments)


def accept_and_commit(
    predictions: Tensor,
    input_ids: Tensor,
    qo_indptr: Tensor,
    seq_lens: Tensor,
    *,
    stride: int,
    pad_token: int = 0,
    request_slots: Tensor | None = None,
    stops: Tensor | None = None,
    text: Tensor | None = None,
) -> Committed:
    """Longest accepted prefix of each request up to a token that ends it, its bonus token and its new length.

    With s = qo_indptr[b] and w = min(qo_indptr[b + 1] - s, stride): accepted = the number of leading
    i < w - 1 with predictions[s + i] == input_ids[s + i + 1]; accept_lens = accepted + 1 (0 when w = 0);
    tokens[b, :accept_lens] = predictions[s : s + accept_lens], whose last is the new bonus token.
    With ``stops`` accept_lens ends behind the first i with predictions[s + i] in stops[request_slots[b]]. With ``text``
    text[request_slots[b], seq_lens[b] + 1 + i] = tokens[b, i] for i < stride: tokens past the committed ones are
    overwritten by later rounds.
    Lossless for deterministic drafts: greedy predictions give greedy decoding's tokens, predictions sampled
    under each request's own parameters give exactly the target's distribution.

    Args:
        predictions: [T] int64, the target's token at each row (argmax or sampled).
        input_ids: [T] int64, the block's ids from `prepare_mixed_block`; T may include padding rows.
        qo_indptr: [B + 1] int32 (or int64).
        seq_lens: [B] int64 or int32.
        stride: columns of ``tokens``; a request commits at most this many, so give the widest width.
        pad_token: fills ``tokens`` past the committed ones.
        request_slots: [B] int64 or int32, pairwise different; needed with ``stops`` or ``text``.
        stops: [slots, S] int64, contiguous: tokens that end each request, -1 where it has fewer.
        text: [slots, context] int64, last dimension contiguous, with ``stride`` columns behind the longest length;
            written in place.

    Returns:
        `Committed`.

    Raises:
        ValueError: ``predictions`` and ``input_ids`` differ in length, ``stride`` is below 1, or ``stops`` or ``text``
            come without ``request_slots``.

    Grid: (B), one launch, graph-capturable.
    Numerics: integers.
    Fallback: torch (cumulative product over a padded view).
    Compared: SGLang's ``_fused_correct_drafts_and_bonus_kernel`` and ``sgl_kernel.verify_tree_greedy`` accept
    for one width or a tree; neither takes ragged rows, ends at stops, or keeps the text.
    Source: speculative sampling, arXiv 2211.17192, for a point-mass draft distribution.
    """
    if predictions.shape != input_ids.shape:
        raise ValueError(
            "predictions and input_ids must match, "
            f"got {tuple(predictions.shape)} and {tuple(input_ids.shape)}"
        )
    if stride < 1:
        raise ValueError(f"stride must be at least 1, got {stride}")
    if request_slots is None and (stops is not None or text is not None):
        raise ValueError("stops and text need request_slots")
    arguments = (predictions, input_ids, qo_indptr, seq_lens, stride, pad_token, request_slots, stops, text)
    return implementation(predictions, "block").accept_and_commit(*arguments)
