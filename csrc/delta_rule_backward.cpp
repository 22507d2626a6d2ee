// Delta rule, backward: the chunks of a text and head from the last to the first.
//
// With o', S'_last and S' for the gradients of o, of the state after a chunk and of the one before it, and the names
// of delta_rule.hpp (e for early, l for late decays of a row, R and L already decayed, A = L / beta):
//     u' = R^T o' + (k l) S'_last
//     y  = (I + L)^-T u',   x = beta y                     the adjoint of the solve
//     v' = x,   beta'[i] = y[i] . (v - (k e) S)[i] - sum_j A[i, j] D[i, j],   D = y u^T
//     R' = o' u^T,   A'[i, j] = -beta[i] D[i, j]           where R and A are not zero
//     q' = e (o' S^T) + (R' decayed) k
//     k' = l (u S'_last^T) - e (x S^T) + (R' decayed)^T q + (A' decayed) k + (A' decayed)^T k
//     S' = exp(b_last) S'_last + (q e)^T o' - (k e)^T x.
// A log decay at token t scales what passes t: from a writer before t to a reader at or after it, from the state
// before the chunk to readers at or after t, from writers before t to the state after the chunk, and from state to
// state. g' is the sum of these products with their gradients, each summed where it has one sign of exponent, so that
// nothing large cancels.
#include "delta_rule_backward.hpp"

namespace seqmix::delta {
namespace {

struct Backward {
    Inputs inputs;
    Tensor borders, grad_o, grad_last;                                // [M, H, K, V], [B, T, H, V], [N, H, K, V]
    Tensor grad_q, grad_k, grad_v, grad_beta, grad_g, grad_state;     // as the inputs
    Tensor workspace;

    static int64_t needed(const Sizes& s) {
        Pieces pieces{nullptr};
        Work work(s, pieces);
        return pieces.used;
    }

    template <class T>
    void run(int threads) const {
        int64_t key_heads = inputs.key_heads();
        for_each_task(inputs.texts() * key_heads, threads, [&](int64_t task, int thread) {
            run_group<T>(task / key_heads, task % key_heads, workspace.as<float>() + thread * workspace.stride(0));
        });
    }

    template <class T>
    void run_group(int64_t index, int64_t key_head, float* base) const {
        const Sizes s = inputs.sizes();
        Pieces pieces{base};
        Work work(s, pieces);
        Chunk& chunk = work.chunk;
        Text text = text_at(inputs.bounds, index, inputs.length());
        auto later_of = [&](const Tensor& tensor, int64_t row, int64_t h) {
            return tensor.as<float>() + row * tensor.stride(0) + (key_head * s.group + h) * tensor.stride(1);
        };
        for (int64_t h = 0; h < s.group; ++h)
            load_rows(later_of(grad_last, index, h), grad_last.stride(2), s.key, s.keys, s.value,
                      work.group_later + h * s.keys * s.values, s.values);
        int64_t chunks = (text.length + s.tokens - 1) / s.tokens;
        int64_t border = inputs.first_chunk(index, text, s.tokens);
        for (int64_t number = chunks - 1; number >= 0; --number) {
            Part part(text, number * s.tokens, s);
            chunk.load_keys<T>(inputs, part, key_head, -s.tokens);
            zero_rows(0, part.tokens, s.keys, work.grad_q);
            zero_rows(0, part.padded, s.keys, work.grad_k);
            for (int64_t h = 0; h < s.group; ++h) {
                work.later = work.group_later + h * s.keys * s.values;
                load_rows(later_of(borders, border + number, h), borders.stride(2), s.key, s.keys, s.value, work.state,
                          s.values);
                run_head<T>(part, key_head * s.group + h, work);
            }
            store_gradient<T>(inputs.q, grad_q, part, 1, key_head, part.tokens, float(inputs.scale), chunk.q,
                              chunk.inverse_q, work.grad_q);
            store_gradient<T>(inputs.k, grad_k, part, s.steps, key_head, part.rows, 1, chunk.k, chunk.inverse_k,
                              work.grad_k);
        }
        for (int64_t h = 0; h < s.group; ++h)
            store_rows(work.group_later + h * s.keys * s.values, s.values, s.key, s.value,
                       later_of(grad_state, index, h), grad_state.stride(2));
    }

    template <class T>
    void run_head(const Part& part, int64_t head, Work& work) const {
        const Sizes s = inputs.sizes();
        Chunk& chunk = work.chunk;
        chunk.load_head(inputs, part, head);
        load_rows(rows_of<T>(inputs.v, part, s.steps, head), inputs.v.stride(1), part.rows, part.padded, s.value,
                  work.missed, s.values, -s.tokens * s.steps * inputs.v.stride(1));
        load_rows(rows_of<T>(grad_o, part, 1, head), grad_o.stride(1), part.tokens, part.tokens, s.value,
                  work.grad_out, s.values, -s.tokens * grad_o.stride(1));
        chunk.write(part, s.values, work.state, work.missed, work.written);
        solve_back(part, work);
        store_rows(work.grad_v, s.values, part.rows, s.value, rows_of<T>(grad_v, part, s.steps, head),
                   grad_v.stride(1));
        score_back(part, work);
        state_back(part, work);
        if (inputs.by_column()) blocks_back(part, work);
        else products_back(part, work);
        float* strengths = rows_of<float>(grad_beta, part, s.steps, head);
        for (int64_t i = 0; i < part.rows; ++i) strengths[i * grad_beta.stride(1)] = work.grad_beta[i];
        if (inputs.g) store_decay(part, head, work);
    }

