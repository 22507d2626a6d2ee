// Linear attention with a decay per key dimension: S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T, o_t = scale S_t^T q_t.
//
// A task is a text and a head. Decays are factors of queries, keys and rows of the state
// (linear_attention_key_decay.hpp); the rest is attention inside chunks and a recurrence between them.
#pragma once

#include "linear_attention_key_decay.hpp"
#include "parallel.hpp"

namespace seqmix {

struct VectorAttention {
    Tensor q, k, v, g;     // [B, T, H, K] all but v [B, T, H, V]
    Tensor state, bounds;  // [N, H, K, V] in float32, [N + 1]
    float scale;

    int64_t key_width() const { return q.size(3); }
    int64_t value_width() const { return v.size(3); }
    int64_t key_row() const { return round_up(key_width()); }
    int64_t value_row() const { return round_up(value_width()); }
    int64_t heads() const { return v.size(2); }
    int64_t texts() const { return num_texts(bounds, v.size(0)); }
    int64_t num_chunks() const { return most_chunks(bounds, v.size(0), v.size(1)); }
};

// Part of a chunk as queries and as keys, with their decays in them.
struct Meeters {
    float *q, *k, *k_turned, *result;

    Meeters(int64_t key_row, Workspace& space) {
        for (float** block : {&q, &k, &k_turned}) *block = space.take(CHUNK * key_row);
        result = space.take(CHUNK * CHUNK);
    }
    // Turns k of a meeting's keys [from, to) with their factors; q of its queries likewise, both from row 0 on.
    void take(const KeyDecay& decay, const Meeting& meeting, const float* from_q, const float* from_k) const {
        int64_t row = decay.row, queries = meeting.last - meeting.first, keys = meeting.to - meeting.from;
        multiply(from_q + meeting.first * row, decay.out + meeting.first * row, queries * row, q);
        multiply(from_k + meeting.from * row, decay.in + meeting.from * row, keys * row, k);
        fill_zero(k + keys * row, (round_up(keys) - keys) * row);
    }
};

struct VectorForward {
    VectorAttention in;
    Tensor o, last;  // [B, T, H, V], [N, H, K, V]

    int64_t workspace() const;  // floats for each thread
    void run(float* memory, int threads) const;

  private:
    struct Blocks;
    void chunks(const Text& text, int64_t index, int64_t head, const Blocks& blocks) const;
    void tokens(const Text& text, int64_t index, int64_t head, const Blocks& blocks) const;
};

struct VectorBackward {
    VectorAttention in;
    Tensor grad_o, grad_last;
    Tensor grad_q, grad_k, grad_v, grad_g, grad_state;  // like q, k, v, g and the state

    int64_t workspace() const;
    void run(float* memory, int threads) const;

  private:
    struct Blocks;
    void states(const Text& text, int64_t index, int64_t head, const Blocks& blocks) const;
    void chunk(const Text& text, int64_t head, int64_t number, int64_t rows, const Blocks& blocks) const;
    void store_gradients(const Text& text, int64_t head, int64_t t, int64_t rows, const Blocks& blocks) const;
};

// scores[i, j] = sum_c q[i, c] k[j, c] exp(b[i, c] - b[j, c]) of a chunk that spans much; entries j > i are not set.
inline void spread_scores(const KeyDecay& decay, const Meeters& meeters, int64_t rows, int64_t width, const float* q,
                          const float* k, float* scores) {
    int64_t row = decay.row;
    decay.meetings(0, rows, [&](const Meeting& meeting) {
        int64_t queries = meeting.last - meeting.first, keys = meeting.to - meeting.from;
        meeters.take(decay, meeting, q, k);
        transpose(keys, width, meeters.k, row, meeters.k_turned, CHUNK);
        matmul(queries, keys, width, meeters.q, row, 1, meeters.k_turned, CHUNK, meeters.result, CHUNK);
        for (int64_t i = 0; i < queries; ++i)
            std::memcpy(scores + (meeting.first + i) * CHUNK + meeting.from, meeters.result + i * CHUNK,
                        keys * sizeof(float));
    });
}

}  // namespace seqmix
