// Tokens through halves of blocks of a language model, in one call: what their parts compute one after the other, with
// nothing but the weights and the keys read from memory. Axes as in seqmix/kernels/decoding.py.
//
//   attention   y = S x + W_o attend(turn(W_q n), turn(W_k n), W_v n)        n = x / sqrt(mean(x^2) + eps) * norm
//   gated unit  y = S x + W_o (silu(W_g n) * W_u n)                          S a shortcut, or one
#include <algorithm>
#include <utility>
#include <vector>

#include <nanobind/stl/pair.h>
#include <nanobind/stl/vector.h>

#include "activations.hpp"
#include "attention.hpp"
#include "parallel.hpp"
#include "weight_matmul.hpp"

namespace seqmix {
namespace {

constexpr int64_t MOST_ROWS = 192;     // of queries that are read together
constexpr int64_t MOST_PIECES = 16;    // of the keys of all texts: their number must not change a bit
constexpr int64_t SHORTEST_PIECE = 4;  // tiles
constexpr int64_t SHARE = 16;          // tokens of a task that is the same for each of them

// body(token) for every token, by several threads if they are many.
template <class Body>
void for_each_token(int64_t tokens, int threads, const Body& body) {
    const int64_t tasks = tokens < 2 * SHARE ? 1 : (tokens + SHARE - 1) / SHARE;
    for_each_task(tasks, threads, [&](int64_t task, int) {
        for (int64_t t = tokens * task / tasks; t < tokens * (task + 1) / tasks; ++t) body(t);
    });
}

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
void norm(const Tensor& x, const Tensor& weight, float eps, const Panel& to, int threads) {
    for_each_token(x.size(0), threads, [&](int64_t t) {
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
    });
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
    if (shortcut) {
        for (int64_t t = 0; t < count; ++t)
            for (int64_t c = 0; c < whole.width; ++c)
                whole.row(t)[c] = to_float(x.as<T>()[t * x.stride(0) + c]);
        multiply(&shortcut, 1, whole.data, whole.stride, count, StripSpace(whole.width, room), threads, add({}));
    }
    multiply(&output, 1, from.data, from.stride, count, StripSpace(from.width, room), threads,
             add(shortcut ? y : x));
}

// A layer from Python: weight, factors of its outputs, bias; of 4 bits the codes, and the factors of groups and their
// size as well.
using Layer = std::tuple<Tensor, Tensor, Tensor, Tensor, int64_t>;

Linear linear_of(const Layer& layer, int64_t inputs, int64_t outputs) {
    const auto& [weight, scale, bias, factors, group] = layer;
    require_of_outputs(scale, outputs);
    require_of_outputs(bias, outputs);
    if (factors) {
        FourBits codes{weight, factors, inputs, group};
        require(weight.axes == 2 && weight.size(0) == outputs, "decoding: a weight does not fit");
        require_codes(codes);
        return {{}, scale, bias, codes};
    }
    require_shape(weight, "decoding: a weight does not fit", {outputs, inputs});
    require(weight.stride(1) == 1 && weight.stride(0) == inputs, "decoding: a weight has gaps");
    require(weight.dtype == Dtype::float32 || weight.dtype == Dtype::bfloat16 || weight.dtype == Dtype::int8,
            "decoding: a weight is in float32, bfloat16 or int8");
    return {weight, scale, bias, {}};
}

// Half a block: layers that read, of attention for queries, keys and values, of a gated unit the gate and what it
// multiplies; the last layer; the shortcut or none; the width of a head, 0 of a gated unit.
struct Half {
    Tensor norm;
    float eps;
    std::vector<Linear> read;
    Linear output, shortcut;
    int64_t head_width;
    float scale;

    Half(Tensor norm, double eps, const std::vector<Layer>& layers, const Layer& last, const Layer& around,
         int64_t head_width, double scale)
        : norm(norm), eps(float(eps)), head_width(head_width), scale(float(scale)) {
        require(norm.axes == 1 && norm.stride(0) == 1, "decoding: the norm is [D], without gaps");
        require(layers.size() == (is_attention() ? 3 : 2), "decoding: attention reads three layers, a gated unit two");
        for (const Layer& layer : layers) read.push_back(linear_of(layer, inputs(), outputs_of(layer)));
        require(read[read.size() - 1].outputs() == read[read.size() - 2].outputs(), "decoding: layers do not fit");
        if (is_attention())
            require(width() % head_width == 0 && shared() % head_width == 0 && width() % shared() == 0,
                    "decoding: heads do not fit");
        output = linear_of(last, width(), outputs_of(last));
        if (std::get<0>(around)) shortcut = linear_of(around, inputs(), outputs());
        else require(inputs() == outputs(), "decoding: without a shortcut the output is as wide as the input");
    }

