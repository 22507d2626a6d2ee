// What products with stored weights share: y = W x for every token.
//
// In sparse ones the lanes of a vector are tokens: a tile of tokens is turned into a panel with a row per input, so one weight,
// broadcast, serves a whole vector of tokens and no pattern of zeros leaves lanes empty. Outputs come in strips that
// are turned back together.
#pragma once

#include "bytes.hpp"
#include "matmul.hpp"
#include "parallel.hpp"
#include "tensor.hpp"
#include "tokens.hpp"

namespace seqmix {

constexpr int TILE_VECTORS = 4;
constexpr int64_t TILE = TILE_VECTORS * WIDTH;  // tokens
constexpr int64_t STRIP = 128;                  // outputs, about

// A task is a strip of outputs for a tile of tokens. Threads hold the panel of the tile they worked on last, so
// with many tiles a task takes all strips of one, and with few the strips are shared out.
struct Plan {
    int64_t tokens, tiles, strips, shares;

    Plan(int64_t tokens, int64_t strips, int threads)
        : tokens(tokens), tiles((tokens + TILE - 1) / TILE), strips(strips) {
        shares = tiles >= 4 * threads ? 1 : 4 * threads;
        shares = shares < strips ? shares : strips;
    }

    // pack(tile, thread) where the thread's panel is of another tile, then strip(tile, strip, thread).
    template <class Pack, class Strip>
    void run(int64_t* packed_tile, int threads, const Pack& pack, const Strip& strip) const {
        for (int thread = 0; thread < threads; ++thread) packed_tile[thread] = -1;
        for_each_task(tiles * shares, threads, [&](int64_t task, int thread) {
            int64_t tile = task / shares, share = task % shares;
            if (packed_tile[thread] != tile) {
                pack(tile, thread);
                packed_tile[thread] = tile;
            }
            for (int64_t i = strips * share / shares; i < strips * (share + 1) / shares; ++i) strip(tile, i, thread);
        });
    }

    int64_t tokens_of(int64_t tile) const { return tokens - tile * TILE < TILE ? tokens - tile * TILE : TILE; }
};

// to[t][first + o] = results[o, t] for o < outputs; rows of `results` are TILE long and there are round_up(outputs).
template <class T>
void write_strip(const float* results, int64_t outputs, T* const* to, int64_t tokens, int64_t first) {
    for (int64_t t = 0; t < tokens; t += WIDTH)
        for (int64_t o = 0; o < outputs; o += WIDTH) {
            const int64_t rows = tokens - t < WIDTH ? tokens - t : WIDTH, columns = outputs - o;
            Vector lines[WIDTH];
            for (int i = 0; i < WIDTH; ++i) lines[i] = load(results + (o + i) * TILE + t);
            transpose_vectors(lines);
            if (rows == WIDTH && columns >= WIDTH) {
                for (int i = 0; i < WIDTH; ++i) store(to[t + i] + first + o, lines[i]);
                continue;
            }
            float turned[WIDTH * WIDTH];  // so that `lines` can stay in registers
            for (int i = 0; i < WIDTH; ++i) store(turned + i * WIDTH, lines[i]);
            for (int64_t i = 0; i < rows; ++i) {
                if (columns >= WIDTH) store(to[t + i] + first + o, load(turned + i * WIDTH));
                else store_part(to[t + i] + first + o, load(turned + i * WIDTH), columns);
            }
        }
}

// Fetches what `write_strip` will write, to be there when the sums of the strip are.
template <class T>
void expect_strip(int64_t outputs, T* const* to, int64_t tokens, int64_t first) {
    for (int64_t t = 0; t < tokens; ++t)
        for (int64_t o = 0; o < outputs; o += 64 / sizeof(T)) __builtin_prefetch(to[t] + first + o, 1, 2);
}

// The number of vectors that hold `tokens`, as a constant: visit(Rows<1>{}) to visit(Rows<TILE_VECTORS>{}).
template <class Visit>
void with_vectors(int64_t tokens, const Visit& visit) {
    if (tokens <= WIDTH) visit(Rows<1>{});
    else if (tokens <= 2 * WIDTH) visit(Rows<2>{});
    else if (tokens <= 3 * WIDTH) visit(Rows<3>{});
    else visit(Rows<4>{});
}

}  // namespace seqmix
