// What the forward and backward of the delta rule share: one chunk of one head, its decays, scores and solve.
//
// A chunk has `tokens` tokens of `steps` rows each. Row i writes k[i] u[i]^T into the state S, and with b the running
// sum of log decays inside the chunk (a row has the b of its token)
//     (I + L) u = beta (v - (k exp(b)) S),    L[i, j] = beta[i] sum_c k[i, c] k[j, c] exp(b[i, c] - b[j, c]),  j < i
//     o = (q exp(b)) S + R u,                 R[p, j] = sum_c q[p, c] k[j, c] exp(b[p, c] - b[j, c]),  j read by p
//     S <- exp(b_last) S + (k exp(b_last - b))^T u.
#pragma once

#include "decay.hpp"
#include "matmul.hpp"
#include "parallel.hpp"
#include "tensor.hpp"
#include "texts.hpp"

namespace seqmix::delta {

constexpr int64_t CHUNK = 64;      // rows of a chunk, if a token has no more
constexpr int64_t PADDED_TO = 16;  // rows; a multiple of every WIDTH and of SOLVED_ROWS
constexpr int SOLVED_ROWS = BLOCK_VECTORS > 2 ? 16 : 8;  // of a solve that stays in registers
constexpr float EPSILON = 1e-6f;   // under the root of a key's length

typedef double Doubles __attribute__((vector_size(WIDTH * 8)));

inline Doubles load_doubles(const double* from) {
    Doubles x;
    std::memcpy(&x, from, sizeof x);
    return x;
}

inline Vector narrow(Doubles x) { return __builtin_convertvector(x, Vector); }

// Cuts a workspace into pieces; without one it only counts what is needed.
struct Pieces {
    float* base;
    int64_t used = 0;
    float* take(int64_t count) {
        float* piece = base ? base + used : nullptr;
        used += round_up(count, 16);
        return piece;
    }
};

struct Sizes {
    int64_t key, value, steps, group;  // K, V, rows of a token, value heads of a key head
    int64_t keys, values;              // K and V in whole vectors
    int64_t tokens, rows, scores;      // of a whole chunk: tokens, padded rows, and how far rows of scores are apart

    Sizes(int64_t key, int64_t value, int64_t steps, int64_t group)
        : key(key), value(value), steps(steps), group(group), keys(round_up(key)), values(round_up(value)),
          tokens(steps < CHUNK ? CHUNK / steps : 1), rows(round_up(tokens * steps, PADDED_TO)),
          scores(rows + PADDED_TO) {}  // a block of scores may end up to a vector beyond the last row
};

struct Inputs {
    Tensor q, k, v, beta, g, bounds;  // [B, T, G, K], [B, T S, G, K], [B, T S, H, V], [B, T S, H], [B, T, H(, K)]
    double scale;
    bool normalize;
    int64_t steps;

