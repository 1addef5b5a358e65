// Attention of packed query rows over a paged KV pool on a CPU: prefill, decoding, verification, draft blocks.
//
//     out[t, h] = sum_j softmax_j(scale * q[t, h] . K[slot(r, j), h / G]) * V[slot(r, j), h / G]
//
// for query row t of request r over the entries j that the row may see, G = Hq / Hkv query heads a KV head, and one
// more entry of score sinks[h] without a value where there are sinks. Tensors, of bfloat16 unless said otherwise:
//
//     q    [T, Hq, D]     rows `q_row` elements apart, heads and dimensions contiguous
//     out  [T, Hq, Dv]    contiguous, aliases nothing
//     k, v [S, Hkv, D or Dv]  slots and heads `*_slot` and `*_head` elements apart, dimensions contiguous; v may be a
//                         part of k (latent attention). The rows' own entries are already in them.
//     table [R, C] int32, `table_row` apart: the slot of every position of a request. rows [bs] int64: its row there.
//     starts [bs + 1] int32 into T; lengths [bs] int32: entries that a request's last row sees, its own included.
//
// D is even, Dv a multiple of 16. Work is cut into (request, block of rows, chunk of entries), for wide requests into
// KV heads as well. Where it is cut depends on the request alone, and a row's sums on its own entries in their order,
// so a row's output depends neither on what runs beside it nor on the number of threads. Entries are taken in blocks
// of KEYS with a running maximum (FlashAttention-2, Dao 2023), chunks of a narrow request are joined at the end
// (Flash-Decoding). Softmax and sums in float32. A processor with an instruction for products of bfloat16 uses it, and
// rounds weights to bfloat16 before they are multiplied with values; others multiply in float32.
#include <algorithm>
#include <cstdint>
#include <vector>

#include <omp.h>

#include "strips.h"

