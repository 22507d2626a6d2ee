// Selective scan: h_t = d_t h_{t-1} + delta_t u_t B_t, y_t = (C_t . h_t + D u_t) silu(z_t), for every channel, with
// d_t = e_t or 2 e_t - 1 (signed), e_t = exp(delta_t A).
//
// A task is a text and a piece of its channels; lanes are channels. Time goes by in blocks, and within a block a few
// entries of the state stay in registers along the tokens. B and C belong to groups of channels: [B, T, G, N].
#include "selective_scan.hpp"

namespace seqmix {
namespace {

using namespace selective;

constexpr int64_t TOKENS = 32;  // of a block; the states at its borders are kept for the backward pass
constexpr int64_t AREA = PIECE * TOKENS;
constexpr int SOME = 4;  // entries of the state in registers at a time

// Blocks are counted through all texts; a text of a packed row begins after all whole blocks before it.
int64_t first_block(const Arguments& given, const Text& text, int64_t index) {
    if (!given.bounds) return index * ((given.length() + TOKENS - 1) / TOKENS);
    return text.start / TOKENS + index;
}

// The workspace of a thread. Blocks of tokens or of states lie by vector: [vector][token or state][lane].
struct Space {
    float *step, *write, *y, *gate;                             // delta; delta u; C . h + D u; z
    float *B, *C;                                               // [TOKENS][wide]
    float *state, *rate;                                        // h; A log2(e)
    float *u, *slope, *grad_y, *grad_write, *grad_step;         // slope: the derivative of the softplus
    float *carried, *grad_rate;                                 // the gradient of h; that of A
    float *decay, *kept, *sums_B, *sums_C;                      // of SOME states: [token][state][lane]
    float *grad_bias, *grad_skip;                               // [PIECE]

