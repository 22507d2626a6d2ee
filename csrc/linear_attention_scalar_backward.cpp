// The backward pass of linear attention with at most one decay per head.
//
// With y[i] = sum_{j <= i} (q[i] . k[j]) v[j] + q[i] S, where v is scaled by decay and step and o[i] = out[i] y[i]
// (linear_attention_decay.hpp), S the state before the chunk and the state after it S' = S + sum_j k[j] v[j]^T:
//     dy[i] = out[i] do[i]
//     E[i, j] = dy[i] . v[j]  for j <= i
//     dv[j] = sum_{i >= j} (q[i] . k[j]) dy[i] + dS'^T k[j]
//     dq[i] = sum_{j <= i} E[i, j] k[j] + S dy[i]
//     dk[j] = sum_{i >= j} E[i, j] q[i] + dS' v[j]
//     dS = dS' + sum_i q[i] dy[i]^T
// The log decay of token t stands in everything that passes it: with P[i, j] = E[i, j] (q[i] . k[j]),
//     dg[t] = sum_{j < t <= i} P[i, j] + sum_{i >= t} q[i] . (S dy[i]) + sum_{j < t} v[j] . (dS'^T k[j]) + <S, dS'>,
// in which only terms meet that the decay of t has made as small as their sum.
// States are computed again from the first chunk on, transposed, since that is how the products read them.
#include "linear_attention_scalar.hpp"

namespace seqmix {

struct ScalarBackward::Sums {
    double rate, skip;
};

struct ScalarBackward::Blocks {
    float *q, *k, *k_turned, *scores, *decayed, *matrix;
    float *v, *v_turned, *grad_y, *errors, *grad_scores, *near, *far, *read, *grad_q, *grad_k, *grad_state;
    float *states, *grad_states, *pending;
    double* sums;
    int64_t state_size, num_chunks;  // of the longest text

