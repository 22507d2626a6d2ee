// Parts of a matrix between memory, in which either axis may be contiguous, and a workspace of float vectors.
#pragma once

#include "matmul.hpp"
#include "texts.hpp"

namespace seqmix {

// A matrix in memory: where it begins, and the distances between rows and between columns, in elements.
struct Matrix {
    void* data;
    Dtype dtype;
    int64_t row, column;
};

inline void* address(const Tensor& tensor, int64_t offset) {
    return static_cast<char*>(tensor.data) + offset * (tensor.dtype == Dtype::bfloat16 ? 2 : 4);
}

// Tokens (rows) from t on and channels (columns) from `channel` on of a text in a tensor [B, T, E].
inline Matrix tokens_of(const Tensor& tensor, const Text& text, int64_t t, int64_t channel) {
    int64_t offset = text.row * tensor.stride(0) + (text.start + t) * tensor.stride(1) + channel * tensor.stride(2);
    return {address(tensor, offset), tensor.dtype, tensor.stride(1), tensor.stride(2)};
}

// Where a block lies in the workspace: vector v of row r at r * row + v * vector.
struct Places {
    int64_t row, vector;
};

// Rows one after another within each vector of columns: what a loop along the rows reads.
inline Places by_vector(int64_t height) { return {WIDTH, height * WIDTH}; }
// Whole rows one after another.
inline Places by_row(int64_t width) { return {width, WIDTH}; }

template <class T>
inline void read_typed(const T* from, int64_t row, int64_t column, int64_t rows, int64_t columns, float* to,
                       Places at) {
    for (int64_t j = 0; j < columns; j += WIDTH) {
        int64_t count = columns - j < WIDTH ? columns - j : WIDTH;
        const T* left = from + j * column;
        float* into = to + j / WIDTH * at.vector;
        if (column == 1 && count == WIDTH) {
            for (int64_t i = 0; i < rows; ++i) store(into + i * at.row, load(left + i * row));
        } else if (column == 1) {
            for (int64_t i = 0; i < rows; ++i) store(into + i * at.row, load_part(left + i * row, count));
        } else if (row == 1) {
            float tile[WIDTH * WIDTH] = {};
            for (int64_t i = 0; i < rows; i += WIDTH) {
                int64_t height = rows - i < WIDTH ? rows - i : WIDTH;
                if (height == WIDTH && count == WIDTH) {
                    transpose_block(left + i, column, into + i * at.row, at.row);
                    continue;
                }
                for (int64_t k = 0; k < count; ++k) store(tile + k * WIDTH, load_part(left + i + k * column, height));
                transpose_block(tile, WIDTH, into + i * at.row, at.row);
            }
        } else {
            for (int64_t i = 0; i < rows; ++i) {
                float values[WIDTH] = {};
                for (int64_t k = 0; k < count; ++k) values[k] = to_float(left[i * row + k * column]);
                store(into + i * at.row, load(values));
            }
        }
    }
}

template <class T>
inline void write_typed(T* to, int64_t row, int64_t column, int64_t rows, int64_t columns, const float* from,
                        Places at) {
    for (int64_t j = 0; j < columns; j += WIDTH) {
        int64_t count = columns - j < WIDTH ? columns - j : WIDTH;
        T* left = to + j * column;
        const float* out = from + j / WIDTH * at.vector;
        if (column == 1 && count == WIDTH) {
            for (int64_t i = 0; i < rows; ++i) store(left + i * row, load(out + i * at.row));
        } else if (column == 1) {
            for (int64_t i = 0; i < rows; ++i) store_part(left + i * row, load(out + i * at.row), count);
        } else if (row == 1) {
            float tile[WIDTH * WIDTH];
            for (int64_t i = 0; i < rows; i += WIDTH) {
                int64_t height = rows - i < WIDTH ? rows - i : WIDTH;
                if (height == WIDTH && count == WIDTH) {
                    transpose_block(out + i * at.row, at.row, left + i, column);
                    continue;
                }
                transpose_block(out + i * at.row, at.row, tile, WIDTH);
                for (int64_t k = 0; k < count; ++k) store_part(left + i + k * column, load(tile + k * WIDTH), height);
            }
        } else {
            for (int64_t i = 0; i < rows; ++i)
                for (int64_t k = 0; k < count; ++k) from_float(out[i * at.row + k], left[i * row + k * column]);
        }
    }
}

// rows x columns of a matrix to vectors in the workspace; lanes of columns that do not exist become 0. The block
// needs room for rows up to whole vectors of them, and those may be overwritten.
inline void read_block(const Matrix& from, int64_t rows, int64_t columns, float* to, Places at) {
    if (from.dtype == Dtype::bfloat16)
        read_typed(static_cast<const bfloat16*>(from.data), from.row, from.column, rows, columns, to, at);
    else
        read_typed(static_cast<const float*>(from.data), from.row, from.column, rows, columns, to, at);
}

// The way back; rows that do not exist are read up to whole vectors of them, and dropped.
inline void write_block(const Matrix& to, int64_t rows, int64_t columns, const float* from, Places at) {
    if (to.dtype == Dtype::bfloat16)
        write_typed(static_cast<bfloat16*>(to.data), to.row, to.column, rows, columns, from, at);
    else
        write_typed(static_cast<float*>(to.data), to.row, to.column, rows, columns, from, at);
}

// Lane i of the result is the sum of the lanes of vector i, of WIDTH vectors one after another.
inline Vector sums_of_rows(const float* rows) {
    Vector now[WIDTH];
    for (int i = 0; i < WIDTH; ++i) now[i] = load(rows + i * WIDTH);
    // Each pass adds halves of runs: afterwards a vector holds the partial sums of twice as many rows.
    for (int run = 1; run < WIDTH; run *= 2) {
        Integers even, odd;
        for (int lane = 0; lane < WIDTH; ++lane) {
            int place = lane / (2 * run) * (2 * run) + lane % run;
            bool second = lane / run % 2;
            even[lane] = place + (second ? WIDTH : 0);
            odd[lane] = even[lane] + run;
        }
        for (int i = 0; i < WIDTH / run; i += 2)
            now[i / 2] = shuffle(now[i], now[i + 1], even) + shuffle(now[i], now[i + 1], odd);
    }
    return now[0];
}

}  // namespace seqmix
