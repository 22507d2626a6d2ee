// Block-sparse attention: o_t = sum_j p_tj v_j over the keys of those blocks that the block of t reads.
//
// A task is a block of queries of one head; it goes through its own blocks of keys with a running softmax.
#include "attention.hpp"

#include "parallel.hpp"
#include "tensor.hpp"
#include "texts.hpp"

namespace seqmix {
namespace {

struct BlockSparse {
    Tensor q, k, v, blocks, o, workspace;  // [B, T, H, K], ..., blocks [B, H, M, N] of 0 and 1
    int64_t block;                         // queries or keys of a block
    bool causal;
    float scale;
    int threads;

    static int64_t thread_floats(int64_t block, int64_t key_width, int64_t value_width) {
        int64_t rows = block * (round_up(key_width) + round_up(value_width) + 2);
        return round_up(rows + Scratch::floats(block, key_width, value_width));
    }

    template <class T>
    void run() const {
        int64_t batch = blocks.size(0), heads = blocks.size(1), down = blocks.size(2);
        for_each_task(batch * down * heads, threads, [&](int64_t task, int thread) {
            int64_t head = task % heads, row = task / heads % batch;
            int64_t m = down - 1 - task / heads / batch;  // late queries may read most: they come first
            read_block<T>(Text{row, 0, q.size(1)}, head, m, thread);
        });
    }

    template <class T>
    void read_block(const Text& text, int64_t head, int64_t m, int thread) const {
        int64_t K = q.size(3), V = v.size(3), keys = k.size(1), begin = m * block;
        int64_t count = begin + block < text.length ? block : text.length - begin;
        int64_t position = begin + keys - text.length;  // queries stand at the end of the keys
        float* space = workspace.as<float>() + thread * thread_floats(block, K, V);
        Queries queries{count, K, V, space, nullptr, nullptr, nullptr};
        queries.highest = queries.q + block * queries.q_row();
        queries.total = queries.highest + block;
        queries.sum = queries.total + block;
        Scratch scratch = Scratch::at(queries.sum + block * queries.sum_row(), block, K, V);
        queries.start();
        load_queries(queries, text, head, begin);
        int64_t shared = head / (q.size(2) / k.size(2));
        const uint8_t* chosen = blocks.as<uint8_t>() + text.row * blocks.stride(0) + head * blocks.stride(1) +
                                m * blocks.stride(2);
        int64_t end = causal && position + count < keys ? position + count : keys;
        for (int64_t n = 0; n * block < end; ++n) {
            if (!chosen[n * blocks.stride(3)]) continue;
            int64_t last = (n + 1) * block < end ? (n + 1) * block : end;
            for (int64_t key = n * block; key < last; key += TILE) {
                int64_t width = key + TILE < last ? TILE : last - key;
                Keys<T> tile{token<T>(k, text, key) + shared * k.stride(2),
                             token<T>(v, text, key) + shared * v.stride(2), k.stride(1), v.stride(1), width, 0};
                read_tile(queries, tile, scratch, [&](float* scores, int64_t width) {
                    if (!causal) return;
                    for (int64_t t = 0; t < count; ++t) {
                        int64_t visible = position + t + 1 - key;
                        for (int64_t j = visible < 0 ? 0 : visible; j < width; ++j) scores[t * TILE + j] = NOTHING;
                    }
                });
            }
        }
        for (int64_t t = 0; t < count; ++t)
            finish(queries, t, NOTHING, token<T>(o, text, begin + t) + head * o.stride(2));
    }

    void load_queries(const Queries& queries, const Text& text, int64_t head, int64_t begin) const {
        if (q.dtype == Dtype::bfloat16) copy_queries<bfloat16>(queries, text, head, begin);
        else copy_queries<float>(queries, text, head, begin);
        for (int64_t i = 0; i < queries.rows * queries.q_row(); ++i) queries.q[i] *= scale;
    }

    template <class T>
    void copy_queries(const Queries& queries, const Text& text, int64_t head, int64_t begin) const {
        copy_rows(token<T>(q, text, begin) + head * q.stride(2), q.stride(1), queries.rows, queries.key_width,
                  queries.q, queries.q_row());
    }
};

}  // namespace

SEQMIX_BINDINGS(module) {
    module.def(
        "block_sparse_attention_workspace",
        [](int64_t block, int64_t key_width, int64_t value_width, int threads) {
            return threads * BlockSparse::thread_floats(block, key_width, value_width);
        },
        "block"_a, "key_width"_a, "value_width"_a, "threads"_a);
    module.def(
        "block_sparse_attention",
        [](Tensor q, Tensor k, Tensor v, Tensor blocks, Tensor o, Tensor workspace, int64_t block, bool causal,
           double scale, int threads) {
            require(k.dtype == v.dtype && v.dtype == o.dtype, "block_sparse_attention: k, v and o in one dtype");
            require(blocks.dtype == Dtype::uint8, "block_sparse_attention: the blocks as bytes");
            int64_t down = (q.size(1) + block - 1) / block, across = (k.size(1) + block - 1) / block;
            require_shape(blocks, "block_sparse_attention: blocks [B, H, M, N]", {q.size(0), q.size(2), down, across});
            require(workspace.size(0) >= threads * BlockSparse::thread_floats(block, q.size(3), v.size(3)),
                    "block_sparse_attention: the workspace is too small");
            BlockSparse attention{q, k, v, blocks, o, workspace, block, causal, float(scale), threads};
            if (k.dtype == Dtype::bfloat16) attention.run<bfloat16>();
            else attention.run<float>();
        },
        "q"_a, "k"_a, "v"_a, "blocks"_a, "o"_a, "workspace"_a, "block"_a, "causal"_a, "scale"_a, "threads"_a,
        WithoutGil());
}

}  // namespace seqmix
