// The decay of one head over one chunk, one number per token and key dimension, split between queries and keys.
//
// With b the running sum of the log decays, token i meets what token j wrote times exp(b[i] - b[j]) in every key
// dimension. While b spans little over some tokens, that is exp(b[i] - m) exp(m - b[j]) with m in the middle, and one
// product gives all their scores. Otherwise they are halved: a later token meets an earlier one through the border
// between the halves, which splits the exponential in two factors of at most 1, and each half goes on by itself
// (GLA, section 4.2). Which of them happens depends on these tokens alone.
#pragma once

#include <cmath>

#include "linear_attention.hpp"

namespace seqmix {

// Tokens [first, last) of a chunk as queries and [from, to) as keys; the same ones, or later and earlier.
struct Meeting {
    int64_t first, last, from, to;
    bool same() const { return first == from; }
};

struct KeyDecay {
    int64_t row;                   // floats of a row: the key width in whole vectors
    float *gates;                  // [CHUNK, row] log decays
    float *out, *in;               // [CHUNK, row] factors of queries and keys that meet
    float *total;                  // [row] the log decay over the chunk
    float *before, *after, *fade;  // [row] factors of the state: before it is read, once the chunk was added; in all
    float *high, *low;             // [row] a running sum, in two parts

    KeyDecay(int64_t key_row, Workspace& space) : row(key_row) {
        for (float** block : {&gates, &out, &in}) *block = space.take(CHUNK * row);
        for (float** block : {&total, &before, &after, &fade, &high, &low}) *block = space.take(row);
    }

    // body(column) for every vector of columns
    template <class Body>
    void columns(const Body& body) const {
        for (int64_t j = 0; j < row; j += WIDTH) body(j);
    }

    // Adds the gates of token t to the running sum; what rounding loses is kept (Knuth's two-sum).
    void add(int64_t t) const {
        columns([&](int64_t j) {
            Vector sum = load(high + j), gate = load(gates + t * row + j), next = sum + gate, kept = next - sum;
            store(high + j, next);
            store(low + j, load(low + j) + ((sum - (next - kept)) + (gate - kept)));
        });
    }

    // e^(high + low) = e^high (1 + low): the rounding of high would otherwise cost a digit.
    void factors(int64_t t, bool with_out, bool with_in) const {
        columns([&](int64_t j) {
            Vector x = load(high + j), more = load(low + j);
            if (with_out) store(out + t * row + j, exp(x) * (1.0f + more));
            if (with_in) store(in + t * row + j, exp(-x) * (1.0f - more));
        });
    }

    void start(const float* from, float factor) const {
        columns([&](int64_t j) {
            store(high + j, from ? factor * load(from + j) : Vector{});
            store(low + j, Vector{});
        });
    }

    bool spans_little(const float* sums) const {
        Vector least = {};
        columns([&](int64_t j) { least = minimum(least, load(sums + j)); });
        return -largest(-least) >= -SPAN;
    }

    bool read(const HeadRows& from, int64_t rows, int64_t width) const;
    void whole(int64_t rows, bool with_out) const;
    void through_state(int64_t rows) const;
    void meet(const Meeting& meeting) const;
    template <class Visit>
    void meetings(int64_t first, int64_t last, const Visit& visit) const;
};

// Reads the gates, none below LOWEST_LOG_DECAY; whether the chunk as a whole spans little.
inline bool KeyDecay::read(const HeadRows& from, int64_t rows, int64_t width) const {
    columns([&](int64_t j) { store(total + j, Vector{}); });
    from.typed([&](auto* data) {
        for (int64_t i = 0; i < rows; ++i)
            for_each_vector(width, [&](int64_t j, auto lanes) {
                Vector gate = maximum(broadcast(LOWEST_LOG_DECAY), lanes.get(data + i * from.row + j));
                store(gates + i * row + j, gate);
                store(total + j, load(total + j) + gate);
            });
    });
    return spans_little(total);
}

// Of a chunk that spans little: factors of both sides through the middle, and those of the state.
inline void KeyDecay::whole(int64_t rows, bool with_out) const {
    start(total, -0.5f);
    columns([&](int64_t j) { store(before + j, exp(-load(high + j))); });  // the exact start, whatever the sum is
    for (int64_t i = 0; i < rows; ++i) {
        add(i);
        factors(i, with_out, true);
    }
    columns([&](int64_t j) {
        store(after + j, exp(load(high + j)) * (1.0f + load(low + j)));
        store(fade + j, broadcast(1));
    });
}

// Factors of at most 1 by which queries read the state before the chunk and keys write to the one after it.
inline void KeyDecay::through_state(int64_t rows) const {
    start(nullptr, 0);
    for (int64_t i = 0; i < rows; ++i) {
        add(i);
        factors(i, true, false);
    }
    columns([&](int64_t j) {
        store(fade + j, exp(load(high + j)));
        store(before + j, broadcast(1)), store(after + j, broadcast(1));
        store(high + j, Vector{}), store(low + j, Vector{});
    });
    for (int64_t i = rows - 1; i >= 0; --i) {
        columns([&](int64_t j) { store(in + i * row + j, exp(load(high + j))); });
        add(i);
    }
}

// Factors of the queries and keys of one meeting.
inline void KeyDecay::meet(const Meeting& meeting) const {
    start(nullptr, 0);
    if (meeting.same()) {
        for (int64_t i = meeting.first + 1; i < meeting.last; ++i) add(i);
        start(high, -0.5f);
        for (int64_t i = meeting.first; i < meeting.last; ++i) {
            if (i > meeting.first) add(i);
            factors(i, true, true);
        }
        return;
    }
    for (int64_t i = meeting.first; i < meeting.last; ++i) {
        add(i);
        factors(i, true, false);
    }
    start(nullptr, 0);
    for (int64_t i = meeting.to - 1; i >= meeting.from; --i) {
        columns([&](int64_t j) { store(in + i * row + j, exp(load(high + j))); });
        add(i);
    }
}

// visit(meeting), its factors in place, until every token of [first, last) has met those before it and itself.
template <class Visit>
inline void KeyDecay::meetings(int64_t first, int64_t last, const Visit& visit) const {
    start(nullptr, 0);
    for (int64_t i = first + 1; i < last; ++i) add(i);
    Meeting meeting{first, last, first, last};
    if (spans_little(high)) {
        meet(meeting);
        visit(meeting);
        return;
    }
    int64_t border = (first + last) / 2;
    meeting = {border, last, first, border};
    meet(meeting);
    visit(meeting);
    meetings(first, border, visit);
    meetings(border, last, visit);
}

inline void multiply(const float* x, const float* y, int64_t count, float* to) {
    for (int64_t i = 0; i < count; i += WIDTH) store(to + i, load(x + i) * load(y + i));
}

inline void scale_columns(float* block, int64_t rows, int64_t row, const float* factors) {
    for (int64_t i = 0; i < rows; ++i) multiply(block + i * row, factors, row, block + i * row);
}

}  // namespace seqmix