namespace {

constexpr int NARROW = 64;  // widest request, in rows, whose entries are cut into chunks
constexpr int CHUNK = 512;  // entries of a narrow request's chunk
constexpr int BLOCK = 192;  // rows times query heads of a KV head, of one block of rows
constexpr size_t KEPT = 1 << 24;  // chunks' sums, in floats, that a thread keeps room for from call to call

// One piece of work: rows [row, row + rows) of a request over entries [first, end), for KV heads [head, head_end).
struct Piece {
    int request, row, rows, first, end, head, head_end;
    int64_t partial;  // where its sums go, in rows times query heads; -1: it is the only one and writes the output
};

struct Bounds {
    int prefix, rows, length;
    bool is_narrow;
};

Bounds bounds_of(const Layout& at, int request) {
    const int rows = at.starts[request + 1] - at.starts[request];
    const int length = at.lengths[request];
    return {length - rows, rows, length, rows <= NARROW};
}

Row row_of(const Layout& at, const Bounds& of, int row, const uint32_t* q) {
    const int position = of.prefix + row;
    return {q, at.window < 0 ? 0 : std::max(0, position - at.window), at.causal ? position + 1 : of.length};
}

int chunks_of(const Bounds& of, int first) {
    return of.is_narrow ? std::max(1, (of.length - first + CHUNK - 1) / CHUNK) : 1;
}

int first_chunk(const Layout& at, const Bounds& of) {  // chunks begin at multiples of their size
    if (!of.is_narrow) return 0;
    return row_of(at, of, 0, nullptr).first / CHUNK * CHUNK;
}

std::vector<Piece> pieces_of(const Layout& at, int64_t& partial_rows) {
    std::vector<Piece> pieces;
    const int share = at.heads / at.kv_heads;
    const int block = std::max(1, BLOCK / share);
    partial_rows = 0;
    for (int request = 0; request < at.requests; ++request) {
        const Bounds of = bounds_of(at, request);
        const int start = first_chunk(at, of), chunks = chunks_of(of, start);
        for (int row = 0; row < of.rows; row += block) {
            const int rows = std::min(block, of.rows - row);
            const int seen = row_of(at, of, row + rows - 1, nullptr).end;
            const int from = of.is_narrow ? start : row_of(at, of, row, nullptr).first;
            for (int c = 0; c < chunks; ++c) {
                const int first = from + c * CHUNK;
                const int end = chunks == 1 ? seen : std::min(first + CHUNK, seen);
                const int64_t partial = chunks == 1 ? -1 : partial_rows;
                if (chunks > 1) partial_rows += int64_t(rows) * at.heads;
                if (of.is_narrow) {
                    pieces.push_back({request, row, rows, first, end, 0, at.kv_heads, partial});
                } else {
                    for (int head = 0; head < at.kv_heads; ++head)
                        pieces.push_back({request, row, rows, first, end, head, head + 1, partial});
                }
            }
        }
    }
    return pieces;
}

void write_out(uint16_t* out, const float* mixed, float top, float total, const float* sink, int size) {
    float share = 1.0f;
    if (sink) {
        const float score = *sink * LOG2E, now = std::max(top, score);
        share = power_of_two(top - now);
        total = total * share + power_of_two(score - now);
    }
    const float factor = total == 0 ? 0.0f : share / total;  // A row that sees nothing is 0.
    for (int d = 0; d < size; d += LANES) store(out + d, narrow(load<floats>(mixed + d) * factor));
}

struct Scratch {
    Block block;
    std::vector<Row> rows;
    std::vector<uint32_t> queries;
    std::vector<float> top, total, mixed;
};

void attend_piece(const Layout& at, const Tensors& x, const Piece& piece, Scratch& own, Sums partials) {
    const int share = at.heads / at.kv_heads, count = piece.rows * share;
    const Bounds of = bounds_of(at, piece.request);
    const int64_t start = at.starts[piece.request] + piece.row;
    const int32_t* slots = at.table + at.rows[piece.request] * at.table_row;
    const int heads = piece.head_end - piece.head;
    own.block.make_room(at, heads);
    own.rows.resize(heads * count);
    const int size = at.size / PAIR;
    own.queries.resize(int64_t(heads) * count * size);
    own.top.assign(heads * count, NONE);
    own.total.assign(heads * count, 0.0f);
    own.mixed.assign(int64_t(heads) * count * at.v_size, 0.0f);
    for (int r = 0; r < heads * count; ++r) {
        const int row = r % count / share, head = (piece.head + r / count) * share + r % share;
        const uint16_t* q = x.q + (start + row) * at.q_row + int64_t(head) * at.size;
        uint32_t* const query = &own.queries[int64_t(r) * size];
        if (PAIR == 2) std::memcpy(query, q, 4 * size);
        else for (int p = 0; p < size; ++p) query[p] = uint32_t(q[p]) << 16;
        own.rows[r] = row_of(at, of, piece.row + row, query);
    }
    const int seen = std::max(piece.first, own.rows[0].first);  // No row sees an entry before this one.
    for (int entry = piece.first + (seen - piece.first) / KEYS * KEYS; entry < piece.end; entry += KEYS) {
        own.block.gather(at, x, slots + entry, seen - entry, piece.end - entry, piece.head, heads);
        for (int head = 0; head < heads; ++head) {
            const int64_t r = int64_t(head) * count;
            const Sums sums{&own.top[r], &own.total[r], &own.mixed[r * at.v_size]};
            attend_rows(at, own.block, head, &own.rows[r], count, sums, entry);
        }
    }
    for (int r = 0; r < heads * count; ++r) {
        const int row = r % count / share, head = (piece.head + r / count) * share + r % share;
        const float* mixed = &own.mixed[int64_t(r) * at.v_size];
        if (piece.partial < 0) {
            uint16_t* out = x.out + ((start + row) * at.heads + head) * at.v_size;
            write_out(out, mixed, own.top[r], own.total[r], x.sinks ? x.sinks + head : nullptr, at.v_size);
        } else {
            const int64_t to = piece.partial + int64_t(row) * at.heads + head;
            partials.top[to] = own.top[r];
            partials.total[to] = own.total[r];
            std::copy(mixed, mixed + at.v_size, partials.mixed + to * at.v_size);
        }
    }
}

// Join the chunks of one block of rows, which begin with pieces[0].
void join(const Layout& at, const Tensors& x, const Piece* pieces, int chunks, Sums partials) {
    const int64_t start = at.starts[pieces->request] + pieces->row;
    std::vector<float> mixed(at.v_size);
    for (int64_t r = 0; r < int64_t(pieces->rows) * at.heads; ++r) {
        float top = NONE, total = 0;
        for (int c = 0; c < chunks; ++c) top = std::max(top, partials.top[pieces[c].partial + r]);
        std::fill(mixed.begin(), mixed.end(), 0.0f);
        for (int c = 0; c < chunks; ++c) {
            const int64_t from = pieces[c].partial + r;
            const float share = partials.top[from] == NONE ? 0.0f : power_of_two(partials.top[from] - top);
            total += share * partials.total[from];
            for (int d = 0; d < at.v_size; ++d) mixed[d] += share * partials.mixed[from * at.v_size + d];
        }
        const float* sink = x.sinks ? x.sinks + r % at.heads : nullptr;
        write_out(x.out + (start * at.heads + r) * at.v_size, mixed.data(), top, total, sink, at.v_size);
    }
}

}  // namespace

extern "C" int whiflash_threads() { return omp_get_max_threads(); }

extern "C" void whiflash_paged_attention(const Layout* layout, const Tensors* tensors) {
    const Layout& at = *layout;
    const Tensors& x = *tensors;
    int64_t partial_rows = 0;
    const std::vector<Piece> pieces = pieces_of(at, partial_rows);
    static thread_local std::vector<float> memory;
    memory.resize(std::max<int64_t>(int64_t(memory.size()), partial_rows * (at.v_size + 2)));
    const Sums partials{memory.data(), memory.data() + partial_rows, memory.data() + 2 * partial_rows};
    const int count = int(pieces.size());
#pragma omp parallel if (count > 1)
    {
        static thread_local Scratch own;
#pragma omp for schedule(dynamic)
        for (int i = 0; i < count; ++i) attend_piece(at, x, pieces[i], own, partials);
#pragma omp for schedule(dynamic)
        for (int i = 0; i < count; ++i) {
            const bool begins = pieces[i].partial >= 0 && (i == 0 || pieces[i - 1].partial < 0 ||
                                pieces[i - 1].request != pieces[i].request || pieces[i - 1].row != pieces[i].row);
            if (!begins) continue;
            int chunks = 1;
            while (i + chunks < count && pieces[i + chunks].request == pieces[i].request &&
                   pieces[i + chunks].row == pieces[i].row)
                ++chunks;
            join(at, x, &pieces[i], chunks, partials);
        }
    }
    if (memory.capacity() > KEPT) std::vector<float>().swap(memory);
}
