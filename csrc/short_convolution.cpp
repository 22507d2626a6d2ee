// Short convolution: y_t = f(sum_k w_k x_{t - W + 1 + k} + b) for every channel, f the identity or silu.
//
// A task is a text and a piece of its channels; lanes are channels. Time goes by in blocks, of which the inputs
// that the next block needs are carried over. They begin as the state and end as the state.
#include "activations.hpp"
#include "blocks.hpp"
#include "parallel.hpp"

namespace seqmix {
namespace {

constexpr int64_t PIECE = 64;   // channels of a task: as many whatever the vectors, so that sums are the same
constexpr int64_t TOKENS = 64;  // of a block

struct Arguments {
    Tensor x, weight, bias, state, bounds;  // [B, T, D], [D, W], [D], [R, reach, D], [R + 1]
    bool silu;
    int64_t reach;  // inputs that a state holds: W - 1, or more

    int64_t taps() const { return weight.size(1); }

    // Of x, and of the states that go with it [R, reach, D].
    void require_shapes(std::initializer_list<Tensor> states) const {
        require(x.axes == 3 && weight.axes == 2 && taps() > 0, "x is [B, T, D] and the weight [D, W]");
        int64_t channels = x.size(2);
        require_shape(weight, "the weight is [D, W]", {channels, taps()});
        if (bias) require_shape(bias, "the bias is [D]", {channels});
        require(reach >= taps() - 1, "a state holds at least W - 1 inputs");
        for (const Tensor& tensor : states)
            if (tensor) require_shape(tensor, "states are [R, reach, D]", {texts(), reach, channels});
    }
    int64_t texts() const { return num_texts(bounds, x.size(0)); }
    int64_t pieces() const { return (x.size(2) + PIECE - 1) / PIECE; }
};

struct Piece {
    int64_t channel, count;
    int64_t vectors() const { return (count + WIDTH - 1) / WIDTH; }
};

// Rows of a block: its tokens and `reach` more, and what reading whole vectors of rows may overwrite.
int64_t num_rows(int64_t reach) { return round_up((reach < TOKENS ? TOKENS : reach) + reach, 16) + 16; }

// The workspace of a thread, each part by vector: [vector][token or tap][lane]. Backward, `y` holds the gradient of x.
struct Space {
    float *inputs, *y, *weight, *bias;
    float *grad, *later, *last, *grad_weight;  // of the sums; after the block; of the last state; of weight and bias
    int64_t rows, taps;

