// Products of few tokens with the weights of linear layers, kept as float, bfloat16 or whole numbers of 8 bits:
// y_t = diag(scale) W x_t + bias, in float32.
//
// The time of one token goes into reading W, so weights become floats in registers; for more tokens the rows of a
// vector's outputs become floats once, in cache. The lanes of a vector are inputs; the sums of a vector's outputs are
// turned together at the end.
#pragma once

#include "bytes.hpp"
#include "matmul.hpp"
#include "parallel.hpp"
#include "tensor.hpp"

namespace seqmix {

struct Linear {
    Tensor weight, scale, bias;  // [O, I] contiguous; [O] or none; [O] or none, both float

    int64_t outputs() const { return weight.size(0); }
    int64_t inputs() const { return weight.size(1); }
    int64_t vectors() const { return round_up(outputs()) / WIDTH; }
};

inline Vector load_weights(const float* from) { return load(from); }
inline Vector load_weights(const bfloat16* from) { return load(from); }
inline Vector load_weights(const int8_t* from) {
    FewBytes bytes;
    std::memcpy(&bytes, from, sizeof bytes);
    return floats(bytes);
}

template <class Weight>
inline Vector load_some_weights(const Weight* from, int64_t count) {
    Weight some[WIDTH] = {};
    std::memcpy(some, from, count * sizeof(Weight));
    return load_weights(some);
}

// sums[t][first + i] = lane by lane, the products of row i of the weight with token t; rows and tokens are `row` and
// `stride` apart, and tokens are zero up to whole vectors.
template <int rows, int tokens, class Weight>
inline void lane_sums(const Weight* weight, int64_t row, int64_t inputs, const float* x, int64_t stride,
                      Vector (*sums)[WIDTH], int64_t first) {
    Vector total[rows][tokens] = {};
    // Rows follow each other, too short for the processor to see it: what is read next but one is fetched already.
    const char* ahead = (const char*)(weight + 2 * rows * row);
    for (int64_t line = 0; line < int64_t(rows * row * sizeof(Weight)); line += 64) __builtin_prefetch(ahead + line, 0, 2);
    auto add = [&](int64_t input, auto read) {
        Vector line[tokens];
        for (int t = 0; t < tokens; ++t) line[t] = load(x + t * stride + input);
        for (int i = 0; i < rows; ++i) {
            Vector factor = read(weight + i * row + input);
            for (int t = 0; t < tokens; ++t) total[i][t] += factor * line[t];
        }
    };
    int64_t input = 0;
    for (; input + WIDTH <= inputs; input += WIDTH) add(input, [](const Weight* from) { return load_weights(from); });
    if (input < inputs)
        add(input, [&](const Weight* from) { return load_some_weights(from, inputs - input); });
    for (int i = 0; i < rows; ++i)
        for (int t = 0; t < tokens; ++t) sums[t][first + i] = total[i][t];
}

// put(token, output, values, count) for the outputs of one vector and some tokens, the first being number `token`.
template <int tokens, class Weight, class Put>
inline void few_outputs(const Linear& linear, const Weight* weight, int64_t row, int64_t first, const float* x,
                        int64_t stride, int64_t token, const Put& put) {
    constexpr int TOGETHER = BLOCK_ROWS >= 6 ? 4 : tokens >= 4 ? 2 : 4;  // as many sums as there are registers for
    const int64_t inputs = linear.inputs(), left = linear.outputs() - first, count = left < WIDTH ? left : WIDTH;
    Vector sums[tokens][WIDTH] = {};
    int64_t i = 0;
    for (; i + TOGETHER <= count; i += TOGETHER)
        lane_sums<TOGETHER, tokens>(weight + i * row, row, inputs, x, stride, sums, i);
    for (; i < count; ++i) lane_sums<1, tokens>(weight + i * row, row, inputs, x, stride, sums, i);
    Vector factor = broadcast(1.0f), start = {};
    if (linear.scale) factor = load_part(linear.scale.as<float>() + first, count);
    if (linear.bias) start = load_part(linear.bias.as<float>() + first, count);
    for (int t = 0; t < tokens; ++t) {
        transpose_vectors(sums[t]);
        Vector total = {};
        for (int lane = 0; lane < WIDTH; ++lane) total += sums[t][lane];
        put(token + t, first, total * factor + start, count);
    }
}

constexpr int64_t READ_AT_ONCE = 4;  // tokens; for more, weights become floats before they are multiplied

// The same for all tokens of x, [tokens, stride]. `space` holds WIDTH rows of `stride` floats.
template <class Weight, class Put>
void vector_of_outputs(const Linear& linear, int64_t vector, const float* x, int64_t stride, int64_t tokens,
                       float* space, const Put& put) {
    const int64_t first = vector * WIDTH, inputs = linear.inputs();
    const Weight* weight = linear.weight.as<Weight>() + first * inputs;
    auto with = [&](auto* rows, int64_t row) {
        int64_t t = 0;
        auto run = [&](auto count) {
            few_outputs<decltype(count)::value>(linear, rows, row, first, x + t * stride, stride, t, put);
            t += decltype(count)::value;
        };
        while (t + 4 <= tokens) run(Rows<4>{});
        if (t + 2 <= tokens) run(Rows<2>{});
        if (t < tokens) run(Rows<1>{});
    };
    if (sizeof(Weight) == sizeof(float) || tokens <= READ_AT_ONCE) return with(weight, inputs);
    const int64_t left = linear.outputs() - first, count = left < WIDTH ? left : WIDTH;
    for (int64_t i = 0; i < count; ++i)
        for (int64_t c = 0; c < inputs; c += WIDTH) {
            const Weight* from = weight + i * inputs + c;
            Vector line = c + WIDTH <= inputs ? load_weights(from) : load_some_weights(from, inputs - c);
            store(space + i * stride + c, line);
        }
    with((const float*)space, stride);
}

// put(layer, token, output, values, count) for all outputs of several layers that read the same tokens. `space` has
// WIDTH rows of `stride` floats for every thread.
template <class Put>
void products(const Linear* layers, int count, const float* x, int64_t stride, int64_t tokens, float* space,
              int threads, const Put& put) {
    int64_t vectors = 0;
    for (int i = 0; i < count; ++i) vectors += layers[i].vectors();
    const int64_t tasks = vectors < 8 * threads ? vectors : 8 * threads;
    for_each_task(tasks, threads, [&](int64_t task, int thread) {
        int64_t v = vectors * task / tasks, end = vectors * (task + 1) / tasks;
        int layer = 0;
        for (int64_t before = 0; v < end; ++v) {
            while (v - before >= layers[layer].vectors()) before += layers[layer++].vectors();
            auto to = [&](int64_t token, int64_t output, Vector values, int64_t some) {
                put(layer, token, output, values, some);
            };
            float* own = space + thread * WIDTH * stride;
            const Linear& linear = layers[layer];
            if (linear.weight.dtype == Dtype::int8)
                vector_of_outputs<int8_t>(linear, v - before, x, stride, tokens, own, to);
            else if (linear.weight.dtype == Dtype::bfloat16)
                vector_of_outputs<bfloat16>(linear, v - before, x, stride, tokens, own, to);
            else
                vector_of_outputs<float>(linear, v - before, x, stride, tokens, own, to);
        }
    });
}

}  // namespace seqmix
