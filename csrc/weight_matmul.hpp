// Products with dense weights that are stored in few bits: y_t = diag(scale) W x_t + bias, in float32.
//
// For few tokens the time goes into reading W: its whole numbers become floats in registers and nowhere else, the lanes
// of a vector are inputs, and the sums of a vector's outputs are turned together at the end. For more it goes into
// products: a strip of W becomes floats in cache, turned, once for many tokens, and the lanes are outputs.
#pragma once

#include "matmul.hpp"
#include "tiles.hpp"

namespace seqmix {

constexpr int64_t FEW = 8;                                // tokens for which W is not turned, at most
constexpr int64_t WEIGHT_STRIP = BLOCK_VECTORS * WIDTH;   // outputs that are turned together
constexpr int64_t DEPTH = 288;                             // inputs, which fit into the first cache so with their tokens
constexpr int TOGETHER = 6;                               // tokens whose sums are in registers with those of a strip
constexpr int64_t TASK_TOKENS = 96, TASK_FLOATS = 1 << 16;  // of a task, at most, so that its inputs stay in cache
constexpr int64_t TASK_PRODUCTS = 1 << 17;                // at least, about: waking a thread takes as long
constexpr int64_t LINE = 64, AHEAD = 4096;                // bytes of a line of cache, and how far ahead one is fetched

// [O], [O] or null.
struct Factors {
    const float *scale, *bias;
};

// What threads work in: the inputs of all tokens, and for each thread a strip of W as bytes and some of it as floats.
struct Workspace {
    int64_t stride, tokens, strip;  // in floats
    float* floats;

    Workspace(int64_t tokens, int64_t inputs, float* floats)
        : stride(round_up(inputs)), tokens(tokens * stride),
          strip(WEIGHT_STRIP * (stride / 4 + DEPTH)), floats(floats) {}

