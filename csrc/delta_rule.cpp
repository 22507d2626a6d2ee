// Delta rule, forward: chunk after chunk of a text and head, the state in cache; a few tokens one by one.
#include "delta_rule_scores.hpp"
#include "delta_rule_tokens.hpp"

namespace seqmix::delta {
namespace {

struct Forward {
    Inputs inputs;
    Tensor state;             // [N, H, K, V]
    Tensor o, last, borders;  // [B, T, H, V], [N, H, K, V], the states before every chunk [M, H, K, V] or nothing
    Tensor workspace;         // [threads, ...]

    struct Piece {  // of the values: columns [first, first + width)
        int64_t first, width, wide;
    };

    static int64_t needed(const Sizes& s) {
        Pieces pieces{nullptr};
        Chunk chunk(s, pieces);
        pieces.take(3 * s.rows * s.values);
        pieces.take(s.group * s.keys * s.values);
        return pieces.used;
    }

    template <class T>
    void run(int threads) const {
        const Sizes s = inputs.sizes();
        int64_t texts = inputs.texts(), key_heads = inputs.key_heads();
        // Heads of a group share their keys' products; values are split only to give every thread something.
        int64_t apart = texts * key_heads < threads ? s.group : 1;
        int64_t most = (s.value + 2 * WIDTH - 1) / (2 * WIDTH), wanted = threads / (texts * key_heads * apart);
        int64_t pieces = wanted < 1 ? 1 : wanted < most ? wanted : most;
        int64_t columns = round_up((s.value + pieces - 1) / pieces);
        for_each_task(texts * key_heads * apart * pieces, threads, [&](int64_t task, int thread) {
            int64_t first = task % pieces * columns, rest = task / pieces;
            if (first >= s.value) return;
            int64_t width = s.value - first < columns ? s.value - first : columns;
            int64_t heads = s.group / apart, head = rest % (key_heads * apart) * heads;
            run_heads<T>(rest / (key_heads * apart), head, heads, Piece{first, width, round_up(width)},
                         workspace.as<float>() + thread * workspace.stride(0));
        });
    }

    template <class T>
    void run_heads(int64_t index, int64_t first_head, int64_t heads, Piece piece, float* base) const {
        const Sizes s = inputs.sizes();
        Pieces pieces{base};
        Chunk chunk(s, pieces);
        int64_t wide = piece.wide, size = s.keys * wide;
        float* missed = pieces.take(s.rows * s.values);
        float* written = pieces.take(s.rows * s.values);
        float* output = pieces.take(s.rows * s.values);
        float* states = pieces.take(s.group * s.keys * s.values);
        Text text = text_at(inputs.bounds, index, inputs.length());
        auto state_of = [&](const Tensor& tensor, int64_t row, int64_t h) {
            return tensor.as<float>() + row * tensor.stride(0) + (first_head + h) * tensor.stride(1) + piece.first;
        };
        for (int64_t h = 0; h < heads; ++h)
            load_rows(state_of(state, index, h), state.stride(2), s.key, s.keys, piece.width, states + h * size, wide);
        int64_t border = inputs.first_chunk(index, text, s.tokens);
        for (int64_t first = 0; first < text.length; first += s.tokens, ++border) {
            Part part(text, first, s);
            chunk.load_keys<T>(inputs, part, first_head / s.group, s.tokens);
            for (int64_t h = 0; h < heads; ++h) {
                float* now = states + h * size;
                int64_t head = first_head + h;
                if (borders)
                    store_rows(now, wide, s.key, piece.width, state_of(borders, border, h), borders.stride(2));
                chunk.load_head(inputs, part, head);
                load_rows(rows_of<T>(inputs.v, part, s.steps, head) + piece.first, inputs.v.stride(1), part.rows,
                          part.padded, piece.width, missed, wide, s.tokens * s.steps * inputs.v.stride(1));
                chunk.write(part, wide, now, missed, written);
                matmul(part.tokens, wide, s.key, chunk.early_q, s.keys, 1, now, wide, output, wide);
                if (s.steps == 1)
                    matmul<Into::add, Shape::lower>(part.tokens, wide, part.rows, chunk.reads, s.scores, 1, written,
                                                    wide, output, wide);
                else
                    matmul<Into::add>(part.tokens, wide, part.rows, chunk.reads, s.scores, 1, written, wide, output,
                                      wide);
                store_rows(output, wide, part.tokens, piece.width, rows_of<T>(o, part, 1, head) + piece.first,
                           o.stride(1));
                chunk.move_on(part, wide, written, now);
            }
        }
        for (int64_t h = 0; h < heads; ++h)
            store_rows(states + h * size, wide, s.key, piece.width, state_of(last, index, h), last.stride(2));
    }
};

}  // namespace

SEQMIX_BINDINGS(module) {
    module.def(
        "delta_rule_workspace",
        [](int64_t key, int64_t value, int64_t steps, int64_t group) {
            return Forward::needed(Sizes(key, value, steps, group));
        },
        "key"_a, "value"_a, "steps"_a, "group"_a);
    module.def(
        "delta_rule",
        [](Tensor q, Tensor k, Tensor v, Tensor beta, Tensor g, Tensor state, Tensor bounds, int64_t steps,
           double scale, bool normalize, Tensor o, Tensor last, Tensor borders, Tensor workspace, int threads) {
            Forward pass{Inputs{q, k, v, beta, g, bounds, scale, normalize, steps}, state, o, last, borders, workspace};
            pass.inputs.require_shapes(state, pass.inputs.texts());
            if (q.dtype == Dtype::bfloat16) pass.run<bfloat16>(threads);
            else pass.run<float>(threads);
        },
        "q"_a, "k"_a, "v"_a, "beta"_a, "g"_a.none(), "state"_a, "bounds"_a.none(), "steps"_a, "scale"_a,
        "normalize"_a, "o"_a, "last"_a, "borders"_a.none(), "workspace"_a, "threads"_a, WithoutGil());
    module.def(
        "delta_rule_tokens",
        [](Tensor q, Tensor k, Tensor v, Tensor beta, Tensor g, Tensor state, Tensor bounds, int64_t steps,
           double scale, bool normalize, Tensor o, Tensor last, int threads) {
            Tokens pass{Inputs{q, k, v, beta, g, bounds, scale, normalize, steps}, state, o, last};
            require(q.size(3) <= WIDEST_KEY, "the keys are too wide for the loop over tokens");
            pass.inputs.require_shapes(state, pass.inputs.texts());
            if (q.dtype == Dtype::bfloat16) pass.run<bfloat16>(threads);
            else pass.run<float>(threads);
        },
        "q"_a, "k"_a, "v"_a, "beta"_a, "g"_a.none(), "state"_a, "bounds"_a.none(), "steps"_a, "scale"_a,
        "normalize"_a, "o"_a, "last"_a, "threads"_a, WithoutGil());
}

}  // namespace seqmix::delta
