// Where a text lies: a row of its own, or a part of the one row in which all are packed.
#pragma once

#include "tensor.hpp"

namespace seqmix {

struct Text {
    int64_t row, start, length;
};

inline int64_t num_texts(const Tensor& bounds, int64_t batch) { return bounds ? bounds.size(0) - 1 : batch; }

// Text number `index` of a batch of rows of `length` tokens, or of the row bounded by `bounds` (int64 [N + 1]).
inline Text text_at(const Tensor& bounds, int64_t index, int64_t length) {
    if (!bounds) return {index, 0, length};
    const int64_t* at = bounds.as<int64_t>();
    return {0, at[index], at[index + 1] - at[index]};
}

// The address of token t of a text in a tensor [B, T, ...].
template <class T>
T* token(const Tensor& tensor, const Text& text, int64_t t) {
    return tensor.as<T>() + text.row * tensor.stride(0) + (text.start + t) * tensor.stride(1);
}

}  // namespace seqmix
