// Attention: o_t = sum_j p_tj v_j over the keys that query t sees, p_t the softmax of their scores.
//
// A line is some queries and the keys that they see; its keys are read in tiles. Few queries against many keys
// (decoding) are cut along the keys: all tiles of all lines in a row are divided into equal pieces, wherever lines
// begin, and what the pieces of a line have read is merged afterwards. Many queries are cut into blocks of queries,
// a line each, of texts of a batch or packed.
#include "attention.hpp"

#include "parallel.hpp"
#include "tensor.hpp"
#include "texts.hpp"

namespace seqmix {
namespace {

constexpr int64_t MOST_ROWS = 192;         // queries of a line times heads that share a key head
constexpr int64_t DECODED = 16;            // up to so many queries are a continuation of a long text
constexpr int64_t MOST_PIECES = 64;        // however many threads there are: their number must not change a bit
constexpr int64_t SHORTEST_PIECE = 4;      // tiles
constexpr int64_t MERGED_ALONE = 1 << 17;  // floats, which one thread reads in some ten microseconds

int64_t divide_up(int64_t count, int64_t size) { return (count + size - 1) / size; }
int64_t smaller(int64_t x, int64_t y) { return x < y ? x : y; }
int64_t larger(int64_t x, int64_t y) { return x > y ? x : y; }

// Which keys a position sees: of window < 0 all; the first `first` in any case.
struct Rule {
    bool causal;
    int64_t window, first;
};

// A run of keys [low, high), and before it the first `first` of the text.
struct Range {
    int64_t first, low, high;
    int64_t keys() const { return first + high - low; }
    int64_t tiles() const { return divide_up(keys(), TILE); }
};

// What the positions `begin` to `end` (of `length`) see together.
Range range_of(const Rule& rule, int64_t begin, int64_t end, int64_t length) {
    Range range{0, 0, length};
    if (rule.causal) range.high = smaller(range.high, end);
    if (rule.window >= 0) {
        if (!rule.causal) range.high = smaller(range.high, end - 1 + rule.window);
        range.low = larger(0, begin - rule.window + 1);
        range.first = smaller(rule.first, rule.causal ? larger(end, 0) : length);
        range.low = larger(range.low, range.first);
    }
    range.high = larger(range.high, range.low);
    return range;
}

// How the work is cut, from sizes alone. `token_major`: the heads of a token are neighbours in memory, so that all
// of them are read before the next tile.
struct Plan {
    int64_t batch, queries, keys, groups, share, key_width, value_width, texts;
    bool packed, along_keys;
    int threads;
    int64_t block;        // queries of a line
    int64_t heads;        // key heads of a line
    int64_t lines, pieces;

    Plan(int64_t batch, int64_t queries, int64_t keys, int64_t heads_of_queries, int64_t groups, int64_t key_width,
         int64_t value_width, int64_t texts, bool token_major, int threads)
        : batch(batch), queries(queries), keys(keys), groups(groups), share(heads_of_queries / groups),
          key_width(key_width), value_width(value_width), texts(texts), packed(texts > 0), threads(threads) {
        bool one_block = queries * share <= MOST_ROWS || queries == 1;
        along_keys = !packed && one_block && (queries <= DECODED || batch * groups < MOST_PIECES / 4);
        block = one_block ? queries : larger(1, smaller(TILE, MOST_ROWS / share));
        heads = along_keys && token_major && queries <= DECODED ? groups : 1;
        if (along_keys) {
            lines = batch * groups / heads;
            int64_t tiles = lines * divide_up(keys, TILE);
            pieces = larger(1, smaller(MOST_PIECES, tiles / SHORTEST_PIECE));
        } else {
            lines = pieces = (packed ? queries / block + texts : batch * divide_up(queries, block)) * groups;
        }
    }

    int64_t rows() const { return block * share; }
    // A piece and the next have read parts of one line, or the next begins a line: so each (piece, line) that meet
    // have a number of their own, their sum.
    int64_t readings() const { return along_keys ? pieces + lines : threads; }
    int64_t reading_floats() const { return round_up(heads * rows() * (round_up(value_width) + 2)); }
    int64_t query_floats() const { return heads * rows() * round_up(key_width); }
    int64_t thread_floats() const { return query_floats() + Scratch::floats(rows(), key_width, value_width); }
    int64_t floats() const { return readings() * reading_floats() + threads * round_up(thread_floats()); }
};

// Queries of one key head at the positions `begin` to `begin + count` of a text.
struct Line {
    Text text;
    int64_t begin, count, head;
    Range range;
};

struct Attention {
    Tensor q, k, v, bias, sinks, bounds, o, workspace;  // [B, T, H, K] ..., bias [B, H, T, S], bounds [N + 1]
    Rule rule;
    float scale;
    Plan plan;

    int64_t keys_of(const Text& text) const { return plan.packed ? text.length : plan.keys; }
    // Queries stand at the end of the keys.
    int64_t position(const Line& line, int64_t t) const {
        return line.begin + t + (plan.packed ? 0 : plan.keys - plan.queries);
    }