    int64_t size(int threads) const { return tokens + threads * strip; }
    int8_t* bytes(int thread) const { return reinterpret_cast<int8_t*>(floats + tokens + thread * strip); }
    float* turned(int thread) const { return floats + tokens + thread * strip + WEIGHT_STRIP * stride / 4; }
};

inline Vector load_whole(const int8_t* from) {
    FewBytes bytes;
    std::memcpy(&bytes, from, sizeof bytes);
    return floats(bytes);
}

inline Vector load_some_whole(const int8_t* from, int64_t count) {
    FewBytes bytes = {};
    std::memcpy(&bytes, from, count < WIDTH ? count : WIDTH);
    return floats(bytes);
}

// A vector of results, or its first `count`, from outputs number `first` on.
template <class T>
inline void finish(Vector total, const Factors& factors, int64_t first, int64_t count, T* to) {
    auto read = [&](const float* from) { return count < WIDTH ? load_part(from + first, count) : load(from + first); };
    Vector result = total * read(factors.scale);
    if (factors.bias) result += read(factors.bias);
    if (count < WIDTH) store_part(to + first, result, count);
    else store(to + first, result);
}

// sums[t][first + i] = lane by lane, the products of row i of the weight with token t. Rows are `inputs` apart, tokens
// `stride`. What comes later is fetched ahead, for rows are too short for a processor to foresee where they lead.
template <int rows, int tokens>
inline void lane_sums(const int8_t* weight, int64_t inputs, const float* x, int64_t stride, Vector (*sums)[WIDTH],
                      int64_t first) {
    const int64_t ahead = rows * inputs < AHEAD ? AHEAD : rows * inputs;
    Vector total[rows][tokens] = {};
    auto add = [&](int64_t input, auto read) {
        Vector line[tokens];
        for (int t = 0; t < tokens; ++t) line[t] = load(x + t * stride + input);
        for (int i = 0; i < rows; ++i) {
            Vector factor = read(weight + i * inputs + input);
            for (int t = 0; t < tokens; ++t) total[i][t] += factor * line[t];
        }
    };
    int64_t input = 0;
    for (; input + LINE <= inputs; input += LINE) {
        for (int i = 0; i < rows; ++i) __builtin_prefetch(weight + i * inputs + input + ahead);
        for (int64_t i = 0; i < LINE; i += WIDTH) add(input + i, load_whole);
    }
    for (; input + WIDTH <= inputs; input += WIDTH) add(input, load_whole);
    if (input < inputs) add(input, [&](const int8_t* from) { return load_some_whole(from, inputs - input); });
    for (int i = 0; i < rows; ++i)
        for (int t = 0; t < tokens; ++t) sums[t][first + i] = total[i][t];
}

// Outputs number `first` to `first + count`, at most a vector of them, whose rows begin at `weight`, for some tokens.
template <int tokens, class T>
inline void few_results(const int8_t* weight, int64_t inputs, const Factors& factors, int64_t first, int64_t count,
                        const float* x, int64_t stride, T* const* to) {
    constexpr int rows = tokens == 4 && BLOCK_VECTORS == 2 ? 2 : 4;  // as many sums as there are registers for
    Vector sums[tokens][WIDTH] = {};
    int64_t i = 0;
    for (; i + rows <= count; i += rows) lane_sums<rows, tokens>(weight + i * inputs, inputs, x, stride, sums, i);
    for (; i < count; ++i) lane_sums<1, tokens>(weight + i * inputs, inputs, x, stride, sums, i);
    for (int t = 0; t < tokens; ++t) {
        transpose_vectors(sums[t]);
        Vector total = {};
        for (int lane = 0; lane < WIDTH; ++lane) total += sums[t][lane];
        finish(total, factors, first, count, to[t]);
    }
}

// turned[i * WEIGHT_STRIP + o] = W_oi for i < depth and `count` outputs, zero for the rest of the strip. Rows of W are
// `inputs` apart.
inline void turn_strip(const int8_t* weight, int64_t inputs, int64_t depth, int64_t count, float* turned) {
    for (int64_t o = 0; o < WEIGHT_STRIP; o += WIDTH)
        for (int64_t i = 0; i < depth; i += WIDTH) {
            const int8_t* from = weight + o * inputs + i;
            if (i % LINE == 0)
                for (int j = 0; j < WIDTH; ++j) __builtin_prefetch(from + (WEIGHT_STRIP + j) * inputs);
            Vector lines[WIDTH];
            if (depth - i >= WIDTH && count - o >= WIDTH) {
                for (int j = 0; j < WIDTH; ++j) lines[j] = load_whole(from + j * inputs);
            } else {
                for (int j = 0; j < WIDTH; ++j)
                    lines[j] = o + j < count ? load_some_whole(from + j * inputs, depth - i) : Vector{};
            }
            transpose_vectors(lines);
            for (int j = 0; j < WIDTH; ++j) store(turned + (i + j) * WEIGHT_STRIP + o, lines[j]);
        }
}

// sums[t][o] += sum_i turned[i][o] x_t[i] for TOGETHER tokens, or = where `begins`.
inline void add_strip(const float* turned, int64_t depth, const float* x, int64_t stride, bool begins, float* sums) {
    Vector total[TOGETHER][BLOCK_VECTORS] = {};
    if (!begins)
        for (int t = 0; t < TOGETHER; ++t)
            for (int v = 0; v < BLOCK_VECTORS; ++v) total[t][v] = load(sums + t * WEIGHT_STRIP + v * WIDTH);
    for (int64_t i = 0; i < depth; ++i) {
        Vector line[BLOCK_VECTORS];
        for (int v = 0; v < BLOCK_VECTORS; ++v) line[v] = load(turned + i * WEIGHT_STRIP + v * WIDTH);
        for (int t = 0; t < TOGETHER; ++t) {
            Vector input = broadcast(x[t * stride + i]);
            for (int v = 0; v < BLOCK_VECTORS; ++v) total[t][v] += input * line[v];
        }
    }
    for (int t = 0; t < TOGETHER; ++t)
        for (int v = 0; v < BLOCK_VECTORS; ++v) store(sums + t * WEIGHT_STRIP + v * WIDTH, total[t][v]);
}

// A strip of outputs, whose rows begin at `weight`, for at least TOGETHER tokens; the last of them in one group with
// some that are in the group before as well.
template <class T>
inline void strip_results(const int8_t* weight, int64_t inputs, const Factors& factors, int64_t first, int64_t count,
                          const float* x, int64_t stride, int64_t tokens, float* turned, T* const* to) {
    constexpr int64_t GROUPS = TASK_TOKENS / TOGETHER;
    float sums[GROUPS * TOGETHER * WEIGHT_STRIP];
    const int64_t groups = (tokens + TOGETHER - 1) / TOGETHER;
    auto begin = [&](int64_t group) {
        return (group + 1) * TOGETHER <= tokens ? group * TOGETHER : tokens - TOGETHER;
    };
    for (int64_t from = 0; from < inputs; from += DEPTH) {
        const int64_t depth = inputs - from < DEPTH ? inputs - from : DEPTH;
        turn_strip(weight + from, inputs, depth, count, turned);
        for (int64_t group = 0; group < groups; ++group)
            add_strip(turned, depth, x + begin(group) * stride + from, stride, from == 0,
                      sums + group * TOGETHER * WEIGHT_STRIP);
    }
    for (int64_t group = 0; group < groups; ++group)
        for (int t = 0; t < TOGETHER; ++t)
            for (int v = 0; v < BLOCK_VECTORS && v * WIDTH < count; ++v)
                finish(load(sums + (group * TOGETHER + t) * WEIGHT_STRIP + v * WIDTH), factors, first + v * WIDTH,
                       count - v * WIDTH, to[begin(group) + t]);
}

// panel[t * stride + i] = x_t[i], zero up to whole vectors.
template <class T>
void pack_tokens(const Tokens<const T>& x, int64_t tokens, int64_t inputs, int64_t stride, float* panel, int threads) {
    constexpr int64_t SHARE = 16;
    for_each_task((tokens + SHARE - 1) / SHARE, threads, [&](int64_t task, int) {
        const T* rows[SHARE];
        const int64_t first = task * SHARE, count = tokens - first < SHARE ? tokens - first : SHARE;
        x.addresses(first, count, rows);
        for (int64_t t = 0; t < count; ++t)
            for (int64_t i = 0; i < stride; i += WIDTH) {
                const int64_t left = inputs - i;
                store(panel + (first + t) * stride + i, left < WIDTH ? load_part(rows[t] + i, left) : load(rows[t] + i));
            }
    });
}

// rows(first, count, bytes) gives the address of the whole numbers [count, I] of outputs from number `first` on; it may
// write them to `bytes`.
template <class T, class ReadRows>
void multiply_weight(const Tensor& x, const Factors& factors, const Tensor& y, const Workspace& workspace, int threads,
                     const ReadRows& rows) {
    const int64_t tokens = x.size(0) * x.size(1), inputs = x.size(2), outputs = y.size(2), stride = workspace.stride;
    require(tokens > 0 && inputs > 0 && outputs > 0, "weight_matmul: there is at least one of everything");
    pack_tokens(Tokens<const T>(x), tokens, inputs, stride, workspace.floats, threads);
    const Tokens<T> results(y);
    const bool few = tokens <= FEW;
    const int64_t height = few ? WIDTH : WEIGHT_STRIP, strips = (outputs + height - 1) / height;
    int64_t most = TASK_FLOATS / stride;
    most = most < 2 * TOGETHER ? 2 * TOGETHER : most < TASK_TOKENS ? most : TASK_TOKENS;
    const int64_t tiles = (tokens + most - 1) / most;  // all of them of at least TOGETHER tokens, unless these are few
    int64_t shares = tokens * inputs * outputs / TASK_PRODUCTS / tiles + 1;
    shares = shares < 8 * threads ? shares : 8 * threads;
    shares = shares < strips ? shares : strips;
    for_each_task(tiles * shares, threads, [&](int64_t task, int thread) {
        const int64_t tile = task / shares, share = task % shares;
        const int64_t begin = tokens * tile / tiles, here = tokens * (tile + 1) / tiles - begin;
        const float* panel = workspace.floats + begin * stride;
        T* to[TASK_TOKENS];
        results.addresses(begin, here, to);
        for (int64_t strip = strips * share / shares; strip < strips * (share + 1) / shares; ++strip) {
            const int64_t first = strip * height, count = outputs - first < height ? outputs - first : height;
            const int8_t* weight = rows(first, count, workspace.bytes(thread));
            int64_t t = 0;
            auto run = [&](auto number) {
                constexpr int some = decltype(number)::value;
                few_results<some>(weight, inputs, factors, first, count, panel + t * stride, stride, to + t);
                t += some;
            };
            if (few) {
                while (t + 4 <= here) run(Rows<4>{});
                if (t + 2 <= here) run(Rows<2>{});
                if (t < here) run(Rows<1>{});
                continue;
            }
            strip_results(weight, inputs, factors, first, count, panel, stride, here, workspace.turned(thread), to);
        }
    });
}

}  // namespace seqmix
