"""Slow, obvious versions of every op: Python loops and float64, one request, row or head at a time."""

import math
from itertools import pairwise

import torch
from torch import Tensor


def routing_stats(row: Tensor) -> tuple[float, float, int]:
    """Entropy, top-1 and first argmax of one row, in float64."""
    logits = row.double().cpu()
    if bool((logits <= -1e30).all()):
        return 0.0, 0.0, 0
    probabilities = torch.softmax(logits, dim=0)
    entropy = -sum(p * math.log(p) for p in probabilities.tolist() if p > 0)
    values = logits.tolist()
    return entropy, max(probabilities.tolist()), values.index(max(values))


def exponential(seed: int, position: int, token: int) -> float:
    """The noise of one token, by integers of Python."""
    whole, half = (1 << 64) - 1, (1 << 32) - 1
    z = (seed + (position + 1) * 0x9E3779B97F4A7C15) & whole
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & whole
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & whole
    z ^= z >> 31
    h = (token * ((z >> 32) | 1) + z) & half
    h = ((h ^ (h >> 16)) * 0x7FEB352D) & half
    h = ((h ^ (h >> 15)) * 0x846CA68B) & half
    h ^= h >> 16
    return -math.log(max(1 - ((h & 0x7FFFFFFF) + 0.5) / 2**31, 1e-8))


def kept(row: Tensor, temperature: float, top_k: float, top_p: float, min_p: float) -> dict[int, float]:
    """Tokens of a row that may be drawn, and their chances before any was left out."""
    chances = torch.softmax(row.double().cpu() / temperature, dim=0).tolist()
    ordered = sorted(range(len(chances)), key=lambda token: -row[token].item())
    found, likelier, mass, passed, top = {}, 0, 0.0, 0.0, 1.0
    if min_p < 0 and top_k < len(chances):
        last = row[ordered[int(top_k) - 1]]
        top = sum(chances[token] for token in ordered if row[token] >= last)
    for place, token in enumerate(ordered):
        if place and row[token] < row[ordered[place - 1]]:
            likelier, mass = place, passed
        passed += chances[token]
        enough = chances[token] >= abs(min_p) * chances[ordered[0]]
        if likelier < top_k and (top_p >= 1 or mass <= top_p * top) and enough:
            found[token] = chances[token]
    return found


def drawn(
    row: Tensor, seed: int, position: int, temperature: float, top_k: float, top_p: float, min_p: float
) -> list[int]:
    """The token of a row, and others that rounding may prefer."""
    if top_k <= 1:
        values = row.tolist()
        return [values.index(max(values))]
    scores = {
        token: chance / exponential(seed, position, token)
        for token, chance in kept(row, temperature, top_k, top_p, min_p).items()
    }
    best = max(scores.values())
    return [token for token, score in scores.items() if score >= best * (1 - 1e-4)]


def park(ring, ring_tokens, features, next_tokens, slots, begins, lengths, starts) -> None:
    """Write every committed row in order, so that a later one replaces an earlier one at the same place."""
    capacity = ring.shape[1]
    for slot, begin, length, start in zip(slots, begins, lengths, starts, strict=True):
        for i in range(length):
            ring[slot, (begin + i) % capacity] = features[start + i]
            ring_tokens[slot, (begin + i) % capacity] = next_tokens[start + i]


def unpark(ring, ring_tokens, slots, begins, ends, req_to_token, columns):
    """Rows of every backlog in order, as lists: features, next tokens, positions, cache slots, owners."""
    capacity = ring.shape[1]
    rows = []
    for owner, (slot, begin, end) in enumerate(zip(slots, begins, ends, strict=True)):
        for position in range(begin, end):
            place = position % capacity
            rows.append(
                (
                    ring[slot, place][columns],
                    int(ring_tokens[slot, place]),
                    position,
                    int(req_to_token[slot, position]),
                    owner,
                )
            )
    return rows


def mixed_block(bonus, drafts, widths, seq_lens, slots, req_to_token):
    """Rows of every request as lists (id, position, cache slot, owner), and where each request begins."""
    rows, indptr = [], [0]
    for owner, width in enumerate(widths):
        for i in range(width):
            token = bonus[owner] if i == 0 else drafts[owner][i - 1]
            position = seq_lens[owner] + i
            rows.append((token, position, int(req_to_token[slots[owner], position]), owner))
        indptr.append(len(rows))
    return rows, indptr


def commit(predictions, input_ids, indptr, stride, stops=None):
    """Committed tokens of every request, which ends at its `stops`."""
    committed = []
    for request, (start, end) in enumerate(pairwise(indptr)):
        end = min(end, start + stride)
        tokens = [predictions[start]] if end > start else []
        for row in range(start, end - 1):
            if predictions[row] != input_ids[row + 1] or (stops and predictions[row] in stops[request]):
                break
            tokens.append(predictions[row + 1])
        committed.append(tokens)
    return committed


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * weight.double() / math.sqrt(float((x * x).mean()) + eps)


