// Products with the weights of linear layers: y_t = diag(scale) W x_t + bias, in float32. W is kept as float, bfloat16,
// or whole numbers of 8 or 4 bits.
#pragma once

#include "four_bits.hpp"
#include "matmul.hpp"

namespace seqmix {

constexpr int64_t FEW_TOKENS = 8;                        // tokens for which W is not turned, at most
constexpr int64_t WEIGHT_STRIP = BLOCK_VECTORS * WIDTH;  // outputs that are turned together
constexpr int64_t STRIPS = WEIGHT_STRIP < 32 ? 32 / WEIGHT_STRIP : 1;  // that meet the tokens while they are in L2
constexpr int64_t DEPTH = 288;                           // inputs that are summed at once: a strip of them fits into L1
constexpr int64_t TASK_TOKENS = 192;                     // tokens of a task: so many inputs of all of them fit into L2

// A linear layer. Rows of its weight [O, I] follow each other; those of 4 bits are codes with factors of groups.
struct Linear {
    Tensor weight, scale, bias;  // of the outputs [O] or none, in float32 or bfloat16
    FourBits codes;              // in the place of the weight, if it has any

    int64_t outputs() const { return codes ? codes.outputs() : weight.size(0); }
    int64_t inputs() const { return codes ? codes.inputs : weight.size(1); }
    explicit operator bool() const { return weight || codes; }

    // visit(rows), where rows(first, count, bytes) gives the address of the numbers [count, I] of outputs from number
    // `first` on; it may write them to `bytes`.
    template <class Visit>
    void with_rows(const Visit& visit) const {
        if (codes) return visit([&](int64_t first, int64_t count, int8_t* bytes) {
            for (int64_t i = 0; i < count; ++i) codes.expand_row(first + i, bytes + i * codes.inputs);
            return (const int8_t*)bytes;
        });
        if (weight.dtype == Dtype::int8) return visit(stored<int8_t>());
        if (weight.dtype == Dtype::bfloat16) return visit(stored<bfloat16>());
        visit(stored<float>());
    }

    // A vector of results, or its first `count`, from outputs number `first` on.
    Vector finished(Vector total, int64_t first, int64_t count) const {
        auto read = [&](const Tensor& from) {
            auto at = [&](const auto* numbers) { return count < WIDTH ? load_part(numbers + first, count) : load(numbers + first); };
            return from.dtype == Dtype::bfloat16 ? at(from.as<bfloat16>()) : at(from.as<float>());
        };
        if (scale) total *= read(scale);
        return bias ? total + read(bias) : total;
    }

private:
    template <class Number>
    auto stored() const {
        const Number* from = weight.as<Number>();
        const int64_t row = weight.size(1);
        return [=](int64_t first, int64_t, int8_t*) { return from + first * row; };
    }
};

// What products work in: the few tokens as codes of 4 bits meet them, and for each thread some strips of W as bytes, a
// part of one as floats, and sums.
struct StripSpace {
    static constexpr int64_t turned_size = WEIGHT_STRIP * DEPTH, sums_size = STRIPS * WEIGHT_STRIP * TASK_TOKENS;
    int64_t split_size, bytes_size;  // in floats
    float* floats;

    StripSpace(int64_t inputs, float* floats)
        : split_size(FEW_TOKENS * SplitTokens::row(inputs)), bytes_size(STRIPS * WEIGHT_STRIP * round_up(inputs) / 4),
          floats(floats) {}

    int64_t all(int threads) const { return split_size + threads * (bytes_size + turned_size + sums_size); }
    float* turned(int thread) const { return floats + split_size + thread * (bytes_size + turned_size + sums_size); }
    float* sums(int thread) const { return turned(thread) + turned_size; }
    int8_t* bytes(int thread) const { return reinterpret_cast<int8_t*>(sums(thread) + sums_size); }
};

// Takes results: put(layer, token, output, values, count) of `count` outputs, at most a vector of them, from number
// `output` on. It is another function, which must live as long.
class Put {
public:
    template <class Function>
    Put(const Function& function)
        : function(&function), call([](const void* function, int layer, int64_t token, int64_t output, Vector values, int64_t count) {
              (*static_cast<const Function*>(function))(layer, token, output, values, count);
          }) {}

    void operator()(int layer, int64_t token, int64_t output, Vector values, int64_t count) const {
        call(function, layer, token, output, values, count);
    }

private:
    const void* function;
    void (*call)(const void*, int, int64_t, int64_t, Vector, int64_t);
};

// put, once for every output of layers that read the same tokens x, whose rows are `stride` apart and zero up to whole
// vectors.
void multiply(const Linear* layers, int count_of_layers, const float* x, int64_t stride, int64_t tokens,
              const StripSpace& space, int threads, const Put& put);

// A factor or bias of so many outputs, or none.
void require_of_outputs(const Tensor& numbers, int64_t outputs);

}  // namespace seqmix
