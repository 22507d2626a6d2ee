// What the kernels of linear attention share: rows of tensors in and out of cache-sized blocks.
#pragma once

#include "matmul.hpp"
#include "tensor.hpp"
#include "texts.hpp"

namespace seqmix {

constexpr int64_t CHUNK = 64;              // tokens that meet each other directly
constexpr int64_t SHORT = 8;               // up to here a text is read token by token
constexpr float SPAN = 60;                 // log decay up to which factors of both sides stay far inside float32
constexpr float LOWEST_LOG_DECAY = -80;    // of a token; exp of it is zero beside any float32 value

// Blocks of floats handed out from one piece of memory, or only counted where there is none yet.
struct Workspace {
    float* base;
    int64_t used = 0;

    float* take(int64_t count) {
        float* block = base ? base + used : nullptr;
        used += round_up(count, 16);  // a cache line
        return block;
    }
};

// Chunks of the longest text.
inline int64_t most_chunks(const Tensor& bounds, int64_t batch, int64_t length) {
    int64_t most = 0;
    for (int64_t index = 0; index < num_texts(bounds, batch); ++index) {
        int64_t chunks = (text_at(bounds, index, length).length + CHUNK - 1) / CHUNK;
        if (chunks > most) most = chunks;
    }
    return most;
}

// Rows of one head of a tensor [B, T, H, columns], from token t of a text on.
struct HeadRows {
    void* data;
    Dtype dtype;
    int64_t row;

    // body(address as what it is)
    template <class Body>
    void typed(const Body& body) const {
        if (dtype == Dtype::bfloat16) body(static_cast<bfloat16*>(data));
        else body(static_cast<float*>(data));
    }
};

inline HeadRows rows_of(const Tensor& tensor, const Text& text, int64_t t, int64_t head) {
    int64_t offset = text.row * tensor.stride(0) + (text.start + t) * tensor.stride(1) + head * tensor.stride(2);
    int64_t size = tensor.dtype == Dtype::bfloat16 ? 2 : 4;
    return {static_cast<char*>(tensor.data) + offset * size, tensor.dtype, tensor.stride(1)};
}

// One matrix of a tensor [N, H, rows, columns].
inline HeadRows state_of(const Tensor& tensor, int64_t text, int64_t head) {
    return {tensor.as<float>() + text * tensor.stride(0) + head * tensor.stride(1), Dtype::float32, tensor.stride(2)};
}

// body(first column, Whole or Part) for the vectors of a row.
struct Whole {
    template <class T>
    Vector get(const T* from) const { return load(from); }
    template <class T>
    void put(T* to, Vector value) const { store(to, value); }
};

struct Part {
    int64_t count;
    template <class T>
    Vector get(const T* from) const { return load_part(from, count); }
    template <class T>
    void put(T* to, Vector value) const { store_part(to, value, count); }
};

template <class Body>
inline void for_each_vector(int64_t columns, const Body& body) {
    int64_t j = 0;
    for (; j + WIDTH <= columns; j += WIDTH) body(j, Whole{});
    if (j < columns) body(j, Part{columns - j});
}

// to[i, j] = factor * factors[i] * from[i, j] (`factors` may be absent), zeros up to whole vectors and in the rows
// up to `padded`, round_up(rows) unless given.
inline void load_rows(const HeadRows& from, int64_t rows, int64_t columns, const float* factors, float factor, float* to,
                      int64_t to_row, int64_t padded = 0) {
    from.typed([&](auto* data) {
        for (int64_t i = 0; i < rows; ++i) {
            float here = factors ? factor * factors[i] : factor;
            for_each_vector(columns, [&](int64_t j, auto lanes) {
                store(to + i * to_row + j, here * lanes.get(data + i * from.row + j));
            });
        }
    });
    for (int64_t i = rows; i < (padded ? padded : round_up(rows)); ++i)
        for (int64_t j = 0; j < to_row; j += WIDTH) store(to + i * to_row + j, Vector{});
}

// to[i, j] = factor * factors[i] * from[i, j].
inline void store_rows(const HeadRows& to, int64_t rows, int64_t columns, const float* factors, float factor,
                       const float* from, int64_t from_row) {
    to.typed([&](auto* data) {
        for (int64_t i = 0; i < rows; ++i) {
            float here = factors ? factor * factors[i] : factor;
            for_each_vector(columns, [&](int64_t j, auto lanes) {
                lanes.put(data + i * to.row + j, here * load(from + i * from_row + j));
            });
        }
    });
}

inline void scale_block(float* block, int64_t count, float factor) {
    if (factor == 1.0f) return;
    for (int64_t i = 0; i < count; i += WIDTH) store(block + i, factor * load(block + i));
}

inline void scale_rows(float* block, int64_t rows, int64_t row, const float* factors) {
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < row; j += WIDTH) store(block + i * row + j, factors[i] * load(block + i * row + j));
}

inline void fill_zero(float* block, int64_t count) {
    for (int64_t i = 0; i < count; i += WIDTH) store(block + i, Vector{});
}

inline float dot(const float* x, const float* y, int64_t padded) {
    Vector total = {};
    for (int64_t j = 0; j < padded; j += WIDTH) total += load(x + j) * load(y + j);
    return sum(total);
}

inline Integers lane_numbers() {
    Integers lanes;
    for (int i = 0; i < WIDTH; ++i) lanes[i] = i;
    return lanes;
}

// Zeros above the diagonal (column > row), in the first `rows` rows and whole vectors of columns.
inline void mask_future(float* block, int64_t rows, int64_t row) {
    Integers lanes = lane_numbers();
    for (int64_t i = 0; i < rows; ++i) {
        int64_t edge = i / WIDTH * WIDTH;
        float* line = block + i * row;
        store(line + edge, choose(lanes <= int32_t(i - edge), load(line + edge), Vector{}));
        for (int64_t j = edge + WIDTH; j < round_up(rows); j += WIDTH) store(line + j, Vector{});
    }
}

}  // namespace seqmix
