// The forward pass: see linear_attention_vector.hpp.
#include "linear_attention_vector.hpp"

namespace seqmix {

struct VectorForward::Blocks {
    float *q, *k, *k_turned, *scores, *v, *y, *state, *pending;
    KeyDecay decay;
    Meeters meeters;

    Blocks(const VectorAttention& in, Workspace& space) : decay(in.key_row(), space), meeters(in.key_row(), space) {
        for (float** block : {&q, &k, &k_turned}) *block = space.take(CHUNK * in.key_row());
        for (float** block : {&v, &y}) *block = space.take(CHUNK * in.value_row());
        scores = space.take(CHUNK * CHUNK);
        state = space.take(in.key_row() * in.value_row());
        pending = space.take(in.key_row());
    }
};

int64_t VectorForward::workspace() const {
    Workspace space{nullptr};
    Blocks counted(in, space);
    return space.used;
}

void VectorForward::run(float* memory, int threads) const {
    int64_t each = workspace();
    for_each_task(in.texts() * in.heads(), threads, [&](int64_t task, int thread) {
        Workspace space{memory + thread * each};
        Blocks blocks(in, space);
        fill_zero(blocks.decay.gates, CHUNK * in.key_row());
        int64_t index = task / in.heads(), head = task % in.heads();
        Text text = text_at(in.bounds, index, in.v.size(1));
        if (text.length <= SHORT) tokens(text, index, head, blocks);
        else chunks(text, index, head, blocks);
    });
}

void VectorForward::chunks(const Text& text, int64_t index, int64_t head, const Blocks& at) const {
    const int64_t K = in.key_width(), V = in.value_width(), key_row = in.key_row(), value_row = in.value_row();
    load_rows(state_of(in.state, index, head), K, V, nullptr, 1, at.state, value_row);
    for (int64_t j = 0; j < key_row; ++j) at.pending[j] = 1;
    for (int64_t t = 0; t < text.length; t += CHUNK) {
        int64_t rows = text.length - t < CHUNK ? text.length - t : CHUNK;
        bool together = at.decay.read(rows_of(in.g, text, t, head), rows, K);
        load_rows(rows_of(in.q, text, t, head), rows, K, nullptr, in.scale, at.q, key_row);
        load_rows(rows_of(in.k, text, t, head), rows, K, nullptr, 1, at.k, key_row);
        load_rows(rows_of(in.v, text, t, head), rows, V, nullptr, 1, at.v, value_row);
        if (together) {
            at.decay.whole(rows, true);
            multiply(at.q, at.decay.out, rows * key_row, at.q);
            multiply(at.k, at.decay.in, rows * key_row, at.k);
            transpose(rows, K, at.k, key_row, at.k_turned, CHUNK);
            matmul<Into::replace, Shape::lower_result>(rows, rows, K, at.q, key_row, 1, at.k_turned, CHUNK,
                                                       at.scores, CHUNK);
        } else {
            spread_scores(at.decay, at.meeters, rows, K, at.q, at.k, at.scores);
            at.decay.through_state(rows);
            multiply(at.q, at.decay.out, rows * key_row, at.q);
            multiply(at.k, at.decay.in, rows * key_row, at.k);
        }
        mask_future(at.scores, rows, CHUNK);
        multiply(at.pending, at.decay.before, key_row, at.pending);
        scale_rows(at.state, K, value_row, at.pending);
        matmul(rows, V, K, at.q, key_row, 1, at.state, value_row, at.y, value_row);
        matmul<Into::add, Shape::lower>(rows, V, rows, at.scores, CHUNK, 1, at.v, value_row, at.y, value_row);
        if (!together) scale_rows(at.state, K, value_row, at.decay.fade);
        matmul<Into::add>(K, V, rows, at.k, 1, key_row, at.v, value_row, at.state, value_row);
        std::memcpy(at.pending, at.decay.after, key_row * sizeof(float));
        store_rows(rows_of(o, text, t, head), rows, V, nullptr, 1, at.y, value_row);
    }
    store_rows(state_of(last, index, head), K, V, at.pending, 1, at.state, value_row);
}

// A few tokens: the recurrence itself, on the state where it will stay.
void VectorForward::tokens(const Text& text, int64_t index, int64_t head, const Blocks& at) const {
    const int64_t K = in.key_width(), V = in.value_width();
    HeadRows from = state_of(in.state, index, head), state = state_of(last, index, head);
    float* to = static_cast<float*>(state.data);
    if (text.length == 0)
        for (int64_t c = 0; c < K; ++c)
            std::memcpy(to + c * state.row, static_cast<float*>(from.data) + c * from.row, V * sizeof(float));
    for (int64_t t = 0; t < text.length; ++t) {
        load_rows(rows_of(in.q, text, t, head), 1, K, nullptr, in.scale, at.q, in.key_row());
        load_rows(rows_of(in.k, text, t, head), 1, K, nullptr, 1, at.k, in.key_row());
        load_rows(rows_of(in.g, text, t, head), 1, K, nullptr, 1, at.decay.high, in.key_row(), 1);
        at.decay.columns([&](int64_t j) { store(at.decay.fade + j, exp(load(at.decay.high + j))); });
        const float* before = static_cast<float*>(t ? state.data : from.data);
        int64_t before_row = t ? state.row : from.row;
        HeadRows values = rows_of(in.v, text, t, head), read = rows_of(o, text, t, head);
        values.typed([&](auto* v) {
            auto* result = static_cast<decltype(v)>(read.data);
            for_each_vector(V, [&](int64_t j, auto lanes) {
                Vector value = lanes.get(v + j), total = {};
                for (int64_t c = 0; c < K; ++c) {
                    Vector now = at.decay.fade[c] * lanes.get(before + c * before_row + j) + at.k[c] * value;
                    lanes.put(to + c * state.row + j, now);
                    total += at.q[c] * now;
                }
                lanes.put(result + j, total);
            });
        });
    }
}

SEQMIX_BINDINGS(module) {
    nb::class_<VectorAttention>(module, "VectorAttention")
        .def("__init__",
             [](VectorAttention* self, Tensor q, Tensor k, Tensor v, Tensor g, Tensor state, Tensor bounds,
                float scale) {
                 require(q.axes == 4 && v.axes == 4, "q, k, v and g do not fit");
                 for (const Tensor& like : {k, g})
                     require_shape(like, "k or g does not fit q", {v.size(0), v.size(1), v.size(2), q.size(3)});
                 require_shape(state, "the state does not fit",
                               {num_texts(bounds, v.size(0)), v.size(2), q.size(3), v.size(3)});
                 new (self) VectorAttention{q, k, v, g, state, bounds, scale};
             },
             "q"_a, "k"_a, "v"_a, "g"_a, "state"_a, "bounds"_a.none(), "scale"_a)
        .def("forward_workspace",
             [](const VectorAttention& in) { return VectorForward{in, {}, {}}.workspace(); })
        .def("forward",
             [](const VectorAttention& in, Tensor o, Tensor last, Tensor workspace, int threads) {
                 require(o.dtype == in.v.dtype, "o does not fit v");
                 VectorForward{in, o, last}.run(workspace.as<float>(), threads);
             },
             "o"_a, "last"_a, "workspace"_a, "threads"_a, WithoutGil())
        .def("backward_workspace",
             [](const VectorAttention& in) {
                 return VectorBackward{in, {}, {}, {}, {}, {}, {}, {}}.workspace();
             })
        .def("backward",
             [](const VectorAttention& in, Tensor grad_o, Tensor grad_last, Tensor grad_q, Tensor grad_k,
                Tensor grad_v, Tensor grad_g, Tensor grad_state, Tensor workspace, int threads) {
                 VectorBackward{in, grad_o, grad_last, grad_q, grad_k, grad_v, grad_g, grad_state}.run(
                     workspace.as<float>(), threads);
             },
             "grad_o"_a, "grad_last"_a, "grad_q"_a, "grad_k"_a, "grad_v"_a, "grad_g"_a, "grad_state"_a,
             "workspace"_a, "threads"_a, WithoutGil());
}

}  // namespace seqmix
