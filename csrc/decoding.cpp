// A few tokens through half a block of a language model, in one call: what its parts compute one after the other, with
// nothing but the weights and the keys read from memory. Axes as in seqmix/kernels/decoding.py.
//
//   attention   y = S x + W_o attend(turn(W_q n), turn(W_k n), W_v n)        n = x / sqrt(mean(x^2) + eps) * weight
//   gated unit  y = S x + W_o (silu(W_g n) * W_u n)                          S a shortcut, or one
#include "activations.hpp"
#include "attention.hpp"
#include "weight_matmul.hpp"

namespace seqmix {
namespace {

constexpr int64_t MOST_PIECES = 16;    // of the keys of all texts: their number must not change a bit
constexpr int64_t SHORTEST_PIECE = 4;  // tiles

// Rows of numbers of a token each, zero up to whole vectors.
struct Panel {
    float* data;
    int64_t width, stride;

    static int64_t floats(int64_t tokens, int64_t width) { return tokens * round_up(width); }
    static Panel at(float*& from, int64_t tokens, int64_t width) {
        Panel panel{from, width, round_up(width)};
        from += floats(tokens, width);
        for (int64_t t = 0; t < tokens; ++t)
            for (int64_t c = width; c < panel.stride; ++c) panel.row(t)[c] = 0;
        return panel;
    }
    float* row(int64_t token) const { return data + token * stride; }
    void put(int64_t token, int64_t first, Vector values, int64_t count) const {
        if (count == WIDTH) store(row(token) + first, values);
        else store_part(row(token) + first, values, count);
    }
};

// Of tokens x [tokens, D].
template <class T>
void norm(const Tensor& x, const Tensor& weight, float eps, const Panel& to) {
    for (int64_t t = 0; t < x.size(0); ++t) {
        const T* from = x.as<T>() + t * x.stride(0);
        float* row = to.row(t);
        Vector squares = {};
        for (int64_t c = 0; c < to.stride; c += WIDTH) {
            Vector values = c + WIDTH <= to.width ? load(from + c) : load_part(from + c, to.width - c);
            squares += values * values;
            store(row + c, values);
        }
        float factor = 1.0f / __builtin_sqrtf(sum(squares) / float(to.width) + eps);
        for (int64_t c = 0; c < to.stride; c += WIDTH) {
            Vector scale = c + WIDTH <= to.width ? load(weight.as<T>() + c) : load_part(weight.as<T>() + c, to.width - c);
            store(row + c, load(row + c) * factor * scale);
        }
    }
}

// y = x + W_o from, for tokens x [tokens, D]; or S x + W_o from, where there is a shortcut S. `whole` is room for x.
template <class T>
void add_output(const Linear& output, const Linear& shortcut, const Panel& from, const Tensor& x, const Panel& whole,
                const Tensor& y, float* room, int threads) {
    auto add = [&](const Tensor& old) {
        return [&, old](int, int64_t token, int64_t first, Vector values, int64_t count) {
            T* to = y.as<T>() + token * y.stride(0) + first;
            const T* before = old ? old.as<T>() + token * old.stride(0) + first : nullptr;
            if (before) values += count == WIDTH ? load(before) : load_part(before, count);
            if (count == WIDTH) store(to, values);
            else store_part(to, values, count);
        };
    };
    const int64_t count = x.size(0);
    if (shortcut.weight) {
        for (int64_t t = 0; t < count; ++t)
            for (int64_t c = 0; c < whole.width; ++c)
                whole.row(t)[c] = to_float(x.as<T>()[t * x.stride(0) + c]);
        multiply(&shortcut, 1, whole.data, whole.stride, count, StripSpace(whole.width, room), threads, add({}));
    }
    multiply(&output, 1, from.data, from.stride, count, StripSpace(from.width, room), threads,
             add(shortcut.weight ? y : x));
}

// What a thread needs for products with so many inputs, and with others afterwards.
int64_t strip_floats(int64_t inputs, int64_t others) {
    return StripSpace(inputs > others ? inputs : others, nullptr).size;
}

struct AttentionStep {
    Tensor x, weight;             // [B * T, D], [D]
    float eps, scale;
    Linear read[3], output;       // queries, keys, values
    Linear shortcut;              // or none
    Tensor keys, values, start;   // [B, S, G, K], the last T of S to be written; [B]: keys before it are none
    Tensor cosines, sines;        // [1 or B, T, 1, R], R channels turn; the first half of the sines negative
    Tensor y;
    int threads;
    int64_t heads;