    bool is_attention() const { return head_width > 0; }
    int64_t inputs() const { return norm.size(0); }
    int64_t outputs() const { return output.outputs(); }
    int64_t width() const { return read[0].outputs(); }   // of what goes into the last layer
    int64_t shared() const { return read[1].outputs(); }  // of keys
    int64_t product_floats(int threads) const {
        return StripSpace(inputs() > width() ? inputs() : width(), nullptr).all(threads);
    }

private:
    static int64_t outputs_of(const Layer& layer) { return std::get<0>(layer).size(0); }
};

struct AttentionStep {
    const Half& half;
    Tensor keys, values, start;  // [B, S, G, K], the last T of S to be written; [B]: keys before it are none
    Tensor cosines, sines;       // [1 or B, T, 1, R], R channels turn; the first half of the sines negative
    Tensor bounds;               // [B + 1] of texts of several lengths, packed; their turns are [1, all, 1, R]
    int64_t all;                 // tokens of all texts
    int threads;
    int64_t longest;             // tokens of a text

    int64_t batch() const { return keys.size(0); }
    int64_t begin_of(int64_t row) const { return bounds ? bounds.as<int64_t>()[row] : row * longest; }
    int64_t tokens_of(int64_t row) const { return bounds ? begin_of(row + 1) - begin_of(row) : longest; }
    int64_t row_of(int64_t token) const {
        if (!bounds) return token / longest;
        const int64_t* at = bounds.as<int64_t>();
        return std::upper_bound(at, at + batch() + 1, token) - at - 1;
    }
    int64_t groups() const { return keys.size(2); }
    int64_t width() const { return keys.size(3); }
    int64_t heads() const { return half.width() / width(); }
    int64_t share() const { return heads() / groups(); }
    // Queries of a line, which read the same keys, are cut into blocks of so many tokens if they are many.
    int64_t block() const {
        if (longest * share() <= MOST_ROWS) return longest;
        const int64_t most = MOST_ROWS / share();
        return most < 1 ? 1 : most < TILE ? most : TILE;
    }
    int64_t blocks() const { return (longest + block() - 1) / block(); }
    int64_t rows() const { return block() * share(); }
    int64_t lines() const { return batch() * groups() * blocks(); }
    int64_t most_pieces() const {  // of a line
        int64_t tiles = (keys.size(1) + TILE - 1) / TILE, most = MOST_PIECES / lines();
        int64_t pieces = tiles / SHORTEST_PIECE < most ? tiles / SHORTEST_PIECE : most;
        return pieces > 1 ? pieces : 1;
    }
    int64_t reading_floats() const { return round_up(rows() * (round_up(width()) + 2)); }
    int64_t thread_floats() const {
        return round_up(rows() * round_up(width()) + Scratch::floats(rows(), width(), width()));
    }
    int64_t all_heads() const { return half.width() + 2 * half.shared(); }
    int64_t floats() const {
        return Panel::floats(all, half.inputs()) + Panel::floats(all, all_heads()) + Panel::floats(all, half.width()) +
               half.product_floats(threads) + lines() * most_pieces() * reading_floats() + threads * thread_floats();
    }

