// Products with the weights of linear layers.
//
// For few tokens the time goes into reading W: its numbers become floats in registers and nowhere else (but for groups of
// 4 bits that are not pairs of vectors, or others than those of a layer that reads the same tokens: they become bytes
// first), the lanes of a vector are inputs, and the sums of a vector's outputs are turned together at the end. For more it
// goes into products: a strip of W becomes floats in cache, turned, once for many tokens, and the lanes are outputs.
#include "weight_matmul.hpp"

#include <type_traits>

#include "parallel.hpp"
#include "tokens.hpp"

namespace seqmix {
namespace {

constexpr int TOGETHER = 6;                 // tokens whose sums are in registers with those of a strip
constexpr int64_t TASK_PRODUCTS = 1 << 17;  // so many take as long as waking a thread
static_assert(TASK_TOKENS % TOGETHER == 0 && FEW_TOKENS >= TOGETHER, "a task has whole groups of tokens");
static_assert(DEPTH % WIDTH == 0, "vectors end where the inputs of a strip do");

inline Vector load_numbers(const float* from) { return load(from); }
inline Vector load_numbers(const bfloat16* from) { return load(from); }
inline Vector load_numbers(const int8_t* from) {
    FewBytes bytes;
    std::memcpy(&bytes, from, sizeof bytes);
    return floats(bytes);
}

template <class Number>
inline Vector load_some_numbers(const Number* from, int64_t count) {
    Number some[WIDTH] = {};
    std::memcpy(some, from, (count < WIDTH ? count : WIDTH) * sizeof(Number));
    return load_numbers(some);
}

// sums[t][place] = lane by lane, the products of a row of the weight with token t. Whoever reads one row after the other
// from its first number to its last reads memory the fastest. A page ahead is fetched, for processors foresee nothing
// beyond the end of one.
template <int tokens, class Number>
inline void lane_sums(const Number* row, int64_t inputs, const float* x, int64_t stride, Vector (*sums)[WIDTH],
                      int64_t place) {
    constexpr int64_t IN_LINE = LINE / sizeof(Number), BOTH = 2 * WIDTH;
    Vector total[2][tokens] = {};  // which do not wait for each other
    auto add = [&](int part, int64_t input, Vector factor) {
        for (int t = 0; t < tokens; ++t) total[part][t] += factor * load(x + t * stride + input);
    };
    int64_t input = 0;
    for (; input + BOTH <= inputs; input += BOTH) {
        if (BOTH >= IN_LINE || input % IN_LINE == 0) __builtin_prefetch(row + input + AHEAD / sizeof(Number));
        if (BOTH > IN_LINE) __builtin_prefetch(row + input + IN_LINE + AHEAD / sizeof(Number));
        add(0, input, load_numbers(row + input));
        add(1, input + WIDTH, load_numbers(row + input + WIDTH));
    }
    for (; input + WIDTH <= inputs; input += WIDTH) add(0, input, load_numbers(row + input));
    if (input < inputs) add(0, input, load_some_numbers(row + input, inputs - input));
    for (int t = 0; t < tokens; ++t) sums[t][place] = total[0][t] + total[1][t];
}

// The same of so many rows of codes of 4 bits, from output number `output` on, for tokens number `token` on of x. Their
// sums begin anew with every group, so several of them are needed to be busy.
template <int rows, int tokens>
inline void lane_sums(const FourBits& bits, int64_t output, const SplitTokens& x, int64_t token, Vector (*sums)[WIDTH],
                      int64_t place) {
    const uint8_t *codes[rows], *factors[rows];
    for (int i = 0; i < rows; ++i) {
        codes[i] = bits.codes.as<uint8_t>() + (output + i) * bits.codes.size(1);
        factors[i] = bits.factors.as<uint8_t>() + (output + i) * bits.factors.size(1);
    }
    Vector total[rows][tokens] = {};
    for (int64_t group = 0, byte = 0; group < x.groups; ++group) {
        Vector own[rows][tokens];
        for (int t = 0; t < tokens; ++t) {
            Vector start = load(x.start_of(token + t, group));
            for (int i = 0; i < rows; ++i) own[i][t] = start;
        }
        for (const int64_t end = byte + bits.group / 2; byte < end; byte += WIDTH) {
            if (byte % LINE < WIDTH)
                for (int i = 0; i < rows; ++i) __builtin_prefetch(codes[i] + byte + AHEAD);
            Vector even[tokens], odd[tokens];
            for (int t = 0; t < tokens; ++t) {
                even[t] = load(x.row_of(token + t) + 2 * byte);
                odd[t] = load(x.row_of(token + t) + 2 * byte + WIDTH);
            }
            for (int i = 0; i < rows; ++i) {
                const auto [low, high] = halves_of_bytes(codes[i] + byte);
                for (int t = 0; t < tokens; ++t) {
                    own[i][t] += low * even[t];
                    own[i][t] += high * odd[t];
                }
            }
        }
        for (int i = 0; i < rows; ++i) {
            Vector factor = broadcast(sixteen_numbers[half_byte(factors[i], group)]);
            for (int t = 0; t < tokens; ++t) total[i][t] += factor * own[i][t];
        }
    }
    for (int i = 0; i < rows; ++i)
        for (int t = 0; t < tokens; ++t) sums[t][place + i] = total[i][t];
}

// Rows of a weight, for the sums of few tokens x: numbers of `inputs`, or codes from number `output` on. So many rows
// are read together for so many tokens.
template <class Number>
struct NumberRows {
    template <int tokens>
    static constexpr int rows = 1;
    const Number* weight;
    int64_t inputs;
    const float* x;
    int64_t stride;

