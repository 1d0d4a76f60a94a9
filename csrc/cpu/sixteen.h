// Products of matrices of many rows with matrices of few, in vectors of 16 floats: a tile has 16 of the few side by
// side. Every sum is made in one order. What is here is inlined into functions that are compiled for one kind of CPU
// each.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>

#include "scalars.h"

namespace mmfast {

constexpr int64_t LANES = 16;
// So many products are added up before they join the sum, so that its error does not grow with its length.
constexpr int64_t RUN = 240;

// 16 numbers in two registers of AVX2. (One vector of 64 bytes would live in memory there.)
struct Halves {
  static constexpr bool IS_ONE_REGISTER = false;
  using Half = float __attribute__((vector_size(32), aligned(4), may_alias));
  Half low, high;

  MMFAST_INLINE static Halves all_of(float x) { return {x - Half{}, x - Half{}}; }
  MMFAST_INLINE void add(const Halves& x, const Halves& y) {
    low += x.low * y.low;
    high += x.high * y.high;
  }
  MMFAST_INLINE void add(float x, const Halves& y) {
    low += x * y.low;
    high += x * y.high;
  }
  MMFAST_INLINE void add(const Halves& y) {
    low += y.low;
    high += y.high;
  }
};

// 16 numbers in one register of AVX-512.
struct Whole {
  static constexpr bool IS_ONE_REGISTER = true;
  using Vector = float __attribute__((vector_size(64), aligned(4), may_alias));
  Vector all;

  MMFAST_INLINE static Whole all_of(float x) { return {x - Vector{}}; }
  MMFAST_INLINE void add(const Whole& x, const Whole& y) { all += x.all * y.all; }
  MMFAST_INLINE void add(float x, const Whole& y) { all += x * y.all; }
  MMFAST_INLINE void add(const Whole& y) { all += y.all; }
};

// Calls are written out for each row, so that the sums of rows are known to be registers.
template <int COUNT>
using Each = std::make_integer_sequence<int, COUNT>;

// sums[i] += Σ_j x[i, j] tile[j] for the rows I of x. Strides are in numbers, but for those of L, which are in vectors.
template <typename L, int... I>
MMFAST_INLINE void project_rows(std::integer_sequence<int, I...>, const float* x, int64_t stride, const L* tile,
                                int64_t columns, L* sums, int64_t sums_stride = 1, int64_t tile_stride = 1) {
  for (int64_t start = 0; start < columns; start += RUN) {
    L sum[sizeof...(I)] = {};
    for (int64_t j = start; j < std::min(start + RUN, columns); ++j) {
      const L factor = tile[j * tile_stride];
      (sum[I].add(x[I * stride + j], factor), ...);
    }
    (sums[I * sums_stride].add(sum[I]), ...);
  }
}

// tile[j] += Σ_i x[i, j] s[i] for the rows I of x.
template <typename L, int... I>
MMFAST_INLINE void outer_rows(std::integer_sequence<int, I...>, const float* x, int64_t stride, const L* s, L* tile,
                              int64_t columns, int64_t s_stride = 1, int64_t tile_stride = 1) {
  const L factor[] = {s[I * s_stride]...};
  for (int64_t j = 0; j < columns; ++j) {
    L sum = tile[j * tile_stride];
    (sum.add(x[I * stride + j], factor[I]), ...);
    tile[j * tile_stride] = sum;
  }
}

// Both in one pass: a number of x that is loaded once takes part in two sums.
template <typename L, int... I>
MMFAST_INLINE void project_and_outer_rows(std::integer_sequence<int, I...>, const float* x, int64_t stride,
                                          const L* factors, const L* s, L* outer, int64_t columns, L* sums,
                                          int64_t step) {
  const L of_row[] = {s[I * step]...};
  for (int64_t start = 0; start < columns; start += RUN) {
    L sum[sizeof...(I)] = {};
    for (int64_t j = start; j < std::min(start + RUN, columns); ++j) {
      const L factor = factors[j * step];
      L of_column = outer[j * step];
      const auto add = [&](float number, L& row_sum, const L& row) __attribute__((always_inline)) {
        const L repeated = L::all_of(number);
        row_sum.add(repeated, factor);
        of_column.add(repeated, row);
      };
      (add(x[I * stride + j], sum[I], of_row[I]), ...);
      outer[j * step] = of_column;
    }
    (sums[I * step].add(sum[I]), ...);
  }
}

// out[i] = start + Σ_r s[i, r] tile[r] for the rows I.
template <typename L, int... I>
MMFAST_INLINE void expand_rows(std::integer_sequence<int, I...>, const float* s, int64_t s_stride, const L* tile,
                               int64_t ranks, const L& start, float* out, int64_t out_stride) {
  L sum[sizeof...(I)] = {((void)I, start)...};
  for (int64_t r = 0; r < ranks; ++r) {
    const L factor = tile[r];
    (sum[I].add(s[I * s_stride + r], factor), ...);
  }
  ((*reinterpret_cast<L*>(out + I * out_stride) = sum[I]), ...);
}

}  // namespace mmfast