    // u', y and x.
    void solve_back(const Part& part, Work& work) const {
        const Sizes s = inputs.sizes();
        Chunk& chunk = work.chunk;
        matmul(part.padded, s.values, s.key, chunk.late_k, s.keys, 1, work.later, s.values, work.grad_written,
               s.values);
        if (s.steps == 1)
            matmul<Into::add, Shape::upper>(part.rows, s.values, part.tokens, chunk.reads, 1, s.scores, work.grad_out,
                                            s.values, work.grad_written, s.values);
        else
            matmul<Into::add>(part.rows, s.values, part.tokens, chunk.reads, 1, s.scores, work.grad_out, s.values,
                              work.grad_written, s.values);
        solve<true>(part.padded, s.values, chunk.lower, s.scores, work.grad_written, s.values);
        for (int64_t i = 0; i < part.padded; ++i)
            for (int64_t j = 0; j < s.values; j += WIDTH)
                store(work.grad_v + i * s.values + j, load(work.grad_written + i * s.values + j) * chunk.beta[i]);
    }

    // A', R' and beta'.
    void score_back(const Part& part, Work& work) const {
        const Sizes s = inputs.sizes();
        Chunk& chunk = work.chunk;
        transpose(part.padded, s.values, work.written, s.values, work.written_t, s.rows);
        matmul<Into::replace, Shape::lower_result>(part.padded, part.padded, s.value, work.grad_written, s.values, 1,
                                                   work.written_t, s.rows, work.grad_lower, s.scores);
        if (s.steps == 1)
            matmul<Into::replace, Shape::lower_result>(part.tokens, part.padded, s.value, work.grad_out, s.values, 1,
                                                       work.written_t, s.rows, work.grad_reads, s.scores);
        else
            matmul(part.tokens, part.padded, s.value, work.grad_out, s.values, 1, work.written_t, s.rows,
                   work.grad_reads, s.scores);
        for (int64_t i = 0; i < part.padded; ++i) {
            Vector erased{};
            float* row = work.grad_lower + i * s.scores;
            for (int64_t j = 0; j < part.padded; j += WIDTH) {
                Vector value = first_lanes(load(row + j), i - j);
                erased += value * load(chunk.among + i * s.scores + j);
                store(row + j, value * -chunk.beta[i]);
            }
            work.grad_beta[i] =
                dot(work.grad_written + i * s.values, work.missed + i * s.values, s.values) - sum(erased);
        }
        for (int64_t t = 0; t < part.tokens; ++t)
            for (int64_t j = 0; j < part.padded; j += WIDTH) {
                float* at = work.grad_reads + t * s.scores + j;
                store(at, first_lanes(load(at), (t + 1) * s.steps - j));
            }
    }

    // What passes through the states before and after the chunk; and the gradient of the state before it.
    void state_back(const Part& part, Work& work) const {
        const Sizes s = inputs.sizes();
        Chunk& chunk = work.chunk;
        const float* decay = chunk.early + (part.tokens - 1) * s.keys;
        transpose(s.keys, s.values, work.state, s.values, work.state_t, s.keys);
        transpose(s.keys, s.values, work.later, s.values, work.later_t, s.keys);
        // from state to state, and from writers to the state after the chunk
        for (int64_t c = 0; c < s.keys; c += WIDTH) {
            Vector kept{};
            for (int64_t j = 0; j < s.value; ++j)
                kept += load(work.state_t + j * s.keys + c) * load(work.later_t + j * s.keys + c);
            store(work.pairs + c, kept * load(decay + c));
        }
        matmul(part.rows, s.keys, s.value, work.written, s.values, 1, work.later_t, s.keys, work.first, s.keys);
        matmul(part.rows, s.keys, s.value, work.grad_v, s.values, 1, work.state_t, s.keys, work.second, s.keys);
        for (int64_t c = 0; c < s.keys; c += WIDTH) {
            Vector passed = load(work.pairs + c);
            for (int64_t t = 0; t < part.tokens; ++t) {
                store(work.grad_g + t * s.keys + c, passed);
                Vector early = load(chunk.early + t * s.keys + c), late = load(chunk.late + t * s.keys + c);
                for (int64_t i = t * s.steps * s.keys + c; i < (t + 1) * s.steps * s.keys; i += s.keys) {
                    Vector written = late * load(work.first + i), read = early * load(work.second + i);
                    passed += load(chunk.k + i) * written;
                    store(work.first + i, load(chunk.k + i) * read);
                    store(work.grad_k + i, load(work.grad_k + i) + written - read);
                }
            }
        }
        matmul(part.tokens, s.keys, s.value, work.grad_out, s.values, 1, work.state_t, s.keys, work.second, s.keys);
        for (int64_t c = 0; c < s.keys; c += WIDTH) {
            Vector passed{};
            for (int64_t t = part.tokens - 1; t >= 0; --t) {
                int64_t at = t * s.keys + c;
                Vector read = load(chunk.early + at) * load(work.second + at);
                store(work.grad_q + at, load(work.grad_q + at) + read);
                passed += load(chunk.q + at) * read;
                for (int64_t i = t * s.steps * s.keys + c; i < (t + 1) * s.steps * s.keys; i += s.keys)
                    passed -= load(work.first + i);
                store(work.grad_g + at, load(work.grad_g + at) + passed);
            }
        }
        for (int64_t c = 0; c < s.key; ++c)
            for (int64_t j = 0; j < s.values; j += WIDTH) {
                float* at = work.later + c * s.values + j;
                store(at, load(at) * decay[c]);
            }
        matmul<Into::add>(s.key, s.values, part.tokens, chunk.early_q, 1, s.keys, work.grad_out, s.values, work.later,
                          s.values);
        matmul<Into::subtract>(s.key, s.values, part.rows, chunk.early_k, 1, s.keys, work.grad_v, s.values, work.later,
                               s.values);
    }