    Space(float* at, int64_t wide, bool backward) {
        auto take = [&](float*& part, int64_t count) { part = at, at += count; };
        for (float** part : {&step, &write, &y, &gate}) take(*part, AREA);
        for (float** part : {&B, &C}) take(*part, TOKENS * wide);
        for (float** part : {&state, &rate}) take(*part, PIECE * wide);
        if (!backward) return;
        for (float** part : {&u, &slope, &grad_y, &grad_write, &grad_step}) take(*part, AREA);
        for (float** part : {&carried, &grad_rate}) take(*part, PIECE * wide);
        for (float** part : {&decay, &kept, &sums_B, &sums_C}) take(*part, TOKENS * SOME * WIDTH);
        for (float** part : {&grad_bias, &grad_skip}) take(*part, PIECE);
    }
    static int64_t size(int64_t wide, bool backward) {
        int64_t forward = 4 * AREA + 2 * (TOKENS + PIECE) * wide;
        return backward ? forward + 5 * AREA + 2 * PIECE * wide + 4 * TOKENS * SOME * 16 + 2 * PIECE : forward;
    }
};

int64_t vectors(const Piece& piece) { return (piece.count + WIDTH - 1) / WIDTH; }

Matrix states_of(const Tensor& tensor, int64_t row, const Piece& piece) {  // [N, channels of the piece]
    return {address(tensor, row * tensor.stride(0) + piece.channel * tensor.stride(1)), tensor.dtype, tensor.stride(2),
            tensor.stride(1)};
}

void read_rates(const Arguments& given, const Piece& piece, const Space& space) {
    int64_t N = given.states(), wide = given.wide();
    Matrix rates{address(given.A, piece.channel * given.A.stride(0)), given.A.dtype, given.A.stride(1),
                 given.A.stride(0)};
    read_block(rates, N, piece.count, space.rate, by_vector(wide));
    for (int64_t i = 0; i < vectors(piece) * wide * WIDTH; i += WIDTH)
        store(space.rate + i, load(space.rate + i) * LOG2E);
}

// Everything of a block that does not depend on the state. y begins as D u.
template <bool backward>
void read_tokens(const Arguments& given, const Text& text, const Piece& piece, int64_t t, int64_t tokens,
                 const Space& space) {
    float bias[PIECE], skip[PIECE];
    read_channels(given.bias, piece, bias);
    read_channels(given.D, piece, skip);
    Places at = by_vector(TOKENS);
    read_block(tokens_of(given.delta, text, t, piece.channel), tokens, piece.count, space.step, at);
    read_block(tokens_of(given.u, text, t, piece.channel), tokens, piece.count, space.write, at);
    if (given.z) read_block(tokens_of(given.z, text, t, piece.channel), tokens, piece.count, space.gate, at);
    for (int64_t v = 0; v < vectors(piece); ++v) {
        Vector added = load(bias + v * WIDTH), weight = load(skip + v * WIDTH);
        for (int64_t i = v * TOKENS * WIDTH; i < (v * TOKENS + tokens) * WIDTH; i += WIDTH) {
            Vector raw = load(space.step + i) + added, u = load(space.write + i);
            Vector step = given.softplus ? softplus(raw) : raw;
            if (backward) {
                store(space.slope + i, given.softplus ? sigmoid(raw) : broadcast(1.0f));
                store(space.u + i, u);
            }
            store(space.step + i, step);
            store(space.write + i, step * u);
            store(space.y + i, weight * u);
        }
    }
    read_block(maps_of(given.B, text, t, piece.group), tokens, given.states(), space.B, by_row(given.wide()));
    read_block(maps_of(given.C, text, t, piece.group), tokens, given.states(), space.C, by_row(given.wide()));
}

// States [n, n + count) of a vector of channels through the tokens of a block. `keep` is for the backward pass: it
// leaves the decay d_t and `kept`, the derivative of h_t by delta_t A, and adds y'_t h_t to the sums of C'.
template <int count, bool negative, bool keep>
void advance(const Space& space, int64_t wide, int64_t vector, int64_t n, int64_t tokens) {
    int64_t offset = vector * TOKENS * WIDTH;
    const float *steps = space.step + offset, *writes = space.write + offset;
    const float *grads = keep ? space.grad_y + offset : nullptr, *B = space.B + n, *C = space.C + n;
    float* y = space.y + offset;
    float* states = space.state + (vector * wide + n) * WIDTH;
    const float* rates = space.rate + (vector * wide + n) * WIDTH;
    Vector h[count], rate[count];
    for (int i = 0; i < count; ++i) h[i] = load(states + i * WIDTH), rate[i] = load(rates + i * WIDTH);
    for (int64_t t = 0; t < tokens; ++t) {
        Vector step = load(steps + t * WIDTH), write = load(writes + t * WIDTH), out = load(y + t * WIDTH);
        for (int i = 0; i < count; ++i) {
            Vector decay = power_of_two(step * rate[i]);
            Vector kept = decay * h[i];
            if (negative) kept = kept + kept;
            Vector left = negative ? kept - h[i] : kept;
            h[i] = left + write * B[t * wide + i];
            out += h[i] * C[t * wide + i];
            if (keep) {
                int64_t place = (t * count + i) * WIDTH;
                store(space.decay + place, negative ? decay + decay - 1.0f : decay);
                store(space.kept + place, kept);
                store(space.sums_C + place, load(space.sums_C + place) + load(grads + t * WIDTH) * h[i]);
            }
        }
        store(y + t * WIDTH, out);
    }
    for (int i = 0; i < count; ++i) store(states + i * WIDTH, h[i]);
}

template <bool negative, bool keep>
void advance_some(const Space& space, int64_t wide, int64_t vector, int64_t n, int64_t some, int64_t tokens) {
    if (some == SOME) advance<SOME, negative, keep>(space, wide, vector, n, tokens);
    else advance<1, negative, keep>(space, wide, vector, n, tokens);
}

// How many states to take at a time from the n-th on.
inline int64_t some_states(int64_t n, int64_t states) { return n + SOME <= states ? SOME : 1; }

struct Forward {
    Arguments given;
    Tensor y, last, borders, workspace;  // [B, T, E], [R, E, N], [blocks, pieces, PIECE * wide] or none, [threads, ...]

    void run(int threads) const {
        int64_t pieces = given.pieces();
        for_each_task(given.texts() * pieces, threads, [&](int64_t task, int thread) {
            Space space(workspace.as<float>() + thread * workspace.stride(0), given.wide(), false);
            given.negative ? piece<true>(task / pieces, task % pieces, space)
                           : piece<false>(task / pieces, task % pieces, space);
        });
    }