    void turn(float* head, int64_t row, int64_t token) const {
        if (!cosines) return;
        const int64_t text = cosines.size(0) == 1 ? 0 : row, t = bounds ? token : token - begin_of(row);
        const int64_t R = cosines.size(3), middle = R / 2;
        const float* cosine = cosines.as<float>() + text * cosines.stride(0) + t * cosines.stride(1);
        const float* sine = sines.as<float>() + text * sines.stride(0) + t * sines.stride(1);
        for (int64_t i = 0; i < middle; ++i) {
            float first = head[i], second = head[middle + i];
            head[i] = first * cosine[i] + second * sine[i];
            head[middle + i] = second * cosine[middle + i] + first * sine[middle + i];
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

    // `count` tokens from number `first` on of a text, and a key head. A text may have none there.
    struct Line {
        int64_t row, group, first, count;
    };
    Line line_at(int64_t index) const {
        const int64_t pair = index / blocks(), row = pair / groups(), first = index % blocks() * block();
        const int64_t left = tokens_of(row) - first, count = left < block() ? left : block();
        return {row, pair % groups(), first, count > 0 ? count : 0};
    }

    // A piece of the keys that a line sees.
    template <class T>
    void read_piece(const Line& line, int64_t piece, const Panel& read, float* reading, float* space) const {
        const auto [row, group, first_token, count_of_tokens] = line;
        const int64_t before = keys.size(1) - tokens_of(row) + first_token;  // keys
        const int64_t begin = start.as<int64_t>()[row], seen = before + count_of_tokens, pieces = most_pieces();
        const int64_t tiles = (seen - begin + TILE - 1) / TILE;
        Queries queries = queries_at(reading, space);
        queries.rows = count_of_tokens * share();
        queries.start();
        if (!count_of_tokens) return;
        for (int64_t r = 0; r < queries.rows; ++r) {
            const int64_t token = begin_of(row) + first_token + r / share();
            const float* from = read.row(token) + (group * share() + r % share()) * width();
            float* to = queries.q + r * queries.q_row();
            for (int64_t c = 0; c < queries.q_row(); ++c) to[c] = c < width() ? from[c] * half.scale : 0.0f;
        }
        Scratch scratch = Scratch::at(space + rows() * round_up(width()), rows(), width(), width());
        for (int64_t tile = tiles * piece / pieces; tile < tiles * (piece + 1) / pieces; ++tile) {
            const int64_t first = begin + tile * TILE, count = seen - first < TILE ? seen - first : TILE;
            auto at = [&](const Tensor& kept) {
                return kept.as<T>() + row * kept.stride(0) + first * kept.stride(1) + group * kept.stride(2);
            };
            Keys<T> here{at(keys), at(values), keys.stride(1), values.stride(1), count, 0};
            read_tile(queries, here, scratch, [&](float* scores, int64_t) {
                for (int64_t r = 0; r < queries.rows; ++r) {
                    const int64_t later = before + r / share() + 1 - first;
                    for (int64_t j = later < 0 ? 0 : later; j < count; ++j) scores[r * TILE + j] = NOTHING;
                }
            });
        }
    }

    template <class T>
    void run(const Tensor& x, const Tensor& y, float* workspace) const {
        const int64_t K = width();
        Panel normed = Panel::at(workspace, all, half.inputs());
        Panel read = Panel::at(workspace, all, all_heads());
        Panel attended = Panel::at(workspace, all, half.width());
        float* room = workspace;
        workspace += half.product_floats(threads);
        float* readings = workspace;
        float* own = readings + lines() * most_pieces() * reading_floats();

        norm<T>(x, half.norm, half.eps, normed, threads);
        const int64_t places[] = {0, half.width(), half.width() + half.shared()};
        multiply(half.read.data(), 3, normed.data, normed.stride, all, StripSpace(half.inputs(), room), threads,
                 [&](int layer, int64_t token, int64_t first, Vector values, int64_t some) {
                     read.put(token, places[layer] + first, values, some);
                 });
        for_each_token(all, threads, [&](int64_t token) {
            const int64_t row = row_of(token), place = keys.size(1) - begin_of(row) - tokens_of(row) + token;
            float* heads_of = read.row(token);
            for (int64_t h = 0; h < heads() + groups(); ++h) turn(heads_of + h * K, row, token);
            for (int64_t g = 0; g < groups(); ++g) {
                keep<T>(keys, row, place, g, heads_of + places[1] + g * K);
                keep<T>(values, row, place, g, heads_of + places[2] + g * K);
            }
        });
        const int64_t pieces = most_pieces(), tasks = lines() * pieces;
        for_each_task(tasks, threads, [&](int64_t task, int thread) {
            task = tasks - 1 - task;  // late queries see most: they come first
            read_piece<T>(line_at(task / pieces), task % pieces, read, readings + task * reading_floats(),
                          own + thread * thread_floats());
        });
        for_each_task(lines(), blocks() > 1 ? threads : 1, [&](int64_t index, int) {
            const auto [row, group, first_token, count_of_tokens] = line_at(index);
            Queries queries = queries_at(readings + index * pieces * reading_floats(), nullptr);
            queries.rows = count_of_tokens * share();
            for (int64_t piece = 1; piece < pieces; ++piece)
                merge(queries, queries_at(readings + (index * pieces + piece) * reading_floats(), nullptr));
            for (int64_t r = 0; r < queries.rows; ++r) {
                const int64_t token = begin_of(row) + first_token + r / share(), head = group * share() + r % share();
                finish(queries, r, NOTHING, attended.row(token) + head * K);
            }
        });
        add_output<T>(half.output, half.shortcut, attended, x, normed, y, room, threads);
    }
};

struct GatedStep {
    const Half& half;
    int64_t all;  // tokens
    int threads;

    int64_t floats() const {
        return Panel::floats(all, half.inputs()) + 2 * Panel::floats(all, half.width()) + half.product_floats(threads);
    }

    template <class T>
    void run(const Tensor& x, const Tensor& y, float* workspace) const {
        Panel normed = Panel::at(workspace, all, half.inputs());
        Panel both[] = {Panel::at(workspace, all, half.width()), Panel::at(workspace, all, half.width())};
        norm<T>(x, half.norm, half.eps, normed, threads);
        multiply(half.read.data(), 2, normed.data, normed.stride, all, StripSpace(half.inputs(), workspace), threads,
                 [&](int layer, int64_t token, int64_t first, Vector values, int64_t some) {
                     both[layer].put(token, first, values, some);
                 });
        for_each_token(all, threads, [&](int64_t t) {
            for (int64_t c = 0; c < half.width(); c += WIDTH) {
                float* gate = both[0].row(t) + c;
                store(gate, silu(load(gate)) * load(both[1].row(t) + c));
            }
        });
        add_output<T>(half.output, half.shortcut, both[0], x, normed, y, workspace, threads);
    }
};

// What attention reads and writes beside its weights: keys and values [B, room for more than S, G, K], S, start, cosines,
// sines, bounds.
using Memory = std::tuple<Tensor, Tensor, int64_t, Tensor, Tensor, Tensor, Tensor>;

int64_t longest_text(const Tensor& bounds, int64_t batch, int64_t all) {
    if (!bounds) return all / batch;
    require_shape(bounds, "decoding: `bounds` is [B + 1]", {batch + 1});
    require(bounds.dtype == Dtype::int64 && bounds.stride(0) == 1, "decoding: `bounds` is int64, without gaps");
    const int64_t* at = bounds.as<int64_t>();
    require(at[0] == 0 && at[batch] == all, "decoding: `bounds` go from first to last");
    int64_t longest = 0;
    for (int64_t row = 0; row < batch; ++row) {
        require(at[row] <= at[row + 1], "decoding: `bounds` rise");
        longest = at[row + 1] - at[row] > longest ? at[row + 1] - at[row] : longest;
    }
    return longest;
}

AttentionStep attention_step(const Half& half, const Memory& memory, const Tensor& x, int threads) {
    auto [keys, values, length, start, cosines, sines, bounds] = memory;
    const int64_t batch = keys.size(0), all = x.size(0);
    require(keys.axes == 4 && batch > 0 && (bounds || all % batch == 0), "decoding: rows do not fit");
    require(keys.size(3) == half.head_width && keys.size(2) * half.head_width == half.shared(),
            "decoding: heads do not fit");
    require(values.axes == 4 && length <= keys.size(1) && length <= values.size(1), "decoding: there are fewer keys");
    keys.sizes[1] = values.sizes[1] = length;
    require_shape(values, "decoding: keys and values differ", {batch, length, keys.size(2), keys.size(3)});
    require(keys.stride(3) == 1 && values.stride(3) == 1, "decoding: keys and values are without gaps");
    require(keys.dtype == x.dtype && values.dtype == x.dtype, "decoding: keys and values are in the dtype of x");
    AttentionStep step{half, keys, values, start, cosines, sines, bounds, all, threads, longest_text(bounds, batch, all)};
    require(step.longest <= length, "decoding: there are fewer keys");
    require_shape(start, "decoding: `start` is [B]", {batch});
    require(start.dtype == Dtype::int64 && (batch == 1 || start.stride(0) == 1), "decoding: `start` is int64, without gaps");
    for (int64_t row = 0; row < batch; ++row)
        require(0 <= start.as<int64_t>()[row] && start.as<int64_t>()[row] <= length - step.tokens_of(row),
                "decoding: a row starts among its keys");
    require(bool(cosines) == bool(sines), "decoding: cosines go with sines");
    if (cosines) {
        require(cosines.axes == 4 && (cosines.size(0) == 1 || (!bounds && cosines.size(0) == batch)) &&
                    cosines.size(3) <= half.head_width,
                "decoding: the turns are [1 or B, T, 1, R]");
        for (const Tensor* turns : {&cosines, &sines}) {
            require_shape(*turns, "decoding: cosines and sines differ", {cosines.size(0), bounds ? all : step.longest, 1, cosines.size(3)});
            require(turns->dtype == Dtype::float32 && turns->stride(3) == 1, "decoding: turns are in float32, without gaps");
        }
    }
    return step;
}

// x [tokens, D] through one half after the other to y; what is between them is in y as well.
struct Call {
    Tensor x;
    std::vector<std::pair<const Half*, Memory>> halves;
    int threads;
    int64_t floats = 0, widest = 0, width;  // of the workspace, and outputs

    Call(Tensor x, const std::vector<std::pair<const Half*, Memory>>& halves, int threads)
        : x(x), halves(halves), threads(threads), width(x.size(1)) {
        require(x.axes == 2 && x.size(0) > 0, "decoding: there is a token");
        for (const auto& [half, memory] : halves) {
            require(half->inputs() == width && half->norm.dtype == x.dtype, "decoding: the norm does not fit");
            width = half->outputs();
            widest = width > widest ? width : widest;
            with_step(*half, memory, [&](const auto& step) { floats = step.floats() > floats ? step.floats() : floats; });
        }
    }

    void run(const Tensor& y, const Tensor& workspace) const {
        require(y.dtype == x.dtype && workspace.dtype == Dtype::float32, "decoding: y is as x, the workspace in float32");
        require(y.size(0) >= x.size(0) * widest && workspace.size(0) >= floats, "decoding: there is too little room");
        if (x.dtype == Dtype::bfloat16) run_in<bfloat16>(y, workspace.as<float>());
        else run_in<float>(y, workspace.as<float>());
    }

private:
    template <class Body>
    void with_step(const Half& half, const Memory& memory, const Body& body) const {
        if (half.is_attention()) body(attention_step(half, memory, x, threads));
        else body(GatedStep{half, x.size(0), threads});
    }

    template <class T>
    void run_in(const Tensor& y, float* workspace) const {
        Tensor from = x;
        for (const auto& [half, memory] : halves) {
            Tensor to = y;
            to.axes = 2;
            to.sizes[0] = x.size(0), to.sizes[1] = to.strides[0] = half->outputs(), to.strides[1] = 1;
            with_step(*half, memory, [&](const auto& step) { step.template run<T>(from, to, workspace); });
            from = to;
        }
    }
};

}  // namespace

SEQMIX_BINDINGS(module) {
    // They have addresses only, so what these are of lives as long.
    nb::class_<Half>(module, "Half")
        .def(nb::init<Tensor, double, const std::vector<Layer>&, const Layer&, const Layer&, int64_t, double>(), "norm"_a,
             "eps"_a, "read"_a, "output"_a, "shortcut"_a, "head_width"_a, "scale"_a, nb::keep_alive<1, 2>(),
             nb::keep_alive<1, 4>(), nb::keep_alive<1, 5>(), nb::keep_alive<1, 6>())
        .def_prop_ro("outputs", &Half::outputs);
    nb::class_<Call>(module, "Call")
        .def(nb::init<Tensor, const std::vector<std::pair<const Half*, Memory>>&, int>(), "x"_a, "halves"_a, "threads"_a,
             nb::keep_alive<1, 2>(), nb::keep_alive<1, 3>())
        .def_ro("floats", &Call::floats)
        .def_ro("widest", &Call::widest)
        .def_ro("width", &Call::width)
        .def("run", &Call::run, "y"_a, "workspace"_a, WithoutGil());
}

}  // namespace seqmix