    void store_decay(const Part& part, int64_t head, Work& work) const {
        const Sizes s = inputs.sizes();
        const float* g = rows_of<float>(inputs.g, part, 1, head);
        float* to = rows_of<float>(grad_g, part, 1, head);
        for (int64_t t = 0; t < part.tokens; ++t) {
            const float* own = g + t * inputs.g.stride(1);
            float* gradient = to + t * grad_g.stride(1);
            const float* from = work.grad_g + t * s.keys;
            if (inputs.by_column()) {
                for (int64_t c = 0; c < s.key; ++c) gradient[c] = own[c] < LOWEST_LOG_DECAY ? 0 : from[c];
            } else {
                Vector total{};
                for (int64_t c = 0; c < s.keys; c += WIDTH) total += load(from + c);
                *gradient = *own < LOWEST_LOG_DECAY ? 0 : sum(total);
            }
        }
    }

    // Through scale and length: x = scale z / |z| gives z' = scale (x' - (z . x') z / |z|^2) / |z|.
    template <class T>
    void store_gradient(const Tensor& input, const Tensor& result, const Part& part, int64_t per_token, int64_t head,
                        int64_t rows, float scale, float* raw, const float* inverse, float* gradient) const {
        const Sizes s = inputs.sizes();
        if (inputs.normalize)
            load_rows(rows_of<T>(input, part, per_token, head), input.stride(1), rows, rows, s.key, raw, s.keys);
        if (inputs.normalize || scale != 1)
            for (int64_t i = 0; i < rows; ++i) {
                float *row = gradient + i * s.keys, *own = raw + i * s.keys;
                float along = inputs.normalize ? dot(row, own, s.keys) * inverse[i] * inverse[i] : 0;
                for (int64_t c = 0; c < s.keys; c += WIDTH) {
                    Vector change = load(row + c);
                    if (inputs.normalize) change -= along * load(own + c);
                    store(row + c, change * (scale * inverse[i]));
                }
            }
        store_rows(gradient, s.keys, rows, s.key, rows_of<T>(result, part, per_token, head), result.stride(1));
    }
};

}  // namespace

SEQMIX_BINDINGS(module) {
    module.def(
        "delta_rule_backward_workspace",
        [](int64_t key, int64_t value, int64_t steps, int64_t group) {
            return Backward::needed(Sizes(key, value, steps, group));
        },
        "key"_a, "value"_a, "steps"_a, "group"_a);
    module.def(
        "delta_rule_backward",
        [](Tensor q, Tensor k, Tensor v, Tensor beta, Tensor g, Tensor bounds, int64_t steps, double scale,
           bool normalize, Tensor borders, Tensor grad_o, Tensor grad_last, Tensor grad_q, Tensor grad_k,
           Tensor grad_v, Tensor grad_beta, Tensor grad_g, Tensor grad_state, Tensor workspace, int threads) {
            Backward pass{Inputs{q, k, v, beta, g, bounds, scale, normalize, steps}, borders, grad_o, grad_last,
                          grad_q, grad_k, grad_v, grad_beta, grad_g, grad_state, workspace};
            pass.inputs.require_shapes(grad_last, pass.inputs.texts());
            if (q.dtype == Dtype::bfloat16) pass.run<bfloat16>(threads);
            else pass.run<float>(threads);
        },
        "q"_a, "k"_a, "v"_a, "beta"_a, "g"_a.none(), "bounds"_a.none(), "steps"_a, "scale"_a, "normalize"_a,
        "borders"_a, "grad_o"_a, "grad_last"_a, "grad_q"_a, "grad_k"_a, "grad_v"_a, "grad_beta"_a, "grad_g"_a.none(),
        "grad_state"_a, "workspace"_a, "threads"_a, WithoutGil());
}

}  // namespace seqmix::delta
