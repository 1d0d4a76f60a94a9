// AVX2 by intrinsics, for kernels that compilers do not find. A function marked MMFAST_AVX2 runs only if has_avx2().
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // of the header's own undefined vectors (GCC bug 105593)
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif
#define MMFAST_AVX2 __attribute__((target("avx2,fma,f16c")))
#endif

#include "scalars.h"

namespace mmfast {

inline bool has_avx2() {
#if defined(__x86_64__)
  static const bool found =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  return found;
#else
  return false;
#endif
}

#if defined(__x86_64__)

MMFAST_AVX2 MMFAST_INLINE float sum(__m256 x) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

// bfloat16 in the low 16 bits of each lane: to nearest, ties to even. x must not be NaN.
MMFAST_AVX2 MMFAST_INLINE __m256i to_bfloat16(__m256 x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  return _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd), 16);
}

MMFAST_AVX2 MMFAST_INLINE __m256i to_float16(__m256 low, __m256 high) {
  return _mm256_set_m128i(_mm256_cvtps_ph(high, _MM_FROUND_TO_NEAREST_INT),
                          _mm256_cvtps_ph(low, _MM_FROUND_TO_NEAREST_INT));
}

template <bool PAST_CACHES>
MMFAST_AVX2 MMFAST_INLINE void store(void* to, __m256i value) {
  if constexpr (PAST_CACHES)
    _mm256_stream_si256(static_cast<__m256i*>(to), value);
  else
    _mm256_storeu_si256(static_cast<__m256i*>(to), value);
}

#endif

}  // namespace mmfast
