// Products with block-sparse weights in float32: y_t = W x_t + bias.
//
// W is given by block rows: blocks offsets[r] to offsets[r + 1] are those of the outputs r P to r P + P - 1, and
// block n holds their weights for the inputs columns[n] Q to columns[n] Q + Q - 1.
#include "tiles.hpp"

namespace seqmix {
namespace {

constexpr int ROWS = 4;  // outputs whose sums are in registers at once: ROWS * TILE_VECTORS of 32

// panel[i * TILE + t] = x[token + t][i]. Beyond the last token, the last one again: its results are not written.
template <class T>
void pack(const Tokens<const T>& x, int64_t token, int64_t tokens, int64_t inputs, float* panel) {
    const T* every_row[TILE];
    x.addresses(token, tokens, every_row);
    for (int64_t t = tokens; t < TILE; ++t) every_row[t] = every_row[tokens - 1];
    for (int64_t t = 0; t < round_up(tokens); t += WIDTH) {
        const T* const* rows = every_row + t;
        int64_t column = 0;
        Vector lines[WIDTH];
        for (; column + WIDTH <= inputs; column += WIDTH) {
            for (int i = 0; i < WIDTH; ++i) lines[i] = load(rows[i] + column);
            transpose_vectors(lines);
            for (int i = 0; i < WIDTH; ++i) store(panel + (column + i) * TILE + t, lines[i]);
        }
        for (; column < inputs; ++column)
            for (int i = 0; i < WIDTH; ++i) panel[column * TILE + t + i] = to_float(rows[i][column]);
    }
}

struct Weights {
    Tensor blocks, columns, offsets, bias;  // [N, P, Q] contiguous, int32 [N], int64 [O / P + 1], [O] or none

    int64_t height() const { return blocks.size(1); }
    int64_t width() const { return blocks.size(2); }
    int64_t block_rows() const { return offsets.size(0) - 1; }
    int64_t outputs() const { return block_rows() * height(); }
};

// results[i * TILE + t] for `rows` outputs from number `output` on, all of one block row.
template <int rows, int vectors>
void row_results(const Weights& weights, int64_t block_row, int64_t within, const float* panel, float* results) {
    const int64_t height = weights.height(), width = weights.width();
    const int64_t first = weights.offsets.as<int64_t>()[block_row], last = weights.offsets.as<int64_t>()[block_row + 1];
    const int32_t* columns = weights.columns.as<int32_t>();
    const float* values = weights.blocks.as<float>() + within * width;
    Vector total[rows][vectors];
    for (int i = 0; i < rows; ++i) {
        float start = weights.bias ? weights.bias.as<float>()[block_row * height + within + i] : 0.0f;
        for (int v = 0; v < vectors; ++v) total[i][v] = broadcast(start);
    }
    auto add = [&](const float* line, const float* value) {
        Vector x[vectors];
        for (int v = 0; v < vectors; ++v) x[v] = load(line + v * WIDTH);
        for (int i = 0; i < rows; ++i) {
            Vector weight = broadcast(value[i * width]);
            for (int v = 0; v < vectors; ++v) total[i][v] += weight * x[v];
        }
    };
    for (int64_t n = first; n < last; ++n)
        for (int64_t q = 0; q < width; ++q)
            add(panel + (columns[n] * width + q) * TILE, values + n * height * width + q);
    for (int i = 0; i < rows; ++i)
        for (int v = 0; v < vectors; ++v) store(results + i * TILE + v * WIDTH, total[i][v]);
}

template <int vectors>
void block_row_results(const Weights& weights, int64_t block_row, const float* panel, float* results) {
    int64_t i = 0, height = weights.height();
    for (; i + ROWS <= height; i += ROWS) row_results<ROWS, vectors>(weights, block_row, i, panel, results + i * TILE);
    if (i + 2 <= height) { row_results<2, vectors>(weights, block_row, i, panel, results + i * TILE); i += 2; }
    if (i < height) row_results<1, vectors>(weights, block_row, i, panel, results + i * TILE);
}

template <class T>
void multiply(const Tensor& x, const Weights& weights, const Tensor& y, const Tensor& panels, const Tensor& packed,
              int threads) {
    const int64_t inputs = x.size(2), height = weights.height();
    const int64_t together = height < STRIP ? STRIP / height : 1;  // block rows of a strip
    const Tokens<const T> from(x);
    const Tokens<T> to(y);
    Plan plan(x.size(0) * x.size(1), (weights.block_rows() + together - 1) / together, threads);
    auto panel = [&](int thread) { return panels.as<float>() + thread * panels.stride(0); };
    plan.run(
        packed.as<int64_t>(), threads,
        [&](int64_t tile, int thread) { pack(from, tile * TILE, plan.tokens_of(tile), inputs, panel(thread)); },
        [&](int64_t tile, int64_t strip, int thread) {
            float* results = panel(thread) + inputs * TILE;
            int64_t first = strip * together, last = first + together;
            last = last < weights.block_rows() ? last : weights.block_rows();
            const int64_t tokens = plan.tokens_of(tile), outputs = (last - first) * height;
            T* rows[TILE];
            to.addresses(tile * TILE, tokens, rows);
            expect_strip(outputs, rows, tokens, first * height);
            with_vectors(tokens, [&](auto count) {
                for (int64_t row = first; row < last; ++row)
                    block_row_results<decltype(count)::value>(weights, row, panel(thread),
                                                              results + (row - first) * height * TILE);
            });
            write_strip(results, outputs, rows, tokens, first * height);
        });
}

// Whether `offsets` rise from 0 to the number of blocks and every column is below `width`: nothing else of the
// weights could make a product leave its memory.
bool pattern_fits(const Tensor& columns, const Tensor& offsets, int64_t num_blocks, int64_t width) {
    const int64_t* offset = offsets.as<int64_t>();
    const int64_t rows = offsets.size(0) - 1;
    if (offset[0] != 0 || offset[rows] != num_blocks) return false;
    for (int64_t i = 0; i < rows; ++i)
        if (offset[i] > offset[i + 1]) return false;
    const int32_t* column = columns.as<int32_t>();
    const int64_t count = columns.axes == 1 ? columns.size(0) : columns.size(0) * columns.size(1);
    uint32_t most = 0;  // a negative column is a large one
    for (int64_t i = 0; i < count; ++i) most = uint32_t(column[i]) > most ? uint32_t(column[i]) : most;
    return count == 0 || most < width;
}

}  // namespace

SEQMIX_BINDINGS(module) {
    module.def(
        "sparse_pattern_fits",
        [](Tensor columns, Tensor offsets, int64_t num_blocks, int64_t width) {
            return pattern_fits(columns, offsets, num_blocks, width);
        },
        "columns"_a, "offsets"_a, "num_blocks"_a, "width"_a, WithoutGil());
    module.def("sparse_tile", [] { return TILE; });
    module.def(
        "sparse_matmul",
        [](Tensor x, Tensor blocks, Tensor columns, Tensor offsets, Tensor bias, Tensor y, Tensor panels, Tensor packed,
           int threads) {
            const Weights weights{blocks, columns, offsets, bias};
            if (x.dtype == Dtype::bfloat16) multiply<bfloat16>(x, weights, y, panels, packed, threads);
            else multiply<float>(x, weights, y, panels, packed, threads);
        },
        "x"_a, "blocks"_a, "columns"_a, "offsets"_a, "bias"_a.none(), "y"_a, "panels"_a, "packed"_a, "threads"_a,
        WithoutGil());
}

}  // namespace seqmix
