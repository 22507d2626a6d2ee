// What the selective scan over texts and that of one token share: the arguments, and how channels are cut up.
#pragma once

#include "activations.hpp"
#include "blocks.hpp"
#include "parallel.hpp"

namespace seqmix::selective {

constexpr int64_t PIECE = 64;  // channels of a task: as many whatever the vectors, so that sums are the same
constexpr float LOG2E = 1.44269504f, LN2 = 0.693147181f;

struct Arguments {
    Tensor u, delta, A, B, C, D, z, bias, state, bounds;  // [B, T, E] twice, [E, N], [B, T, G, N] twice, [E], ...
    bool softplus, negative;

    int64_t batch() const { return u.size(0); }
    int64_t length() const { return u.size(1); }
    int64_t channels() const { return u.size(2); }
    int64_t states() const { return A.size(1); }
    int64_t groups() const { return B.size(2); }
    int64_t texts() const { return num_texts(bounds, batch()); }
    int64_t wide() const { return round_up(states(), 16); }
    int64_t pieces_of_group() const { return (channels() / groups() + PIECE - 1) / PIECE; }
    int64_t pieces() const { return groups() * pieces_of_group(); }

    // The states that go with the inputs are [R, E, N].
    void require_shapes(std::initializer_list<Tensor> states) const {
        int64_t rows = batch(), tokens = length(), width = channels();
        require(u.axes == 3 && A.axes == 2 && B.axes == 4, "u is [B, T, E], A [E, N] and B [B, T, G, N]");
        require(groups() > 0 && width % groups() == 0, "groups divide the channels");
        for (const Tensor& tensor : {delta, z})
            if (tensor) require_shape(tensor, "delta and z are [B, T, E]", {rows, tokens, width});
        for (const Tensor& maps : {B, C})
            require_shape(maps, "B and C are [B, T, G, N]", {rows, tokens, groups(), A.size(1)});
        require_shape(A, "A is [E, N]", {width, A.size(1)});
        for (const Tensor& numbers : {D, bias})
            if (numbers) require_shape(numbers, "D and the bias are [E]", {width});
        require(A.dtype == Dtype::float32, "A is float32");
        for (const Tensor& tensor : states)
            if (tensor) require_shape(tensor, "states are [R, E, N]", {texts(), width, A.size(1)});
    }
};

// Some channels of one group.
struct Piece {
    int64_t group, channel, count;
};

inline Piece piece_at(const Arguments& given, int64_t index) {
    int64_t width = given.channels() / given.groups(), group = index / given.pieces_of_group();
    int64_t within = index % given.pieces_of_group() * PIECE;
    return {group, group * width + within, width - within < PIECE ? width - within : PIECE};
}

// The maps B or C of a group of channels, [tokens, N].
inline Matrix maps_of(const Tensor& tensor, const Text& text, int64_t t, int64_t group) {
    Matrix maps = tokens_of(tensor, text, t, 0);
    return {address(tensor, text.row * tensor.stride(0) + (text.start + t) * tensor.stride(1) + group * tensor.stride(2)),
            maps.dtype, tensor.stride(1), tensor.stride(3)};
}

inline void fill(float* to, int64_t count) {
    for (int64_t i = 0; i < count; ++i) to[i] = 0;
}

// One number per channel, or 0 without any.
inline void read_channels(const Tensor& tensor, const Piece& piece, float* to) {
    fill(to, PIECE);
    if (tensor) read_block({address(tensor, piece.channel), tensor.dtype, 0, 1}, 1, piece.count, to, by_row(PIECE));
}

// One token of every row, lanes being entries of the state: y [B, 1, E] and `last`, which may be the state itself.
// The state and the rates must be contiguous along N. `space` is room for the maps, 2 wide() floats for each thread.
void step(const Arguments& given, const Tensor& y, const Tensor& last, const Tensor& space, int threads);

}  // namespace seqmix::selective
