// Softmax attention of a block of queries over keys that come tile by tile.
//
// What queries have read so far is kept as (highest score, sum of weights, weighted sum of values). Two such
// triples over different keys merge into that of all of them, and merging is associative, so keys may be read in
// pieces, in any order and by different threads.
#pragma once

#include <cstdint>

#include "matmul.hpp"
#include "vector.hpp"

namespace seqmix {

constexpr int64_t TILE = 64;  // keys that are read at once
constexpr int FEW = 8;        // so many queries read keys where they lie; more have them transposed first

constexpr float NOTHING = -__builtin_inff();  // the score of a key that is hidden

// e^x for x <= 0: below -87.3 it is 0, and a NaN stays one.
inline Vector exp_falling(Vector x) {
    const float log2e = 1.442695040888963f, ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
    Vector clamped = choose(x < -87.3f, broadcast(-87.3f), x);
    const float round = 12582912.0f;  // 1.5 * 2^23: its last bits hold the whole number that was added
    Vector shifted = clamped * log2e + round;
    Vector n = shifted - round;
    Vector r = clamped - n * ln2_high;
    r = r - n * ln2_low;
    Vector p = broadcast(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    Vector result = (Vector)((Bits)p + ((Bits)shifted << 23));
    return choose(x < -87.3f, Vector{}, choose(x == x, result, x));
}

// The sum of each of WIDTH vectors, as one vector.
inline Vector sum_each(Vector* parts) {
    Integers low, high;
    for (int i = 0; i < WIDTH / 2; ++i) {
        low[2 * i] = i, low[2 * i + 1] = i + WIDTH;
        high[2 * i] = i + WIDTH / 2, high[2 * i + 1] = i + WIDTH / 2 + WIDTH;
    }
    for (int count = WIDTH / 2; count > 0; count /= 2)
        for (int i = 0; i < count; ++i)
            parts[i] = shuffle(parts[i], parts[i + count], low) +
                       shuffle(parts[i], parts[i + count], high);
    return parts[0];
}

// Rows of queries [rows, key width] and what they have read; all rows are padded to whole vectors.
struct Queries {
    int64_t rows, key_width, value_width;
    float* q;        // scaled, [rows, round_up(key_width)]
    float* highest;  // [rows]
    float* total;    // [rows]
    float* sum;      // [rows, round_up(value_width)]

    int64_t q_row() const { return round_up(key_width); }
    int64_t sum_row() const { return round_up(value_width); }

    void start() const {
        for (int64_t r = 0; r < rows; ++r) highest[r] = NOTHING, total[r] = 0;
        for (int64_t i = 0; i < rows * sum_row(); ++i) sum[i] = 0;
    }
};

// Keys and values of at most TILE neighbouring positions.
template <class T>
struct Keys {
    const T *k, *v;
    int64_t k_row, v_row, count;
    int64_t ahead;  // rows after these that will be read next: fetched already. 0 for none

    void fetch(const T* line) const {
        if (ahead) __builtin_prefetch(line, 0, 2);
    }
};

// Workspace of a thread, in floats: `scores` [rows, TILE], and the tile converted and transposed.
struct Scratch {
    float *scores, *keys, *transposed, *values;

    static int64_t floats(int64_t rows, int64_t key_width, int64_t value_width) {
        return rows * TILE + TILE * (2 * round_up(key_width) + round_up(value_width));
    }
    static Scratch at(float* from, int64_t rows, int64_t key_width, int64_t value_width) {
        Scratch scratch;
        scratch.scores = from;
        scratch.keys = scratch.scores + rows * TILE;
        scratch.transposed = scratch.keys + TILE * round_up(key_width);
        scratch.values = scratch.transposed + TILE * round_up(key_width);
        return scratch;
    }
};

// to[i, c] = from[i, c] for i < rows, c < columns; zero up to whole vectors of columns.
template <class T>
inline void copy_rows(const T* from, int64_t from_row, int64_t rows, int64_t columns, float* to, int64_t to_row) {
    for (int64_t i = 0; i < rows; ++i) {
        int64_t c = 0;
        for (; c + WIDTH <= columns; c += WIDTH) store(to + i * to_row + c, load(from + i * from_row + c));
        if (c < columns) store(to + i * to_row + c, load_part(from + i * from_row + c, columns - c));
    }
}

// scores[r, j] = q_r . k_j for a few rows; key width in whole vectors.
template <int rows, class T>
inline void few_scores(const float* q, int64_t width, const Keys<T>& keys, float* scores) {
    for (int64_t j = 0; j < keys.count; j += WIDTH) {
        Vector parts[rows][WIDTH];
        for (int64_t i = 0; i < WIDTH; ++i) {
            const T* key = keys.k + (j + i < keys.count ? j + i : 0) * keys.k_row;  // past the end: any, masked later
            Vector total[rows] = {};
            for (int64_t c = 0; c < width; c += WIDTH) {
                keys.fetch(key + keys.ahead * keys.k_row + c);
                Vector line = load(key + c);
                for (int r = 0; r < rows; ++r) total[r] += line * load(q + r * width + c);
            }
            for (int r = 0; r < rows; ++r) parts[r][i] = total[r];
        }
        for (int r = 0; r < rows; ++r) store(scores + r * TILE + j, sum_each(parts[r]));
    }
}

// sum[r, c] += sum_j weights[r, j] v[j, c] for a few rows and vectors of columns.
template <int rows, int vectors, class T>
inline void few_sums(const float* weights, const Keys<T>& keys, int64_t column, float* sum, int64_t sum_row) {
    Vector total[rows][vectors];
    for (int r = 0; r < rows; ++r)
        for (int i = 0; i < vectors; ++i) total[r][i] = load(sum + r * sum_row + column + i * WIDTH);
    const T* value = keys.v + column;
    for (int64_t j = 0; j < keys.count; ++j, value += keys.v_row) {
        Vector line[vectors];
        for (int i = 0; i < vectors; ++i) {
            keys.fetch(value + keys.ahead * keys.v_row + i * WIDTH);
            line[i] = load(value + i * WIDTH);
        }
        for (int r = 0; r < rows; ++r) {
            Vector weight = broadcast(weights[r * TILE + j]);
            for (int i = 0; i < vectors; ++i) total[r][i] += weight * line[i];
        }
    }
    for (int r = 0; r < rows; ++r)
        for (int i = 0; i < vectors; ++i) store(sum + r * sum_row + column + i * WIDTH, total[r][i]);
}

template <int rows, class T>
inline void few_rows_of_sums(const float* weights, const Keys<T>& keys, float* sum, int64_t sum_row) {
    int64_t column = 0;
    for (; column + 4 * WIDTH <= sum_row; column += 4 * WIDTH)
        few_sums<rows, 4>(weights, keys, column, sum, sum_row);
    for (; column < sum_row; column += WIDTH) few_sums<rows, 1>(weights, keys, column, sum, sum_row);
}

// step(Rows<n>, first row) over all rows, four at a time.
template <class Step>
inline void by_four(int64_t rows, const Step& step) {
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4) step(Rows<4>{}, r);
    if (rows - r == 3) step(Rows<3>{}, r);
    if (rows - r == 2) step(Rows<2>{}, r);
    if (rows - r == 1) step(Rows<1>{}, r);
}

// Scores become weights exp(score - highest), with what was read before rescaled to the new highest score.
inline void weigh(const Queries& queries, float* scores, int64_t count) {
    int64_t width = round_up(count), sum_row = queries.sum_row();
    for (int64_t r = 0; r < queries.rows; ++r) {
        float* row = scores + r * TILE;
        for (int64_t j = count; j < width; ++j) row[j] = NOTHING;
        Vector most = load(row);
        for (int64_t j = WIDTH; j < width; j += WIDTH) most = maximum(load(row + j), most);
        float before = queries.highest[r], now = largest(most);
        now = now > before ? now : before;
        if (now == NOTHING) {  // nothing is visible yet, or nothing is a number
            for (int64_t j = 0; j < width; ++j) {
                if (row[j] != row[j]) queries.total[r] = row[j];
                row[j] = 0;
            }
            continue;
        }
        if (now != before) {
            float factor = exp_falling(broadcast(before - now))[0];
            queries.highest[r] = now;
            queries.total[r] *= factor;
            for (int64_t c = 0; c < sum_row; c += WIDTH)
                store(queries.sum + r * sum_row + c, load(queries.sum + r * sum_row + c) * factor);
        }
        Vector total = {};
        for (int64_t j = 0; j < width; j += WIDTH) {
            Vector weight = exp_falling(load(row + j) - now);
            store(row + j, weight);
            total += weight;
        }
        queries.total[r] += sum(total);
    }
}

// Reads a tile: `mask(scores, count)` sees the scores [rows, TILE] before they become weights.
template <class T, class Mask>
inline void read_few(const Queries& queries, const Keys<T>& keys, float* scores, const Mask& mask) {
    by_four(queries.rows, [&](auto rows, int64_t r) {
        few_scores<decltype(rows)::value>(queries.q + r * queries.q_row(), queries.q_row(), keys, scores + r * TILE);
    });
    mask(scores, keys.count);
    weigh(queries, scores, keys.count);
    by_four(queries.rows, [&](auto rows, int64_t r) {
        few_rows_of_sums<decltype(rows)::value>(scores + r * TILE, keys, queries.sum + r * queries.sum_row(),
                                                queries.sum_row());
    });
}

template <class T, class Mask>
inline void read_tile(const Queries& queries, const Keys<T>& keys, const Scratch& scratch, const Mask& mask) {
    int64_t K = queries.key_width, V = queries.value_width, q_row = queries.q_row(), sum_row = queries.sum_row();
    bool few = queries.rows <= FEW, whole = K % WIDTH == 0 && V % WIDTH == 0;
    if (few && whole) return read_few(queries, keys, scratch.scores, mask);
    constexpr bool wide = sizeof(T) == sizeof(float);
    const float *k = (const float*)keys.k, *v = (const float*)keys.v;
    int64_t k_row = keys.k_row, v_row = keys.v_row;
    if (!wide || K % WIDTH || (!few && keys.count % WIDTH)) {
        copy_rows(keys.k, keys.k_row, keys.count, K, scratch.keys, q_row);
        for (int64_t j = keys.count; j < round_up(keys.count); ++j)
            for (int64_t c = 0; c < q_row; ++c) scratch.keys[j * q_row + c] = 0;
        k = scratch.keys, k_row = q_row;
    }
    if (!wide || V % WIDTH) {
        copy_rows(keys.v, keys.v_row, keys.count, V, scratch.values, sum_row);
        v = scratch.values, v_row = sum_row;
    }
    if (few) return read_few(queries, Keys<float>{k, v, k_row, v_row, keys.count, 0}, scratch.scores, mask);
    transpose(keys.count, K, k, k_row, scratch.transposed, TILE);
    matmul(queries.rows, keys.count, K, queries.q, q_row, 1, scratch.transposed, TILE, scratch.scores, TILE);
    mask(scratch.scores, keys.count);
    weigh(queries, scratch.scores, keys.count);
    matmul<Into::add>(queries.rows, sum_row, keys.count, scratch.scores, TILE, 1, v, v_row, queries.sum, sum_row);
}

// What `more` has read joins what `queries` has, row by row.
inline void merge(const Queries& queries, const Queries& more) {
    int64_t sum_row = queries.sum_row();
    for (int64_t r = 0; r < queries.rows; ++r) {
        float now = queries.highest[r] > more.highest[r] ? queries.highest[r] : more.highest[r];
        float base = now == NOTHING ? 0 : now;
        float own = exp_falling(broadcast(queries.highest[r] - base))[0];
        float other = exp_falling(broadcast(more.highest[r] - base))[0];
        queries.highest[r] = now;
        queries.total[r] = own * queries.total[r] + other * more.total[r];
        for (int64_t c = r * sum_row; c < (r + 1) * sum_row; c += WIDTH)
            store(queries.sum + c, own * load(queries.sum + c) + other * load(more.sum + c));
    }
}

// Row r becomes the average of what it has read; `sink`, a logit, joins the sum of weights (NOTHING for none).
template <class T>
inline void finish(const Queries& queries, int64_t r, float sink, T* to) {
    float now = queries.highest[r] > sink ? queries.highest[r] : sink;
    float base = now == NOTHING ? 0 : now;
    float own = exp_falling(broadcast(queries.highest[r] - base))[0];
    float total = own * queries.total[r] + exp_falling(broadcast(sink - base))[0];
    float factor = total == 0 ? 0 : own / total;
    const float* sum = queries.sum + r * queries.sum_row();
    int64_t c = 0, width = queries.value_width;
    for (; c + WIDTH <= width; c += WIDTH) store(to + c, load(sum + c) * factor);
    if (c < width) store_part(to + c, load(sum + c) * factor, width - c);
}

}  // namespace seqmix
