// Diagonal scan: h_t = exp(a_t) h_{t-1} + x_t for every channel.
//
// A task is a text and a few vectors of its channels; the state stays in registers along the text.
#include "parallel.hpp"
#include "tensor.hpp"
#include "texts.hpp"

namespace seqmix {
namespace {

constexpr int64_t PIECE = 4 * WIDTH;  // channels of a task: at least a cache line of every row

// A vector of channels that all exist, or the last ones, of which `count` do.
struct Whole {
    template <class T>
    Vector get(const T* from) const { return load(from); }
    template <class T>
    void put(T* to, Vector value) const { store(to, value); }
};

struct Part {
    int64_t count;
    template <class T>
    Vector get(const T* from) const { return load_part(from, count); }
    template <class T>
    void put(T* to, Vector value) const { store_part(to, value, count); }
};

// visit(index of a text, text, first channel, Whole or Part) for every text and vector of channels.
template <class Visit>
void for_each_vector(const Tensor& bounds, int64_t batch, int64_t length, int64_t channels, int threads,
                     const Visit& visit) {
    int64_t pieces = (channels + PIECE - 1) / PIECE;
    for_each_task(num_texts(bounds, batch) * pieces, threads, [&](int64_t task, int) {
        int64_t index = task / pieces, channel = task % pieces * PIECE;
        int64_t end = channel + PIECE < channels ? channel + PIECE : channels;
        Text text = text_at(bounds, index, length);
        for (; channel + WIDTH <= end; channel += WIDTH) visit(index, text, channel, Whole{});
        if (channel < end) visit(index, text, channel, Part{end - channel});
    });
}

struct Forward {
    Tensor x, a, state, bounds, h, last;  // [B, T, D], [B, T, D], [N, D], [N + 1], [B, T, D], [N, D]

    template <class T, class Decay>
    void run(int threads) const {
        for_each_vector(bounds, x.size(0), x.size(1), x.size(2), threads,
                        [&](int64_t index, Text text, int64_t channel, auto lanes) {
            Vector now = lanes.get(state.as<float>() + index * state.stride(0) + channel);
            for (int64_t t = 0; t < text.length; ++t) {
                Vector decay = exp(lanes.get(token<Decay>(a, text, t) + channel));
                now = decay * now + lanes.get(token<T>(x, text, t) + channel);
                lanes.put(token<T>(h, text, t) + channel, now);
            }
            lanes.put(last.as<float>() + index * last.stride(0) + channel, now);
        });
    }
};

// Adjoint: with G_t the gradient of h_t, from the last token back,
//     G_t = h'_t + exp(a_{t+1}) G_{t+1},    x'_t = G_t,    a'_t = G_t exp(a_t) h_{t-1},    h'_0 = exp(a_1) G_1.
struct Backward {
    Tensor a, state, bounds, h, grad_h, grad_last;  // grad_last [N, D]
    Tensor grad_x, grad_a, grad_state;

    template <class T, class Decay>
    void run(int threads) const {
        for_each_vector(bounds, a.size(0), a.size(1), a.size(2), threads,
                        [&](int64_t index, Text text, int64_t channel, auto lanes) {
            Vector initial = lanes.get(state.as<float>() + index * state.stride(0) + channel);
            Vector carried = lanes.get(grad_last.as<float>() + index * grad_last.stride(0) + channel);
            for (int64_t t = text.length - 1; t >= 0; --t) {
                Vector gradient = carried + lanes.get(token<T>(grad_h, text, t) + channel);
                carried = exp(lanes.get(token<Decay>(a, text, t) + channel)) * gradient;
                Vector before = t > 0 ? lanes.get(token<T>(h, text, t - 1) + channel) : initial;
                lanes.put(token<T>(grad_x, text, t) + channel, gradient);
                lanes.put(token<Decay>(grad_a, text, t) + channel, carried * before);
            }
            lanes.put(grad_state.as<float>() + index * grad_state.stride(0) + channel, carried);
        });
    }
};

template <class Pass>
void run(const Pass& pass, Dtype dtype, Dtype decay, int threads) {
    bool half = dtype == Dtype::bfloat16, half_decay = decay == Dtype::bfloat16;
    if (half) half_decay ? pass.template run<bfloat16, bfloat16>(threads) : pass.template run<bfloat16, float>(threads);
    else half_decay ? pass.template run<float, bfloat16>(threads) : pass.template run<float, float>(threads);
}

// What every pass reads and writes by the sizes of the decays: nothing may leave the memory.
void require_fit(const Tensor& a, const Tensor& bounds, std::initializer_list<Tensor> tokens,
                 std::initializer_list<Tensor> states) {
    require(a.axes == 3, "the decays are [B, T, D]");
    for (const Tensor& tensor : tokens)
        require_shape(tensor, "not of the shape of the decays", {a.size(0), a.size(1), a.size(2)});
    for (const Tensor& state : states) {
        require(state.dtype == Dtype::float32, "states are float32");
        require_shape(state, "states are [N, D]", {num_texts(bounds, a.size(0)), a.size(2)});
    }
}

}  // namespace

SEQMIX_BINDINGS(module) {
    module.def(
        "diagonal_scan",
        [](Tensor x, Tensor a, Tensor state, Tensor bounds, Tensor h, Tensor last, int threads) {
            require_fit(a, bounds, {x, h}, {state, last});
            run(Forward{x, a, state, bounds, h, last}, x.dtype, a.dtype, threads);
        },
        "x"_a, "a"_a, "state"_a, "bounds"_a.none(), "h"_a, "last"_a, "threads"_a, WithoutGil());
    module.def(
        "diagonal_scan_backward",
        [](Tensor a, Tensor state, Tensor bounds, Tensor h, Tensor grad_h, Tensor grad_last, Tensor grad_x,
           Tensor grad_a, Tensor grad_state, int threads) {
            require_fit(a, bounds, {h, grad_h, grad_x, grad_a}, {state, grad_last, grad_state});
            run(Backward{a, state, bounds, h, grad_h, grad_last, grad_x, grad_a, grad_state}, h.dtype, a.dtype, threads);
        },
        "a"_a, "state"_a, "bounds"_a.none(), "h"_a, "grad_h"_a, "grad_last"_a, "grad_x"_a, "grad_a"_a,
        "grad_state"_a, "threads"_a, WithoutGil());
}

}  // namespace seqmix
