// Products of small blocks that lie in cache: what chunked recurrences and attention are made of.
//
// Blocks are float32 with rows padded to whole vectors (`round_up(columns)`), zero in the padding. The inner
// loop keeps ROWS x COLUMNS vectors of the result in registers and broadcasts the left operand, so the left
// operand may have any strides (a transposed one costs nothing) and the right operand is read row by row.
#pragma once

#include <cstdint>
#include <utility>

#include "vector.hpp"

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define SEQMIX_SHUFFLEVECTOR 1
#endif
#endif

namespace seqmix {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int BLOCK_ROWS = 6, BLOCK_VECTORS = 4;  // 32 registers
#else
constexpr int BLOCK_ROWS = 4, BLOCK_VECTORS = 2;  // 16 registers
#endif

// What becomes of the old content of the result.
enum class Into { replace, add, subtract };

// Which entries exist. `lower`: the left operand is zero above its diagonal (left[i, p] = 0 for p > i, and stored
// as zero at least up to column i + BLOCK_ROWS). `upper`: left[i, p] = 0 for p < i (stored as zero down to column
// i - BLOCK_ROWS). `lower_result`: of the result only j <= i is wanted; entries above may hold anything.
enum class Shape { full, lower, upper, lower_result };

template <Into into, int rows, int vectors>
inline void block_product(int64_t first, int64_t last, const float* left, int64_t left_row, int64_t left_column,
                          const float* right, int64_t right_row, float* result, int64_t result_row) {
    Vector total[rows][vectors] = {};
    for (int64_t p = first; p < last; ++p) {
        Vector line[vectors];
        for (int v = 0; v < vectors; ++v) line[v] = load(right + p * right_row + v * WIDTH);
        for (int i = 0; i < rows; ++i) {
            Vector factor = broadcast(left[i * left_row + p * left_column]);
            for (int v = 0; v < vectors; ++v) total[i][v] += factor * line[v];
        }
    }
    for (int i = 0; i < rows; ++i)
        for (int v = 0; v < vectors; ++v) {
            float* to = result + i * result_row + v * WIDTH;
            if (into == Into::replace) store(to, total[i][v]);
            if (into == Into::add) store(to, load(to) + total[i][v]);
            if (into == Into::subtract) store(to, load(to) - total[i][v]);
        }
}

template <Into into, int rows>
inline void row_product(int64_t first, int64_t last, int64_t columns, const float* left, int64_t left_row,
                        int64_t left_column, const float* right, int64_t right_row, float* result,
                        int64_t result_row) {
    int64_t j = 0;
    for (; j + BLOCK_VECTORS * WIDTH <= columns; j += BLOCK_VECTORS * WIDTH)
        block_product<into, rows, BLOCK_VECTORS>(first, last, left, left_row, left_column, right + j, right_row,
                                                 result + j, result_row);
    if constexpr (BLOCK_VECTORS > 2)
        if (j + 2 * WIDTH <= columns) {
            block_product<into, rows, 2>(first, last, left, left_row, left_column, right + j, right_row, result + j,
                                         result_row);
            j += 2 * WIDTH;
        }
    for (; j < columns; j += WIDTH)
        block_product<into, rows, 1>(first, last, left, left_row, left_column, right + j, right_row, result + j,
                                     result_row);
}

template <int count>
struct Rows {
    static constexpr int value = count;
};

// result[i, j] = (or +=, -=) sum_p left[i, p] right[p, j] for i < rows, j < columns, p < depth.
// left[i, p] is at left[i * left_row + p * left_column]. Columns are processed in whole vectors: right and result
// need rows of at least round_up(columns).
template <Into into = Into::replace, Shape shape = Shape::full>
__attribute__((noinline)) inline void matmul(int64_t rows, int64_t columns, int64_t depth, const float* left, int64_t left_row,
                   int64_t left_column, const float* right, int64_t right_row, float* result, int64_t result_row) {
    auto run = [&](auto count, int64_t i) {
        constexpr int height = decltype(count)::value;
        int64_t first = 0, last = depth, wide = columns;
        if (shape == Shape::lower) last = i + height < depth ? i + height : depth;
        if (shape == Shape::upper) first = i < depth ? i : depth;
        if (shape == Shape::lower_result) wide = i + height < columns ? i + height : columns;
        row_product<into, height>(first, last, wide, left + i * left_row, left_row, left_column, right, right_row,
                                  result + i * result_row, result_row);
    };
    int64_t i = 0;
    for (; i + BLOCK_ROWS <= rows; i += BLOCK_ROWS) run(Rows<BLOCK_ROWS>{}, i);
    if (BLOCK_ROWS > 4 && i + 4 <= rows) { run(Rows<4>{}, i); i += 4; }
    if (i + 2 <= rows) { run(Rows<2>{}, i); i += 2; }
    if (i < rows) run(Rows<1>{}, i);
}

// Lanes at these places of two vectors laid end to end. Clang and newer GCCs take constants for the places; older GCCs
// know only their own builtin.
template <int... place>
inline Vector pick(Vector a, Vector b) {
#if SEQMIX_SHUFFLEVECTOR
    return __builtin_shufflevector(a, b, place...);
#else
    return __builtin_shuffle(a, b, Integers{place...});
#endif
}

// a[0], b[0], a[1], b[1], ... of the first halves of two vectors, or of their second halves.
template <int half, int... place>
inline Vector interleave(Vector a, Vector b, std::integer_sequence<int, place...>) {
    return pick<(half * WIDTH / 2 + place / 2 + place % 2 * WIDTH)...>(a, b);
}

// Lane j of vector i becomes lane i of vector j.
inline void transpose_vectors(Vector (&now)[WIDTH]) {
    Vector next[WIDTH];
#if defined(__AVX__) && !defined(__AVX512F__)
    // What crosses the middle of a vector costs an instruction more here, so it is done once: first numbers, then pairs,
    // then halves.
    for (int i = 0; i < 8; i += 2) {
        next[i] = pick<0, 8, 1, 9, 4, 12, 5, 13>(now[i], now[i + 1]);
        next[i + 1] = pick<2, 10, 3, 11, 6, 14, 7, 15>(now[i], now[i + 1]);
    }
    for (int four = 0; four < 8; four += 4)
        for (int i = 0; i < 2; ++i) {
            now[four + 2 * i] = pick<0, 1, 8, 9, 4, 5, 12, 13>(next[four + i], next[four + i + 2]);
            now[four + 2 * i + 1] = pick<2, 3, 10, 11, 6, 7, 14, 15>(next[four + i], next[four + i + 2]);
        }
    for (int i = 0; i < 4; ++i) {
        next[i] = pick<0, 1, 2, 3, 8, 9, 10, 11>(now[i], now[i + 4]);
        next[i + 4] = pick<4, 5, 6, 7, 12, 13, 14, 15>(now[i], now[i + 4]);
    }
    for (int i = 0; i < 8; ++i) now[i] = next[i];
#else
    // Each pass interleaves the two halves of the rows; after log2(WIDTH) passes rows are columns.
    using Places = std::make_integer_sequence<int, WIDTH>;
    for (int pass = 1; pass < WIDTH; pass *= 2) {
        for (int i = 0; i < WIDTH / 2; ++i) {
            next[2 * i] = interleave<0>(now[i], now[i + WIDTH / 2], Places{});
            next[2 * i + 1] = interleave<1>(now[i], now[i + WIDTH / 2], Places{});
        }
        for (int i = 0; i < WIDTH; ++i) now[i] = next[i];
    }
#endif
}

// to[j, i] = from[i, j] for whole blocks of WIDTH x WIDTH; both are padded to whole blocks.
template <class From, class To>
inline void transpose_block(const From* from, int64_t from_row, To* to, int64_t to_row) {
    Vector lines[WIDTH];
    for (int i = 0; i < WIDTH; ++i) lines[i] = load(from + i * from_row);
    transpose_vectors(lines);
    for (int i = 0; i < WIDTH; ++i) store(to + i * to_row, lines[i]);
}

// to[j, i] = from[i, j] for i < rows, j < columns. Both blocks must extend to whole vectors in rows and columns.
inline void transpose(int64_t rows, int64_t columns, const float* from, int64_t from_row, float* to, int64_t to_row) {
    for (int64_t i = 0; i < rows; i += WIDTH)
        for (int64_t j = 0; j < columns; j += WIDTH)
            transpose_block(from + i * from_row + j, from_row, to + j * to_row + i, to_row);
}

}  // namespace seqmix