    template <int rows, int tokens>
    void add(int64_t i, int64_t token, Vector (*sums)[WIDTH]) const {
        lane_sums<tokens>(weight + i * inputs, inputs, x + token * stride, stride, sums, i);
    }
};

struct CodeRows {
    template <int tokens>
    static constexpr int rows = tokens == 4 && BLOCK_VECTORS == 2 ? 2 : 4;  // as there are registers for
    const FourBits& bits;
    int64_t output;
    const SplitTokens& x;

    template <int rows, int tokens>
    void add(int64_t i, int64_t token, Vector (*sums)[WIDTH]) const {
        lane_sums<rows, tokens>(bits, output + i, x, token, sums, i);
    }
};

// put(token, output, values, count) of `count` outputs, at most a vector of them, from number `first` on, for so many
// tokens from number `token` on.
template <int tokens, class Weight, class Results>
inline void few_results(const Linear& layer, const Weight& weight, int64_t first, int64_t count, int64_t token,
                        const Results& put) {
    constexpr int rows = Weight::template rows<tokens>;
    Vector sums[tokens][WIDTH] = {};
    int64_t i = 0;
    for (; i + rows <= count; i += rows) weight.template add<rows, tokens>(i, token, sums);
    for (; i < count; ++i) weight.template add<1, tokens>(i, token, sums);
    for (int t = 0; t < tokens; ++t) {
        transpose_vectors(sums[t]);
        Vector total = {};
        for (int lane = 0; lane < WIDTH; ++lane) total += sums[t][lane];
        put(token + t, first, layer.finished(total, first, count), count);
    }
}

// turned[i * WEIGHT_STRIP + o] = W_oi for i < depth and `count` outputs, zero for the rest of the strip. Rows of W are
// `inputs` apart; what lies `ahead` is fetched.
template <class Number>
inline void turn_strip(const Number* weight, int64_t inputs, int64_t depth, int64_t count, int64_t ahead, float* turned) {
    constexpr int64_t IN_LINE = LINE / sizeof(Number);
    for (int64_t o = 0; o < WEIGHT_STRIP; o += WIDTH)
        for (int64_t i = 0; i < depth; i += WIDTH) {
            const Number* from = weight + o * inputs + i;
            if (i % IN_LINE == 0)
                for (int j = 0; j < WIDTH; ++j) __builtin_prefetch(from + ahead + j * inputs);
            Vector lines[WIDTH];
            if (depth - i >= WIDTH && count - o >= WIDTH) {
                for (int j = 0; j < WIDTH; ++j) lines[j] = load_numbers(from + j * inputs);
            } else {
                for (int j = 0; j < WIDTH; ++j)
                    lines[j] = o + j < count ? load_some_numbers(from + j * inputs, depth - i) : Vector{};
            }
            transpose_vectors(lines);
            for (int j = 0; j < WIDTH; ++j) store(turned + (i + j) * WEIGHT_STRIP + o, lines[j]);
        }
}

// sums[t][o] += sum_i turned[i][o] x_t[i] for TOGETHER tokens, or = where `begins`.
inline void add_strip(const float* turned, int64_t depth, const float* x, int64_t stride, bool begins, float* sums) {
    Vector total[TOGETHER][BLOCK_VECTORS] = {};
    if (!begins)
        for (int t = 0; t < TOGETHER; ++t)
            for (int v = 0; v < BLOCK_VECTORS; ++v) total[t][v] = load(sums + t * WEIGHT_STRIP + v * WIDTH);
    for (int64_t i = 0; i < depth; ++i) {
        Vector line[BLOCK_VECTORS];
        for (int v = 0; v < BLOCK_VECTORS; ++v) line[v] = load(turned + i * WEIGHT_STRIP + v * WIDTH);
        for (int t = 0; t < TOGETHER; ++t) {
            Vector input = broadcast(x[t * stride + i]);
            for (int v = 0; v < BLOCK_VECTORS; ++v) total[t][v] += input * line[v];
        }
    }
    for (int t = 0; t < TOGETHER; ++t)
        for (int v = 0; v < BLOCK_VECTORS; ++v) store(sums + t * WEIGHT_STRIP + v * WIDTH, total[t][v]);
}

// The same for some strips of outputs and at least TOGETHER tokens; the last of them in one group with some that are in
// the group before as well. Some inputs of all tokens stay in cache while they meet all strips.
template <class Number, class Results>
inline void strip_results(const Linear& layer, const Number* weight, int64_t first, int64_t count, const float* x,
                          int64_t stride, int64_t token, int64_t tokens, float* turned, float* sums,
                          const Results& put) {
    const int64_t inputs = layer.inputs(), groups = (tokens + TOGETHER - 1) / TOGETHER;
    auto begin = [&](int64_t group) {
        return (group + 1) * TOGETHER <= tokens ? group * TOGETHER : tokens - TOGETHER;
    };
    auto sums_of = [&](int64_t strip, int64_t group) {
        return sums + (strip / WEIGHT_STRIP * TASK_TOKENS + group * TOGETHER) * WEIGHT_STRIP;
    };
    for (int64_t from = 0; from < inputs; from += DEPTH) {
        const int64_t depth = inputs - from < DEPTH ? inputs - from : DEPTH;
        for (int64_t strip = 0; strip < count; strip += WEIGHT_STRIP) {
            int64_t ahead = WEIGHT_STRIP * inputs;  // the next strip, the first one's next inputs, or those of other strips
            if (strip + WEIGHT_STRIP >= count) ahead = from + DEPTH < inputs ? DEPTH - strip * inputs : ahead - from;
            turn_strip(weight + strip * inputs + from, inputs, depth, count - strip, ahead, turned);
            for (int64_t group = 0; group < groups; ++group)
                add_strip(turned, depth, x + begin(group) * stride + from, stride, from == 0, sums_of(strip, group));
        }
    }
    for (int64_t group = 0; group < groups; ++group)
        for (int t = 0; t < TOGETHER; ++t) {
            const int64_t at = begin(group) + t;
            if (at < group * TOGETHER) continue;  // put already
            for (int64_t output = 0; output < count; output += WIDTH) {
                const int64_t some = count - output < WIDTH ? count - output : WIDTH;
                Vector total = load(sums_of(output, group) + t * WEIGHT_STRIP + output % WEIGHT_STRIP);
                put(token + at, first + output, layer.finished(total, first + output, some), some);
            }
        }
}

// panel[t * stride + i] = x_t[i], zero up to whole vectors.
template <class T>
void pack_tokens(const Tokens<const T>& x, int64_t tokens, int64_t inputs, int64_t stride, float* panel, int threads) {
    constexpr int64_t SHARE = 16;
    for_each_task((tokens + SHARE - 1) / SHARE, threads, [&](int64_t task, int) {
        const T* rows[SHARE];
        const int64_t first = task * SHARE, count = tokens - first < SHARE ? tokens - first : SHARE;
        x.addresses(first, count, rows);
        for (int64_t t = 0; t < count; ++t)
            for (int64_t i = 0; i < stride; i += WIDTH) {
                const int64_t left = inputs - i;
                store(panel + (first + t) * stride + i, left < WIDTH ? load_part(rows[t] + i, left) : load(rows[t] + i));
            }
    });
}

}  // namespace

void multiply(const Linear* layers, int count_of_layers, const float* x, int64_t stride, int64_t tokens,
              const StripSpace& space, int threads, const Put& put) {
    const bool few = tokens <= FEW_TOKENS;
    const int64_t height = few ? WIDTH : STRIPS * WEIGHT_STRIP, inputs = layers[0].inputs();
    auto strips_of = [&](const Linear& layer) { return (layer.outputs() + height - 1) / height; };
    int64_t strips = 0;
    for (int i = 0; i < count_of_layers; ++i) strips += strips_of(layers[i]);
    const int64_t tiles = (tokens + TASK_TOKENS - 1) / TASK_TOKENS;
    int64_t shares = tokens * inputs * strips * height < 2 * TASK_PRODUCTS ? 1 : 4 * threads;
    shares = shares < strips ? shares : strips;
    const FourBits* codes = nullptr;
    for (int i = 0; i < count_of_layers; ++i)
        if (few && layers[i].codes.is_read_in_vectors()) codes = &layers[i].codes;
    const SplitTokens split = codes ? SplitTokens(*codes, x, stride, tokens, space.floats) : SplitTokens();
    for_each_task(tiles * shares, threads, [&](int64_t task, int thread) {
        const int64_t tile = task / shares, share = task % shares;
        const int64_t begin = tokens * tile / tiles, here = tokens * (tile + 1) / tiles - begin;
        int64_t strip = strips * share / shares, before = 0;
        const int64_t end = strips * (share + 1) / shares;
        for (int i = 0; i < count_of_layers && strip < end; before += strips_of(layers[i++])) {
            const Linear& layer = layers[i];
            const int64_t outputs = layer.outputs(), stop = before + strips_of(layer);
            auto to = [&](int64_t token, int64_t output, Vector values, int64_t some) {
                put(i, token, output, values, some);
            };
            auto put_few = [&](const auto& weight, int64_t first, int64_t count) {
                int64_t token = begin;
                auto run = [&](auto some) {
                    few_results<decltype(some)::value>(layer, weight, first, count, token, to);
                    token += some.value;
                };
                while (token + 4 <= begin + here) run(Rows<4>{});
                if (token + 2 <= begin + here) run(Rows<2>{});
                if (token < begin + here) run(Rows<1>{});
            };
            auto each_strip = [&](auto&& body) {
                for (; strip < end && strip < stop; ++strip) {
                    const int64_t first = (strip - before) * height;
                    body(first, outputs - first < height ? outputs - first : height);
                }
            };
            if (few && split.fits(layer.codes)) {
                each_strip([&](int64_t first, int64_t count) {
                    put_few(CodeRows{layer.codes, first, split}, first, count);
                });
                continue;
            }
            layer.with_rows([&](const auto& numbers) {
                each_strip([&](int64_t first, int64_t count) {
                    const auto* weight = numbers(first, count, space.bytes(thread));
                    using Number = std::remove_cv_t<std::remove_pointer_t<decltype(weight)>>;
                    if (few && !layer.codes && strip == strips * share / shares)  // nobody has fetched these ahead
                        for (int64_t byte = LINE; byte < AHEAD; byte += LINE)
                            __builtin_prefetch(reinterpret_cast<const char*>(weight) + byte);
                    if (few) put_few(NumberRows<Number>{weight, inputs, x, stride}, first, count);
                    else strip_results(layer, weight, first, count, x + begin * stride, stride, begin, here,
                                       space.turned(thread), space.sums(thread), to);
                });
            });
        }
    });
}

void require_of_outputs(const Tensor& numbers, int64_t outputs) {
    if (!numbers) return;
    require_shape(numbers, "weight_matmul: a factor or bias is [O]", {outputs});
    require(numbers.stride(0) == 1 && (numbers.dtype == Dtype::float32 || numbers.dtype == Dtype::bfloat16),
            "weight_matmul: factors and biases are in float32 or bfloat16, without gaps");
}

namespace {

// y [B, T, O], without gaps, of x [B, T, I].
template <class T>
void multiply_tokens(const Tensor& x, const Linear& layer, const Tensor& y, float* room, int threads) {
    const int64_t tokens = x.size(0) * x.size(1), inputs = x.size(2), outputs = y.size(2), stride = round_up(inputs);
    pack_tokens(Tokens<const T>(x), tokens, inputs, stride, room, threads);
    multiply(&layer, 1, room, stride, tokens, StripSpace(inputs, room + tokens * stride), threads,
             [&](int, int64_t token, int64_t first, Vector values, int64_t count) {
                 T* to = y.as<T>() + token * outputs + first;
                 if (count < WIDTH) store_part(to, values, count);
                 else store(to, values);
             });
}

int64_t workspace_floats(int64_t tokens, int64_t inputs, int threads) {
    return tokens * round_up(inputs) + StripSpace(inputs, nullptr).all(threads);
}

// x [B, T, I] with one layer, to y [B, T, O].
void multiply_weight(const Tensor& x, const Linear& layer, const Tensor& y, const Tensor& room, int threads) {
    const int64_t tokens = x.size(0) * x.size(1), inputs = x.size(2);
    require(tokens > 0 && inputs > 0 && y.size(2) > 0, "weight_matmul: there is at least one of everything");
    require(layer.outputs() == y.size(2) && layer.inputs() == inputs, "weight_matmul: the weight is [O, I]");
    require(room.dtype == Dtype::float32, "weight_matmul: the workspace is in float32");
    require(room.size(0) >= workspace_floats(tokens, inputs, threads), "weight_matmul: the workspace is too small");
    if (x.dtype == Dtype::bfloat16) multiply_tokens<bfloat16>(x, layer, y, room.as<float>(), threads);
    else multiply_tokens<float>(x, layer, y, room.as<float>(), threads);
}

}  // namespace

SEQMIX_BINDINGS(module) {
    module.def("weight_matmul_few", [] { return FEW_TOKENS; });
    module.def("weight_matmul_workspace", &workspace_floats, "tokens"_a, "inputs"_a, "threads"_a);
    module.def(
        "linear_step",
        [](Tensor x, Tensor weight, Tensor bias, Tensor y, Tensor room, int threads) {
            require_of_outputs(bias, weight.size(0));
            multiply_weight(x, {weight, {}, bias, {}}, y, room, threads);
        },
        "x"_a, "weight"_a, "bias"_a.none(), "y"_a, "room"_a, "threads"_a, WithoutGil());
    module.def(
        "int8_matmul",
        [](Tensor x, Tensor weight, Tensor scale, Tensor bias, Tensor y, Tensor room, int threads) {
            multiply_weight(x, {weight, scale, bias, {}}, y, room, threads);
        },
        "x"_a, "weight"_a, "scale"_a, "bias"_a.none(), "y"_a, "room"_a, "threads"_a, WithoutGil());
    module.def(
        "int4_matmul",
        [](Tensor x, Tensor codes, Tensor factors, Tensor scale, Tensor bias, Tensor y, int64_t group, Tensor room,
           int threads) {
            require_codes({codes, factors, x.size(2), group});
            multiply_weight(x, {{}, scale, bias, {codes, factors, x.size(2), group}}, y, room, threads);
        },
        "x"_a, "codes"_a, "factors"_a, "scale"_a, "bias"_a.none(), "y"_a, "group"_a, "room"_a, "threads"_a,
        WithoutGil());
}

}  // namespace seqmix
