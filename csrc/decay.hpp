// Scores under a decay for every key column, sum_c q[i, c] k[j, c] exp(b[i, c] - b[j, c]), from products of blocks.
//
// exp(b[i]) exp(-b[j]) would overflow, so the exponent is split at a border token: what a reader sees of the border
// times what the border sees of the writer. A block of later readers and earlier writers has the border between
// them, and neither factor exceeds 1. A triangle, where readers and writers are the same tokens, has it in its
// middle, as long as the decay over it spans little; otherwise it is halved into a square and two triangles.
// Differences of the running sum b are summed outwards from the border, so a hard reset elsewhere costs no digits.
#pragma once

#include "vector.hpp"

namespace seqmix {

constexpr float LOWEST_LOG_DECAY = -80;  // exp(-80) is zero beside any float32 value
constexpr float SPAN = 40;               // the most a triangle decays: exp(SPAN) squared is a float32 still

// Readers [first_reader, + readers) and writers [first_writer, + writers), in tokens.
struct DecayBlock {
    int64_t first_reader, readers, first_writer, writers, border;
    bool triangle() const { return first_reader == first_writer; }
};

// Whether some column of log decays [.., wide] decays by more than SPAN from the first of the tokens to the last.
inline bool spans_much(const float* gates, int64_t wide, int64_t first, int64_t tokens) {
    for (int64_t c = 0; c < wide; c += WIDTH) {
        Vector total{};
        for (int64_t t = first + 1; t < first + tokens; ++t) total -= load(gates + t * wide + c);
        if (largest(total) > SPAN) return true;
    }
    return false;
}

// visit(block) for blocks that cover every pair of a reader and a writer no later than it. What a block leaves to
// the right of its columns is written over by a later block or lies above the diagonal.
template <class Visit>
void for_each_decay_block(const float* gates, int64_t wide, int64_t first, int64_t tokens, const Visit& visit) {
    if (tokens == 1 || !spans_much(gates, wide, first, tokens)) {
        visit(DecayBlock{first, tokens, first, tokens, first + tokens / 2});
        return;
    }
    int64_t half = tokens / 2;
    visit(DecayBlock{first + half, tokens - half, first, half, first + half - 1});
    for_each_decay_block(gates, wide, first, half, visit);
    for_each_decay_block(gates, wide, first + half, tokens - half, visit);
}

// factors[t - first] = exp(sign (b[t] - b[border])) for the tokens [first, first + tokens), rows of `wide`; the border
// is one of them or a neighbour.
inline void decays_from(int64_t border, float sign, const float* gates, int64_t wide, int64_t first, int64_t tokens,
                        float* factors) {
    for (int64_t c = 0; c < wide; c += WIDTH) {
        Vector total{};
        for (int64_t t = border; t < first + tokens; ++t) {
            if (t > border) total += sign * load(gates + t * wide + c);
            if (t >= first) store(factors + (t - first) * wide + c, exp(total));
        }
        total = Vector{};
        for (int64_t t = border - 1; t >= first; --t) {
            total -= sign * load(gates + (t + 1) * wide + c);
            if (t < first + tokens) store(factors + (t - first) * wide + c, exp(total));
        }
    }
}

}  // namespace seqmix