    int64_t batch() const { return keys.size(0); }
    int64_t tokens() const { return x.size(0) / batch(); }  // of a text
    int64_t groups() const { return keys.size(2); }
    int64_t width() const { return keys.size(3); }
    int64_t share() const { return heads / groups(); }
    int64_t rows() const { return tokens() * share(); }  // of queries that read the same keys
    int64_t lines() const { return batch() * groups(); }
    int64_t most_pieces() const {  // of one line
        int64_t tiles = (keys.size(1) + TILE - 1) / TILE, most = MOST_PIECES / lines();
        int64_t pieces = tiles / SHORTEST_PIECE < most ? tiles / SHORTEST_PIECE : most;
        return pieces > 1 ? pieces : 1;
    }
    int64_t reading_floats() const { return round_up(rows() * (round_up(width()) + 2)); }
    int64_t thread_floats() const {
        return round_up(rows() * round_up(width()) + Scratch::floats(rows(), width(), width()));
    }
    int64_t product_floats() const {
        return threads * strip_floats(x.size(1), heads * width());
    }
    int64_t all_heads() const { return (heads + 2 * groups()) * width(); }
    int64_t floats() const {
        int64_t count = x.size(0);
        return Panel::floats(count, x.size(1)) + Panel::floats(count, all_heads()) +
               Panel::floats(count, heads * width()) + product_floats() +
               lines() * most_pieces() * reading_floats() + threads * thread_floats();
    }

    void turn(float* head, int64_t row, int64_t t) const {
        if (!cosines) return;
        const int64_t text = cosines.size(0) == 1 ? 0 : row, R = cosines.size(3), half = R / 2;
        const float* cosine = cosines.as<float>() + text * cosines.stride(0) + t * cosines.stride(1);
        const float* sine = sines.as<float>() + text * sines.stride(0) + t * sines.stride(1);
        for (int64_t i = 0; i < half; ++i) {
            float first = head[i], second = head[half + i];
            head[i] = first * cosine[i] + second * sine[i];
            head[half + i] = second * cosine[half + i] + first * sine[half + i];
        }
    }

    template <class T>
    void keep(const Tensor& to, int64_t row, int64_t place, int64_t group, const float* from) const {
        T* at = to.as<T>() + row * to.stride(0) + place * to.stride(1) + group * to.stride(2);
        for (int64_t c = 0; c < width(); ++c) from_float(from[c], at[c]);
    }

    Queries queries_at(float* reading, float* q) const {
        float* numbers = reading + rows() * round_up(width());
        return {rows(), width(), width(), q, numbers, numbers + rows(), reading};
    }

    // A piece of the keys of one text and key head.
    template <class T>
    void read_piece(int64_t line, int64_t piece, const Panel& all, float* reading, float* space) const {
        const int64_t row = line / groups(), group = line % groups(), T_ = tokens(), S = keys.size(1);
        const int64_t begin = start.as<int64_t>()[row], pieces = most_pieces();
        const int64_t tiles = (S - begin + TILE - 1) / TILE;
        Queries queries = queries_at(reading, space);
        queries.start();
        for (int64_t t = 0; t < T_; ++t)
            for (int64_t h = 0; h < share(); ++h) {
                const float* from = all.row(row * T_ + t) + (group * share() + h) * width();
                float* to = queries.q + (t * share() + h) * queries.q_row();
                for (int64_t c = 0; c < queries.q_row(); ++c) to[c] = c < width() ? from[c] * scale : 0.0f;
            }
        Scratch scratch = Scratch::at(space + rows() * round_up(width()), rows(), width(), width());
        for (int64_t tile = tiles * piece / pieces; tile < tiles * (piece + 1) / pieces; ++tile) {
            const int64_t first = begin + tile * TILE, count = S - first < TILE ? S - first : TILE;
            auto at = [&](const Tensor& kept) {
                return kept.as<T>() + row * kept.stride(0) + first * kept.stride(1) + group * kept.stride(2);
            };
            Keys<T> here{at(keys), at(values), keys.stride(1), values.stride(1), count, 0};
            read_tile(queries, here, scratch, [&](float* scores, int64_t) {
                for (int64_t t = 0; t < T_; ++t)
                    for (int64_t h = 0; h < share(); ++h)
                        for (int64_t j = S - T_ + t + 1 - first; j < count; ++j)
                            if (j >= 0) scores[(t * share() + h) * TILE + j] = NOTHING;
            });
        }
    }

