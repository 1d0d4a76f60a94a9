// What attention needs of AMX beside amx.h: whole products, the packing of factors, and exponentials. Rows and columns
// come in blocks of 32.
#pragma once

#include "amx.h"

#if defined(MMFAST_AMX)

namespace mmfast::attention {

using avx512::Floats;
using Integers16 = int16_t __attribute__((vector_size(64)));

constexpr int64_t PACKED = TILE_ROWS * TILE_DEPTH;  // numbers in a tile of B

// C [rows, columns] (+)= A [rows, steps] · B; b are B's tiles, those of 32 steps after each other.
template <bool ADD>
MMFAST_AMX MMFAST_INLINE void product(const Bfloat16* a, int64_t a_stride, const Bfloat16* b, int64_t rows,
                                      int64_t columns, int64_t steps, float* c, int64_t c_stride) {
  stored_before_tiles();
  const int64_t a_bytes = a_stride * 2, c_bytes = c_stride * 4;
  for (int64_t j = 0; j < columns; j += 32) {
    for (int64_t i = 0; i < rows; i += 32) {
      float *upper = c + i * c_stride + j, *lower = upper + 16 * c_stride;
      if constexpr (ADD) {
        _tile_loadd(0, upper, c_bytes);
        _tile_loadd(1, upper + 16, c_bytes);
        _tile_loadd(2, lower, c_bytes);
        _tile_loadd(3, lower + 16, c_bytes);
      } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
      }
      for (int64_t k = 0; k < steps; k += TILE_DEPTH) {
        const Bfloat16 *left = a + i * a_stride + k, *right = b + (k / TILE_DEPTH * columns + j) / 16 * PACKED;
        _tile_loadd(4, left, a_bytes);
        _tile_loadd(5, left + 16 * a_stride, a_bytes);
        _tile_loadd(6, right, TILE_BYTES);
        _tile_loadd(7, right + PACKED, TILE_BYTES);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
      _tile_stored(0, upper, c_bytes);
      _tile_stored(1, upper + 16, c_bytes);
      _tile_stored(2, lower, c_bytes);
      _tile_stored(3, lower + 16, c_bytes);
    }
  }
}

// The tiles of B = the transpose of x [rows, width].
MMFAST_AMX MMFAST_INLINE void pack_transposed(const Bfloat16* x, int64_t rows, int64_t width, Bfloat16* to) {
  for (int64_t k = 0; k < width; k += TILE_DEPTH)
    for (int64_t j = 0; j < rows; j += 16, to += PACKED) {
      __m512i from[16];
      for (int i = 0; i < 16; ++i) from[i] = _mm512_loadu_si512(x + (j + i) * width + k);
      transpose_pairs(from, reinterpret_cast<__m512i*>(to));
    }
}

// Row by row the pairs of two rows of 32 numbers: those of 8 numbers out of 16 each, as `unfold` knows.
MMFAST_AMX MMFAST_INLINE void fold(__m512i even, __m512i odd, __m512i* first, __m512i* second) {
  *first = _mm512_unpacklo_epi16(even, odd);
  *second = _mm512_unpackhi_epi16(even, odd);
}
// The place among 32 numbers of number n of the first (add 4: of the second) 16 pairs.
constexpr int64_t unfolded(int64_t n) { return n / 4 * 8 + n % 4; }
// 32 numbers of which `fold` has changed the order, in theirs.
MMFAST_AMX MMFAST_INLINE void unfold(Floats* first, Floats* second) {
  const Floats low = _mm512_shuffle_f32x4(*first, *second, 0x44), high = _mm512_shuffle_f32x4(*first, *second, 0xee);
  *first = _mm512_shuffle_f32x4(low, low, 0xd8);
  *second = _mm512_shuffle_f32x4(high, high, 0xd8);
}

// The tiles of B = x [rows, width], with columns folded: so are the product's.
MMFAST_AMX MMFAST_INLINE void pack_folded(const Bfloat16* x, int64_t rows, int64_t width, Bfloat16* to) {
  for (int64_t k = 0; k < rows; k += TILE_DEPTH)
    for (int64_t j = 0; j < width; j += 32, to += 2 * PACKED)
      for (int64_t i = 0; i < 16; ++i) {
        const Bfloat16* even = x + (k + 2 * i) * width + j;
        __m512i first, second;
        fold(_mm512_loadu_si512(even), _mm512_loadu_si512(even + width), &first, &second);
        _mm512_store_si512(to + i * 32, first);
        _mm512_store_si512(to + PACKED + i * 32, second);
      }
}

// to [columns, rows] = the transpose of x [rows, columns]
MMFAST_AMX MMFAST_INLINE void transpose(const Bfloat16* x, int64_t stride, int64_t rows, int64_t columns, Bfloat16* to,
                                        int64_t to_stride) {
  for (int64_t j = 0; j < columns; j += 32)
    for (int64_t k = 0; k < rows; k += TILE_DEPTH) {
      __m512i first[16], second[16], turned[16];
      for (int i = 0; i < 16; ++i) {
        const Bfloat16* even = x + (k + 2 * i) * stride + j;
        fold(_mm512_loadu_si512(even), _mm512_loadu_si512(even + stride), first + i, second + i);
      }
      Bfloat16* target = to + j * to_stride + k;
      transpose_pairs(first, turned);
      for (int i = 0; i < 16; ++i) _mm512_storeu_si512(target + unfolded(i) * to_stride, turned[i]);
      transpose_pairs(second, turned);
      for (int i = 0; i < 16; ++i) _mm512_storeu_si512(target + (unfolded(i) + 4) * to_stride, turned[i]);
    }
}

// 16 numbers out of bfloat16, and as bfloat16; then 32 as bfloat16.
MMFAST_AMX MMFAST_INLINE Floats upper_halves(__m256i x) {
  return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16);
}
MMFAST_AMX MMFAST_INLINE void store_rounded(Bfloat16* to, Floats x) {
  _mm256_store_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(x));
}
MMFAST_AMX MMFAST_INLINE __m512i rounded(Floats first, Floats second) {
  return (__m512i)_mm512_cvtne2ps_pbh(second, first);
}

