// Tokens of all texts of a batch, one after the other.
#pragma once

#include "tensor.hpp"

namespace seqmix {

// The tokens of x [B, T, D] or y [B, T, O], counted through all rows of the batch.
template <class T>
struct Tokens {
    T* data;
    int64_t length, row_stride, token_stride;

    explicit Tokens(const Tensor& tensor)
        : data(tensor.as<T>()), length(tensor.size(1)), row_stride(tensor.stride(0)), token_stride(tensor.stride(1)) {}

    // at[i] = the address of token first + i, for i < count: divisions are dear, so one for all of them.
    void addresses(int64_t first, int64_t count, T** at) const {
        int64_t row = first / length, place = first % length;
        for (int64_t i = 0; i < count; ++i) {
            at[i] = data + row * row_stride + place * token_stride;
            if (++place == length) place = 0, ++row;
        }
    }
};

}  // namespace seqmix
