// Products with block-sparse weights of 8 bits: activations are rounded to 8 bits per token on the way, sums are
// exact in 32 bits, and one factor per token and output makes them floats again.
//
// W is given by block rows of four outputs. A block holds, for each of them, the weights of four inputs, which may
// be any: columns[n][j] is the input of the weights blocks[n][:, j].
#include "tiles.hpp"

namespace seqmix {
namespace {

constexpr int ROWS = 4, DEPTH = 4;     // outputs and inputs of a block
constexpr int GROUP = 16;              // inputs that are turned at once
constexpr int LANES = WIDTH / 4;       // 128-bit lanes of a vector, within which bytes are interleaved
constexpr float SMALLEST = 1e-30f;     // a token whose entries are all below counts as zero
constexpr float LARGEST = 3.4028235e38f;

#if defined(__AVX512VNNI__)
constexpr bool DOTS = true;
#else
constexpr bool DOTS = false;
#endif
// The dot product takes its left bytes without sign, so activations are stored shifted, and 128 times the sum of
// the weights is taken off the result.
constexpr uint8_t SHIFT = DOTS ? 0x80 : 0;

typedef int8_t Bytes __attribute__((vector_size(WIDTH * 4)));

// Which token of the tile stands at byte 16 * lane + place of a panel's row. Four rows of a panel, interleaved byte by
// byte within lanes, make TILE_VECTORS vectors in which four bytes belong to one token; with this order of the row,
// lane i of vector v is token v * WIDTH + i. Without dot products nothing is interleaved.
constexpr int64_t token_at(int lane, int place) {
    return DOTS ? place / 4 * WIDTH + lane * 4 + place % 4 : lane * 16 + place;
}

template <int half>
inline Bytes interleave(Bytes x, Bytes y) {
#if defined(__AVX512BW__)
    return (Bytes)(half ? _mm512_unpackhi_epi8((__m512i)x, (__m512i)y) : _mm512_unpacklo_epi8((__m512i)x, (__m512i)y));
#else
    Bytes mask;
    for (int lane = 0; lane < LANES; ++lane)
        for (int i = 0; i < 8; ++i) {
            mask[lane * 16 + 2 * i] = int8_t(lane * 16 + half * 8 + i);
            mask[lane * 16 + 2 * i + 1] = int8_t(lane * 16 + half * 8 + i + WIDTH * 4);
        }
    return shuffle(x, y, mask);
#endif
}

// To the nearest whole number, ties to even. A NaN becomes any byte: its token's factor is NaN too.
inline void round_to_bytes(Vector x, int8_t* to) {
#if defined(__AVX512F__)
    Integers whole = (Integers)_mm512_maskz_cvtps_epi32(0xffff, (__m512)x);
#else
    float values[WIDTH];
    store(values, x);
    for (int i = 0; i < WIDTH; ++i) values[i] = __builtin_rintf(values[i]);
    Integers whole = __builtin_convertvector(load(values), Integers);
#endif
    FewBytes bytes = __builtin_convertvector(whole, FewBytes);
    std::memcpy(to, &bytes, sizeof bytes);
}

// factor = max |x| / 127 for a row, NaN where an entry is not finite; returns what entries are multiplied by.
template <class T>
float row_factor(const T* row, int64_t inputs, float& factor) {
    Integers most = {};  // of the bits without sign, which are in the order of the numbers; infinity and NaN are last
    auto see = [&](Vector x) {
        Integers size = (Integers)x & 0x7fffffff;
        most = size > most ? size : most;
    };
    int64_t i = 0;
    for (; i + WIDTH <= inputs; i += WIDTH) see(load(row + i));
    if (i < inputs) see(load_part(row + i, inputs - i));
    int32_t bits = 0;
    for (int lane = 0; lane < WIDTH; ++lane) bits = most[lane] > bits ? most[lane] : bits;
    float peak;
    std::memcpy(&peak, &bits, sizeof peak);
    if (!(peak <= LARGEST)) {
        factor = __builtin_nanf("");
        return 0.0f;
    }
    factor = peak < SMALLEST ? 0.0f : peak / 127.0f;
    return peak < SMALLEST ? 0.0f : 127.0f / peak;
}

// panel[i * TILE + place] = rounded x; factors[t] by token. Beyond the last token, the last one again.
template <class T>
void pack(const Tokens<const T>& x, int64_t token, int64_t tokens, int64_t inputs, int8_t* panel, float* factors) {
    const T* rows[TILE];
    float scale[TILE];
    x.addresses(token, tokens, rows);
    for (int64_t t = 0; t < tokens; ++t) scale[t] = row_factor(rows[t], inputs, factors[t]);
    for (int64_t t = tokens; t < TILE; ++t)
        rows[t] = rows[tokens - 1], scale[t] = scale[tokens - 1], factors[t] = factors[tokens - 1];
    for (int64_t column = 0; column < inputs; column += GROUP) {
        int8_t rounded[GROUP * TILE];  // [place][lane][16 inputs]
        for (int place = 0; place < 16; ++place)
            for (int lane = 0; lane < LANES; ++lane) {
                int64_t t = token_at(lane, place);
                int8_t* to = rounded + (place * LANES + lane) * GROUP;
                for (int i = 0; i < GROUP; i += WIDTH) {
                    int64_t left = inputs - column - i;
                    const T* from = rows[t] + column + i;
                    Vector line = left >= WIDTH ? load(from) : load_part(from, left > 0 ? left : 0);
                    round_to_bytes(line * scale[t], to + i);
                }
            }
        Bytes now[GROUP], next[GROUP];
        for (int i = 0; i < GROUP; ++i) std::memcpy(&now[i], rounded + i * TILE, TILE);
        for (int pass = 1; pass < GROUP; pass *= 2) {  // as transpose_vectors does
            for (int i = 0; i < GROUP / 2; ++i) {
                next[2 * i] = interleave<0>(now[i], now[i + GROUP / 2]);
                next[2 * i + 1] = interleave<1>(now[i], now[i + GROUP / 2]);
            }
            for (int i = 0; i < GROUP; ++i) now[i] = next[i];
        }
        for (int i = 0; i < GROUP && column + i < inputs; ++i) {
            Bytes line = now[i] ^ (int8_t)SHIFT;
            std::memcpy(panel + (column + i) * TILE, &line, TILE);
        }
    }
}

#if defined(__AVX512VNNI__)

// sums plus products of four unsigned bytes of x with four signed ones of y, in every 32-bit lane. Written as an
// instruction because GCC 12 copies every sum twice around its own name for it, which halves the speed.
template <class Register>
inline Register add_dot(Register sums, Register x, Register y) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(x), "v"(y));
    return sums;
}

