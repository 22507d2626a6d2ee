// Linear attention with at most one decay per head, and the state space dual: S_t = d_t S_{t-1} + k_t (s_t v_t)^T and
// o_t = scale S_t^T q_t + D v_t, where neighbouring heads may share q and k.
//
// A task is a text and some heads of a group. Chunk by chunk, q k^T is computed once for these heads. Decays are
// factors of the values and of the output (linear_attention_decay.hpp), so q and k are never scaled.
#pragma once

#include "linear_attention_decay.hpp"
#include "parallel.hpp"

namespace seqmix {

struct ScalarAttention {
    Tensor q, k, v;      // [B, T, G, K], [B, T, G, K], [B, T, H, V]
    Tensor state, bounds;  // [N, H, K, V] in float32, [N + 1]
    ScalarGate gate;
    float scale;
    int pieces;          // parts into which the heads of a group are divided

    int64_t key_width() const { return q.size(3); }
    int64_t value_width() const { return v.size(3); }
    int64_t key_row() const { return round_up(key_width()); }
    int64_t value_row() const { return round_up(value_width()); }
    int64_t groups() const { return q.size(2); }
    int64_t heads() const { return v.size(2); }
    int64_t heads_of_group() const { return heads() / groups(); }
    int64_t heads_of_piece() const { return (heads_of_group() + pieces - 1) / pieces; }
    int64_t texts() const { return num_texts(bounds, v.size(0)); }
    int64_t num_chunks() const { return most_chunks(bounds, v.size(0), v.size(1)); }
};

// Some heads of one group of one text.
struct ScalarTask {
    Text text;
    int64_t index, group, piece, first, count;  // `first` of `count` heads

    ScalarTask(const ScalarAttention& of, int64_t task) {
        piece = task % of.pieces;
        group = task / of.pieces % of.groups();
        index = task / of.pieces / of.groups();
        text = text_at(of.bounds, index, of.v.size(1));
        int64_t begin = piece * of.heads_of_piece(), end = begin + of.heads_of_piece();
        if (begin > of.heads_of_group()) begin = of.heads_of_group();
        if (end > of.heads_of_group()) end = of.heads_of_group();
        first = group * of.heads_of_group() + begin;
        count = end - begin;
    }
};

struct ScalarForward {
    ScalarAttention in;
    Tensor o, last;  // [B, T, H, V], [N, H, K, V]

    int64_t workspace() const;  // floats for each thread
    void run(float* memory, int threads) const;

  private:
    struct Blocks;
    void chunks(const ScalarTask& task, const Blocks& blocks) const;
    void tokens(const ScalarTask& task) const;
    void store_output(const Text& text, int64_t t, int64_t rows, int64_t head, const float* factors,
                      const float* y) const;
};

struct ScalarBackward {
    ScalarAttention in;
    Tensor grad_o, grad_last;
    // [pieces, B, T, G, K] both, [B, T, H, V], [B, T, H] of the log decays or steps, [N, H], [N, H], [N, H, K, V]
    Tensor grad_q, grad_k, grad_v, grad_gate, grad_rate, grad_skip, grad_state;

    int64_t workspace() const;
    void run(float* memory, int threads) const;

  private:
    struct Blocks;
    struct Sums;
    void states(const ScalarTask& task, const Blocks& blocks) const;
    void chunk(const ScalarTask& task, const Blocks& blocks, int64_t number, int64_t rows, Sums* sums) const;
    void head(const ScalarTask& task, const Blocks& blocks, int64_t number, int64_t rows, int64_t one,
              Sums& sums) const;
    void store_gradients(const ScalarTask& task, const Blocks& blocks, int64_t t, int64_t rows, int64_t head,
                         const ScalarDecay& decay, double* grad_step, Sums& sums) const;
};

}  // namespace seqmix
