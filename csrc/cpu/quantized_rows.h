// Parts of rows of a quantised weight, decoded: `count` elements, LONGEST at most, of which up to 63 more are written.
// Sources that include it are compiled with -ffp-contract=off, see nf4.h.
#pragma once

#include <algorithm>
#include <cstdint>

#include "amx.h"
#include "nf4.h"
#include "scalars.h"
#include "stream.h"

#ifdef MMFAST_AMX

namespace mmfast {

constexpr int64_t LONGEST = 768;
// Rows of a part of the weight from decoding one to asking memory for another: the hardware does not see them coming.
constexpr int64_t AHEAD = 16;

struct Nf4Rows {
  static constexpr uint64_t BLOCK = nf4::BLOCK;
  const uint8_t* packed;
  nf4::Scales scales;
  int64_t columns;

  MMFAST_AMX MMFAST_INLINE void read(int64_t row, int64_t column, int64_t count, Bfloat16* out) const {
    const auto at = static_cast<uint64_t>(row * columns + column), end = at + count;
    float block_scales[LONGEST / BLOCK + 2];
    scales.read(at / BLOCK, (end - 1) / BLOCK - at / BLOCK + 1, block_scales);
    const __m512 levels = _mm512_load_ps(nf4::LEVELS);
    const uint8_t* from = packed + at / 2;
    const float* scale = block_scales;
    for (uint64_t i = at; i < end; ++scale) {
      const uint64_t size = std::min(end, (i / BLOCK + 1) * BLOCK) - i;
      // The 16 values of a block, twice, because a look-up takes five bits of an index.
      const auto values = (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(levels, _mm512_set1_ps(*scale)));
      const __m512i table = _mm512_broadcast_i64x4(values);
      const __m256i bytes = _mm256_maskz_loadu_epi8(first_lanes(size / 2), from);
      _mm512_storeu_si512(out, look_up(table, _mm256_castsi256_si128(bytes)));
      _mm512_storeu_si512(out + 32, look_up(table, _mm256_extracti128_si256(bytes, 1)));
      i += size, out += size, from += size / 2;
    }
  }

  MMFAST_AVX512 MMFAST_INLINE void read(int64_t row, int64_t column, int64_t count, float* out) const {
    const auto at = static_cast<uint64_t>(row * columns + column), end = at + count;
    float block_scales[LONGEST / BLOCK + 2];
    scales.read(at / BLOCK, (end - 1) / BLOCK - at / BLOCK + 1, block_scales);
    const __m512 levels = _mm512_load_ps(nf4::LEVELS);
    const uint8_t* from = packed + at / 2;
    const float* scale = block_scales;
    for (uint64_t i = at; i < end; ++scale) {
      const uint64_t size = std::min(end, (i / BLOCK + 1) * BLOCK) - i;
      const __m512 values = _mm512_mul_ps(levels, _mm512_set1_ps(*scale));
      const __m256i bytes = _mm256_maskz_loadu_epi8(first_lanes(size / 2), from);
      look_up(values, _mm256_castsi256_si128(bytes), out);
      look_up(values, _mm256_extracti128_si256(bytes, 1), out + 32);
      i += size, out += size, from += size / 2;
    }
  }

  MMFAST_INLINE void fetch(int64_t row, int64_t column, int64_t count) const {
    prefetch(packed + (row * columns + column) / 2, count / 2);
  }

 private:
  MMFAST_AMX MMFAST_INLINE static __m512i look_up(__m512i table, __m128i bytes) {
    const __m512i wide = _mm512_cvtepu8_epi32(bytes);  // the upper half of a byte is the code of an even element
    return _mm512_permutexvar_epi16(_mm512_or_si512(_mm512_srli_epi32(wide, 4), _mm512_slli_epi32(wide, 16)), table);
  }
  MMFAST_AVX512 MMFAST_INLINE static void look_up(__m512 values, __m128i bytes, float* out) {
    const __m512i wide = _mm512_cvtepu8_epi32(bytes);
    const __m512 even = _mm512_permutexvar_ps(_mm512_srli_epi32(wide, 4), values);  // of an index, four bits count
    const __m512 odd = _mm512_permutexvar_ps(wide, values);
    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i high = _mm512_or_si512(low, _mm512_set1_epi32(8));
    _mm512_storeu_ps(out, _mm512_permutex2var_ps(even, low, odd));
    _mm512_storeu_ps(out + 16, _mm512_permutex2var_ps(even, high, odd));
  }
};

// Whole numbers are exact in bfloat16: where a row of W is a column of the output, its scale is left to the sums.
struct Int8Rows {
  const int8_t* values;
  const float* scale;  // null: left to the sums
  int64_t columns;

  MMFAST_AMX MMFAST_INLINE void read(int64_t row, int64_t column, int64_t count, Bfloat16* out) const {
    const int8_t* from = values + row * columns + column;
    const __m512 factor = _mm512_set1_ps(scale ? scale[row] : 1.0f);
    for (int64_t k = 0; k < count; k += 32) {
      const __m256i bytes = _mm256_maskz_loadu_epi8(first_lanes(count - k), from + k);
      const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(bytes)));
      const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(bytes, 1)));
      const auto both = _mm512_cvtne2ps_pbh(_mm512_mul_ps(high, factor), _mm512_mul_ps(low, factor));
      _mm512_storeu_si512(out + k, (__m512i)both);
    }
  }

  MMFAST_AVX512 MMFAST_INLINE void read(int64_t row, int64_t column, int64_t count, float* out) const {
    const int8_t* from = values + row * columns + column;
    const __m512 factor = _mm512_set1_ps(scale ? scale[row] : 1.0f);
    for (int64_t k = 0; k < count; k += 16) {
      const __m128i bytes = _mm_maskz_loadu_epi8(static_cast<__mmask16>(first_lanes(count - k)), from + k);
      _mm512_storeu_ps(out + k, _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)), factor));
    }
  }

  MMFAST_INLINE void fetch(int64_t row, int64_t column, int64_t count) const {
    prefetch(values + row * columns + column, count);
  }
};

}  // namespace mmfast

#endif
