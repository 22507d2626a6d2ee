// Vectors of floats as wide as the instruction set that this file is compiled for.
//
// Written with the vector extensions of GCC and Clang, so one source serves SSE, AVX2, AVX-512 and NEON. Memory
// may hold float or bfloat16; arithmetic is always float32.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__SSE4_1__)
#include <immintrin.h>
#endif

namespace seqmix {

#if defined(__AVX512F__)
constexpr int WIDTH = 16;
#elif defined(__AVX__)
constexpr int WIDTH = 8;
#else
constexpr int WIDTH = 4;
#endif

typedef float Vector __attribute__((vector_size(WIDTH * 4)));
typedef int32_t Integers __attribute__((vector_size(WIDTH * 4)));
typedef uint32_t Bits __attribute__((vector_size(WIDTH * 4)));
typedef uint16_t HalfBits __attribute__((vector_size(WIDTH * 2)));

struct bfloat16 {
    uint16_t bits;
};

inline int64_t round_up(int64_t count, int64_t multiple = WIDTH) {
    return (count + multiple - 1) / multiple * multiple;
}

inline float to_float(float x) { return x; }

inline float to_float(bfloat16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline void from_float(float value, float& x) { x = value; }

// To the nearest, ties to even; a NaN stays one.
inline void from_float(float value, bfloat16& x) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    bool is_nan = value != value;
    x.bits = is_nan ? uint16_t((bits >> 16) | 0x40) : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// Nothing is taken off, which compilers leave out; adding nothing they would do, for it makes -0 a 0.
inline Vector broadcast(float x) { return x - Vector{}; }

inline Vector load(const float* from) {
    Vector x;
    std::memcpy(&x, from, sizeof x);
    return x;
}

// Widened by name on x86, where GCC 12 takes the general conversion apart into seven instructions.
inline Vector load(const bfloat16* from) {
#if defined(__AVX512F__)
    Bits bits = (Bits)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from));
#elif defined(__AVX2__)
    Bits bits = (Bits)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)from));
#elif defined(__SSE4_1__)
    Bits bits = (Bits)_mm_cvtepu16_epi32(_mm_loadl_epi64((const __m128i*)from));
#else
    HalfBits half;
    std::memcpy(&half, from, sizeof half);
    Bits bits = __builtin_convertvector(half, Bits);
#endif
    return (Vector)(bits << 16);
}

inline void store(float* to, Vector x) { std::memcpy(to, &x, sizeof x); }

inline void store(bfloat16* to, Vector x) {
#if defined(__AVX512BF16__)
    __m256bh half = _mm512_cvtneps_pbh((__m512)x);
    std::memcpy(to, &half, sizeof half);
#else
    Bits bits = (Bits)x;
    Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    Bits quiet = (bits >> 16) | 0x40;
    Bits is_nan = (Bits)(x != x);
    HalfBits half = __builtin_convertvector((rounded & ~is_nan) | (quiet & is_nan), HalfBits);
    std::memcpy(to, &half, sizeof half);
#endif
}

// The first `count` of a vector; the rest are zero. For the end of a row.
template <class T>
inline Vector load_part(const T* from, int64_t count) {
    float values[WIDTH] = {};
    for (int64_t i = 0; i < count; ++i) values[i] = to_float(from[i]);
    return load(values);
}

template <class T>
inline void store_part(T* to, Vector x, int64_t count) {
    float values[WIDTH];
    store(values, x);
    for (int64_t i = 0; i < count; ++i) from_float(values[i], to[i]);
}

inline Vector choose(Integers condition, Vector yes, Vector no) { return condition ? yes : no; }

// Entries of two vectors laid end to end, from the given places. Clang's own shuffle wants constants.
template <class Any, class Places>
inline Any shuffle(Any x, Any y, Places places) {
#if defined(__clang__)
    constexpr int count = sizeof(Places) / sizeof(places[0]);
    Any result;
    for (int i = 0; i < count; ++i) result[i] = places[i] < count ? x[places[i]] : y[places[i] - count];
    return result;
#else
    return __builtin_shuffle(x, y, places);
#endif
}

// Written with the comparison inside, which compilers turn into one instruction. Of a NaN and a number the second.
inline Vector maximum(Vector x, Vector y) { return x > y ? x : y; }
inline Vector minimum(Vector x, Vector y) { return x < y ? x : y; }

inline float sum(Vector x) {
    float values[WIDTH], total = 0;
    store(values, x);
    for (int width = WIDTH / 2; width > 0; width /= 2)
        for (int i = 0; i < width; ++i) values[i] += values[i + width];
    total = values[0];
    return total;
}

inline float largest(Vector x) {
    float values[WIDTH];
    store(values, x);
    float most = values[0];
    for (int i = 1; i < WIDTH; ++i) most = values[i] > most ? values[i] : most;
    return most;
}

// e^x to about one unit in the last place: x = n ln 2 + r with |r| <= ln(2) / 2 and a polynomial in r.
// Below -87.3 the result is 0 (so exp(-inf) = 0), above 88.7 it is infinite; a NaN stays one.
inline Vector exp(Vector x) {
    const float log2e = 1.442695040888963f, ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
    Vector clamped = minimum(maximum(x, broadcast(-87.3f)), broadcast(88.7f));
    const float round = 12582912.0f;  // 1.5 * 2^23: adding and subtracting it rounds to a whole number
    Vector shifted = clamped * log2e + round;
    Vector n = shifted - round;
    Vector r = clamped - n * ln2_high;
    r = r - n * ln2_low;
    Vector p = broadcast(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    // 2^n as 2^(n/2) 2^(n - n/2): n may be 128, whose exponent no float has
    Integers whole = __builtin_convertvector(n, Integers);
    Integers half = whole >> 1;
    Vector scale = (Vector)((half + 127) << 23), rest = (Vector)((whole - half + 127) << 23);
    Vector result = p * scale * rest;
    result = choose(x < -87.3f, Vector{}, result);
    result = choose(x > 88.7f, broadcast(__builtin_inff()), result);
    return choose(x == x, result, x);
}

inline float exp(float x) { return exp(broadcast(x))[0]; }

}  // namespace seqmix
