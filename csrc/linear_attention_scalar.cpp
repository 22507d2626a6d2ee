// The forward pass: see linear_attention_scalar.hpp.
#include "linear_attention_scalar.hpp"

namespace seqmix {

struct ScalarForward::Blocks {
    float *q, *k, *k_turned, *scores, *decayed, *v, *y, *states;
    float* pending;  // a factor that each state still lacks

    Blocks(const ScalarAttention& in, Workspace& space) {
        q = space.take(CHUNK * in.key_row());
        k = space.take(CHUNK * in.key_row());
        k_turned = space.take(in.key_row() * CHUNK);
        scores = space.take(CHUNK * CHUNK);
        decayed = space.take(CHUNK * CHUNK);
        v = space.take(CHUNK * in.value_row());
        y = space.take(CHUNK * in.value_row());
        states = space.take(in.heads_of_piece() * in.key_width() * in.value_row());
        pending = space.take(in.heads_of_piece());
    }
};

int64_t ScalarForward::workspace() const {
    Workspace space{nullptr};
    Blocks counted(in, space);
    return space.used;
}

void ScalarForward::run(float* memory, int threads) const {
    int64_t each = workspace();
    for_each_task(in.texts() * in.groups() * in.pieces, threads, [&](int64_t number, int thread) {
        ScalarTask task(in, number);
        if (task.text.length <= SHORT) return tokens(task);
        Workspace space{memory + thread * each};
        chunks(task, Blocks(in, space));
    });
}

void ScalarForward::store_output(const Text& text, int64_t t, int64_t rows, int64_t head, const float* factors,
                                 const float* y) const {
    HeadRows to = rows_of(o, text, t, head);
    if (!in.gate.skip) return store_rows(to, rows, in.value_width(), factors, 1, y, in.value_row());
    float skip = in.gate.of_head(in.gate.skip, head, 0);
    HeadRows from = rows_of(in.v, text, t, head);
    to.typed([&](auto* data) {
        auto* values = static_cast<decltype(data)>(from.data);
        for (int64_t i = 0; i < rows; ++i)
            for_each_vector(in.value_width(), [&](int64_t j, auto lanes) {
                Vector read = factors[i] * load(y + i * in.value_row() + j);
                lanes.put(data + i * to.row + j, read + skip * lanes.get(values + i * from.row + j));
            });
    });
}

void ScalarForward::chunks(const ScalarTask& task, const Blocks& at) const {
    const int64_t K = in.key_width(), V = in.value_width(), key_row = in.key_row(), value_row = in.value_row();
    for (int64_t one = 0; one < task.count; ++one)
        load_rows(state_of(in.state, task.index, task.first + one), K, V, nullptr, 1, at.states + one * K * value_row,
                  value_row, K);
    for (int64_t one = 0; one < task.count; ++one) at.pending[one] = 1;
    ScalarDecay decay;
    for (int64_t t = 0; t < task.text.length; t += CHUNK) {
        int64_t rows = task.text.length - t < CHUNK ? task.text.length - t : CHUNK;
        load_rows(rows_of(in.q, task.text, t, task.group), rows, K, nullptr, in.scale, at.q, key_row);
        load_rows(rows_of(in.k, task.text, t, task.group), rows, K, nullptr, 1, at.k, key_row);
        transpose(rows, K, at.k, key_row, at.k_turned, CHUNK);
        matmul<Into::replace, Shape::lower_result>(rows, rows, K, at.q, key_row, 1, at.k_turned, CHUNK, at.scores,
                                                   CHUNK);
        mask_future(at.scores, rows, CHUNK);
        for (int64_t one = 0; one < task.count; ++one) {
            int64_t head = task.first + one;
            float* state = at.states + one * K * value_row;
            decay.read(in.gate, task.text, t, rows, head);
            decay.split(rows);
            load_rows(rows_of(in.v, task.text, t, head), rows, V, decay.write, 1, at.v, value_row);
            const float* scores = at.scores;
            scale_block(state, K * value_row, at.pending[one] * decay.before);
            matmul(rows, V, K, at.q, key_row, 1, state, value_row, at.y, value_row);
            if (decay.apart) {
                decay_scores(decay, rows, at.scores, at.decayed);
                scores = at.decayed;
                scale_rows(at.y, rows, value_row, decay.reach);
            }
            matmul<Into::add, Shape::lower>(rows, V, rows, scores, CHUNK, 1, at.v, value_row, at.y, value_row);
            if (decay.apart) {
                scale_rows(at.v, rows, value_row, decay.hold);
                scale_block(state, K * value_row, decay.fade);
            }
            matmul<Into::add>(K, V, rows, at.k, 1, key_row, at.v, value_row, state, value_row);
            at.pending[one] = decay.after;
            store_output(task.text, t, rows, head, decay.out, at.y);
        }
    }
    for (int64_t one = 0; one < task.count; ++one)
        store_rows(state_of(last, task.index, task.first + one), K, V, nullptr, at.pending[one],
                   at.states + one * K * value_row, value_row);
}

// A few tokens: the recurrence itself, on the state where it will stay.
void ScalarForward::tokens(const ScalarTask& task) const {
    const int64_t K = in.key_width(), V = in.value_width(), length = task.text.length;
    ScalarDecay decay;
    for (int64_t head = task.first; head < task.first + task.count; ++head) {
        HeadRows from = state_of(in.state, task.index, head), state = state_of(last, task.index, head);
        float* to = static_cast<float*>(state.data);
        if (length == 0) {
            for (int64_t c = 0; c < K; ++c)
                std::memcpy(to + c * state.row, static_cast<float*>(from.data) + c * from.row, V * sizeof(float));
            continue;
        }
        decay.read(in.gate, task.text, 0, length, head);
        float skip = in.gate.of_head(in.gate.skip, head, 0);
        for (int64_t t = 0; t < length; ++t) {
            HeadRows values = rows_of(in.v, task.text, t, head), read = rows_of(o, task.text, t, head);
            HeadRows queries = rows_of(in.q, task.text, t, task.group), keys = rows_of(in.k, task.text, t, task.group);
            const float* before = static_cast<float*>(t ? state.data : from.data);
            int64_t before_row = t ? state.row : from.row;
            float fade = decay.transition[t];
            queries.typed([&](auto* q) {
                auto* k = static_cast<decltype(q)>(keys.data);
                values.typed([&](auto* v) {
                    auto* result = static_cast<decltype(v)>(read.data);
                    for_each_vector(V, [&](int64_t j, auto lanes) {
                        Vector value = lanes.get(v + j), written = decay.step[t] * value, total = {};
                        for (int64_t c = 0; c < K; ++c) {
                            Vector now = fade * lanes.get(before + c * before_row + j) + to_float(k[c]) * written;
                            lanes.put(to + c * state.row + j, now);
                            total += to_float(q[c]) * now;
                        }
                        lanes.put(result + j, in.scale * total + skip * value);
                    });
                });
            });
        }
    }
}

namespace {

ScalarAttention described(Tensor q, Tensor k, Tensor v, Tensor gate, Tensor step, Tensor rate, Tensor bias,
                          Tensor skip, Tensor state, Tensor bounds, float scale, bool softplus, bool negative,
                          int pieces) {
    require(q.dtype == k.dtype && q.axes == 4 && k.axes == 4 && v.axes == 4, "q, k and v do not fit");
    require(v.size(2) % q.size(2) == 0, "the heads are no multiple of the groups");
    require_shape(k, "k does not fit q", {v.size(0), v.size(1), q.size(2), q.size(3)});
    require_shape(state, "the state does not fit", {num_texts(bounds, v.size(0)), v.size(2), q.size(3), v.size(3)});
    return {q, k, v, state, bounds, {gate, step, rate, bias, skip, softplus, negative}, scale, pieces};
}

}  // namespace

SEQMIX_BINDINGS(module) {
    nb::class_<ScalarAttention>(module, "ScalarAttention")
        .def("__init__",
             [](ScalarAttention* self, Tensor q, Tensor k, Tensor v, Tensor gate, Tensor step, Tensor rate,
                Tensor bias, Tensor skip, Tensor state, Tensor bounds, float scale, bool softplus, bool negative,
                int pieces) {
                 new (self) ScalarAttention(described(q, k, v, gate, step, rate, bias, skip, state, bounds, scale,
                                                      softplus, negative, pieces));
             },
             "q"_a, "k"_a, "v"_a, "gate"_a.none(), "step"_a.none(), "rate"_a.none(), "bias"_a.none(),
             "skip"_a.none(), "state"_a, "bounds"_a.none(), "scale"_a, "softplus"_a, "negative"_a, "pieces"_a)
        .def("forward_workspace",
             [](const ScalarAttention& in) { return ScalarForward{in, {}, {}}.workspace(); })
        .def("forward",
             [](const ScalarAttention& in, Tensor o, Tensor last, Tensor workspace, int threads) {
                 require(o.dtype == in.v.dtype, "o does not fit v");
                 ScalarForward{in, o, last}.run(workspace.as<float>(), threads);
             },
             "o"_a, "last"_a, "workspace"_a, "threads"_a, WithoutGil())
        .def("backward_workspace",
             [](const ScalarAttention& in) { return ScalarBackward{in, {}, {}, {}, {}, {}, {}, {}, {}, {}}.workspace(); })
        .def("backward",
             [](const ScalarAttention& in, Tensor grad_o, Tensor grad_last, Tensor grad_q, Tensor grad_k,
                Tensor grad_v, Tensor grad_gate, Tensor grad_rate, Tensor grad_skip, Tensor grad_state,
                Tensor workspace, int threads) {
                 require(grad_o.dtype == in.v.dtype && grad_v.dtype == in.v.dtype, "gradients do not fit v");
                 ScalarBackward{in, grad_o, grad_last, grad_q, grad_k, grad_v, grad_gate, grad_rate, grad_skip,
                                grad_state}.run(workspace.as<float>(), threads);
             },
             "grad_o"_a, "grad_last"_a, "grad_q"_a, "grad_k"_a, "grad_v"_a, "grad_gate"_a.none(),
             "grad_rate"_a.none(), "grad_skip"_a.none(), "grad_state"_a, "workspace"_a, "threads"_a, WithoutGil());
}

}  // namespace seqmix
