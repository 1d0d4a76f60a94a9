// Matrices of bfloat16 and the tiles of amx.h: packing of what is no tile as it lies in memory.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../tensor_view.h"
#include "amx.h"
#include "matrix.h"
#include "scalars.h"

#ifdef MMFAST_AMX

namespace mmfast {

constexpr int64_t SUMS = TILE_ROWS * TILE_PAIRS;  // floats in a tile of C
constexpr int64_t PAIR = 2 * TILE_PAIRS;          // columns of two tiles of B, one line of memory

struct alignas(64) Tile {
  __m512i rows[TILE_ROWS];

  float* sums() { return reinterpret_cast<float*>(rows); }
};

// Tiles 0 to 3, [4, 16, 16] floats in memory.
MMFAST_AMX MMFAST_INLINE void load_sums(const float* sums) {
  _tile_loadd(0, sums, TILE_BYTES);
  _tile_loadd(1, sums + SUMS, TILE_BYTES);
  _tile_loadd(2, sums + 2 * SUMS, TILE_BYTES);
  _tile_loadd(3, sums + 3 * SUMS, TILE_BYTES);
}
MMFAST_AMX MMFAST_INLINE void store_sums(float* sums) {
  _tile_stored(0, sums, TILE_BYTES);
  _tile_stored(1, sums + SUMS, TILE_BYTES);
  _tile_stored(2, sums + 2 * SUMS, TILE_BYTES);
  _tile_stored(3, sums + 3 * SUMS, TILE_BYTES);
}
MMFAST_AMX MMFAST_INLINE void zero_sums() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

// A tile of A: 16 rows and 32 columns of x, zero beyond [rows, columns].
MMFAST_AMX inline void pack_a(const Bfloat16* x, int64_t stride, int64_t rows, int64_t columns, Tile* to) {
  for (int64_t i = 0; i < TILE_ROWS; ++i)
    to->rows[i] = i < rows ? _mm512_maskz_loadu_epi16(first_lanes(columns), x + i * stride) : _mm512_setzero_si512();
}

// A tile of B: 32 rows and 16 columns of x, of which either dimension has stride 1; zero beyond [rows, columns].
MMFAST_AMX inline void pack_b(const Strided<Bfloat16>& x, int64_t rows, int64_t columns, Tile* to) {
  if (!x.rows_are_packed(columns)) {
    Tile pairs;
    pack_a(x.data, x.column, columns, rows, &pairs);
    return transpose_pairs(pairs.rows, to->rows);
  }
  for (int64_t j = 0; j < TILE_PAIRS; ++j) {
    __m512i row[2];
    for (int64_t i = 0; i < 2; ++i) {
      const auto mask = static_cast<__mmask16>(2 * j + i < rows ? first_lanes(columns) : 0);
      row[i] = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, x.data + (2 * j + i) * x.row));
    }
    to->rows[j] = _mm512_or_si512(row[0], _mm512_slli_epi32(row[1], 16));
  }
}

// Two tiles of B: 32 rows and 32 columns of x.
MMFAST_AMX MMFAST_INLINE void pack_b_pair(const Bfloat16* x, int64_t stride, Tile* to) {
  const __m512i left = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), right = _mm512_or_si512(left, _mm512_set1_epi64(4));
  for (int64_t j = 0; j < TILE_PAIRS; ++j) {
    const __m512i even = _mm512_loadu_si512(x + 2 * j * stride), odd = _mm512_loadu_si512(x + (2 * j + 1) * stride);
    const __m512i low = _mm512_unpacklo_epi16(even, odd), high = _mm512_unpackhi_epi16(even, odd);
    to[0].rows[j] = _mm512_permutex2var_epi64(low, left, high);
    to[1].rows[j] = _mm512_permutex2var_epi64(low, right, high);
  }
}

}  // namespace mmfast

#endif
