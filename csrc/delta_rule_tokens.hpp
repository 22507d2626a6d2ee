// Delta rule token by token: for decoding, where a chunk would be mostly empty.
#pragma once

#include "delta_rule.hpp"

namespace seqmix::delta {

constexpr int64_t WIDEST_KEY = 512;            // of the rows that are kept on the stack
constexpr int64_t WORTH_A_THREAD = 1 << 18;  // entries of states read: about 30 microseconds

struct Tokens {
    Inputs inputs;
    Tensor state;    // [N, H, K, V]
    Tensor o, last;  // [B, T, H, V], [N, H, K, V]

    template <class T>
    void run(int threads) const {
        const Sizes s = inputs.sizes();
        int64_t heads = inputs.heads(), tasks = inputs.texts() * heads;
        int64_t work = inputs.batch() * inputs.length() * s.steps * heads * s.key * s.value;
        for_each_task(tasks, work < WORTH_A_THREAD ? 1 : threads, [&](int64_t task, int) {
            run_head<T>(task / heads, task % heads);
        });
    }

    template <class T>
    void run_head(int64_t index, int64_t head) const {
        const Sizes s = inputs.sizes();
        float q[WIDEST_KEY], k[WIDEST_KEY], decay[WIDEST_KEY];
        int64_t key_head = head / s.group;
        Text text = text_at(inputs.bounds, index, inputs.length());
        const float* from = state.as<float>() + index * state.stride(0) + head * state.stride(1);
        float* to = last.as<float>() + index * last.stride(0) + head * last.stride(1);
        int64_t from_row = state.stride(2), to_row = last.stride(2);
        if (text.length == 0) {
            for (int64_t c = 0; c < s.key; ++c)
                std::memcpy(to + c * to_row, from + c * from_row, size_t(s.value) * sizeof(float));
        }
        for (int64_t t = 0; t < text.length; ++t) {
            float inverse;
            load_rows(token<T>(inputs.q, text, t) + key_head * inputs.q.stride(2), 0, 1, 1, s.key, q, s.keys);
            scale_rows(1, s.keys, float(inputs.scale), inputs.normalize, q, &inverse);
            load_decay(text, t, head, s, decay);
            for (int64_t step = 0; step < s.steps; ++step) {
                int64_t row = (text.start + t) * s.steps + step;
                auto at = [&](const Tensor& tensor, int64_t h) {
                    return text.row * tensor.stride(0) + row * tensor.stride(1) + h * tensor.stride(2);
                };
                load_rows(inputs.k.as<T>() + at(inputs.k, key_head), 0, 1, 1, s.key, k, s.keys);
                if (inputs.normalize) scale_rows(1, s.keys, 1, true, k, &inverse);
                float strength = inputs.beta.as<float>()[at(inputs.beta, head)];
                const T* v = inputs.v.as<T>() + at(inputs.v, head);
                T* out = step == s.steps - 1 ? token<T>(o, text, t) + head * o.stride(2) : nullptr;
                int64_t j = 0;
                for (; j + 4 * WIDTH <= s.value; j += 4 * WIDTH)
                    columns<4>(s.key, q, k, decay, strength, v + j, from + j, from_row, to + j, to_row,
                               out ? out + j : nullptr);
                for (; j + WIDTH <= s.value; j += WIDTH)
                    columns<1>(s.key, q, k, decay, strength, v + j, from + j, from_row, to + j, to_row,
                               out ? out + j : nullptr);
                if (j < s.value)
                    last_columns(s.value - j, s.key, q, k, decay, strength, v + j, from + j, from_row, to + j, to_row,
                                 out ? out + j : nullptr);
                for (int64_t c = 0; c < s.keys; c += WIDTH) store(decay + c, broadcast(1));
                from = to, from_row = to_row;
            }
        }
    }

    void load_decay(const Text& text, int64_t t, int64_t head, const Sizes& s, float* decay) const {
        const float* g = inputs.g ? token<float>(inputs.g, text, t) + head * inputs.g.stride(2) : nullptr;
        if (inputs.by_column()) load_rows(g, 0, 1, 1, s.key, decay, s.keys);
        for (int64_t c = 0; c < s.keys; c += WIDTH)
            store(decay + c, exp(!g ? Vector{} : inputs.by_column() ? load(decay + c) : broadcast(*g)));
    }

    // One row written to some columns of the state, and read: S <- decay S + k (beta (v - (decay S)^T k))^T.
    template <int vectors, class T>
    static void columns(int64_t key, const float* q, const float* k, const float* decay, float strength, const T* v,
                        const float* from, int64_t from_row, float* to, int64_t to_row, T* out) {
        Vector held[2][vectors] = {}, read[2][vectors] = {}, change[vectors];
        for (int64_t c = 0; c < key; ++c)
            for (int i = 0; i < vectors; ++i)
                held[c & 1][i] += broadcast(k[c] * decay[c]) * load(from + c * from_row + i * WIDTH);
        for (int i = 0; i < vectors; ++i) change[i] = strength * (load(v + i * WIDTH) - held[0][i] - held[1][i]);
        for (int64_t c = 0; c < key; ++c)
            for (int i = 0; i < vectors; ++i) {
                Vector now = decay[c] * load(from + c * from_row + i * WIDTH) + k[c] * change[i];
                store(to + c * to_row + i * WIDTH, now);
                read[c & 1][i] += q[c] * now;
            }
        if (out)
            for (int i = 0; i < vectors; ++i) store(out + i * WIDTH, read[0][i] + read[1][i]);
    }

    template <class T>
    static void last_columns(int64_t count, int64_t key, const float* q, const float* k, const float* decay,
                             float strength, const T* v, const float* from, int64_t from_row, float* to,
                             int64_t to_row, T* out) {
        for (int64_t j = 0; j < count; ++j) {
            float held = 0, read = 0;
            for (int64_t c = 0; c < key; ++c) held += k[c] * decay[c] * from[c * from_row + j];
            float change = strength * (to_float(v[j]) - held);
            for (int64_t c = 0; c < key; ++c) {
                float now = decay[c] * from[c * from_row + j] + k[c] * change;
                to[c * to_row + j] = now;
                read += q[c] * now;
            }
            if (out) from_float(read, out[j]);
        }
    }
};

}  // namespace seqmix::delta