// to [width] = row of `dim` numbers, then zeros.
MMFAST_AMX MMFAST_INLINE void copy_row(const Bfloat16* row, int64_t dim, int64_t width, Bfloat16* to) {
  for (int64_t d = 0; d < width; d += 32)
    _mm512_store_si512(to + d, _mm512_maskz_loadu_epi16(first_lanes(dim - d), row + d));
}

// to [dim] = factor · from [width], whose columns are folded.
MMFAST_AMX MMFAST_INLINE void store_unfolded(const float* from, int64_t dim, float factor, Bfloat16* to) {
  for (int64_t d = 0; d < dim; d += 32) {
    Floats first = avx512::load(from + d) * factor, second = avx512::load(from + d + 16) * factor;
    unfold(&first, &second);
    _mm512_mask_storeu_epi16(to + d, first_lanes(dim - d), rounded(first, second));
  }
}
MMFAST_AMX MMFAST_INLINE void store_unfolded(const float* from, int64_t dim, float factor, float* to) {
  for (int64_t d = 0; d < dim; d += 32) {
    Floats first = avx512::load(from + d) * factor, second = avx512::load(from + d + 16) * factor;
    unfold(&first, &second);
    const uint32_t there = first_lanes(dim - d);
    _mm512_mask_storeu_ps(to + d, static_cast<__mmask16>(there), first);
    _mm512_mask_storeu_ps(to + d + 16, static_cast<__mmask16>(there >> 16), second);
  }
}

// to [dim] = add + factor · from, whose columns are folded
MMFAST_AMX MMFAST_INLINE void add_unfolded(const float* from, int64_t dim, float factor, const Bfloat16* add,
                                           Bfloat16* to) {
  for (int64_t d = 0; d < dim; d += 32) {
    const uint32_t there = first_lanes(dim - d);
    Floats first = avx512::load(from + d), second = avx512::load(from + d + 16);
    unfold(&first, &second);
    const __m512i bits = _mm512_maskz_loadu_epi16(there, add + d);
    first = first * factor + upper_halves(_mm512_castsi512_si256(bits));
    second = second * factor + upper_halves(_mm512_extracti64x4_epi64(bits, 1));
    _mm512_mask_storeu_epi16(to + d, there, rounded(first, second));
  }
}

// 2^x for x <= 0 (or little more), within 2 ulp; NaN for NaN.
MMFAST_AMX MMFAST_INLINE Floats exp2_nonpositive(Floats x) {
  x = _mm512_max_ps(_mm512_set1_ps(-160.0f), x);  // of a NaN the second operand, which is it
  const Floats n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), r = x - n;
  Floats p = _mm512_set1_ps(1.535336188e-4f);  // the polynomial of Cephes' exp2f
  p = p * r + 1.339887440e-3f;
  p = p * r + 9.618437357e-3f;
  p = p * r + 5.550332471e-2f;
  p = p * r + 2.402264791e-1f;
  p = p * r + 6.931472028e-1f;
  p = p * r + 1.0f;
  return _mm512_scalef_ps(p, n);
}
constexpr float LOG2_E = 1.44269504f, LN_2 = 0.69314718f;

}  // namespace mmfast::attention

#endif