    void require_shapes(const Tensor& states, int64_t rows) const {
        int64_t batch = q.size(0), tokens = q.size(1), groups = q.size(2), key = q.size(3), heads = v.size(2);
        require(q.axes == 4 && v.axes == 4 && steps > 0, "q, k and v have four axes");
        require(groups > 0 && heads % groups == 0, "heads of q and k divide those of v");
        require_shape(k, "k is [B, T steps, G, K]", {batch, tokens * steps, groups, key});
        require_shape(v, "v is [B, T steps, H, V]", {batch, tokens * steps, heads, v.size(3)});
        require_shape(beta, "beta is [B, T steps, H]", {batch, tokens * steps, heads});
        if (by_column()) require_shape(g, "g is [B, T, H, K]", {batch, tokens, heads, key});
        else if (g) require_shape(g, "g is [B, T, H]", {batch, tokens, heads});
        require_shape(states, "states are [N, H, K, V]", {rows, heads, key, v.size(3)});
        require(beta.dtype == Dtype::float32 && (!g || g.dtype == Dtype::float32) && states.dtype == Dtype::float32 &&
                    q.dtype == k.dtype && k.dtype == v.dtype, "q, k and v share a dtype, the others are float32");
    }
    int64_t batch() const { return q.size(0); }
    int64_t length() const { return q.size(1); }
    int64_t texts() const { return num_texts(bounds, batch()); }
    int64_t key_heads() const { return q.size(2); }
    int64_t heads() const { return v.size(2); }
    bool by_column() const { return g.axes == 4; }
    Sizes sizes() const { return {q.size(3), v.size(3), steps, heads() / key_heads()}; }
    // Chunks of all texts, with room between them: text n of a packed row starts at the n-th after those before it.
    int64_t first_chunk(int64_t index, const Text& text, int64_t tokens) const {
        return bounds ? text.start / tokens + index : index * ((length() + tokens - 1) / tokens);
    }
};

// Tokens [first, first + tokens) of a text.
struct Part {
    Text text;
    int64_t first, tokens, rows, padded;
    Part(const Text& text, int64_t first, const Sizes& sizes) : text(text), first(first) {
        tokens = text.length - first < sizes.tokens ? text.length - first : sizes.tokens;
        rows = tokens * sizes.steps;
        padded = round_up(rows, PADDED_TO);
    }
};

// Address of the first row of a part in a tensor of `per_token` rows per token, for one head.
template <class T>
T* rows_of(const Tensor& tensor, const Part& part, int64_t per_token, int64_t head) {
    return tensor.as<T>() + part.text.row * tensor.stride(0) +
           (part.text.start + part.first) * per_token * tensor.stride(1) + head * tensor.stride(2);
}

inline Vector first_lanes(Vector x, int64_t count) {
    Integers lane;
    for (int i = 0; i < WIDTH; ++i) lane[i] = i;
    return choose(lane < int32_t(count < 0 ? 0 : count < WIDTH ? count : WIDTH), x, Vector{});
}

// Rows as float32, zeros to whole vectors and to `padded` rows. The rows of a head are too far apart for the
// processor to see what comes next: what lies `ahead` (elements) of each is called for in advance, if it is not zero.
template <class T>
void load_rows(const T* from, int64_t from_row, int64_t rows, int64_t padded, int64_t width, float* to, int64_t to_row,
               int64_t ahead = 0) {
    for (int64_t i = 0; i < rows; ++i) {
        const T* source = from + i * from_row;
        float* target = to + i * to_row;
        if (ahead) {
            uintptr_t later = reinterpret_cast<uintptr_t>(source) + uintptr_t(ahead) * sizeof(T);
            for (int64_t byte = 0; byte < width * int64_t(sizeof(T)); byte += 64)
                __builtin_prefetch(reinterpret_cast<const void*>(later + uintptr_t(byte)), 0, 2);
        }
        int64_t j = 0;
        for (; j + WIDTH <= width; j += WIDTH) store(target + j, load(source + j));
        if (j < width) store(target + j, load_part(source + j, width - j));
    }
    for (int64_t i = rows; i < padded; ++i)
        for (int64_t j = 0; j < to_row; j += WIDTH) store(to + i * to_row + j, Vector{});
}

template <class T>
void store_rows(const float* from, int64_t from_row, int64_t rows, int64_t width, T* to, int64_t to_row) {
    for (int64_t i = 0; i < rows; ++i) {
        int64_t j = 0;
        for (; j + WIDTH <= width; j += WIDTH) store(to + i * to_row + j, load(from + i * from_row + j));
        if (j < width) store_part(to + i * to_row + j, load(from + i * from_row + j), width - j);
    }
}

inline float dot(const float* x, const float* y, int64_t count) {
    Vector total{};
    for (int64_t j = 0; j < count; j += WIDTH) total += load(x + j) * load(y + j);
    return sum(total);
}

// Rows times `scale` and, to be normalised, over their lengths. `inverse` keeps one over the length.
inline void scale_rows(int64_t rows, int64_t wide, float scale, bool normalize, float* x, float* inverse) {
    for (int64_t i = 0; i < rows; ++i) {
        float* row = x + i * wide;
        inverse[i] = normalize ? 1 / __builtin_sqrtf(dot(row, row, wide) + EPSILON) : 1;
        Vector factor = broadcast(inverse[i] * scale);
        for (int64_t j = 0; j < wide; j += WIDTH) store(row + j, load(row + j) * factor);
    }
}

// x <- (I + L)^-1 x for a block, or (I + L)^-T x; a column of the block stays in registers.
template <bool transposed>
inline void solve_block(int64_t columns, const float* lower, int64_t row, float* x, int64_t x_row) {
    for (int64_t j = 0; j < columns; j += WIDTH) {
        Vector now[SOLVED_ROWS];
        for (int i = 0; i < SOLVED_ROWS; ++i) now[i] = load(x + i * x_row + j);
        if (transposed) {
            for (int p = SOLVED_ROWS - 1; p > 0; --p)
                for (int i = p - 1; i >= 0; --i) now[i] -= broadcast(lower[p * row + i]) * now[p];
        } else {
            for (int p = 0; p < SOLVED_ROWS - 1; ++p)
                for (int i = p + 1; i < SOLVED_ROWS; ++i) now[i] -= broadcast(lower[i * row + p]) * now[p];
        }
        for (int i = 0; i < SOLVED_ROWS; ++i) store(x + i * x_row + j, now[i]);
    }
}

// x <- (I + L)^-1 x or, transposed, (I + L)^-T x, for L strictly lower; `rows` are whole blocks.
template <bool transposed>
void solve(int64_t rows, int64_t columns, const float* lower, int64_t row, float* x, int64_t x_row) {
    for (int64_t done = 0; done < rows; done += SOLVED_ROWS) {
        int64_t first = transposed ? rows - SOLVED_ROWS - done : done;
        int64_t next = first + SOLVED_ROWS;
        float* block = x + first * x_row;
        if (transposed)
            matmul<Into::subtract>(SOLVED_ROWS, columns, done, lower + next * row + first, 1, row, x + next * x_row,
                                   x_row, block, x_row);
        else
            matmul<Into::subtract>(SOLVED_ROWS, columns, done, lower + first * row, row, 1, x, x_row, block, x_row);
        solve_block<transposed>(columns, lower + first * row + first, row, block, x_row);
    }
}

// One chunk: what depends on keys, queries and decays alone.
struct Chunk {
    Sizes sizes;
    float *q, *k, *inverse_q, *inverse_k;           // [tokens, keys], [rows, keys]; scaled and normalised
    float *columns, *raw_lower, *raw_reads;         // k^T, k k^T, q k^T, before decay: the same for a group of heads
    float *gates, *early, *late, *weights, *beta;   // per token: g, exp(b), exp(b_last - b); exp(b[p] - b[j])
    double* total;                                  // b per row
    float *early_q, *early_k, *late_k;              // q exp(b), k exp(b), k exp(b_last - b)
    float *among, *lower, *reads;                   // L / beta, L, R
    float *reader_decay, *writer_decay, *reader_q, *reader_k, *writer_k;  // of a decay block