// total[i][v] = the sums of products of the blocks first to last.
template <int vectors>
inline void dot_products(int64_t first, int64_t last, const int8_t* blocks, const int32_t* columns,
                         const int8_t* panel, Integers (&total)[ROWS][vectors]) {
    __m512i sums[ROWS][vectors];
    for (int i = 0; i < ROWS; ++i)
        for (int v = 0; v < vectors; ++v) sums[i][v] = _mm512_setzero_si512();
    __m128i shifts = _mm_setzero_si128();
    const __m128i shift = _mm_set1_epi8((char)SHIFT);
    for (int64_t n = first; n < last; ++n) {
        __m512i line[DEPTH];
        for (int j = 0; j < DEPTH; ++j) line[j] = _mm512_loadu_si512(panel + columns[n * DEPTH + j] * TILE);
        __m512i x[vectors];
        for (int half = 0; half < vectors / 2; ++half) {
            __m512i left = half ? (__m512i)interleave<1>((Bytes)line[0], (Bytes)line[1])
                                : (__m512i)interleave<0>((Bytes)line[0], (Bytes)line[1]);
            __m512i right = half ? (__m512i)interleave<1>((Bytes)line[2], (Bytes)line[3])
                                 : (__m512i)interleave<0>((Bytes)line[2], (Bytes)line[3]);
            x[2 * half] = _mm512_unpacklo_epi16(left, right);
            x[2 * half + 1] = _mm512_unpackhi_epi16(left, right);
        }
        const int8_t* block = blocks + n * ROWS * DEPTH;
        shifts = add_dot(shifts, shift, _mm_loadu_si128((const __m128i*)block));
        for (int i = 0; i < ROWS; ++i) {
            int32_t four;
            std::memcpy(&four, block + i * DEPTH, DEPTH);
            __m512i weights = _mm512_set1_epi32(four);
            for (int v = 0; v < vectors; ++v) sums[i][v] = add_dot(sums[i][v], x[v], weights);
        }
    }
    const int32_t taken[ROWS] = {_mm_extract_epi32(shifts, 0), _mm_extract_epi32(shifts, 1),
                                 _mm_extract_epi32(shifts, 2), _mm_extract_epi32(shifts, 3)};
    for (int i = 0; i < ROWS; ++i)
        for (int v = 0; v < vectors; ++v) total[i][v] = (Integers)sums[i][v] - taken[i];
}

#else