    template <bool negative>
    void piece(int64_t index, int64_t number, const Space& space) const {
        int64_t N = given.states(), wide = given.wide();
        Text text = text_at(given.bounds, index, given.length());
        Piece piece = piece_at(given, number);
        read_rates(given, piece, space);
        fill(space.state, PIECE * wide);
        if (given.state) read_block(states_of(given.state, index, piece), N, piece.count, space.state, by_vector(wide));
        int64_t block = first_block(given, text, index);
        for (int64_t t = 0; t < text.length; t += TOKENS, ++block) {
            int64_t tokens = text.length - t < TOKENS ? text.length - t : TOKENS;
            if (borders) {
                float* border = borders.as<float>() + (block * given.pieces() + number) * PIECE * wide;
                std::memcpy(border, space.state, PIECE * wide * sizeof(float));
            }
            read_tokens<false>(given, text, piece, t, tokens, space);
            for (int64_t v = 0; v < vectors(piece); ++v) {
                for (int64_t n = 0; n < N; n += some_states(n, N))
                    advance_some<negative, false>(space, wide, v, n, some_states(n, N), tokens);
                if (!given.z) continue;
                for (int64_t i = v * TOKENS * WIDTH; i < (v * TOKENS + tokens) * WIDTH; i += WIDTH)
                    store(space.y + i, load(space.y + i) * silu(load(space.gate + i)));
            }
            write_block(tokens_of(y, text, t, piece.channel), tokens, piece.count, space.y, by_vector(TOKENS));
        }
        write_block(states_of(last, index, piece), N, piece.count, space.state, by_vector(wide));
    }
};

// Adjoint: with G_t the gradient of h_t and y'_t that of C_t . h_t + D u_t, from the last token back,
//     G_t = y'_t C_t + d_{t+1} G_{t+1}        C'_t = sum_e y'_t h_t        B'_t = sum_e delta_t u_t G_t
//     L_t = G_t d'_t h_{t-1}, the gradient of delta_t A, where d'_t = e_t or 2 e_t
//     delta'_t = sum_n A L_t + u_t (G_t . B_t)    u'_t = delta_t (G_t . B_t) + D y'_t    A' = sum_t delta_t L_t
// Every block is run again from the state before it.
template <int count>
void retreat(const Space& space, int64_t wide, int64_t vector, int64_t n, int64_t tokens) {
    int64_t offset = vector * TOKENS * WIDTH, first = (vector * wide + n) * WIDTH;
    const float *steps = space.step + offset, *writes = space.write + offset, *grads = space.grad_y + offset;
    const float *B = space.B + n, *C = space.C + n;
    Vector carried[count], rate[count], grad_rate[count];
    for (int i = 0; i < count; ++i) {
        carried[i] = load(space.carried + first + i * WIDTH);
        rate[i] = load(space.rate + first + i * WIDTH);
        grad_rate[i] = load(space.grad_rate + first + i * WIDTH);
    }
    for (int64_t t = tokens - 1; t >= 0; --t) {
        Vector step = load(steps + t * WIDTH), write = load(writes + t * WIDTH), grad = load(grads + t * WIDTH);
        Vector grad_write = load(space.grad_write + offset + t * WIDTH);
        Vector grad_step = load(space.grad_step + offset + t * WIDTH);
        for (int i = 0; i < count; ++i) {
            int64_t place = (t * count + i) * WIDTH;
            Vector G = carried[i] + grad * C[t * wide + i];
            grad_write += G * B[t * wide + i];
            store(space.sums_B + place, load(space.sums_B + place) + write * G);
            Vector L = G * load(space.kept + place);
            grad_step += rate[i] * L;
            grad_rate[i] += step * L;
            carried[i] = G * load(space.decay + place);
        }
        store(space.grad_write + offset + t * WIDTH, grad_write);
        store(space.grad_step + offset + t * WIDTH, grad_step);
    }
    for (int i = 0; i < count; ++i) {
        store(space.carried + first + i * WIDTH, carried[i]);
        store(space.grad_rate + first + i * WIDTH, grad_rate[i]);
    }
}

struct Backward {
    Arguments given;
    Tensor borders, grad_y, grad_last;             // of the outputs
    Tensor grad_u, grad_delta, grad_z, grad_state;  // [B, T, E] three times, [R, E, N]
    Tensor grad_A, grad_channels;                  // for every text: [R, E, N], and of bias and D [R, 2, E]
    Tensor grad_maps;                              // of B and C, sums over some pieces: [parts, 2, B * T, G * N], zeros
    Tensor workspace;

    void run(int threads) const {
        int64_t parts = grad_maps.size(0);
        for_each_task(given.texts() * parts, threads, [&](int64_t task, int thread) {
            Space space(workspace.as<float>() + thread * workspace.stride(0), given.wide(), true);
            for (int64_t number = task % parts; number < given.pieces(); number += parts)
                given.negative ? piece<true>(task / parts, number, task % parts, space)
                               : piece<false>(task / parts, number, task % parts, space);
        });
    }