    Space(float* at, const Arguments& given) : rows(num_rows(given.reach)), taps(round_up(given.taps() + 1, 16)) {
        auto take = [&](float*& part, int64_t count) { part = at, at += count; };
        take(inputs, PIECE * rows), take(y, PIECE * rows), take(weight, PIECE * taps), take(bias, PIECE);
        take(grad, PIECE * rows), take(later, PIECE * rows), take(last, PIECE * rows), take(grad_weight, PIECE * taps);
    }
    static int64_t size(int64_t taps, int64_t reach) {
        return PIECE * (5 * num_rows(reach) + 2 * round_up(taps + 1, 16) + 1);
    }
};

inline void fill(float* to, int64_t count) {
    for (int64_t i = 0; i < count; ++i) to[i] = 0;
}

Matrix rows_of(const Tensor& state, int64_t index, int64_t row, int64_t channel) {  // of a state [R, reach, D]
    int64_t offset = index * state.stride(0) + row * state.stride(1) + channel * state.stride(2);
    return {address(state, offset), state.dtype, state.stride(1), state.stride(2)};
}

// The state of a text from its row `row` on.
void read_state(const Arguments& given, int64_t index, int64_t row, const Piece& piece, const Space& space) {
    if (given.state) {
        read_block(rows_of(given.state, index, row, piece.channel), given.reach - row, piece.count, space.inputs,
                   by_vector(space.rows));
        return;
    }
    for (int64_t v = 0; v < piece.vectors(); ++v)
        fill(space.inputs + v * space.rows * WIDTH, (given.reach - row) * WIDTH);
}

void read_weights(const Arguments& given, const Piece& piece, const Space& space) {
    const Tensor& weight = given.weight;
    Matrix taps{address(weight, piece.channel * weight.stride(0)), weight.dtype, weight.stride(1), weight.stride(0)};
    read_block(taps, given.taps(), piece.count, space.weight, by_vector(space.taps));
    fill(space.bias, PIECE);
    if (given.bias)
        read_block({address(given.bias, piece.channel), given.bias.dtype, 0, 1}, 1, piece.count, space.bias,
                   by_row(PIECE));
}

template <int count>
struct Taps {
    static constexpr int value = count;
};

// visit(Taps<number of taps>): up to 8 of them stay in registers, with 0 for more.
template <class Visit>
void with_taps(int64_t taps, const Visit& visit) {
    switch (taps) {
        case 1: return visit(Taps<1>{});
        case 2: return visit(Taps<2>{});
        case 3: return visit(Taps<3>{});
        case 4: return visit(Taps<4>{});
        case 5: return visit(Taps<5>{});
        case 6: return visit(Taps<6>{});
        case 7: return visit(Taps<7>{});
        case 8: return visit(Taps<8>{});
        default: return visit(Taps<0>{});
    }
}

// finish(t, sum over the taps + bias) for the tokens of a block; `x` is the oldest input of the first one.
template <int fixed, class Finish>
inline void convolve(const float* x, const float* weight, Vector bias, int64_t taps, int64_t tokens,
                     const Finish& finish) {
    constexpr int registers = fixed ? fixed : 1;
    Vector own[registers];
    for (int k = 0; k < fixed; ++k) own[k] = load(weight + k * WIDTH);
    for (int64_t t = 0; t < tokens; ++t, x += WIDTH) {
        Vector sum = bias;
        if (fixed)
            for (int k = 0; k < fixed; ++k) sum += own[k] * load(x + k * WIDTH);
        else
            for (int64_t k = 0; k < taps; ++k) sum += load(weight + k * WIDTH) * load(x + k * WIDTH);
        finish(t, sum);
    }
}

template <class Visit>
void for_each_piece(const Arguments& given, const Tensor& workspace, int threads, const Visit& visit) {
    int64_t pieces = given.pieces(), channels = given.x.size(2);
    for_each_task(given.texts() * pieces, threads, [&](int64_t task, int thread) {
        Space space(workspace.as<float>() + thread * workspace.stride(0), given);
        int64_t index = task / pieces, channel = task % pieces * PIECE;
        Piece piece{channel, channels - channel < PIECE ? channels - channel : PIECE};
        read_weights(given, piece, space);
        visit(index, text_at(given.bounds, index, given.x.size(1)), piece, space);
    });
}

struct Forward {
    Arguments given;
    Tensor y, last, workspace;  // [B, T, D], [R, reach, D]; `last` may be the state itself

    void run(int threads) const {
        for_each_piece(given, workspace, threads,
                       [&](int64_t index, const Text& text, const Piece& piece, const Space& space) {
            int64_t reach = given.reach, rows = space.rows;
            read_state(given, index, 0, piece, space);
            for (int64_t t = 0; t < text.length; t += TOKENS) {
                int64_t tokens = text.length - t < TOKENS ? text.length - t : TOKENS;
                read_block(tokens_of(given.x, text, t, piece.channel), tokens, piece.count,
                           space.inputs + reach * WIDTH, by_vector(rows));
                for (int64_t v = 0; v < piece.vectors(); ++v) {
                    float* inputs = space.inputs + v * rows * WIDTH;
                    block(inputs, space.weight + v * space.taps * WIDTH, load(space.bias + v * WIDTH), tokens,
                          space.y + v * rows * WIDTH);
                    std::memmove(inputs, inputs + tokens * WIDTH, reach * WIDTH * sizeof(float));
                }
                write_block(tokens_of(y, text, t, piece.channel), tokens, piece.count, space.y, by_vector(rows));
            }
            write_block(rows_of(last, index, 0, piece.channel), reach, piece.count, space.inputs, by_vector(rows));
        });
    }