// The same with fused products of floats, which are exact for as many blocks as are added before a sum is put by.
template <int vectors>
inline void dot_products(int64_t first, int64_t last, const int8_t* blocks, const int32_t* columns,
                         const int8_t* panel, Integers (&total)[ROWS][vectors]) {
    constexpr int64_t EXACT = (1 << 24) / (127 * 128 * DEPTH);
    for (int i = 0; i < ROWS; ++i)
        for (int v = 0; v < vectors; ++v) total[i][v] = Integers{};
    for (int v = 0; v < vectors; ++v)
        for (int64_t from = first; from < last; from += EXACT) {
            int64_t to = from + EXACT < last ? from + EXACT : last;
            Vector sums[ROWS] = {};
            for (int64_t n = from; n < to; ++n)
                for (int j = 0; j < DEPTH; ++j) {
                    FewBytes bytes;
                    std::memcpy(&bytes, panel + columns[n * DEPTH + j] * TILE + v * WIDTH, sizeof bytes);
                    Vector x = floats(bytes);
                    for (int i = 0; i < ROWS; ++i) sums[i] += x * float(blocks[(n * ROWS + i) * DEPTH + j]);
                }
            for (int i = 0; i < ROWS; ++i) total[i][v] += __builtin_convertvector(sums[i], Integers);
        }
}

#endif

struct Weights {
    Tensor blocks, scales, columns, offsets, bias;  // int8 [N, 4, 4], [O], int32 [N, 4], int64 [O / 4 + 1], [O] or none
};

// results[i * TILE + t] for the four outputs of a block row.
template <int vectors>
void row_results(const Weights& weights, int64_t row, const int8_t* panel, const float* factors, float* results) {
    const int64_t* offsets = weights.offsets.as<int64_t>();
    Integers total[ROWS][vectors];
    dot_products<vectors>(offsets[row], offsets[row + 1], weights.blocks.as<int8_t>(), weights.columns.as<int32_t>(),
                          panel, total);
    for (int i = 0; i < ROWS; ++i) {
        float scale = weights.scales.as<float>()[row * ROWS + i];
        float start = weights.bias ? weights.bias.as<float>()[row * ROWS + i] : 0.0f;
        for (int v = 0; v < vectors; ++v) {
            Vector product = __builtin_convertvector(total[i][v], Vector) * scale * load(factors + v * WIDTH);
            store(results + i * TILE + v * WIDTH, product + start);
        }
    }
}

template <class T>
void multiply(const Tensor& x, const Weights& weights, const Tensor& y, const Tensor& panels, const Tensor& results,
              const Tensor& packed, int threads) {
    const int64_t inputs = x.size(2), block_rows = weights.offsets.size(0) - 1, together = STRIP / ROWS;
    const Tokens<const T> from(x);
    const Tokens<T> to(y);
    Plan plan(x.size(0) * x.size(1), (block_rows + together - 1) / together, threads);
    auto panel = [&](int thread) { return panels.as<int8_t>() + thread * panels.stride(0); };
    auto own = [&](int thread) { return results.as<float>() + thread * results.stride(0); };
    plan.run(
        packed.as<int64_t>(), threads,
        [&](int64_t tile, int thread) {
            pack(from, tile * TILE, plan.tokens_of(tile), inputs, panel(thread), own(thread));
        },
        [&](int64_t tile, int64_t strip, int thread) {
            float* factors = own(thread);
            float* strip_results = factors + TILE;
            int64_t first = strip * together, last = first + together;
            last = last < block_rows ? last : block_rows;
            const int64_t tokens = plan.tokens_of(tile), outputs = (last - first) * ROWS;
            T* rows[TILE];
            to.addresses(tile * TILE, tokens, rows);
            expect_strip(outputs, rows, tokens, first * ROWS);
            for (int64_t row = first; row < last; ++row) {
                float* here = strip_results + (row - first) * ROWS * TILE;
                if (tokens <= 2 * WIDTH) row_results<2>(weights, row, panel(thread), factors, here);
                else row_results<TILE_VECTORS>(weights, row, panel(thread), factors, here);
            }
            write_strip(strip_results, outputs, rows, tokens, first * ROWS);
        });
}

}  // namespace

SEQMIX_BINDINGS(module) {
    module.def(
        "quantized_sparse_matmul",
        [](Tensor x, Tensor blocks, Tensor scales, Tensor columns, Tensor offsets, Tensor bias, Tensor y, Tensor panels,
           Tensor results, Tensor packed, int threads) {
            const Weights weights{blocks, scales, columns, offsets, bias};
            if (x.dtype == Dtype::bfloat16) multiply<bfloat16>(x, weights, y, panels, results, packed, threads);
            else multiply<float>(x, weights, y, panels, results, packed, threads);
        },
        "x"_a, "blocks"_a, "scales"_a, "columns"_a, "offsets"_a, "bias"_a.none(), "y"_a, "panels"_a, "results"_a,
        "packed"_a, "threads"_a, WithoutGil());
}

}  // namespace seqmix