    Blocks(const ScalarAttention& in, int64_t num_chunks, Workspace& space) : num_chunks(num_chunks) {
        int64_t keys = in.key_row(), values = in.value_row(), heads = in.heads_of_piece();
        state_size = keys * values;
        for (float** block : {&q, &k, &read, &grad_q, &grad_k}) *block = space.take(CHUNK * keys);
        for (float** block : {&v, &grad_y, &near, &far}) *block = space.take(CHUNK * values);
        for (float** block : {&scores, &decayed, &matrix, &errors, &grad_scores}) *block = space.take(CHUNK * CHUNK);
        k_turned = space.take(keys * CHUNK);
        v_turned = space.take(values * CHUNK);
        grad_state = space.take(state_size);
        grad_states = space.take(heads * state_size);
        states = space.take(heads * num_chunks * state_size);
        pending = space.take(heads);
        sums = reinterpret_cast<double*>(space.take(4 * heads));
    }
    float* state(int64_t one, int64_t number) const { return states + (one * num_chunks + number) * state_size; }
};

int64_t ScalarBackward::workspace() const {
    Workspace space{nullptr};
    Blocks counted(in, in.num_chunks(), space);
    return space.used;
}

void ScalarBackward::run(float* memory, int threads) const {
    int64_t each = workspace(), num_chunks = in.num_chunks();
    const int64_t K = in.key_width(), V = in.value_width(), key_row = in.key_row(), value_row = in.value_row();
    for_each_task(in.texts() * in.groups() * in.pieces, threads, [&](int64_t number, int thread) {
        ScalarTask task(in, number);
        Workspace space{memory + thread * each};
        Blocks at(in, num_chunks, space);
        Sums* sums = reinterpret_cast<Sums*>(at.sums);
        for (int64_t one = 0; one < task.count; ++one) {
            load_rows(state_of(grad_last, task.index, task.first + one), K, V, nullptr, 1, at.grad_state, value_row);
            transpose(K, V, at.grad_state, value_row, at.grad_states + one * at.state_size, key_row);
            sums[one] = {0, 0};
        }
        states(task, at);
        for (int64_t chunks = (task.text.length + CHUNK - 1) / CHUNK; chunks > 0; --chunks) {
            int64_t left = task.text.length - (chunks - 1) * CHUNK;
            chunk(task, at, chunks - 1, left < CHUNK ? left : CHUNK, sums);
        }
        for (int64_t one = 0; one < task.count; ++one) {
            int64_t head = task.first + one;
            transpose(V, K, at.grad_states + one * at.state_size, key_row, at.grad_state, value_row);
            store_rows(state_of(grad_state, task.index, head), K, V, nullptr, 1, at.grad_state, value_row);
            if (grad_rate) grad_rate.as<float>()[task.index * in.heads() + head] = float(sums[one].rate);
            if (grad_skip) grad_skip.as<float>()[task.index * in.heads() + head] = float(sums[one].skip);
        }
    });
}

// The state before every chunk, transposed and (where decays are factors) times `before`.
void ScalarBackward::states(const ScalarTask& task, const Blocks& at) const {
    const int64_t K = in.key_width(), V = in.value_width(), key_row = in.key_row(), value_row = in.value_row();
    ScalarDecay decay;
    for (int64_t one = 0; one < task.count; ++one) {
        load_rows(state_of(in.state, task.index, task.first + one), K, V, nullptr, 1, at.grad_state, value_row);
        if (at.num_chunks) transpose(K, V, at.grad_state, value_row, at.state(one, 0), key_row);
        at.pending[one] = 1;
    }
    for (int64_t t = 0, number = 0; t < task.text.length; t += CHUNK, ++number) {
        bool is_last = t + CHUNK >= task.text.length;
        int64_t rows = is_last ? task.text.length - t : CHUNK;
        load_rows(rows_of(in.k, task.text, t, task.group), rows, K, nullptr, 1, at.k, key_row);
        for (int64_t one = 0; one < task.count; ++one) {
            decay.read(in.gate, task.text, t, rows, task.first + one);
            decay.split(rows);
            float* state = at.state(one, number);
            float factor = at.pending[one] * decay.before;
            if (is_last) {
                scale_block(state, at.state_size, factor);
                continue;
            }
            float* next = at.state(one, number + 1);
            for (int64_t i = 0; i < at.state_size; i += WIDTH) {
                Vector now = factor * load(state + i);
                store(state + i, now);
                store(next + i, decay.fade * now);
            }
            load_rows(rows_of(in.v, task.text, t, task.first + one), rows, V, decay.write, 1, at.v, value_row);
            if (decay.apart) scale_rows(at.v, rows, value_row, decay.hold);
            matmul<Into::add>(V, K, rows, at.v, 1, value_row, at.k, key_row, next, key_row);
            at.pending[one] = decay.after;
        }
    }
}

void ScalarBackward::chunk(const ScalarTask& task, const Blocks& at, int64_t number, int64_t rows,
                           Sums* sums) const {
    const int64_t K = in.key_width(), key_row = in.key_row(), t = number * CHUNK;
    load_rows(rows_of(in.q, task.text, t, task.group), rows, K, nullptr, in.scale, at.q, key_row);
    load_rows(rows_of(in.k, task.text, t, task.group), rows, K, nullptr, 1, at.k, key_row);
    transpose(rows, K, at.k, key_row, at.k_turned, CHUNK);
    matmul<Into::replace, Shape::lower_result>(rows, rows, K, at.q, key_row, 1, at.k_turned, CHUNK, at.scores, CHUNK);
    mask_future(at.scores, rows, CHUNK);
    fill_zero(at.grad_scores, rows * CHUNK);
    fill_zero(at.grad_q, rows * key_row);
    fill_zero(at.grad_k, rows * key_row);
    for (int64_t one = 0; one < task.count; ++one) head(task, at, number, rows, one, sums[one]);
    matmul<Into::add, Shape::lower>(rows, K, rows, at.grad_scores, CHUNK, 1, at.k, key_row, at.grad_q, key_row);
    matmul<Into::add, Shape::upper>(rows, K, rows, at.grad_scores, 1, CHUNK, at.q, key_row, at.grad_k, key_row);
    Tensor to_q = grad_q, to_k = grad_k;
    for (Tensor* to : {&to_q, &to_k}) {  // the part of this piece
        to->data = static_cast<char*>(to->data) + task.piece * to->stride(0) * (to->dtype == Dtype::bfloat16 ? 2 : 4);
        for (int axis = 0; axis < 4; ++axis) to->sizes[axis] = to->sizes[axis + 1], to->strides[axis] = to->strides[axis + 1];
    }
    store_rows(rows_of(to_q, task.text, t, task.group), rows, K, nullptr, in.scale, at.grad_q, key_row);
    store_rows(rows_of(to_k, task.text, t, task.group), rows, K, nullptr, 1, at.grad_k, key_row);
}

namespace {

// Adds errors[i, j] (j <= i; times matrix[i, j] where there is one) to `total`, and, with P = errors * scores below
// the diagonal, finds later[i] = sum_j P[i, j] and earlier[j] = sum_i P[i, j]. In float64, so that their running
// difference is the sum over a rectangle and no more.
void add_errors(const float* errors, const float* matrix, const float* scores, int64_t rows, float* total,
                double* later, double* earlier) {
    typedef double Doubles __attribute__((vector_size(WIDTH * 4)));
    typedef float HalfVector __attribute__((vector_size(WIDTH * 2)));
    constexpr int64_t HALF = WIDTH / 2;
    for (int64_t j = 0; j < CHUNK; ++j) earlier[j] = 0;
    Integers lanes = lane_numbers();
    for (int64_t i = 0; i < rows; ++i) {
        Doubles sum_of_row = {};
        for (int64_t j = 0; j <= i; j += WIDTH) {
            Vector error = choose(lanes <= int32_t(i - j), load(errors + i * CHUNK + j), Vector{});
            Vector product = choose(lanes < int32_t(i - j), error * load(scores + i * CHUNK + j), Vector{});
            if (matrix) error *= load(matrix + i * CHUNK + j);
            store(total + i * CHUNK + j, load(total + i * CHUNK + j) + error);
            for (int64_t half = 0; half < 2; ++half) {
                HalfVector part;
                std::memcpy(&part, reinterpret_cast<const float*>(&product) + half * HALF, sizeof part);
                Doubles wide = __builtin_convertvector(part, Doubles), column;
                std::memcpy(&column, earlier + j + half * HALF, sizeof column);
                column += wide;
                std::memcpy(earlier + j + half * HALF, &column, sizeof column);
                sum_of_row += wide;
            }
        }
        later[i] = 0;
        for (int lane = 0; lane < HALF; ++lane) later[i] += sum_of_row[lane];
    }
}

}  // namespace

void ScalarBackward::head(const ScalarTask& task, const Blocks& at, int64_t number, int64_t rows, int64_t one,
                          Sums& sums) const {
    const int64_t K = in.key_width(), V = in.value_width(), key_row = in.key_row(), value_row = in.value_row();
    const int64_t t = number * CHUNK, head = task.first + one;
    const bool decays = in.gate.decays();
    float *state = at.state(one, number), *grad_turned = at.grad_states + one * at.state_size;
    ScalarDecay decay;
    decay.read(in.gate, task.text, t, rows, head);
    decay.split(rows);
    load_rows(rows_of(in.v, task.text, t, head), rows, V, decay.write, 1, at.v, value_row);
    load_rows(rows_of(grad_o, task.text, t, head), rows, V, decay.out, 1, at.grad_y, value_row);
    const float *scores = at.scores, *matrix = nullptr;
    if (decay.apart) {
        for (int64_t i = 0; i < rows * CHUNK; i += WIDTH) store(at.matrix + i, broadcast(1));
        decay_scores(decay, rows, at.matrix, at.matrix);
        for (int64_t i = 0; i < rows * CHUNK; i += WIDTH)
            store(at.decayed + i, load(at.matrix + i) * load(at.scores + i));
        scores = at.decayed, matrix = at.matrix;
    }

    // Inside the chunk.
    double later[CHUNK] = {}, earlier[CHUNK] = {}, kept[CHUNK] = {}, whole = 0;
    transpose(rows, V, at.v, value_row, at.v_turned, CHUNK);
    matmul<Into::replace, Shape::lower_result>(rows, rows, V, at.grad_y, value_row, 1, at.v_turned, CHUNK, at.errors,
                                               CHUNK);
    add_errors(at.errors, matrix, scores, rows, at.grad_scores, later, earlier);
    matmul<Into::replace, Shape::upper>(rows, V, rows, scores, 1, CHUNK, at.grad_y, value_row, at.near, value_row);

    // Through the states before and after it.
    if (decay.apart) {
        scale_rows(at.v, rows, value_row, decay.hold);
        scale_rows(at.grad_y, rows, value_row, decay.reach);
    }
    scale_block(grad_turned, at.state_size, decay.after);
    transpose(V, K, grad_turned, key_row, at.grad_state, value_row);
    matmul(rows, V, K, at.k, key_row, 1, at.grad_state, value_row, at.far, value_row);
    matmul<Into::add>(rows, K, V, at.v, value_row, 1, grad_turned, key_row, at.grad_k, key_row);
    if (decays) {
        matmul(rows, K, V, at.grad_y, value_row, 1, state, key_row, at.read, key_row);
        for (int64_t i = 0; i < rows; ++i) {
            later[i] += dot(at.q + i * key_row, at.read + i * key_row, key_row);
            kept[i] = dot(at.v + i * value_row, at.far + i * value_row, value_row);
        }
        for (int64_t i = 0; i < rows * key_row; i += WIDTH)
            store(at.grad_q + i, load(at.grad_q + i) + load(at.read + i));
        for (int64_t i = 0; i < V; ++i) whole += dot(state + i * key_row, grad_turned + i * key_row, key_row);
    } else {
        matmul<Into::add>(rows, K, V, at.grad_y, value_row, 1, state, key_row, at.grad_q, key_row);
    }
    whole *= decay.fade;
    scale_block(grad_turned, at.state_size, decay.fade);
    matmul<Into::add>(V, K, rows, at.grad_y, 1, value_row, at.q, key_row, grad_turned, key_row);
    scale_block(grad_turned, at.state_size, decay.before);

    double grad_step[CHUNK] = {};
    store_gradients(task, at, t, rows, head, decay, grad_step, sums);
    if (!decays) return;
    double grad_log[CHUNK], inside = 0, before = 0;
    for (int64_t i = 0; i < rows; ++i) grad_log[i] = before + whole, before += kept[i];
    // The rectangle of token i has row i more than that of the next token, and lacks column i.
    for (int64_t i = rows - 1; i >= 0; --i) grad_log[i] += inside += later[i] - earlier[i];
    float rate = in.gate.of_head(in.gate.rate, head, 0);
    float* to = grad_gate.as<float>() + task.text.row * grad_gate.stride(0) + (task.text.start + t) * grad_gate.stride(1) +
                head * grad_gate.stride(2);
    for (int64_t i = 0; i < rows; ++i) {
        double grad = grad_log[i] * decay.chain[i];
        if (in.gate.step) {
            sums.rate += grad * decay.step[i];
            grad = decay.slope[i] * (grad_step[i] + rate * grad);
        }
        to[i * grad_gate.stride(1)] = float(grad);
    }
}

// Gradients of the values; of the steps and the skip where there are any.
void ScalarBackward::store_gradients(const ScalarTask& task, const Blocks& at, int64_t t, int64_t rows, int64_t head,
                                     const ScalarDecay& decay, double* grad_step, Sums& sums) const {
    const int64_t value_row = in.value_row();
    HeadRows to = rows_of(grad_v, task.text, t, head), values = rows_of(in.v, task.text, t, head);
    HeadRows outputs = rows_of(grad_o, task.text, t, head);
    float skip = in.gate.of_head(in.gate.skip, head, 0);
    to.typed([&](auto* data) {
        auto* v = static_cast<decltype(data)>(values.data);
        auto* grads = static_cast<decltype(data)>(outputs.data);
        for (int64_t i = 0; i < rows; ++i) {
            float near_factor = decay.in[i], far_factor = decay.apart ? decay.in[i] * decay.hold[i] : decay.in[i];
            Vector step = {}, skipped = {};
            for_each_vector(in.value_width(), [&](int64_t j, auto lanes) {
                Vector grad = near_factor * load(at.near + i * value_row + j) +
                              far_factor * load(at.far + i * value_row + j);
                Vector own = decay.step[i] * grad;
                if (in.gate.step) {
                    Vector value = lanes.get(v + i * values.row + j);
                    Vector error = lanes.get(grads + i * outputs.row + j);
                    step += grad * value;
                    skipped += error * value;
                    own += skip * error;
                }
                lanes.put(data + i * to.row + j, own);
            });
            grad_step[i] = sum(step);
            sums.skip += sum(skipped);
        }
    });
}

}  // namespace seqmix
