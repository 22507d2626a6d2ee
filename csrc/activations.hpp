// Gates and step sizes on vectors.
#pragma once

#include "vector.hpp"

namespace seqmix {

inline Vector sigmoid(Vector x) { return 1.0f / (1.0f + exp(-x)); }

// x sigmoid(x), and its derivative, from x and sigmoid(x).
inline Vector silu(Vector x) { return x * sigmoid(x); }
inline Vector silu_slope(Vector x, Vector gate) { return gate * (1.0f + x * (1.0f - gate)); }

// log(1 + e^x) = max(x, 0) + log(1 + y) with y = e^-|x| <= 1, and log(1 + y) = 2 artanh(y / (2 + y)), an odd
// function of an argument of at most 1/3: small results keep all their digits.
inline Vector softplus(Vector x) {
    Vector y = exp(-maximum(x, -x));
    Vector s = y / (2.0f + y), q = s * s;
    Vector p = broadcast(1.4012229e-1f);
    p = p * q + 1.3999571e-1f;
    p = p * q + 2.0010850e-1f;
    p = p * q + 3.3333206e-1f;
    p = p * q + 1.0f;
    return maximum(x, Vector{}) + 2.0f * s * p;
}

// 2^x for x of at most 0, to about one unit in the last place. Below -125 it stays 2^-125, which no sum notices.
inline Vector power_of_two(Vector x) {
    const float round = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number, in the lowest bits
    Vector clamped = maximum(x, broadcast(-125.0f));
    Vector shifted = clamped + round;
    Vector r = clamped - (shifted - round);
    Vector p = broadcast(1.5353362e-4f);
    p = p * r + 1.3398874e-3f;
    p = p * r + 9.6184369e-3f;
    p = p * r + 5.5503324e-2f;
    p = p * r + 2.4022648e-1f;
    p = p * r + 6.9314718e-1f;
    p = p * r + 1.0f;
    return (Vector)((Integers)p + ((Integers)shifted << 23));
}

}  // namespace seqmix