    template <bool negative>
    void piece(int64_t index, int64_t number, int64_t part, const Space& space) const {
        int64_t N = given.states(), wide = given.wide();
        Text text = text_at(given.bounds, index, given.length());
        Piece piece = piece_at(given, number);
        read_rates(given, piece, space);
        read_block(states_of(grad_last, index, piece), N, piece.count, space.carried, by_vector(wide));
        fill(space.grad_rate, PIECE * wide);
        fill(space.grad_bias, 2 * PIECE);
        int64_t blocks = (text.length + TOKENS - 1) / TOKENS, first = first_block(given, text, index);
        for (int64_t block = blocks - 1; block >= 0; --block) {
            const float* border = borders.as<float>() + ((first + block) * given.pieces() + number) * PIECE * wide;
            std::memcpy(space.state, border, PIECE * wide * sizeof(float));
            int64_t t = block * TOKENS, tokens = text.length - t < TOKENS ? text.length - t : TOKENS;
            read_tokens<true>(given, text, piece, t, tokens, space);
            read_block(tokens_of(grad_y, text, t, piece.channel), tokens, piece.count, space.grad_y,
                       by_vector(TOKENS));
            open(piece, tokens, space);
            for (int64_t n = 0; n < N; n += some_states(n, N)) {
                int64_t some = some_states(n, N);
                fill(space.sums_B, 2 * TOKENS * SOME * WIDTH);
                for (int64_t v = 0; v < vectors(piece); ++v) {
                    advance_some<negative, true>(space, wide, v, n, some, tokens);
                    some == SOME ? retreat<SOME>(space, wide, v, n, tokens) : retreat<1>(space, wide, v, n, tokens);
                }
                add_maps(0, space.sums_B, text, t, tokens, piece.group, n, some, part);
                add_maps(1, space.sums_C, text, t, tokens, piece.group, n, some, part);
            }
            close(text, piece, t, tokens, space);
        }
        write_block(states_of(grad_A, index, piece), N, piece.count, space.grad_rate, by_vector(wide));
        write_block(states_of(grad_state, index, piece), N, piece.count, space.carried, by_vector(wide));
        for (int which = 0; which < 2; ++which) {
            int64_t offset = index * grad_channels.stride(0) + which * grad_channels.stride(1) + piece.channel;
            write_block({address(grad_channels, offset), Dtype::float32, 0, 1}, 1, piece.count,
                        which ? space.grad_skip : space.grad_bias, by_row(PIECE));
        }
    }

    // The gradient of C . h + D u from that of y; sums along the state begin with nothing.
    void open(const Piece& piece, int64_t tokens, const Space& space) const {
        for (int64_t v = 0; v < vectors(piece); ++v)
            for (int64_t i = v * TOKENS * WIDTH; i < (v * TOKENS + tokens) * WIDTH; i += WIDTH) {
                store(space.grad_write + i, Vector{});
                store(space.grad_step + i, Vector{});
                if (!given.z) continue;
                Vector z = load(space.gate + i), gate = sigmoid(z), grad = load(space.grad_y + i);
                store(space.grad_y + i, grad * z * gate);
                store(space.gate + i, grad * silu_slope(z, gate));
            }
    }

    // The gradients of u, delta and z from those of what was made of them.
    void close(const Text& text, const Piece& piece, int64_t t, int64_t tokens, const Space& space) const {
        float skip[PIECE];
        read_channels(given.D, piece, skip);
        for (int64_t v = 0; v < vectors(piece); ++v) {
            Vector weight = load(skip + v * WIDTH);
            Vector bias = load(space.grad_bias + v * WIDTH), sum = load(space.grad_skip + v * WIDTH);
            for (int64_t i = v * TOKENS * WIDTH; i < (v * TOKENS + tokens) * WIDTH; i += WIDTH) {
                Vector u = load(space.u + i), grad = load(space.grad_y + i), grad_write = load(space.grad_write + i);
                Vector step = (load(space.grad_step + i) * LN2 + grad_write * u) * load(space.slope + i);
                store(space.grad_write + i, grad_write * load(space.step + i) + weight * grad);
                store(space.grad_step + i, step);
                if (given.z) store(space.gate + i, load(space.gate + i) * load(space.y + i));
                bias += step;
                sum += grad * u;
            }
            store(space.grad_bias + v * WIDTH, bias);
            store(space.grad_skip + v * WIDTH, sum);
        }
        auto put = [&](const Tensor& to, const float* from) {
            write_block(tokens_of(to, text, t, piece.channel), tokens, piece.count, from, by_vector(TOKENS));
        };
        put(grad_u, space.grad_write);
        put(grad_delta, space.grad_step);
        if (given.z) put(grad_z, space.gate);
    }