    // `head` counts the key heads of the line; row t * share + h is query t of the h-th head that reads them.
    Queries queries_at(float* reading, float* q_rows, int64_t head, const Line& line) const {
        int64_t rows = plan.rows(), sum_row = round_up(plan.value_width);
        float* sums = reading + head * rows * sum_row;
        float* numbers = reading + plan.heads * rows * sum_row + head * 2 * rows;
        return {line.count * plan.share, plan.key_width, plan.value_width,
                q_rows + head * rows * round_up(plan.key_width), numbers, numbers + rows, sums};
    }

    template <class T>
    void load_queries(const Queries& queries, const Line& line) const {
        for (int64_t t = 0; t < line.count; ++t) {
            float* to = queries.q + t * plan.share * queries.q_row();
            const T* from = token<T>(q, line.text, line.begin + t) + line.head * plan.share * q.stride(2);
            copy_rows(from, q.stride(2), plan.share, plan.key_width, to, queries.q_row());
        }
        for (int64_t i = 0; i < queries.rows * queries.q_row(); ++i) queries.q[i] *= scale;
    }

    void start(const Queries& queries, const Line& line) const {
        queries.start();
        if (q.dtype == Dtype::bfloat16) load_queries<bfloat16>(queries, line);
        else load_queries<float>(queries, line);
    }

    // Adds the bias to the scores of keys from `first` on, and hides those that a query does not see.
    void mask(const Line& line, int64_t first, float* scores, int64_t count) const {
        for (int64_t t = 0; t < line.count; ++t) {
            int64_t at = position(line, t), low = 0, high = count;
            if (rule.causal) high = smaller(high, at + 1 - first);
            if (rule.window >= 0 && first >= line.range.first) {
                low = at - rule.window + 1 - first;
                if (!rule.causal) high = smaller(high, at + rule.window - first);
            }
            for (int64_t h = 0; h < plan.share; ++h) {
                float* row = scores + (t * plan.share + h) * TILE;
                if (bias) add_bias(line, t, line.head * plan.share + h, first, row, count);
                for (int64_t j = 0; j < smaller(low, count); ++j) row[j] = NOTHING;
                for (int64_t j = larger(high, 0); j < count; ++j) row[j] = NOTHING;
            }
        }
    }

    void add_bias(const Line& line, int64_t t, int64_t head, int64_t first, float* row, int64_t count) const {
        const float* from = bias.as<float>() + line.text.row * bias.stride(0) + head * bias.stride(1) +
                            (line.text.start + line.begin + t) * bias.stride(2) +
                            (line.text.start + first) * bias.stride(3);
        for (int64_t j = 0; j < count; ++j) row[j] += from[j * bias.stride(3)];
    }

    // Reads tile number `tile` of the line's keys.
    template <class T>
    void read(const Queries& queries, const Line& line, int64_t tile, const Scratch& scratch) const {
        int64_t from = tile * TILE, to = smaller(from + TILE, line.range.keys());
        while (from < to) {  // twice where the first keys end within the tile
            bool early = from < line.range.first;
            int64_t stop = early ? smaller(to, line.range.first) : to;
            int64_t key = early ? from : line.range.low + from - line.range.first;
            Keys<T> keys{token<T>(k, line.text, key) + line.head * k.stride(2),
                         token<T>(v, line.text, key) + line.head * v.stride(2),
                         k.stride(1), v.stride(1), stop - from, plan.along_keys ? TILE : 0};
            read_tile(queries, keys, scratch,
                      [&](float* scores, int64_t count) { mask(line, key, scores, count); });
            from = stop;
        }
    }

    template <class T>
    void write(const Queries& queries, const Line& line) const {
        for (int64_t r = 0; r < queries.rows; ++r) {
            int64_t head = line.head * plan.share + r % plan.share;
            float sink = sinks ? sinks.as<float>()[head * sinks.stride(0)] : NOTHING;
            finish(queries, r, sink, token<T>(o, line.text, line.begin + r / plan.share) + head * o.stride(2));
        }
    }

    float* reading(int64_t index) const { return workspace.as<float>() + index * plan.reading_floats(); }
    float* thread_space(int thread) const {
        return reading(plan.readings()) + thread * round_up(plan.thread_floats());
    }

    // A block of queries after the other.
    template <class T>
    void by_queries() const {
        for_each_task(plan.lines, plan.threads, [&](int64_t task, int thread) {
            Line line;
            if (!block_at(plan.lines - 1 - task, &line)) return;  // late queries see most: they come first
            float* space = thread_space(thread);
            Queries queries = queries_at(reading(thread), space, 0, line);
            Scratch scratch = Scratch::at(space + plan.query_floats(), plan.rows(), plan.key_width,
                                          plan.value_width);
            start(queries, line);
            for (int64_t tile = 0; tile < line.range.tiles(); ++tile) read<T>(queries, line, tile, scratch);
            write<T>(queries, line);
        });
    }

