// Whole numbers of 8 bits, a vector at a time.
#pragma once

#include "vector.hpp"

namespace seqmix {

constexpr int64_t LINE = 64, AHEAD = 4096;  // bytes of a line of cache, and how far ahead weights are fetched

typedef int8_t FewBytes __attribute__((vector_size(WIDTH)));

// Whole numbers of 8 bits as floats. By name on x86, where GCC 12 takes the general conversion apart byte by byte.
inline Vector floats(FewBytes bytes) {
#if defined(__AVX512F__)
    Integers whole = (Integers)_mm512_cvtepi8_epi32((__m128i)bytes);
#elif defined(__SSE4_1__)
    __m128i all = {};
    std::memcpy(&all, &bytes, sizeof bytes);
#if defined(__AVX2__)
    Integers whole = (Integers)_mm256_cvtepi8_epi32(all);
#else
    Integers whole = (Integers)_mm_cvtepi8_epi32(all);
#endif
#else
    Integers whole = __builtin_convertvector(bytes, Integers);
#endif
    return __builtin_convertvector(whole, Vector);
}

// The next WIDTH bytes, each from 0 to 255.
inline Integers unsigned_bytes(const uint8_t* from) {
#if defined(__AVX512F__)
    return (Integers)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)from));
#elif defined(__AVX2__)
    return (Integers)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)from));
#elif defined(__SSE4_1__)
    int32_t all;
    std::memcpy(&all, from, sizeof all);
    return (Integers)_mm_cvtepu8_epi32(_mm_cvtsi32_si128(all));
#else
    typedef uint8_t Unsigned __attribute__((vector_size(WIDTH)));
    Unsigned bytes;
    std::memcpy(&bytes, from, sizeof bytes);
    return __builtin_convertvector(bytes, Integers);
#endif
}

}  // namespace seqmix