    // Adds the lanes of [token][state] up, into the gradient of B (which = 0) or C (which = 1).
    void add_maps(int which, const float* lanes, const Text& text, int64_t t, int64_t tokens, int64_t group, int64_t n,
                  int64_t some, int64_t part) const {
        const Tensor& to = grad_maps;
        float* sums = to.as<float>() + part * to.stride(0) + which * to.stride(1) +
                      ((text.row * given.length() + text.start + t) * given.groups() + group) * given.states() + n;
        int64_t row = given.groups() * given.states();
        for (int64_t i = 0; i < tokens * some; i += WIDTH) {
            float values[WIDTH];
            store(values, sums_of_rows(lanes + i * WIDTH));
            for (int64_t k = 0; k < WIDTH && i + k < tokens * some; ++k)
                sums[(i + k) / some * row + (i + k) % some] += values[k];
        }
    }
};

void run(const Arguments& given, const Tensor& y, const Tensor& last, const Tensor& borders, const Tensor& workspace,
         int threads) {
    given.require_shapes({given.state, last});
    require(!given.state || given.state.dtype == last.dtype, "both states in one dtype");
    bool rows = given.A.stride(1) == 1 && last.stride(2) == 1 && (!given.state || given.state.stride(2) == 1);
    if (given.length() == 1 && rows && !given.bounds && !borders) step(given, y, last, workspace, threads);
    else Forward{given, y, last, borders, workspace}.run(threads);
}

// [B, ...] as [B, 1, ...].
Tensor with_axis(Tensor tensor) {
    for (int axis = tensor.axes++; axis > 1; --axis)
        tensor.sizes[axis] = tensor.sizes[axis - 1], tensor.strides[axis] = tensor.strides[axis - 1];
    tensor.sizes[1] = 1;
    return tensor;
}

}  // namespace

SEQMIX_BINDINGS(module) {
    module.def("selective_scan_workspace", [](int64_t states, bool backward) {
        return Space::size(round_up(states, 16), backward);
    });
    module.def(
        "selective_scan",
        [](Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor D, Tensor z, Tensor bias, Tensor state,
           Tensor bounds, bool softplus, bool negative, Tensor y, Tensor last, Tensor borders, Tensor workspace,
           int threads) {
            run({u, delta, A, B, C, D, z, bias, state, bounds, softplus, negative}, y, last, borders, workspace,
                threads);
        },
        "u"_a, "delta"_a, "A"_a, "B"_a, "C"_a, "D"_a.none(), "z"_a.none(), "bias"_a.none(), "state"_a.none(),
        "bounds"_a.none(), "softplus"_a, "negative"_a, "y"_a, "last"_a, "borders"_a.none(), "workspace"_a, "threads"_a,
        WithoutGil());
    module.def(
        "selective_scan_update",  // u, delta, z and y [B, E], B and C [B, N] or [B, G, N]; the state is written in place
        [](Tensor state, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor D, Tensor z, Tensor bias,
           bool softplus, bool negative, Tensor y, Tensor workspace, int threads) {
            for (Tensor* token : {&u, &delta, &z, &y, &B, &C})
                if (*token) *token = with_axis(*token);
            if (B.axes == 3) B = with_axis(B);
            if (C.axes == 3) C = with_axis(C);
            run({u, delta, A, B, C, D, z, bias, state, {}, softplus, negative}, y, state, {}, workspace, threads);
        },
        "state"_a, "u"_a, "delta"_a, "A"_a, "B"_a, "C"_a, "D"_a.none(), "z"_a.none(), "bias"_a.none(), "softplus"_a,
        "negative"_a, "y"_a, "workspace"_a, "threads"_a, WithoutGil());
    module.def(
        "selective_scan_backward",
        [](Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor D, Tensor z, Tensor bias, Tensor bounds,
           bool softplus, bool negative, Tensor borders, Tensor grad_y, Tensor grad_last, Tensor grad_u,
           Tensor grad_delta, Tensor grad_z, Tensor grad_state, Tensor grad_A, Tensor grad_channels, Tensor grad_maps,
           Tensor workspace, int threads) {
            Backward{{u, delta, A, B, C, D, z, bias, {}, bounds, softplus, negative},
                     borders, grad_y, grad_last, grad_u, grad_delta, grad_z, grad_state, grad_A, grad_channels,
                     grad_maps, workspace}
                .run(threads);
        },
        "u"_a, "delta"_a, "A"_a, "B"_a, "C"_a, "D"_a.none(), "z"_a.none(), "bias"_a.none(), "bounds"_a.none(),
        "softplus"_a, "negative"_a, "borders"_a, "grad_y"_a, "grad_last"_a, "grad_u"_a, "grad_delta"_a,
        "grad_z"_a.none(), "grad_state"_a, "grad_A"_a, "grad_channels"_a, "grad_maps"_a, "workspace"_a, "threads"_a,
        WithoutGil());
}

}  // namespace seqmix