    Chunk(const Sizes& s, Pieces& pieces) : sizes(s) {
        q = pieces.take(s.rows * s.keys), k = pieces.take(s.rows * s.keys);
        inverse_q = pieces.take(s.rows), inverse_k = pieces.take(s.rows);
        columns = pieces.take(s.keys * s.rows);
        raw_lower = pieces.take(s.rows * s.scores), raw_reads = pieces.take(s.rows * s.scores);
        gates = pieces.take(s.tokens * s.keys);
        early = pieces.take(s.tokens * s.keys), late = pieces.take(s.tokens * s.keys);
        weights = pieces.take(s.tokens * s.scores), beta = pieces.take(s.rows);
        total = reinterpret_cast<double*>(pieces.take(2 * s.rows));
        early_q = pieces.take(s.tokens * s.keys);
        early_k = pieces.take(s.rows * s.keys), late_k = pieces.take(s.rows * s.keys);
        among = pieces.take(s.rows * s.scores), lower = pieces.take(s.rows * s.scores);
        reads = pieces.take(s.rows * s.scores);
        int64_t decays = s.tokens * s.keys > s.rows ? s.tokens * s.keys : s.rows;
        reader_decay = pieces.take(decays), writer_decay = pieces.take(decays);
        reader_q = pieces.take(s.tokens * s.keys), reader_k = pieces.take(s.rows * s.keys);
        writer_k = pieces.take(s.rows * s.keys);
    }

    // `ahead` is how many tokens further the next chunk lies.
    // Keys and queries of a key head; for all of its value heads, so too their products when no column decays alone.
    template <class T>
    void load_keys(const Inputs& inputs, const Part& part, int64_t key_head, int64_t ahead) {
        const Sizes& s = sizes;
        load_rows(rows_of<T>(inputs.q, part, 1, key_head), inputs.q.stride(1), part.tokens, part.tokens, s.key, q,
                  s.keys, ahead * inputs.q.stride(1));
        load_rows(rows_of<T>(inputs.k, part, s.steps, key_head), inputs.k.stride(1), part.rows, part.padded, s.key, k,
                  s.keys, ahead * s.steps * inputs.k.stride(1));
        scale_rows(part.tokens, s.keys, float(inputs.scale), inputs.normalize, q, inverse_q);
        if (inputs.normalize) scale_rows(part.rows, s.keys, 1, true, k, inverse_k);
        if (inputs.by_column()) return;
        transpose(part.padded, s.keys, k, s.keys, columns, s.rows);
        score(part.padded, part.padded, true, k, raw_lower);
        score(part.tokens, part.padded, s.steps == 1, q, raw_reads);
    }

    void score(int64_t readers, int64_t writers, bool triangle, const float* left, float* result) {
        const Sizes& s = sizes;
        if (triangle)
            matmul<Into::replace, Shape::lower_result>(readers, writers, s.key, left, s.keys, 1, columns, s.rows,
                                                       result, s.scores);
        else
            matmul(readers, writers, s.key, left, s.keys, 1, columns, s.rows, result, s.scores);
    }

    void load_head(const Inputs& inputs, const Part& part, int64_t head);
    void decay_by_head(const Inputs& inputs, const Part& part, int64_t head);
    void decay_by_column(const Inputs& inputs, const Part& part, int64_t head);
    void no_decay(const Part& part);
    void decay_to_border(const DecayBlock& block);
    void score_blocks(const Part& part);
    void write(const Part& part, int64_t wide, const float* state, float* missed, float* written);
    void move_on(const Part& part, int64_t wide, const float* written, float* state);
};

}  // namespace seqmix::delta
