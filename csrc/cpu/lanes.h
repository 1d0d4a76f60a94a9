// Vectors of 8 floats (AVX2) or 16 (AVX-512) with operators, and their loads and stores in any float dtype.
//
// A kernel that is written with them stands in a file that each_width.inc includes twice, in namespace avx2 and in namespace
// avx512, with MMFAST_LANES as the attribute of every function: a template's own attribute cannot depend on its arguments.
#pragma once

#include <cstdint>
#include <type_traits>

#include "avx2.h"
#include "scalars.h"

#if defined(__x86_64__)
#define MMFAST_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")))

namespace mmfast {

inline bool has_avx512() {
  static const bool found = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && has_avx2();
  return found;
}

namespace avx2 {

using Floats = __m256;
using Integers = int32_t __attribute__((vector_size(32)));
using Unsigned = uint32_t __attribute__((vector_size(32)));

MMFAST_AVX2 MMFAST_INLINE Floats load(const float* from) { return _mm256_loadu_ps(from); }
MMFAST_AVX2 MMFAST_INLINE Floats load(const Float16* from) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
MMFAST_AVX2 MMFAST_INLINE Floats load(const Bfloat16* from) {
  const __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
}
MMFAST_AVX2 MMFAST_INLINE Integers load_bits(const void* from) {
  return (Integers)_mm256_loadu_si256(static_cast<const __m256i*>(from));
}
MMFAST_AVX2 MMFAST_INLINE void store_bits(void* to, Integers bits) {
  _mm256_storeu_si256(static_cast<__m256i*>(to), (__m256i)bits);
}
// The upper half of each of eight integers.
MMFAST_AVX2 MMFAST_INLINE void store_upper(void* to, Integers bits) {
  const __m256i upper = _mm256_srli_epi32((__m256i)bits, 16);
  const __m128i low = _mm256_castsi256_si128(upper), high = _mm256_extracti128_si256(upper, 1);
  _mm_storeu_si128(static_cast<__m128i*>(to), _mm_packus_epi32(low, high));
}
MMFAST_AVX2 MMFAST_INLINE void store(float* to, Floats x) { _mm256_storeu_ps(to, x); }
MMFAST_AVX2 MMFAST_INLINE void store(Float16* to, Floats x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
MMFAST_AVX2 MMFAST_INLINE Floats round_to_float16(Floats x) {
  return _mm256_cvtph_ps(_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}

}  // namespace avx2

namespace avx512 {

using Floats = __m512;
using Integers = int32_t __attribute__((vector_size(64)));
using Unsigned = uint32_t __attribute__((vector_size(64)));

MMFAST_AVX512 MMFAST_INLINE Floats load(const float* from) { return _mm512_loadu_ps(from); }
MMFAST_AVX512 MMFAST_INLINE Floats load(const Float16* from) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
MMFAST_AVX512 MMFAST_INLINE Floats load(const Bfloat16* from) {
  const __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
}
MMFAST_AVX512 MMFAST_INLINE Integers load_bits(const void* from) { return (Integers)_mm512_loadu_si512(from); }
MMFAST_AVX512 MMFAST_INLINE void store_bits(void* to, Integers bits) { _mm512_storeu_si512(to, (__m512i)bits); }
// The upper half of each of sixteen integers.
MMFAST_AVX512 MMFAST_INLINE void store_upper(void* to, Integers bits) {
  _mm256_storeu_si256(static_cast<__m256i*>(to), _mm512_cvtepi32_epi16(_mm512_srli_epi32((__m512i)bits, 16)));
}
MMFAST_AVX512 MMFAST_INLINE void store(float* to, Floats x) { _mm512_storeu_ps(to, x); }
MMFAST_AVX512 MMFAST_INLINE void store(Float16* to, Floats x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
MMFAST_AVX512 MMFAST_INLINE Floats round_to_float16(Floats x) {
  return _mm512_cvtph_ps(_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}

}  // namespace avx512

}  // namespace mmfast

#define MMFAST_FILE "lanes.inc"
#include "each_width.inc"

#else

namespace mmfast {
inline bool has_avx512() { return false; }
}  // namespace mmfast

#endif
