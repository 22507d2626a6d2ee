// The decay of one head over one chunk, one number per token, and how it is split between the two sides of a product.
//
// With b the running sum of the log decays, token i sees what token j wrote times exp(b[i] - b[j]). While b spans
// little over the chunk, that is exp(b[i] - m) exp(m - b[j]) with m in the middle: factors of the rows of the output
// and of the values, so that q and k stay as they are (and may be shared by heads). Otherwise the chunk takes the
// matrix exp(b[i] - b[j]), which cannot overflow. A transition of negative sign keeps its sign in the same factors.
#pragma once

#include <cmath>

#include "linear_attention.hpp"

namespace seqmix {

// Where the decays of a head come from: log decays as given, or step sizes times a rate.
struct ScalarGate {
    Tensor gate;              // [B, T, H] log decays, or nothing
    Tensor step;              // [B, T, H] step sizes, or nothing
    Tensor rate, bias, skip;  // [H], or nothing
    bool softplus, negative;

    bool decays() const { return gate || rate; }
    float of_head(const Tensor& tensor, int64_t head, float absent) const {
        return tensor ? tensor.as<float>()[head * tensor.stride(0)] : absent;
    }
};

struct ScalarDecay {
    bool apart;                  // whether the span is too wide for factors
    float before, after;         // not apart: of the state before it is read, and once the chunk was added
    float fade;                  // apart: of the state over the whole chunk
    float out[CHUNK], in[CHUNK];  // of the rows of the output and of the values, inside the chunk
    float write[CHUNK];          // in[] times the step size
    float reach[CHUNK], hold[CHUNK];  // apart: further factors of out and in where they meet the state
    float step[CHUNK], slope[CHUNK];  // the step size, and its derivative by the number given
    float transition[CHUNK];          // what the state is multiplied by
    float chain[CHUNK];               // derivative of the log of the decay's size by step * rate
    float high[CHUNK], low[CHUNK];    // b - m, in two parts

    void read(const ScalarGate& from, const Text& text, int64_t t, int64_t rows, int64_t head);
    void split(int64_t rows);
};

// log(1 + e^x) and its derivative; log(1 + u) = 2 artanh(u / (2 + u)).
inline Vector softplus(Vector x, Vector& slope) {
    Vector size = maximum(x, -x), u = exp(-size);
    Vector s = u / (2.0f + u), square = s * s;
    Vector series = broadcast(1.0f / 15);
    for (int odd = 13; odd >= 1; odd -= 2) series = series * square + 1.0f / odd;
    Vector falling = u / (1.0f + u);
    slope = choose(x > 0.0f, 1.0f - falling, falling);
    return maximum(x, Vector{}) + 2.0f * s * series;
}

// Step sizes and log decays: step, slope, transition, chain, and the running sum of the logs in high.
inline void ScalarDecay::read(const ScalarGate& from, const Text& text, int64_t t, int64_t rows, int64_t head) {
    int64_t padded = round_up(rows);
    auto column = [&](const Tensor& tensor, float* to) {
        const float* at = tensor.as<float>() + text.row * tensor.stride(0) + (text.start + t) * tensor.stride(1) +
                          head * tensor.stride(2);
        for (int64_t i = 0; i < rows; ++i) to[i] = at[i * tensor.stride(1)];
        for (int64_t i = rows; i < padded; ++i) to[i] = 0;
    };
    if (from.step) {
        column(from.step, step);
        float bias = from.of_head(from.bias, head, 0);
        for (int64_t i = 0; i < padded; i += WIDTH) {
            Vector given = load(step + i) + bias, derivative = broadcast(1);
            store(step + i, from.softplus ? seqmix::softplus(given, derivative) : given);
            store(slope + i, derivative);
        }
    } else {
        for (int64_t i = 0; i < padded; ++i) step[i] = 1;
    }
    if (from.gate) column(from.gate, high);
    else {
        float rate = from.of_head(from.rate, head, 0);
        for (int64_t i = 0; i < rows; ++i) high[i] = step[i] * rate;
    }
    for (int64_t i = 0; i < padded; ++i) chain[i] = 1;
    if (from.negative) {
        const double smallest = 1e-30;  // the sign of zero does not matter, its logarithm must be finite
        for (int64_t i = 0; i < rows; ++i) {
            double decay = std::exp(double(high[i])), value = 1 + 2 * std::expm1(double(high[i]));
            if (std::fabs(value) < smallest) value = smallest;
            chain[i] = float(2 * decay / value);
            transition[i] = float(value);
            high[i] = float(std::log(std::fabs(value)));
        }
    } else {
        for (int64_t i = 0; i < padded; i += WIDTH) store(transition + i, exp(load(high + i)));
    }
}

inline void ScalarDecay::split(int64_t rows) {
    int64_t padded = round_up(rows);
    double total = 0, sums[CHUNK];
    for (int64_t i = 0; i < rows; ++i) sums[i] = total += high[i] < LOWEST_LOG_DECAY ? LOWEST_LOG_DECAY : high[i];
    apart = total < -SPAN;
    double middle = apart ? 0 : total / 2;
    for (int64_t i = 0; i < rows; ++i) {
        high[i] = float(sums[i] - middle);
        low[i] = float(sums[i] - middle - high[i]);
    }
    for (int64_t i = rows; i < padded; ++i) high[i] = low[i] = 0;
    float sign[CHUNK], last = 1;
    for (int64_t i = 0; i < rows; ++i) sign[i] = last = transition[i] < 0 ? -last : last;
    for (int64_t i = rows; i < padded; ++i) sign[i] = 1;
    Vector end = broadcast(high[rows - 1]), rest = broadcast(low[rows - 1]);
    for (int64_t i = 0; i < padded; i += WIDTH) {
        Vector x = load(high + i), more = load(low + i), signs = load(sign + i);
        if (apart) {
            store(out + i, signs), store(in + i, signs);
            store(reach + i, exp(x)), store(hold + i, last * exp((end - x) + (rest - more)));
        } else {  // e^(x + more) = e^x (1 + more): the rounding of x would otherwise cost a digit
            store(out + i, signs * exp(x) * (1.0f + more)), store(in + i, signs * exp(-x) * (1.0f - more));
            store(reach + i, broadcast(1)), store(hold + i, broadcast(1));
        }
        store(write + i, load(in + i) * load(step + i));
    }
    before = apart ? 1 : float(std::exp(middle));
    after = apart ? 1 : last * float(std::exp(total - middle));
    fade = apart ? last * float(std::exp(total)) : 1;
}

// to[i, j] = from[i, j] exp(b[i] - b[j]) for j <= i, else 0; `to` may be `from`.
inline void decay_scores(const ScalarDecay& decay, int64_t rows, const float* from, float* to) {
    Integers lanes = lane_numbers();
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < round_up(rows); j += WIDTH) {
            Vector log = (decay.high[i] - load(decay.high + j)) + (decay.low[i] - load(decay.low + j));
            Vector scores = load(from + i * CHUNK + j) * exp(minimum(Vector{}, log));
            store(to + i * CHUNK + j, choose(lanes + int32_t(j) <= int32_t(i), scores, Vector{}));
        }
}

}  // namespace seqmix
