// The backward pass of linear attention with a decay per key dimension.
//
// With q and k scaled by their decays (linear_attention_key_decay.hpp), S the state before the chunk, S' the one after:
//     E[i, j] = do[i] . v[j]  for j <= i
//     dv[j] = sum_{i >= j} (q[i] . k[j]) do[i] + dS'^T k[j]
//     dq[i] = sum_{j <= i} E[i, j] k[j] + S do[i]
//     dk[j] = sum_{i >= j} E[i, j] q[i] + dS' v[j]
//     dS = dS' + sum_i q[i] do[i]^T
// and, in every key dimension, with near the first part of dk and both sums without i = j,
//     dg[t] = sum_{i >= t} (q[i] dq[i] - k[i] near[i]) + sum_{j < t} k[j] (dS' v[j]) + <S, dS'>,
// the terms that the decay of t has made small: those of pairs that do not meet across t cancel.
// States are computed again from the first chunk on, transposed, since that is how the products read them.
#include "linear_attention_vector.hpp"

namespace seqmix {

struct VectorBackward::Blocks {
    float *q, *k, *k_turned, *scores, *errors, *own;
    float *v, *v_turned, *grad_o, *grad_v, *grad_q, *near, *far, *reach, *grad_g;
    float *grad_state, *grad_turned, *states, *pending, *whole;
    KeyDecay decay;
    Meeters meeters;
    int64_t state_size;