    template <class T>
    void run(float* workspace) const {
        const int64_t count = x.size(0), S = keys.size(1), K = width(), T_ = tokens();
        Panel normed = Panel::at(workspace, count, x.size(1));
        Panel all = Panel::at(workspace, count, all_heads());
        Panel attended = Panel::at(workspace, count, heads * K);
        float* room = workspace;
        workspace += product_floats();
        float* readings = workspace;
        float* own = readings + lines() * most_pieces() * reading_floats();

        norm<T>(x, weight, eps, normed);
        const int64_t places[] = {0, heads * K, (heads + groups()) * K};
        multiply(read, 3, normed.data, normed.stride, count, StripSpace(x.size(1), room), threads,
                 [&](int layer, int64_t token, int64_t first, Vector values, int64_t some) {
                     all.put(token, places[layer] + first, values, some);
                 });
        for (int64_t row = 0; row < batch(); ++row)
            for (int64_t t = 0; t < T_; ++t) {
                float* heads_of = all.row(row * T_ + t);
                for (int64_t h = 0; h < heads + groups(); ++h) turn(heads_of + h * K, row, t);
                for (int64_t g = 0; g < groups(); ++g) {
                    keep<T>(keys, row, S - T_ + t, g, heads_of + places[1] + g * K);
                    keep<T>(values, row, S - T_ + t, g, heads_of + places[2] + g * K);
                }
            }
        const int64_t pieces = most_pieces();
        for_each_task(lines() * pieces, threads, [&](int64_t task, int thread) {
            read_piece<T>(task / pieces, task % pieces, all, readings + task * reading_floats(),
                          own + thread * thread_floats());
        });
        for (int64_t line = 0; line < lines(); ++line) {
            Queries queries = queries_at(readings + line * pieces * reading_floats(), nullptr);
            for (int64_t piece = 1; piece < pieces; ++piece)
                merge(queries, queries_at(readings + (line * pieces + piece) * reading_floats(), nullptr));
            for (int64_t r = 0; r < rows(); ++r) {
                int64_t token = line / groups() * T_ + r / share(), head = line % groups() * share() + r % share();
                finish(queries, r, NOTHING, attended.row(token) + head * K);
            }
        }
        add_output<T>(output, shortcut, attended, x, normed, y, room, threads);
    }
};

struct GatedStep {
    Tensor x, weight;  // [tokens, D], [D]
    float eps;
    Linear read[2], output;  // gate, up
    Linear shortcut;         // or none
    Tensor y;
    int threads;
    int64_t hidden;

    int64_t product_floats() const {
        return threads * strip_floats(x.size(1), hidden);
    }
    int64_t floats() const {
        int64_t count = x.size(0);
        return Panel::floats(count, x.size(1)) + 2 * Panel::floats(count, hidden) + product_floats();
    }

