// Decays and scores of a chunk of the delta rule, for one value head.
#pragma once

#include "delta_rule.hpp"

namespace seqmix::delta {

// early[t] = exp(b[t]), late[t] = exp(b[last] - b[t]), the same for every column, and b of every row.
inline void Chunk::decay_by_head(const Inputs& inputs, const Part& part, int64_t head) {
    const Sizes& s = sizes;
    const float* g = rows_of<float>(inputs.g, part, 1, head);
    double now = 0;
    for (int64_t t = 0; t < part.tokens; ++t) {
        float decay = g[t * inputs.g.stride(1)];
        now += decay < LOWEST_LOG_DECAY ? LOWEST_LOG_DECAY : decay;
        for (int64_t i = t * s.steps; i < (t + 1) * s.steps; ++i) total[i] = now;
    }
    for (int64_t i = part.rows; i < part.padded; ++i) total[i] = now;
    for (int64_t i = 0; i < part.padded; i += WIDTH) {
        Vector since_start = narrow(load_doubles(total + i)), to_end = narrow(now - load_doubles(total + i));
        store(reader_decay + i, exp(since_start));
        store(writer_decay + i, exp(to_end));
    }
    for (int64_t t = 0; t < part.tokens; ++t)
        for (int64_t c = 0; c < s.keys; c += WIDTH) {
            store(early + t * s.keys + c, broadcast(reader_decay[t * s.steps]));
            store(late + t * s.keys + c, broadcast(writer_decay[t * s.steps]));
        }
    for (int64_t t = 0; t < part.tokens; ++t) {
        double own = total[t * s.steps];
        int64_t seen = (t + 1) * s.steps;
        float* row = weights + t * s.scores;
        for (int64_t j = 0; j < seen; j += WIDTH)
            store(row + j, first_lanes(exp(minimum(Vector{}, narrow(own - load_doubles(total + j)))), seen - j));
        for (int64_t j = round_up(seen); j < part.padded; j += WIDTH) store(row + j, Vector{});
    }
}

inline void Chunk::decay_by_column(const Inputs& inputs, const Part& part, int64_t head) {
    const Sizes& s = sizes;
    load_rows(rows_of<float>(inputs.g, part, 1, head), inputs.g.stride(1), part.tokens, part.tokens, s.key, gates,
              s.keys);
    for (int64_t c = 0; c < s.keys; c += WIDTH) {
        Vector now{};
        for (int64_t t = 0; t < part.tokens; ++t) {
            Vector decay = maximum(broadcast(LOWEST_LOG_DECAY), load(gates + t * s.keys + c));
            store(gates + t * s.keys + c, decay);
            now += decay;
            store(early + t * s.keys + c, exp(now));
        }
        now = Vector{};
        for (int64_t t = part.tokens - 1; t >= 0; --t) {
            store(late + t * s.keys + c, exp(now));
            now += load(gates + t * s.keys + c);
        }
    }
}

inline void Chunk::no_decay(const Part& part) {
    const Sizes& s = sizes;
    for (int64_t i = 0; i < part.tokens * s.keys; i += WIDTH) {
        store(early + i, broadcast(1));
        store(late + i, broadcast(1));
    }
    for (int64_t t = 0; t < part.tokens; ++t)
        for (int64_t j = 0; j < part.padded; j += WIDTH)
            store(weights + t * s.scores + j, first_lanes(broadcast(1), (t + 1) * s.steps - j));
}

// to[r] = from[r] * decay[token of r] for the rows of `tokens` tokens of `steps` rows.
inline void decay_rows(int64_t tokens, int64_t steps, int64_t wide, const float* from, const float* decay, float* to) {
    for (int64_t t = 0; t < tokens; ++t)
        for (int64_t i = t * steps * wide; i < (t + 1) * steps * wide; i += wide)
            for (int64_t c = 0; c < wide; c += WIDTH)
                store(to + i + c, load(from + i + c) * load(decay + t * wide + c));
}

inline void zero_rows(int64_t first, int64_t last, int64_t wide, float* rows) {
    for (int64_t i = first * wide; i < last * wide; i += WIDTH) store(rows + i, Vector{});
}

// Queries and keys of the readers of a block and keys of its writers, each decayed to the block's border.
inline void Chunk::decay_to_border(const DecayBlock& block) {
    const Sizes& s = sizes;
    decays_from(block.border, 1, gates, s.keys, block.first_reader, block.readers, reader_decay);
    decays_from(block.border, -1, gates, s.keys, block.first_writer, block.writers, writer_decay);
    int64_t reader_row = block.first_reader * s.steps, writer_row = block.first_writer * s.steps;
    decay_rows(block.readers, 1, s.keys, q + block.first_reader * s.keys, reader_decay, reader_q);
    decay_rows(block.readers, s.steps, s.keys, k + reader_row * s.keys, reader_decay, reader_k);
    decay_rows(block.writers, s.steps, s.keys, k + writer_row * s.keys, writer_decay, writer_k);
}

// `among` and `reads` where every column decays alone; what is above the diagonal may be anything.
inline void Chunk::score_blocks(const Part& part) {
    const Sizes& s = sizes;
    for_each_decay_block(gates, s.keys, 0, part.tokens, [&](const DecayBlock& block) {
        decay_to_border(block);
        int64_t readers = block.readers * s.steps, writers = block.writers * s.steps;
        int64_t column = block.first_writer * s.steps;
        zero_rows(writers, round_up(writers, WIDTH), s.keys, writer_k);
        transpose(writers, s.keys, writer_k, s.keys, columns, s.rows);
        score(readers, writers, block.triangle(), reader_k,
              among + block.first_reader * s.steps * s.scores + column);
        score(block.readers, writers, block.triangle() && s.steps == 1, reader_q,
              reads + block.first_reader * s.scores + column);
    });
}

// Everything that a value head's own decays and strengths change.
inline void Chunk::load_head(const Inputs& inputs, const Part& part, int64_t head) {
    const Sizes& s = sizes;
    const float* strengths = rows_of<float>(inputs.beta, part, s.steps, head);
    for (int64_t i = 0; i < part.padded; ++i) beta[i] = i < part.rows ? strengths[i * inputs.beta.stride(1)] : 0;
    if (inputs.by_column()) {
        decay_by_column(inputs, part, head);
        score_blocks(part);
    } else if (inputs.g) {
        decay_by_head(inputs, part, head);
    } else {
        no_decay(part);
    }
    decay_rows(part.tokens, 1, s.keys, q, early, early_q);
    decay_rows(part.tokens, s.steps, s.keys, k, early, early_k);
    decay_rows(part.tokens, s.steps, s.keys, k, late, late_k);
    zero_rows(part.rows, part.padded, s.keys, early_k);
    zero_rows(part.rows, part.padded, s.keys, late_k);
    for (int64_t i = 0; i < part.padded; ++i) {
        int64_t row = i * s.scores;
        const float* weight = weights + (i < part.rows ? i / s.steps : 0) * s.scores;
        bool exists = i < part.rows;
        for (int64_t j = 0; j < part.padded; j += WIDTH) {
            Vector value = load(among + row + j);
            if (!inputs.by_column()) value = load(raw_lower + row + j) * load(weight + j);
            value = first_lanes(value, exists ? i - j : 0);
            store(among + row + j, value);
            store(lower + row + j, value * beta[i]);
        }
    }
    for (int64_t t = 0; t < part.tokens; ++t) {
        int64_t row = t * s.scores;
        for (int64_t j = 0; j < part.padded; j += WIDTH) {
            Vector value = load(reads + row + j);
            if (!inputs.by_column()) value = load(raw_reads + row + j) * load(weights + row + j);
            store(reads + row + j, first_lanes(value, (t + 1) * s.steps - j));
        }
    }
}

// Held values and written ones: u = (I + L)^-1 beta (v - (k exp(b)) S). `v` comes in `missed` and leaves it as
// v - (k exp(b)) S.
inline void Chunk::write(const Part& part, int64_t wide, const float* state, float* missed, float* written) {
    const Sizes& s = sizes;
    matmul<Into::subtract>(part.padded, wide, s.key, early_k, s.keys, 1, state, wide, missed, wide);
    for (int64_t i = 0; i < part.padded; ++i)
        for (int64_t j = 0; j < wide; j += WIDTH)
            store(written + i * wide + j, load(missed + i * wide + j) * beta[i]);
    solve<false>(part.padded, wide, lower, s.scores, written, wide);
}

// S <- exp(b_last) S + (k exp(b_last - b))^T u.
inline void Chunk::move_on(const Part& part, int64_t wide, const float* written, float* state) {
    const Sizes& s = sizes;
    const float* decay = early + (part.tokens - 1) * s.keys;
    for (int64_t c = 0; c < s.key; ++c)
        for (int64_t j = 0; j < wide; j += WIDTH) store(state + c * wide + j, load(state + c * wide + j) * decay[c]);
    matmul<Into::add>(s.key, wide, part.padded, late_k, 1, s.keys, written, wide, state, wide);
}

}  // namespace seqmix::delta
