// Gradients through the scores of a chunk of the delta rule (delta_rule_backward.cpp has the equations).
#pragma once

#include "delta_rule_scores.hpp"

namespace seqmix::delta {

// What a task works with besides the chunk itself.
struct Work {
    Chunk chunk;
    float *state, *state_t, *later, *later_t, *group_later;  // S, S^T, S'_last, S'_last^T, of every head
    float *missed, *written, *written_t, *grad_out, *grad_written, *grad_v;  // v - (k e) S, u, u^T, o', u' and y, x
    float *grad_lower, *grad_reads;                          // A' and R'
    float *grad_q, *grad_k, *grad_beta, *grad_g;             // of the chunk; g' per token and column
    float *first, *second, *third, *pairs;                   // whatever is under way

    Work(const Sizes& s, Pieces& pieces) : chunk(s, pieces) {
        int64_t square = s.keys * s.values, values = s.rows * s.values, keys = s.rows * s.keys;
        state = pieces.take(square), state_t = pieces.take(square), later_t = pieces.take(square);
        group_later = pieces.take(s.group * square), later = group_later;
        missed = pieces.take(values), written = pieces.take(values), written_t = pieces.take(values);
        grad_out = pieces.take(values), grad_written = pieces.take(values), grad_v = pieces.take(values);
        grad_lower = pieces.take(s.rows * s.scores), grad_reads = pieces.take(s.rows * s.scores);
        grad_q = pieces.take(keys), grad_k = pieces.take(keys), grad_beta = pieces.take(s.rows);
        grad_g = pieces.take(s.tokens * s.keys);
        first = pieces.take(keys), second = pieces.take(keys), third = pieces.take(keys);
        pairs = pieces.take(s.scores > s.keys ? s.scores : s.keys);
    }
};

// What readers had of writers in the chunk, where all columns decay alike: the pairs are entries of A and R.
inline void products_back(const Part& part, Work& work) {
    const Sizes& s = work.chunk.sizes;
    Chunk& chunk = work.chunk;
    for (int64_t j = 0; j < part.padded; j += WIDTH) store(work.pairs + j, Vector{});
    for (int64_t t = part.tokens - 1; t >= 0; --t) {
        const float* weight = chunk.weights + t * s.scores;
        auto pass = [&](float* gradient, const float* score) {
            for (int64_t j = 0; j < part.padded; j += WIDTH) {
                Vector change = load(gradient + j);
                store(work.pairs + j, load(work.pairs + j) + change * load(score + j));
                store(gradient + j, change * load(weight + j));
            }
        };
        pass(work.grad_reads + t * s.scores, chunk.reads + t * s.scores);
        for (int64_t i = t * s.steps; i < (t + 1) * s.steps; ++i)
            pass(work.grad_lower + i * s.scores, chunk.among + i * s.scores);
        Vector passed{};
        for (int64_t j = 0; j < t * s.steps; j += WIDTH)
            passed += first_lanes(load(work.pairs + j), t * s.steps - j);
        float* to = work.grad_g + t * s.keys;  // of all columns together: any of them may hold it
        store(to, load(to) + passed);
    }
    if (s.steps == 1) {
        matmul<Into::add, Shape::lower>(part.tokens, s.keys, part.rows, work.grad_reads, s.scores, 1, chunk.k,
                                        s.keys, work.grad_q, s.keys);
        matmul<Into::add, Shape::upper>(part.rows, s.keys, part.tokens, work.grad_reads, 1, s.scores, chunk.q,
                                        s.keys, work.grad_k, s.keys);
    } else {
        matmul<Into::add>(part.tokens, s.keys, part.rows, work.grad_reads, s.scores, 1, chunk.k, s.keys,
                          work.grad_q, s.keys);
        matmul<Into::add>(part.rows, s.keys, part.tokens, work.grad_reads, 1, s.scores, chunk.q, s.keys,
                          work.grad_k, s.keys);
    }
    matmul<Into::add, Shape::lower>(part.rows, s.keys, part.rows, work.grad_lower, s.scores, 1, chunk.k, s.keys,
                                    work.grad_k, s.keys);
    matmul<Into::add, Shape::upper>(part.rows, s.keys, part.rows, work.grad_lower, 1, s.scores, chunk.k, s.keys,
                                    work.grad_k, s.keys);
}

// What a token had of its own rows, which no decay touches: taken out of R' and A', for in a triangle it would be
// subtracted from itself in the gradient of the decays, and is larger than all that remains.
inline void own_rows_back(const Part& part, Work& work) {
    const Sizes& s = work.chunk.sizes;
    const Chunk& chunk = work.chunk;
    auto exchange = [&](float& gradient, const float* reader, float* to_reader, const float* writer,
                        float* to_writer) {
        for (int64_t c = 0; c < s.keys; c += WIDTH) {
            store(to_reader + c, load(to_reader + c) + gradient * load(writer + c));
            store(to_writer + c, load(to_writer + c) + gradient * load(reader + c));
        }
        gradient = 0;
    };
    for (int64_t t = 0; t < part.tokens; ++t)
        for (int64_t j = t * s.steps; j < (t + 1) * s.steps; ++j) {
            const float* writer = chunk.k + j * s.keys;
            float* to_writer = work.grad_k + j * s.keys;
            exchange(work.grad_reads[t * s.scores + j], chunk.q + t * s.keys, work.grad_q + t * s.keys, writer,
                     to_writer);
            for (int64_t i = j + 1; i < (t + 1) * s.steps; ++i)
                exchange(work.grad_lower[i * s.scores + j], chunk.k + i * s.keys, work.grad_k + i * s.keys,
                         writer, to_writer);
        }
}

// Gradients of queries, keys and log decays of a vector of columns of a block. In a triangle the decay from the
// border to a writer runs against that to its readers.
inline void block_decay_back(const DecayBlock& block, int64_t c, Work& work, const float* read_q, const float* read_k,
                      const float* written) {
    const Sizes& s = work.chunk.sizes;
    Chunk& chunk = work.chunk;
    auto reads_of = [&](int64_t t) {
        int64_t from = t * s.keys + c, to = (block.first_reader + t) * s.keys + c;
        Vector decay = load(chunk.reader_decay + from), gradient = load(read_q + from);
        store(work.grad_q + to, load(work.grad_q + to) + decay * gradient);
        Vector change = load(chunk.reader_q + from) * gradient;
        for (int64_t i = 0; i < s.steps; ++i) {
            int64_t row = (t * s.steps + i) * s.keys + c;
            int64_t target = ((block.first_reader + t) * s.steps + i) * s.keys + c;
            store(work.grad_k + target, load(work.grad_k + target) + decay * load(read_k + row));
            change += load(chunk.reader_k + row) * load(read_k + row);
        }
        return change;
    };
    auto writes_of = [&](int64_t t) {
        Vector decay = load(chunk.writer_decay + t * s.keys + c), change{};
        for (int64_t i = 0; i < s.steps; ++i) {
            int64_t row = (t * s.steps + i) * s.keys + c;
            int64_t target = ((block.first_writer + t) * s.steps + i) * s.keys + c;
            store(work.grad_k + target, load(work.grad_k + target) + decay * load(written + row));
            change += load(chunk.writer_k + row) * load(written + row);
        }
        return change;
    };
    auto add = [&](int64_t t, Vector change) {
        float* to = work.grad_g + t * s.keys + c;
        store(to, load(to) + change);
    };
    Vector passed{};
    for (int64_t t = block.readers - 1; t >= 0; --t) {
        passed += reads_of(t);
        if (block.triangle()) passed -= writes_of(t);
        if (!block.triangle() || t > 0) add(block.first_reader + t, passed);
    }
    if (block.triangle()) return;
    passed = Vector{};
    for (int64_t t = 0; t < block.writers; ++t) {
        add(block.first_writer + t, passed);
        passed += writes_of(t);
    }
}

// The same where every column decays alone, block by block as the scores were made.
inline void blocks_back(const Part& part, Work& work) {
    const Sizes& s = work.chunk.sizes;
    Chunk& chunk = work.chunk;
    own_rows_back(part, work);
    for_each_decay_block(chunk.gates, s.keys, 0, part.tokens, [&](const DecayBlock& block) {
        if (block.triangle() && block.readers == 1) return;
        chunk.decay_to_border(block);
        int64_t reader_row = block.first_reader * s.steps, writer_row = block.first_writer * s.steps;
        int64_t readers = block.readers * s.steps, writers = block.writers * s.steps;
        const float* grad_reads = work.grad_reads + block.first_reader * s.scores + writer_row;
        const float* grad_lower = work.grad_lower + reader_row * s.scores + writer_row;
        float *read_q = work.third, *read_k = work.first, *written = work.second;
        matmul(block.readers, s.keys, writers, grad_reads, s.scores, 1, chunk.writer_k, s.keys, read_q, s.keys);
        matmul(readers, s.keys, writers, grad_lower, s.scores, 1, chunk.writer_k, s.keys, read_k, s.keys);
        matmul(writers, s.keys, block.readers, grad_reads, 1, s.scores, chunk.reader_q, s.keys, written, s.keys);
        matmul<Into::add>(writers, s.keys, readers, grad_lower, 1, s.scores, chunk.reader_k, s.keys, written,
                          s.keys);
        for (int64_t c = 0; c < s.keys; c += WIDTH) block_decay_back(block, c, work, read_q, read_k, written);
    });
}

}  // namespace seqmix::delta