    template <class T>
    void run(float* workspace) const {
        const int64_t count = x.size(0);
        Panel normed = Panel::at(workspace, count, x.size(1));
        Panel both[] = {Panel::at(workspace, count, hidden), Panel::at(workspace, count, hidden)};
        norm<T>(x, weight, eps, normed);
        multiply(read, 2, normed.data, normed.stride, count, StripSpace(x.size(1), workspace), threads,
                 [&](int layer, int64_t token, int64_t first, Vector values, int64_t some) {
                     both[layer].put(token, first, values, some);
                 });
        for (int64_t t = 0; t < count; ++t)
            for (int64_t c = 0; c < hidden; c += WIDTH) {
                float* gate = both[0].row(t) + c;
                store(gate, silu(load(gate)) * load(both[1].row(t) + c));
            }
        add_output<T>(output, shortcut, both[0], x, normed, y, workspace, threads);
    }
};

// A layer from Python: weight, factors of its outputs, bias; of 4 bits the codes, and the factors of groups and their
// size as well.
using Layer = std::tuple<Tensor, Tensor, Tensor, Tensor, int64_t>;

Linear linear_of(const Layer& layer, int64_t inputs, int64_t outputs) {
    const auto& [weight, scale, bias, factors, group] = layer;
    if (factors) {
        FourBits codes{weight, factors, inputs, group};
        require(weight.axes == 2 && weight.size(0) == outputs, "decoding: a weight does not fit");
        require_codes(codes);
        return {{}, scale, bias, codes};
    }
    require_shape(weight, "decoding: a weight does not fit", {outputs, inputs});
    require(weight.stride(1) == 1 && weight.stride(0) == inputs, "decoding: a weight has gaps");
    return {weight, scale, bias, {}};
}

Linear shortcut_of(const Layer& layer, int64_t inputs, int64_t outputs) {
    if (std::get<0>(layer)) return linear_of(layer, inputs, outputs);
    require(inputs == outputs, "decoding: without a shortcut the output is as wide as the input");
    return {};
}

void require_tokens(const Tensor& x, const Tensor& weight) {
    require(x.axes == 2 && x.size(0) > 0, "decoding: there is a token");
    require_shape(weight, "decoding: the norm does not fit", {x.size(1)});
}

int64_t outputs_of(const Layer& layer) { return std::get<0>(layer).size(0); }

template <class Step>
void run(const Step& step, const Tensor& workspace) {
    require(workspace.size(0) >= step.floats(), "decoding: the workspace is too small");
    if (step.x.dtype == Dtype::bfloat16) step.template run<bfloat16>(workspace.as<float>());
    else step.template run<float>(workspace.as<float>());
}

}  // namespace

SEQMIX_BINDINGS(module) {
    module.def(
        "attention_step_floats",
        [](int64_t batch, int64_t tokens, int64_t inputs, int64_t heads, int64_t groups, int64_t width, int64_t keys,
           int threads) {
            AttentionStep step{};
            step.threads = threads;
            step.x.sizes[0] = batch * tokens, step.x.sizes[1] = inputs;
            step.heads = heads;
            step.keys.sizes[0] = batch, step.keys.sizes[1] = keys, step.keys.sizes[2] = groups,
            step.keys.sizes[3] = width;
            return step.floats();
        });
    module.def(
        "attention_step",
        [](Tensor x, Tensor weight, double eps, Layer query, Layer key, Layer value, Layer output, Layer shortcut,
           Tensor keys, Tensor values, Tensor start, Tensor cosines, Tensor sines, double scale, Tensor y, Tensor workspace,
           int threads) {
            require_tokens(x, weight);
            const int64_t batch = keys.size(0), length = keys.size(1), tokens = x.size(0) / batch;
            require(keys.axes == 4 && batch * tokens == x.size(0) && tokens <= length, "decoding: rows do not fit");
            require_shape(values, "decoding: keys and values differ", {batch, length, keys.size(2), keys.size(3)});
            require_shape(start, "decoding: `start` is [B]", {batch});
            const int64_t D = x.size(1), K = keys.size(3), all = outputs_of(query), shared = keys.size(2) * K;
            AttentionStep step{x, weight, float(eps), float(scale),
                               {linear_of(query, D, all), linear_of(key, D, shared), linear_of(value, D, shared)},
                               linear_of(output, all, y.size(1)), shortcut_of(shortcut, D, y.size(1)), keys, values, start,
                               cosines, sines, y, threads, all / K};
            nb::gil_scoped_release release;
            run(step, workspace);
        },
        "x"_a, "weight"_a, "eps"_a, "query"_a, "key"_a, "value"_a, "output"_a, "shortcut"_a, "keys"_a, "values"_a, "start"_a,
        "cosines"_a.none(), "sines"_a.none(), "scale"_a, "y"_a, "workspace"_a, "threads"_a);
    module.def(
        "linear_step",
        [](Tensor x, Tensor weight, Tensor bias, Tensor y, Tensor room, int threads) {
            multiply_weight(x, {weight, {}, bias, {}}, y, room, threads);
        },
        "x"_a, "weight"_a, "bias"_a.none(), "y"_a, "room"_a, "threads"_a, WithoutGil());
    module.def("gated_step_floats", [](int64_t tokens, int64_t inputs, int64_t hidden, int threads) {
        GatedStep step{};
        step.threads = threads;
        step.x.sizes[0] = tokens, step.x.sizes[1] = inputs;
        step.hidden = hidden;
        return step.floats();
    });
    module.def(
        "gated_step",
        [](Tensor x, Tensor weight, double eps, Layer gate, Layer up, Layer output, Layer shortcut, Tensor y,
           Tensor workspace, int threads) {
            require_tokens(x, weight);
            const int64_t D = x.size(1), hidden = outputs_of(gate);
            GatedStep step{x, weight, float(eps), {linear_of(gate, D, hidden), linear_of(up, D, hidden)},
                           linear_of(output, hidden, y.size(1)), shortcut_of(shortcut, D, y.size(1)), y, threads, hidden};
            nb::gil_scoped_release release;
            run(step, workspace);
        },
        "x"_a, "weight"_a, "eps"_a, "gate"_a, "up"_a, "output"_a, "shortcut"_a, "y"_a, "workspace"_a, "threads"_a);
}

}  // namespace seqmix