def rotate(head: Tensor, angles: Tensor) -> Tensor:
    """Neox RoPE of one head [D] with one row [R] of the table: pair i is (i, i + R/2)."""
    half = angles.numel() // 2
    out = head.clone()
    for i in range(half):
        cosine, sine = float(angles[i]), float(angles[half + i])
        out[i] = head[i] * cosine - head[half + i] * sine
        out[half + i] = head[half + i] * cosine + head[i] * sine
    return out


def write_kv(kv_rows, k_norm, eps, positions, slots, rope, k_pools, v_pools) -> None:
    """Norm, rotate and store, one head at a time, from float64 rows [L*2*Hkv*D]."""
    layers, (_, heads, dim) = len(k_pools), k_pools[0].shape
    for kv, position, slot in zip(kv_rows, positions, slots, strict=True):
        if slot < 0:
            continue
        parts = kv.view(layers, 2, heads, dim)
        for layer in range(layers):
            for head in range(heads):
                k = parts[layer, 0, head]
                if k_norm is not None:
                    k = rms_norm(k, k_norm[layer], eps)
                k_pools[layer][slot, head] = rotate(k, rope[position])
                v_pools[layer][slot, head] = parts[layer, 1, head]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out = weight.double() @ x
    return out if bias is None else out + bias.double()


def dflash_rows(features, weights) -> list[Tensor]:
    """The projections of every row, in float64."""
    rows = []
    for feature in features.double():
        fused = rms_norm(linear(feature, weights.fc, weights.fc_bias), weights.hidden_norm, weights.eps)
        rows.append(linear(fused, weights.kv, weights.kv_bias))
    return rows


def eagle3_rows(features, next_tokens, weights) -> tuple[list[Tensor], list[Tensor]]:
    """The projections of every row, and the fused features, in float64."""
    rows, fused_rows = [], []
    for feature, token in zip(features.double(), next_tokens, strict=True):
        if weights.concat_norm is not None:
            feature = rms_norm(feature, weights.concat_norm, weights.eps)
        if weights.chunk_norms is not None:
            chunks = feature.view(weights.chunk_norms.shape)
            normed = [
                rms_norm(chunk, norm, weights.eps) for chunk, norm in zip(chunks, weights.chunk_norms, strict=True)
            ]
            feature = torch.cat(normed)
        fused = linear(feature, weights.fc, weights.fc_bias)
        embedded = rms_norm(weights.embedding[token].double(), weights.input_norm, weights.eps)
        x = torch.cat([embedded, rms_norm(fused, weights.hidden_norm, weights.eps)])
        rows.append(linear(x, weights.kv, weights.kv_bias))
        fused_rows.append(fused)
    return rows, fused_rows


def router(hidden, w1, b1, w2, b2) -> Tensor:
    """[B, n_out] float64, one row at a time."""
    rows = []
    for x in hidden.double():
        inner = linear(x, w1, b1)
        active = torch.tensor([0.5 * h * (1 + math.erf(h / math.sqrt(2))) for h in inner.tolist()])
        rows.append(linear(active.double(), w2, b2))
    return torch.stack(rows)