    Blocks(const VectorAttention& in, int64_t num_chunks, Workspace& space)
        : decay(in.key_row(), space), meeters(in.key_row(), space) {
        int64_t keys = in.key_row(), values = in.value_row();
        state_size = keys * values;
        for (float** block : {&q, &k, &k_turned, &grad_q, &near, &far, &reach, &grad_g}) *block = space.take(CHUNK * keys);
        for (float** block : {&v, &v_turned, &grad_o, &grad_v}) *block = space.take(CHUNK * values);
        for (float** block : {&scores, &errors}) *block = space.take(CHUNK * CHUNK);
        own = space.take(CHUNK);
        grad_state = space.take(state_size);
        grad_turned = space.take(state_size);
        states = space.take(num_chunks * state_size);
        pending = space.take(keys);
        whole = space.take(keys);
    }
};

int64_t VectorBackward::workspace() const {
    Workspace space{nullptr};
    Blocks counted(in, in.num_chunks(), space);
    return space.used;
}

void VectorBackward::run(float* memory, int threads) const {
    int64_t each = workspace(), num_chunks = in.num_chunks();
    const int64_t K = in.key_width(), V = in.value_width(), key_row = in.key_row(), value_row = in.value_row();
    for_each_task(in.texts() * in.heads(), threads, [&](int64_t task, int thread) {
        Workspace space{memory + thread * each};
        Blocks at(in, num_chunks, space);
        fill_zero(at.decay.gates, CHUNK * key_row);
        int64_t index = task / in.heads(), head = task % in.heads();
        Text text = text_at(in.bounds, index, in.v.size(1));
        states(text, index, head, at);
        load_rows(state_of(grad_last, index, head), K, V, nullptr, 1, at.grad_state, value_row);
        transpose(K, V, at.grad_state, value_row, at.grad_turned, key_row);
        for (int64_t chunks = (text.length + CHUNK - 1) / CHUNK; chunks > 0; --chunks) {
            int64_t left = text.length - (chunks - 1) * CHUNK;
            chunk(text, head, chunks - 1, left < CHUNK ? left : CHUNK, at);
        }
        transpose(V, K, at.grad_turned, key_row, at.grad_state, value_row);
        store_rows(state_of(grad_state, index, head), K, V, nullptr, 1, at.grad_state, value_row);
    });
}

// The state before every chunk, transposed and times `before`.
void VectorBackward::states(const Text& text, int64_t index, int64_t head, const Blocks& at) const {
    const int64_t K = in.key_width(), V = in.value_width(), key_row = in.key_row(), value_row = in.value_row();
    if (text.length == 0) return;
    load_rows(state_of(in.state, index, head), K, V, nullptr, 1, at.grad_state, value_row);
    transpose(K, V, at.grad_state, value_row, at.states, key_row);
    for (int64_t j = 0; j < key_row; ++j) at.pending[j] = 1;
    for (int64_t t = 0, number = 0; t < text.length; t += CHUNK, ++number) {
        int64_t rows = text.length - t < CHUNK ? text.length - t : CHUNK;
        if (at.decay.read(rows_of(in.g, text, t, head), rows, K)) at.decay.whole(rows, false);
        else at.decay.through_state(rows);
        float *state = at.states + number * at.state_size, *next = state + at.state_size;
        multiply(at.pending, at.decay.before, key_row, at.pending);
        scale_columns(state, V, key_row, at.pending);
        if (t + rows >= text.length) return;
        for (int64_t i = 0; i < V; ++i) multiply(state + i * key_row, at.decay.fade, key_row, next + i * key_row);
        fill_zero(next + V * key_row, (value_row - V) * key_row);
        load_rows(rows_of(in.k, text, t, head), rows, K, nullptr, 1, at.k, key_row);
        multiply(at.k, at.decay.in, rows * key_row, at.k);
        load_rows(rows_of(in.v, text, t, head), rows, V, nullptr, 1, at.v, value_row);
        matmul<Into::add>(V, K, rows, at.v, 1, value_row, at.k, key_row, next, key_row);
        std::memcpy(at.pending, at.decay.after, key_row * sizeof(float));
    }
}

namespace {

// The diagonal goes to `own`, and zeros take its place and that of everything above it.
void take_diagonal(float* block, int64_t rows, float* own) {
    mask_future(block, rows, CHUNK);
    for (int64_t i = 0; i < rows; ++i) {
        own[i] = block[i * CHUNK + i];
        block[i * CHUNK + i] = 0;
    }
}

// to += x y, or to = x y
void multiply_add(const float* x, const float* y, int64_t count, float* to) {
    for (int64_t i = 0; i < count; i += WIDTH) store(to + i, load(to + i) + load(x + i) * load(y + i));
}

}  // namespace

void VectorBackward::chunk(const Text& text, int64_t head, int64_t number, int64_t rows, const Blocks& at) const {
    const int64_t K = in.key_width(), V = in.value_width(), key_row = in.key_row(), value_row = in.value_row();
    const int64_t t = number * CHUNK, size = rows * key_row;
    const KeyDecay& decay = at.decay;
    const Meeters& meeters = at.meeters;
    const float* state = at.states + number * at.state_size;
    bool together = decay.read(rows_of(in.g, text, t, head), rows, K);
    load_rows(rows_of(in.q, text, t, head), rows, K, nullptr, in.scale, at.q, key_row);
    load_rows(rows_of(in.k, text, t, head), rows, K, nullptr, 1, at.k, key_row);
    load_rows(rows_of(in.v, text, t, head), rows, V, nullptr, 1, at.v, value_row);
    load_rows(rows_of(grad_o, text, t, head), rows, V, nullptr, 1, at.grad_o, value_row);
    transpose(rows, V, at.v, value_row, at.v_turned, CHUNK);
    matmul<Into::replace, Shape::lower_result>(rows, rows, V, at.grad_o, value_row, 1, at.v_turned, CHUNK, at.errors,
                                               CHUNK);
    take_diagonal(at.errors, rows, at.own);

    // Inside the chunk: scores, and what reaches q and k through them.
    const float *q = at.q, *k = at.k;  // as they meet the states
    if (together) {
        decay.whole(rows, true);
        multiply(at.q, decay.out, size, at.q);
        multiply(at.k, decay.in, size, at.k);
        transpose(rows, K, at.k, key_row, at.k_turned, CHUNK);
        matmul<Into::replace, Shape::lower_result>(rows, rows, K, at.q, key_row, 1, at.k_turned, CHUNK, at.scores,
                                                   CHUNK);
        matmul<Into::replace, Shape::lower>(rows, K, rows, at.errors, CHUNK, 1, at.k, key_row, at.grad_q, key_row);
        matmul<Into::replace, Shape::upper>(rows, K, rows, at.errors, 1, CHUNK, at.q, key_row, at.near, key_row);
    } else {
        spread_scores(decay, meeters, rows, K, at.q, at.k, at.scores);
        fill_zero(at.grad_q, size);
        fill_zero(at.near, size);
        decay.meetings(0, rows, [&](const Meeting& meeting) {
            int64_t queries = meeting.last - meeting.first, keys = meeting.to - meeting.from;
            int64_t first = meeting.first * key_row, from = meeting.from * key_row;
            const float* errors = at.errors + meeting.first * CHUNK + meeting.from;
            meeters.take(decay, meeting, at.q, at.k);
            matmul(queries, K, keys, errors, CHUNK, 1, meeters.k, key_row, at.far, key_row);
            multiply_add(at.far, decay.out + first, queries * key_row, at.grad_q + first);
            matmul(keys, K, queries, errors, 1, CHUNK, meeters.q, key_row, at.far, key_row);
            multiply_add(at.far, decay.in + from, keys * key_row, at.near + from);
        });
        decay.through_state(rows);
        multiply(at.q, decay.out, size, meeters.q);
        multiply(at.k, decay.in, size, meeters.k);
        q = meeters.q, k = meeters.k;
    }
    mask_future(at.scores, rows, CHUNK);
    matmul<Into::replace, Shape::upper>(rows, V, rows, at.scores, 1, CHUNK, at.grad_o, value_row, at.grad_v,
                                        value_row);

    // Through the states before and after it.
    scale_columns(at.grad_turned, V, key_row, decay.after);
    transpose(V, K, at.grad_turned, key_row, at.grad_state, value_row);
    matmul<Into::add>(rows, V, K, k, key_row, 1, at.grad_state, value_row, at.grad_v, value_row);
    store_rows(rows_of(grad_v, text, t, head), rows, V, nullptr, 1, at.grad_v, value_row);
    matmul(rows, K, V, at.v, value_row, 1, at.grad_turned, key_row, at.far, key_row);
    if (together) {
        matmul<Into::add>(rows, K, V, at.grad_o, value_row, 1, state, key_row, at.grad_q, key_row);
    } else {
        matmul(rows, K, V, at.grad_o, value_row, 1, state, key_row, at.reach, key_row);
        multiply_add(at.reach, decay.out, size, at.grad_q);
        multiply(at.far, decay.in, size, at.far);
    }
    fill_zero(at.whole, key_row);
    for (int64_t i = 0; i < V; ++i) multiply_add(state + i * key_row, at.grad_turned + i * key_row, key_row, at.whole);
    multiply(at.whole, decay.fade, key_row, at.whole);
    if (!together) scale_columns(at.grad_turned, V, key_row, decay.fade);
    matmul<Into::add>(V, K, rows, at.grad_o, 1, value_row, q, key_row, at.grad_turned, key_row);
    scale_columns(at.grad_turned, V, key_row, decay.before);
    if (!together)  // gradients are those of q and k as they came
        for (int64_t i = 0; i < size; i += WIDTH) store(decay.out + i, broadcast(1)), store(decay.in + i, broadcast(1));
    store_gradients(text, head, t, rows, at);
}

// Of q, k and g, from those of q and k with their factors.
void VectorBackward::store_gradients(const Text& text, int64_t head, int64_t t, int64_t rows,
                                     const Blocks& at) const {
    const int64_t row = in.key_row();
    for (int64_t j = 0; j < row; j += WIDTH) {
        Vector later = load(at.whole + j), kept = {};
        for (int64_t place = (rows - 1) * row + j; place >= 0; place -= row) {
            later += load(at.q + place) * load(at.grad_q + place) - load(at.k + place) * load(at.near + place);
            store(at.grad_g + place, later);
        }
        for (int64_t i = 0, place = j; i < rows; ++i, place += row) {
            Vector q = load(at.q + place), k = load(at.k + place), far = load(at.far + place);
            store(at.grad_g + place, load(at.grad_g + place) + kept);
            kept += k * far;
            store(at.grad_q + place, load(at.decay.out + place) * (load(at.grad_q + place) + at.own[i] * k));
            store(at.near + place, load(at.decay.in + place) * (load(at.near + place) + far + at.own[i] * q));
        }
    }
    store_rows(rows_of(grad_q, text, t, head), rows, in.key_width(), nullptr, in.scale, at.grad_q, row);
    store_rows(rows_of(grad_k, text, t, head), rows, in.key_width(), nullptr, 1, at.near, row);
    store_rows(rows_of(grad_g, text, t, head), rows, in.key_width(), nullptr, 1, at.grad_g, row);
}

}  // namespace seqmix
