// Weights of 4 bits and a factor for each group of neighbouring inputs: W_oi = m_og q_oi.
//
// m from 1 to 15 and q + 8 are kept two to a byte, the first in the low half. Few tokens are multiplied with the codes as
// they are, for a group is a sum m (sum_i c_i x_i - 8 sum_i x_i), if their inputs are sorted as the halves of bytes
// are; an infinite input gives NaN so. For more, the products m q fit into 8 bits, and there are 16 of them for a factor,
// which one instruction looks up: a row becomes bytes in cache on its way.
#pragma once

#include "bytes.hpp"
#include "tensor.hpp"

namespace seqmix {

typedef uint8_t Sixteen __attribute__((vector_size(16)));

constexpr int CODE_OF_ZERO = 8;  // codes are kept as q + 8

// at[m][c] = m (c - 8)
struct CodeProducts {
    int8_t at[16][16];
    constexpr CodeProducts() : at() {
        for (int m = 0; m < 16; ++m)
            for (int c = 0; c < 16; ++c) at[m][c] = int8_t(m * (c - CODE_OF_ZERO));
    }
};
alignas(64) inline constexpr CodeProducts code_products;

inline Sixteen look_up(Sixteen table, Sixteen places) {
#if defined(__SSSE3__)
    return (Sixteen)_mm_shuffle_epi8((__m128i)table, (__m128i)places);
#else
    return shuffle(table, table, places);
#endif
}

inline int half_byte(const uint8_t* bytes, int64_t i) { return bytes[i / 2] >> i % 2 * 4 & 15; }

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

struct FourBits {
    Tensor codes, factors;  // [O, ceil(I / 2)], [O, ceil(I / G / 2)]
    int64_t inputs, group;

    explicit operator bool() const { return bool(codes); }
    bool is_read_in_vectors() const { return codes && group % (2 * WIDTH) == 0; }
    int64_t outputs() const { return codes.size(0); }

    void expand_row(int64_t output, int8_t* to) const {
        const uint8_t* code = codes.as<uint8_t>() + output * codes.size(1);
        const uint8_t* factor = factors.as<uint8_t>() + output * factors.size(1);
        if (group % 32 == 0) return expand_groups<16>(code, factor, to);
        if (group % 16 == 0) return expand_groups<8>(code, factor, to);
        for (int64_t i = 0; i < inputs; ++i) to[i] = code_products.at[half_byte(factor, i / group)][half_byte(code, i)];
    }

    template <int bytes>
    void expand_groups(const uint8_t* code, const uint8_t* factor, int8_t* to) const {
        for (int64_t g = 0; g < inputs / group; ++g) {
            const int8_t* of_factor = code_products.at[half_byte(factor, g)];
            __builtin_prefetch(code + g * group / 2 + AHEAD);
            for (int64_t i = g * group; i < (g + 1) * group; i += 2 * bytes)
                expand<bytes>(code + i / 2, of_factor, to + i);
        }
    }
};

constexpr float sixteen_numbers[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

struct TwoVectors {
    Vector low, high;
};

// The halves of the next WIDTH bytes, as floats.
inline TwoVectors halves_of_bytes(const uint8_t* from) {
    Integers both = unsigned_bytes(from);
    return {__builtin_convertvector(both & 15, Vector), __builtin_convertvector(both >> 4, Vector)};
}

// Tokens as codes of 4 bits meet them: of every two vectors of inputs those with even numbers, then the others. For each
// group there is what its sums, lane by lane, begin with, since codes are 8 too large.
struct SplitTokens {
    int64_t inputs = 0, group = 0, groups = 0;
    const float* floats = nullptr;

    static int64_t row(int64_t inputs) { return round_up(inputs + inputs / 2); }

    SplitTokens() = default;
    SplitTokens(const FourBits& bits, const float* x, int64_t stride, int64_t tokens, float* to)
        : inputs(bits.inputs), group(bits.group), groups(inputs / group), floats(to) {
        for (int64_t t = 0; t < tokens; ++t, to += row(inputs))
            for (int64_t g = 0; g < groups; ++g) {
                Vector sum = {};
                for (int64_t i = g * group; i < (g + 1) * group; i += 2 * WIDTH) {
                    const float* from = x + t * stride + i;
                    for (int j = 0; j < WIDTH; ++j) {
                        to[i + j] = from[2 * j];
                        to[i + WIDTH + j] = from[2 * j + 1];
                    }
                    sum += load(to + i) + load(to + i + WIDTH);
                }
                store(to + inputs + g * WIDTH, sum * float(-CODE_OF_ZERO));
            }
    }

    bool fits(const FourBits& bits) const { return floats && bits.is_read_in_vectors() && bits.group == group; }
    const float* row_of(int64_t token) const { return floats + token * row(inputs); }
    const float* start_of(int64_t token, int64_t number) const { return row_of(token) + inputs + number * WIDTH; }
};

inline void require_codes(const FourBits& bits) {
    const int64_t inputs = bits.inputs, group = bits.group, outputs = bits.outputs();
    require(group > 0 && inputs % group == 0, "int4_matmul: the group divides the inputs");
    require_shape(bits.codes, "int4_matmul: the codes are [O, ceil(I / 2)]", {outputs, (inputs + 1) / 2});
    require_shape(bits.factors, "int4_matmul: the factors are [O, ceil(I / G / 2)]",
                  {outputs, (inputs / group + 1) / 2});
    for (const Tensor* bytes : {&bits.codes, &bits.factors})
        require(bytes->dtype == Dtype::uint8 && bytes->axes == 2 && (bytes->size(1) == 1 || bytes->stride(1) == 1) &&
                    (outputs == 1 || bytes->stride(0) == bytes->size(1)),
                "int4_matmul: codes and factors are uint8, without gaps");
}

}  // namespace seqmix