def draft_attention(q, k, v, table, request_slots, ends, width, causal, scale, window):
    """[rows, Hq, D] in float64, one head of one row at a time; a row that sees nothing is 0."""
    out = torch.zeros(q.shape, dtype=torch.float64)
    groups = q.shape[1] // k.shape[1]
    for row in range(q.shape[0]):
        request, offset = divmod(row, width)
        end = ends[request]
        position = end - width + offset
        first = 0 if window is None else max(0, position - window)
        slots = table[request_slots[request], first : max(position + 1 if causal else end, 0)].tolist()
        if not slots:
            continue
        for head in range(q.shape[1]):
            keys, values = (pool[slots, head // groups].double().cpu() for pool in (k, v))
            weights = torch.softmax(scale * (keys @ q[row, head].double().cpu()), dim=0)
            out[row, head] = weights @ values
    return out


def verify_attention(q, k, v, k_pool, v_pool, lists, widths, scale, window, cap, sinks, k_scale, v_scale):
    """[sum(widths), Hq, D] in float64, one head of one row at a time; ``lists`` has each request's slots."""
    out, groups, begun = (torch.zeros((sum(widths), *q.shape[1:]), dtype=torch.float64), q.shape[1] // k.shape[1], 0)
    q, k, v, k_pool, v_pool = (tensor.double().cpu() for tensor in (q, k, v, k_pool, v_pool))
    for slots, width in zip(lists, widths, strict=True):
        every_key = torch.cat((k_pool[slots] * k_scale, k[begun : begun + width]))
        every_value = torch.cat((v_pool[slots] * v_scale, v[begun : begun + width]))
        for row in range(begun, begun + width):
            keys, values = (x[: len(slots) + row - begun + 1] for x in (every_key, every_value))
            if window is not None:
                keys, values = keys[-window - 1 :], values[-window - 1 :]
            for head in range(q.shape[1]):
                scores = scale * (keys[:, head // groups] @ q[row, head])
                scores = cap * torch.tanh(scores / cap) if cap else scores
                if sinks is not None:
                    scores = torch.cat((scores, sinks[head : head + 1].double().cpu()))
                out[row, head] = torch.softmax(scores, 0)[: len(keys)] @ values[:, head // groups]
        begun += width
    return out


def propose_copy(text, source, limit, alive, factor, chances, boundaries, width, worth, min_match, keep_first):
    """One request, token by token: (tokens, chances, agreements, place, match length)."""

    def match(place: int) -> int:
        m = 0
        while m < min(32, place, len(text)) and text[place - 1 - m] == text[-1 - m]:
            m += 1
        return m

    lengths = {place: match(place) for place in range(len(text) - 1, 0, -1)}
    places = [p for p in lengths if lengths[p] >= 2][:8] or [p for p in lengths if lengths[p] == 1][:8]
    if 0 < source < len(text):
        places = [source, *(p for p in places if p != source)]
    places = [p for p in places if lengths[p] >= max(min_match, 1)]
    if not places:
        return [], [], [], 0, 0
    best = max(places, key=lambda p: lengths[p])
    said = {p: [(text[p:] * width)[d] for d in range(width)] for p in places}
    following, tokens, lives, agreements, chance = places, [], [], [], alive
    for depth in range(min(width, limit)):
        token = said[best][depth]
        same = [p for p in following if said[p][depth] == token]
        others = [lengths[p] for p in following if p not in same]
        if len(following) == 1:
            agreement = 0
        elif not others:
            agreement = 1
        else:
            agreement = 2 if max(lengths[p] for p in same) > max(others) else 3
        bucket = max(k for k, b in enumerate(boundaries) if b <= lengths[best] + depth)
        chance *= min(chances[bucket][agreement] * (factor if depth == 0 else 1.0), 0.995)
        if token < 0 or (chance < worth and not (keep_first and depth == 0)):
            break
        tokens.append(token)
        lives.append(chance)
        agreements.append(agreement)
        following = same
    return tokens, lives, agreements, best, lengths[best]


def claim(watermarks, slots, seq_lens, due):
    """Begins and ends of every drafter's backlogs; `watermarks`, a list of lists, moves."""
    begins, ends = [], []
    for own, wanted in zip(watermarks, due, strict=True):
        begins.append([own[slot] for slot in slots])
        for slot, length, flag in zip(slots, seq_lens, wanted, strict=True):
            if flag:
                own[slot] = max(own[slot], length)
        ends.append([own[slot] for slot in slots])
    return begins, ends


def cut(confidences, calibration, edges, limit, worth):
    """How many drafts of one request are kept, and the chance of each with all before it."""
    alive, chance = [], 1.0
    for sure in confidences:
        chance *= calibration[sum(edge <= sure for edge in edges)]
        alive.append(chance)
    kept = 1
    while kept < len(alive) and alive[kept] >= worth:
        kept += 1
    return min(kept, limit), alive


def choose(requests, worth, most, least=0.0, stops=None, spare=None):
    """Drafts that are verified of every request, their sources, how many are the first ones; and those worth a row.

    A request is its own drafts, those behind them, candidates and copies, each a list of (token, chance); a candidate
    is one with how many of its first tokens were committed since, whether these are the text's, and the most of it.
    There are no copies if the rest of the first candidate pays its rows. A request's `stops` end its drafts. spare:
    further drafts of each request, which fill rows behind its own.
    """
    merged, sources, first, wanted = [], [], [], []
    none = [[]] * len(requests)
    for request, ending, left_over in zip(requests, stops or none, spare or none, strict=True):
        laid, behind, candidates, copies = request
        best, source = until(laid + behind, ending), 0
        left = [(k, until(follow(*candidate, least), ending)) for k, candidate in enumerate(candidates, 1)]
        copies = until(copies, ending)
        copied = [] if left and gain(left[0][1], worth) > 0 else copies
        for number, drafts in (*left, (-1, copied)):
            if drafts and gain(drafts, worth) > gain(best, worth):
                best, source = drafts, number
        wanted.append(len(best))
        if fills := laid and not behind and not source:
            best = until(laid + left_over, ending)
        merged.append(best)
        sources.append(source)
        first.append(len(best if fills else laid))
    if most is not None:
        ranked = sorted(
            (-chance, depth, b) for b, drafts in enumerate(merged) for depth, (_, chance) in enumerate(drafts)
        )
        kept = [b for _, _, b in ranked[:most]]
        merged = [drafts[: kept.count(b)] for b, drafts in enumerate(merged)]
    return merged, sources, [min(n, len(drafts)) for n, drafts in zip(first, merged, strict=True)], wanted


def until(drafts, stops):
    ends = [i for i, (token, _) in enumerate(drafts, 1) if token in stops]
    return drafts[: ends[0]] if ends else drafts


def gain(drafts, worth):
    """Accepted tokens that drafts promise, net of their rows."""
    return sum(chance - worth for _, chance in drafts)


def follow(drafts, passed, agrees, most, least):
    """Rest of a candidate when its first `passed` tokens were committed, or others; no chance is below `least`."""
    if not agrees or not 0 <= passed < len(drafts):
        return []
    before = drafts[passed - 1][1] if passed else 1.0
    left = [(token, chance / before) for token, chance in drafts[passed:]][:most] if before else []
    return [(token, chance) for token, chance in left if chance >= least]
