// Products of few tokens with weights of 8 bits: y_t = diag(scale) W x_t + bias, in float32.
//
// The time goes into reading W, so its bytes become floats in registers and nowhere else. The lanes of a vector are
// inputs; the sums of a vector's outputs are turned together at the end.
#include "tiles.hpp"

namespace seqmix {
namespace {

constexpr int64_t FEW = 15;  // tokens at most
constexpr int TOGETHER = 4;  // outputs, and tokens, whose sums are in registers at once

inline Vector load_bytes(const int8_t* from) {
    FewBytes bytes;
    std::memcpy(&bytes, from, sizeof bytes);
    return floats(bytes);
}

inline Vector load_some_bytes(const int8_t* from, int64_t count) {
    FewBytes bytes = {};
    std::memcpy(&bytes, from, count);
    return floats(bytes);
}

struct Weights {
    Tensor weight, scale, bias;  // int8 [O, I] contiguous, [O], [O] or none

    int64_t outputs() const { return weight.size(0); }
    int64_t inputs() const { return weight.size(1); }
    const int8_t* row(int64_t output) const { return weight.as<int8_t>() + output * inputs(); }
};

// sums[t][first + i] = lane by lane, the products of row i of the weight with token t; tokens are `stride` apart.
template <int rows, int tokens>
inline void lane_sums(const int8_t* weight, int64_t inputs, const float* x, int64_t stride, Vector (*sums)[WIDTH],
                      int64_t first) {
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
    for (; input + WIDTH <= inputs; input += WIDTH) add(input, [](const int8_t* from) { return load_bytes(from); });
    if (input < inputs) add(input, [&](const int8_t* from) { return load_some_bytes(from, inputs - input); });
    for (int i = 0; i < rows; ++i)
        for (int t = 0; t < tokens; ++t) sums[t][first + i] = total[i][t];
}

// A vector's outputs from number `first` on, for some tokens. `x` is floats, zero up to whole vectors.
template <int tokens, class T>
inline void few_results(const Weights& weights, int64_t first, const float* x, int64_t stride, T* const* to) {
    const int64_t inputs = weights.inputs(), left = weights.outputs() - first;
    const int64_t count = left < WIDTH ? left : WIDTH;
    Vector sums[tokens][WIDTH] = {};
    int64_t i = 0;
    for (; i + TOGETHER <= count; i += TOGETHER)
        lane_sums<TOGETHER, tokens>(weights.row(first + i), inputs, x, stride, sums, i);
    for (; i < count; ++i)
        lane_sums<1, tokens>(weights.row(first + i), inputs, x, stride, sums, i);
    const float* scale = weights.scale.as<float>() + first;
    Vector factor = count == WIDTH ? load(scale) : load_part(scale, count), start = {};
    if (weights.bias) start = load_part(weights.bias.as<float>() + first, count);
    for (int t = 0; t < tokens; ++t) {
        transpose_vectors(sums[t]);
        Vector total = {};
        for (int lane = 0; lane < WIDTH; ++lane) total += sums[t][lane];
        total = total * factor + start;
        if (count == WIDTH) store(to[t] + first, total);
        else store_part(to[t] + first, total, count);
    }
}

template <class T>
void multiply(const Tensor& x, const Weights& weights, const Tensor& y, float* panel, int threads) {
    const int64_t tokens = x.size(0) * x.size(1);
    require(tokens <= FEW, "int8_matmul: too many tokens");
    const int64_t inputs = weights.inputs(), stride = round_up(inputs), vectors = round_up(weights.outputs()) / WIDTH;
    const T* rows[FEW];
    T* results[FEW];
    Tokens<const T>(x).addresses(0, tokens, rows);
    Tokens<T>(y).addresses(0, tokens, results);
    for (int64_t t = 0; t < tokens; ++t)
        for (int64_t i = 0; i < stride; i += WIDTH) {
            int64_t left = inputs - i;
            store(panel + t * stride + i, left < WIDTH ? load_part(rows[t] + i, left) : load(rows[t] + i));
        }
    const int64_t tasks = vectors < 8 * threads ? vectors : 8 * threads;
    for_each_task(tasks, threads, [&](int64_t task, int) {
        for (int64_t v = vectors * task / tasks; v < vectors * (task + 1) / tasks; ++v) {
            int64_t t = 0;
            auto run = [&](auto count) {
                few_results<decltype(count)::value>(weights, v * WIDTH, panel + t * stride, stride, results + t);
                t += decltype(count)::value;
            };
            while (t + TOGETHER <= tokens) run(Rows<TOGETHER>{});
            if (t + 2 <= tokens) run(Rows<2>{});
            if (t < tokens) run(Rows<1>{});
        }
    });
}

}  // namespace

SEQMIX_BINDINGS(module) {
    module.def("int8_matmul_few", [] { return FEW; });
    module.def(
        "int8_matmul",
        [](Tensor x, Tensor weight, Tensor scale, Tensor bias, Tensor y, Tensor panel, int threads) {
            const Weights weights{weight, scale, bias};
            if (x.dtype == Dtype::bfloat16) multiply<bfloat16>(x, weights, y, panel.as<float>(), threads);
            else multiply<float>(x, weights, y, panel.as<float>(), threads);
        },
        "x"_a, "weight"_a, "scale"_a, "bias"_a.none(), "y"_a, "panel"_a, "threads"_a, WithoutGil());
}

}  // namespace seqmix
