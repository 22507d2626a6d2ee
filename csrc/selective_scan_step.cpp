// One token of the selective scan, for decoding: lanes are entries of the state, so that neither the state nor the
// rates have to be transposed, and the lanes of WIDTH channels are added up together.
#include "selective_scan.hpp"

namespace seqmix::selective {
namespace {

constexpr int64_t SMALL = 1 << 16;  // entries of states below which waking other threads takes longer than the work

template <class State, bool negative>
void piece(const Arguments& given, const Tensor& y, const Tensor& last, int64_t row, const Piece& piece, float* space) {
    int64_t N = given.states();
    float *B = space, *C = space + given.wide();
    Text text{row, 0, 1};
    read_block(maps_of(given.B, text, 0, piece.group), 1, N, B, by_row(N));
    read_block(maps_of(given.C, text, 0, piece.group), 1, N, C, by_row(N));
    float bias[PIECE], skip[PIECE], steps[PIECE], inputs[PIECE], gates[PIECE], lanes[WIDTH * WIDTH] = {};
    Places at = by_row(PIECE);
    read_channels(given.bias, piece, bias);
    read_channels(given.D, piece, skip);
    auto one = [&](const Tensor& tensor) {
        Matrix token = tokens_of(tensor, text, 0, piece.channel);
        return Matrix{token.data, token.dtype, 0, token.column};
    };
    read_block(one(given.delta), 1, piece.count, steps, at);
    read_block(one(given.u), 1, piece.count, inputs, at);
    if (given.z) read_block(one(given.z), 1, piece.count, gates, at);
    const float* rates = given.A.as<float>() + piece.channel * given.A.stride(0);
    const State* before = nullptr;
    if (given.state)
        before = given.state.as<State>() + row * given.state.stride(0) + piece.channel * given.state.stride(1);
    State* after = last.as<State>() + row * last.stride(0) + piece.channel * last.stride(1);
    for (int64_t first = 0; first < piece.count; first += WIDTH) {
        Vector u = load(inputs + first), raw = load(steps + first) + load(bias + first);
        Vector step = given.softplus ? softplus(raw) : raw, write = step * u;
        float own_step[WIDTH], own_write[WIDTH];
        store(own_step, step * LOG2E), store(own_write, write);
        for (int64_t e = 0; e < WIDTH && first + e < piece.count; ++e) {
            Vector total = {};
            int64_t channel = first + e;
            auto entries = [&](int64_t n, auto get, auto put) {
                Vector decay = power_of_two(get(rates + channel * given.A.stride(0) + n) * own_step[e]);
                Vector h = before ? get(before + channel * given.state.stride(1) + n) : Vector{};
                Vector kept = negative ? decay * h + decay * h - h : decay * h;
                h = kept + own_write[e] * load(B + n);
                total += h * load(C + n);
                put(after + channel * last.stride(1) + n, h);
            };
            int64_t n = 0;
            for (; n + WIDTH <= N; n += WIDTH)
                entries(n, [](auto* from) { return load(from); }, [](auto* to, Vector h) { store(to, h); });
            if (n < N)
                entries(n, [&](auto* from) { return load_part(from, N - n); },
                        [&](auto* to, Vector h) { store_part(to, h, N - n); });
            store(lanes + e * WIDTH, total);
        }
        Vector out = sums_of_rows(lanes) + load(skip + first) * u;
        store(inputs + first, given.z ? out * silu(load(gates + first)) : out);
    }
    write_block(one(y), 1, piece.count, inputs, at);
}

}  // namespace

void step(const Arguments& given, const Tensor& y, const Tensor& last, const Tensor& space, int threads) {
    int64_t pieces = given.pieces(), tasks = given.batch() * pieces;
    if (given.batch() * given.channels() * given.states() < SMALL) threads = 1;
    for_each_task(tasks, threads, [&](int64_t task, int thread) {
        auto run = last.dtype == Dtype::bfloat16
                       ? (given.negative ? piece<bfloat16, true> : piece<bfloat16, false>)
                       : (given.negative ? piece<float, true> : piece<float, false>);
        run(given, y, last, task / pieces, piece_at(given, task % pieces),
            space.as<float>() + thread * space.stride(0));
    });
}

}  // namespace seqmix::selective
