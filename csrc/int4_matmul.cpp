// Products with weights of 4 bits and a factor for each group of neighbouring inputs: W_oi = m_og q_oi.
//
// m from 1 to 15 and q + 8 are kept two to a byte, the first in the low half. The products m q fit into 8 bits, and
// there are 16 of them for a factor, which one instruction looks up: a row becomes bytes in cache on its way.
#include "weight_matmul.hpp"

namespace seqmix {
namespace {

typedef uint8_t Sixteen __attribute__((vector_size(16)));

constexpr int ZERO = 8;  // codes are kept as q + 8

// at[m][c] = m (c - 8)
struct Products {
    int8_t at[16][16];
    constexpr Products() : at() {
        for (int m = 0; m < 16; ++m)
            for (int c = 0; c < 16; ++c) at[m][c] = int8_t(m * (c - ZERO));
    }
};
alignas(64) constexpr Products products;

inline Sixteen look_up(Sixteen table, Sixteen places) {
#if defined(__SSSE3__)
    return (Sixteen)_mm_shuffle_epi8((__m128i)table, (__m128i)places);
#else
    return shuffle(table, table, places);
#endif
}

inline int half(const uint8_t* bytes, int64_t i) { return bytes[i / 2] >> i % 2 * 4 & 15; }

// The whole numbers of `bytes` bytes of one group, 8 or 16, from the products of its factor.
template <int bytes>
inline void expand(const uint8_t* codes, const int8_t* of_factor, int8_t* to) {
    const Sixteen even = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
    Sixteen both = {}, table;
    std::memcpy(&both, codes, bytes);
    std::memcpy(&table, of_factor, sizeof table);
    Sixteen low = look_up(table, both & 15), high = look_up(table, both >> 4);
    Sixteen first = shuffle(low, high, even), second = shuffle(low, high, even + 8);
    std::memcpy(to, &first, sizeof first);
    if (bytes == 16) std::memcpy(to + 16, &second, sizeof second);
}

struct Weights {
    Tensor codes, factors;  // [O, ceil(I / 2)], [O, ceil(I / G / 2)]
    int64_t inputs, group;

    void expand_row(int64_t output, int8_t* to) const {
        const uint8_t* code = codes.as<uint8_t>() + output * codes.size(1);
        const uint8_t* factor = factors.as<uint8_t>() + output * factors.size(1);
        if (group % 32 == 0) return expand_groups<16>(code, factor, to);
        if (group % 16 == 0) return expand_groups<8>(code, factor, to);
        for (int64_t i = 0; i < inputs; ++i) to[i] = products.at[half(factor, i / group)][half(code, i)];
    }

    template <int bytes>
    void expand_groups(const uint8_t* code, const uint8_t* factor, int8_t* to) const {
        for (int64_t g = 0; g < inputs / group; ++g) {
            const int8_t* of_factor = products.at[half(factor, g)];
            __builtin_prefetch(code + g * group / 2 + AHEAD / 2);
            for (int64_t i = g * group; i < (g + 1) * group; i += 2 * bytes)
                expand<bytes>(code + i / 2, of_factor, to + i);
        }
    }
};

}  // namespace

SEQMIX_BINDINGS(module) {
    module.def(
        "int4_matmul",
        [](Tensor x, Tensor codes, Tensor group_factors, Tensor scale, Tensor bias, Tensor y, int64_t group,
           Tensor floats, int threads) {
            const int64_t inputs = x.size(2), outputs = y.size(2);
            require(group > 0 && inputs % group == 0, "int4_matmul: the group divides the inputs");
            require_shape(codes, "int4_matmul: the codes are [O, ceil(I / 2)]", {outputs, (inputs + 1) / 2});
            require_shape(group_factors, "int4_matmul: the factors are [O, ceil(I / G / 2)]",
                          {outputs, (inputs / group + 1) / 2});
            const Weights weights{codes, group_factors, inputs, group};
            const Factors factors{scale.as<float>(), bias.as<float>()};
            const Workspace workspace(x.size(0) * x.size(1), inputs, floats.as<float>());
            require(floats.size(0) >= workspace.size(threads), "int4_matmul: the workspace is too small");
            auto rows = [&](int64_t first, int64_t count, int8_t* bytes) {
                for (int64_t i = 0; i < count; ++i) weights.expand_row(first + i, bytes + i * inputs);
                return bytes;
            };
            if (x.dtype == Dtype::bfloat16) multiply_weight<bfloat16>(x, factors, y, workspace, threads, rows);
            else multiply_weight<float>(x, factors, y, workspace, threads, rows);
        },
        "x"_a, "codes"_a, "factors"_a, "scale"_a, "bias"_a.none(), "y"_a, "group"_a, "floats"_a, "threads"_a,
        WithoutGil());
}

}  // namespace seqmix