    void block(const float* inputs, const float* weight, Vector bias, int64_t tokens, float* to) const {
        const float* oldest = inputs + (given.reach - given.taps() + 1) * WIDTH;
        with_taps(given.taps(), [&](auto fixed) {
            constexpr int taps = decltype(fixed)::value;
            if (given.silu)
                convolve<taps>(oldest, weight, bias, given.taps(), tokens,
                               [&](int64_t t, Vector sum) { store(to + t * WIDTH, silu(sum)); });
            else
                convolve<taps>(oldest, weight, bias, given.taps(), tokens,
                               [&](int64_t t, Vector sum) { store(to + t * WIDTH, sum); });
        });
    }
};

// Adjoint: with s_t the gradient of the sum of token t (that of y_t times the derivative of f),
//     x'_t = sum_k w_k s_{t + W - 1 - k}      w'_k = sum_t s_t x_{t - W + 1 + k}      b' = sum_t s_t
// and the gradient of the last state is added to that of the last W - 1 inputs, the initial state's included.
struct Backward {
    Arguments given;  // reach = W - 1
    Tensor grad_y, grad_last;                  // of the outputs
    Tensor grad_x, grad_state, grad_channels;  // [B, T, D], [R, W - 1, D], of weight and bias [R, W + 1, D]
    Tensor workspace;

    void run(int threads) const {
        for_each_piece(given, workspace, threads,
                       [&](int64_t index, const Text& text, const Piece& piece, const Space& space) {
            int64_t reach = given.reach, rows = space.rows, taps = given.taps();
            Places at = by_vector(rows);
            fill(space.grad_weight, PIECE * space.taps);
            fill(space.later, PIECE * rows);
            read_block(rows_of(grad_last, index, 0, piece.channel), reach, piece.count, space.last, at);
            for (int64_t end = text.length; end > 0;) {
                int64_t t = (end - 1) / TOKENS * TOKENS, tokens = end - t;
                read_inputs(index, text, piece, t, tokens, space);
                read_block(tokens_of(grad_y, text, t, piece.channel), tokens, piece.count, space.grad, at);
                for (int64_t v = 0; v < piece.vectors(); ++v) {
                    float *grad = space.grad + v * rows * WIDTH, *later = space.later + v * rows * WIDTH;
                    sums(v, tokens, space);
                    std::memcpy(grad + tokens * WIDTH, later, reach * WIDTH * sizeof(float));
                    spread(v, tokens, t - text.length + reach, space);
                    std::memcpy(later, grad, reach * WIDTH * sizeof(float));
                }
                write_block(tokens_of(grad_x, text, t, piece.channel), tokens, piece.count, space.y, at);
                end = t;
            }
            // Inputs before the text: sums before it have no gradient.
            for (int64_t v = 0; v < piece.vectors(); ++v) {
                float* grad = space.grad + v * rows * WIDTH;
                fill(grad, reach * WIDTH);
                std::memcpy(grad + reach * WIDTH, space.later + v * rows * WIDTH, reach * WIDTH * sizeof(float));
                spread(v, reach, -text.length, space);
            }
            write_block(rows_of(grad_state, index, 0, piece.channel), reach, piece.count, space.y, at);
            write_block(rows_of(grad_channels, index, 0, piece.channel), taps + 1, piece.count, space.grad_weight,
                        by_vector(space.taps));
        });
    }

    // The inputs of a block and the `reach` ones before it.
    void read_inputs(int64_t index, const Text& text, const Piece& piece, int64_t t, int64_t tokens,
                     const Space& space) const {
        int64_t before = t < given.reach ? given.reach - t : 0;  // rows that come from the state
        if (before) read_state(given, index, t, piece, space);
        read_block(tokens_of(given.x, text, t - given.reach + before, piece.channel), tokens + given.reach - before,
                   piece.count, space.inputs + before * WIDTH, by_vector(space.rows));
    }