    // Block number `index`; false if there is none (a text of n tokens takes no more than n / block + 1 numbers).
    bool block_at(int64_t index, Line* line) const {
        int64_t head = index % plan.groups, block = index / plan.groups;
        if (plan.packed) {
            const int64_t* at = bounds.as<int64_t>();
            int64_t text = 0, end = plan.texts;  // the last text whose first block is not after this one
            while (end - text > 1) {
                int64_t middle = (text + end) / 2;
                (at[middle] / plan.block + middle <= block ? text : end) = middle;
            }
            line->text = {0, at[text], at[text + 1] - at[text]};
            block -= at[text] / plan.block + text;
        } else {
            int64_t blocks = divide_up(plan.queries, plan.block);
            line->text = {block / blocks, 0, plan.queries};
            block %= blocks;
        }
        line->begin = block * plan.block;
        line->head = head;
        line->count = smaller(plan.block, line->text.length - line->begin);
        if (line->count <= 0) return false;
        see(line);
        return true;
    }

    void see(Line* line) const {
        int64_t first = position(*line, 0);
        line->range = range_of(rule, first, first + line->count, keys_of(line->text));
    }

    Line whole(int64_t index) const {
        int64_t per_row = plan.groups / plan.heads;
        Line line{{index / per_row, 0, plan.queries}, 0, plan.queries, index % per_row * plan.heads, {}};
        see(&line);
        return line;
    }

    // Equal pieces of the keys of all lines.
    template <class T>
    void by_keys() const {
        int64_t tiles = larger(1, whole(0).range.tiles()), all = plan.lines * tiles;
        for_each_task(plan.pieces, plan.threads, [&](int64_t piece, int thread) {
            float* space = thread_space(thread);
            Scratch scratch = Scratch::at(space + plan.query_floats(), plan.rows(), plan.key_width,
                                          plan.value_width);
            int64_t from = all * piece / plan.pieces, to = all * (piece + 1) / plan.pieces;
            while (from < to) {
                Line line = whole(from / tiles);
                float* own = reading(piece + from / tiles);
                for (int64_t head = 0; head < plan.heads; ++head)
                    start(queries_at(own, space, head, line), with_head(line, head));
                int64_t stop = smaller(to, (from / tiles + 1) * tiles);
                for (int64_t tile = from % tiles; from < stop; ++from, ++tile)
                    for (int64_t head = 0; head < plan.heads; ++head)
                        read<T>(queries_at(own, space, head, line), with_head(line, head), tile, scratch);
            }
        });
        // What is merged is mostly too little to wake other threads for.
        int threads = plan.readings() * plan.reading_floats() > MERGED_ALONE ? plan.threads : 1;
        for_each_task(plan.lines * plan.heads, threads, [&](int64_t task, int) {
            int64_t index = task / plan.heads, head = task % plan.heads;
            Line line = whole(index);
            Queries queries{};
            for (int64_t piece = 0; piece < plan.pieces; ++piece) {
                int64_t from = all * piece / plan.pieces, to = all * (piece + 1) / plan.pieces;
                if (from >= (index + 1) * tiles || to <= index * tiles || from == to) continue;
                Queries more = queries_at(reading(piece + index), nullptr, head, line);
                if (queries.sum) merge(queries, more);
                else queries = more;
            }
            if (queries.sum) write<T>(queries, with_head(line, head));
        });
    }

    static Line with_head(Line line, int64_t head) {
        line.head += head;
        return line;
    }

    template <class T>
    void run() const {
        if (plan.along_keys) by_keys<T>();
        else by_queries<T>();
    }
};

Plan plan_of(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& bounds, int threads) {
    return Plan(q.size(0), q.size(1), k.size(1), q.size(2), k.size(2), q.size(3), v.size(3),
                bounds ? bounds.size(0) - 1 : 0, k.stride(2) < k.stride(1), threads);
}

}  // namespace

SEQMIX_BINDINGS(module) {
    module.def(
        "attention_workspace",
        [](Tensor q, Tensor k, Tensor v, Tensor bounds, int threads) {
            return plan_of(q, k, v, bounds, threads).floats();
        },
        "q"_a, "k"_a, "v"_a, "bounds"_a.none(), "threads"_a);
    module.def(
        "attention",
        [](Tensor q, Tensor k, Tensor v, Tensor bias, Tensor sinks, Tensor bounds, Tensor o, Tensor workspace,
           bool causal, int64_t window, int64_t first, double scale, int threads) {
            Plan plan = plan_of(q, k, v, bounds, threads);
            require(workspace.size(0) >= plan.floats(), "attention: the workspace is too small");
            require(k.dtype == v.dtype && v.dtype == o.dtype, "attention: keys, values and output in one dtype");
            Rule rule{causal, window, first};
            Attention attention{q, k, v, bias, sinks, bounds, o, workspace, rule, float(scale), plan};
            if (k.dtype == Dtype::bfloat16) attention.run<bfloat16>();
            else attention.run<float>();
        },
        "q"_a, "k"_a, "v"_a, "bias"_a.none(), "sinks"_a.none(), "bounds"_a.none(), "o"_a, "workspace"_a, "causal"_a,
        "window"_a, "first"_a, "scale"_a, "threads"_a, WithoutGil());
}

}  // namespace seqmix