    // Turns the gradients of y into those of the sums, and adds up those of weight and bias.
    void sums(int64_t v, int64_t tokens, const Space& space) const {
        const float* inputs = space.inputs + v * space.rows * WIDTH;
        const float* weight = space.weight + v * space.taps * WIDTH;
        float *grad = space.grad + v * space.rows * WIDTH, *total = space.grad_weight + v * space.taps * WIDTH;
        with_taps(given.taps(), [&](auto fixed) {
            constexpr int taps = decltype(fixed)::value, registers = taps ? taps : 1;
            int64_t all = taps ? taps : given.taps();
            if (given.silu)
                convolve<taps>(inputs, weight, load(space.bias + v * WIDTH), all, tokens, [&](int64_t t, Vector sum) {
                    store(grad + t * WIDTH, load(grad + t * WIDTH) * silu_slope(sum, sigmoid(sum)));
                });
            Vector own[registers], bias = load(total + all * WIDTH);
            for (int k = 0; k < taps; ++k) own[k] = load(total + k * WIDTH);
            for (int64_t t = 0; t < tokens; ++t) {
                Vector now = load(grad + t * WIDTH);
                bias += now;
                if (taps)
                    for (int k = 0; k < taps; ++k) own[k] += now * load(inputs + (t + k) * WIDTH);
                else
                    for (int64_t k = 0; k < all; ++k)
                        store(total + k * WIDTH, load(total + k * WIDTH) + now * load(inputs + (t + k) * WIDTH));
            }
            for (int k = 0; k < taps; ++k) store(total + k * WIDTH, own[k]);
            store(total + all * WIDTH, bias);
        });
    }

    // Gradients of inputs into `y`: `tokens` of them, of which the first is row `place` of the last state.
    void spread(int64_t v, int64_t tokens, int64_t place, const Space& space) const {
        const float* grad = space.grad + v * space.rows * WIDTH;
        const float *weight = space.weight + v * space.taps * WIDTH, *last = space.last + v * space.rows * WIDTH;
        float* to = space.y + v * space.rows * WIDTH;
        with_taps(given.taps(), [&](auto fixed) {
            constexpr int taps = decltype(fixed)::value, registers = taps ? taps : 1;
            int64_t all = given.taps();
            Vector own[registers];
            for (int k = 0; k < taps; ++k) own[k] = load(weight + (taps - 1 - k) * WIDTH);
            for (int64_t t = 0; t < tokens; ++t) {
                int64_t row = place + t;
                Vector sum = row >= 0 && row < given.reach ? load(last + row * WIDTH) : Vector{};
                if (taps)
                    for (int k = 0; k < taps; ++k) sum += own[k] * load(grad + (t + k) * WIDTH);
                else
                    for (int64_t k = 0; k < all; ++k)
                        sum += load(weight + (all - 1 - k) * WIDTH) * load(grad + (t + k) * WIDTH);
                store(to + t * WIDTH, sum);
            }
        });
    }
};

}  // namespace

SEQMIX_BINDINGS(module) {
    module.def("short_convolution_workspace", &Space::size);
    module.def(
        "short_convolution",
        [](Tensor x, Tensor weight, Tensor bias, Tensor state, Tensor bounds, bool silu, Tensor y, Tensor last,
           Tensor workspace, int threads) {
            Forward pass{{x, weight, bias, state, bounds, silu, last.size(1)}, y, last, workspace};
            pass.given.require_shapes({state, last});
            pass.run(threads);
        },
        "x"_a, "weight"_a, "bias"_a.none(), "state"_a.none(), "bounds"_a.none(), "silu"_a, "y"_a, "last"_a,
        "workspace"_a, "threads"_a, WithoutGil());
    module.def(
        "short_convolution_backward",
        [](Tensor x, Tensor weight, Tensor bias, Tensor state, Tensor bounds, bool silu, Tensor grad_y,
           Tensor grad_last, Tensor grad_x, Tensor grad_state, Tensor grad_channels, Tensor workspace, int threads) {
            Backward pass{{x, weight, bias, state, bounds, silu, grad_last.size(1)},
                          grad_y, grad_last, grad_x, grad_state, grad_channels, workspace};
            pass.given.require_shapes({state, grad_last, grad_state});
            pass.run(threads);
        },
        "x"_a, "weight"_a, "bias"_a.none(), "state"_a.none(), "bounds"_a.none(), "silu"_a, "grad_y"_a, "grad_last"_a,
        "grad_x"_a, "grad_state"_a, "grad_channels"_a, "workspace"_a, "threads"_a, WithoutGil());
}

}  // namespace seqmix
