// The products of a low-rank adapter in fp32: matrices of many rows and columns times matrices of few ranks. A general
// matrix product packs its operands as if they were large; these read the large matrix once, as it lies in memory.
// Every sum is made in one order, whatever the number of threads.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <utility>

#include "../tensor_view.h"
#include "scalars.h"

namespace mmfast {
namespace {

constexpr int64_t LANES = 16;  // ranks, or columns, that are worked on together
constexpr int ROWS = 6;        // rows whose sums stay in registers
// So many products are added up before they join the sum, so that its error does not grow with its length.
constexpr int64_t RUN = 256;

// 16 numbers in two registers of AVX2. (One vector of 64 bytes would live in memory there.)
struct Lanes {
  using Half = float __attribute__((vector_size(32), aligned(4), may_alias));
  Half low, high;

  MMFAST_INLINE void add(float x, const Lanes& y) {
    low += x * y.low;
    high += x * y.high;
  }
  MMFAST_INLINE void add(const Lanes& y) {
    low += y.low;
    high += y.high;
  }
};

// Calls are written out for each row, so that the sums of rows are known to be registers.
template <int COUNT>
using Each = std::make_integer_sequence<int, COUNT>;

// A matrix in which both strides count.
struct Strided {
  float* data;
  int64_t row, column;

  float& at(int64_t i, int64_t j) const { return data[i * row + j * column]; }
};

Strided strided(const TensorView& x) { return {x.as<float>(), x.stride(0), x.stride(1)}; }

// What is worth a second thread, in multiplications.
int threads_for(int64_t work, int threads) {
  return static_cast<int>(std::clamp<int64_t>(work >> 18, 1, threads));
}

// factors [ranks, columns] as [tiles of 16 ranks, columns, 16], scaled, zero beyond the ranks.
std::unique_ptr<float[]> pack(const Strided& factors, int64_t ranks, int64_t columns, float scale) {
  const int64_t tiles = (ranks + LANES - 1) / LANES;
  auto packed = std::make_unique<float[]>(tiles * columns * LANES);
  for (int64_t r = 0; r < ranks; ++r) {
    float* tile = packed.get() + r / LANES * columns * LANES + r % LANES;
    for (int64_t j = 0; j < columns; ++j) tile[j * LANES] = factors.at(r, j) * scale;
  }
  return packed;
}

// sums[i] = Σ_j x[i, j] tile[j] for the rows I of x.
template <int... I>
MMFAST_INLINE void project_rows(std::integer_sequence<int, I...>, const float* x, int64_t stride, const Lanes* tile,
                                int64_t columns, Lanes* sums) {
  for (int64_t start = 0; start < columns; start += RUN) {
    Lanes sum[sizeof...(I)] = {};
    for (int64_t j = start; j < std::min(start + RUN, columns); ++j) {
      const Lanes factor = tile[j];
      (sum[I].add(x[I * stride + j], factor), ...);
    }
    (sums[I].add(sum[I]), ...);
  }
}

MMFAST_CLONES void project(const float* x, int64_t stride, const Lanes* tile, int64_t columns, int64_t count,
                           Lanes* sums) {
  if (count == ROWS) return project_rows(Each<ROWS>(), x, stride, tile, columns, sums);
  for (int64_t i = 0; i < count; ++i) project_rows(Each<1>(), x + i * stride, stride, tile, columns, sums + i);
}

// tile[j] += Σ_i x[i, j] s[i] for the rows I of x.
template <int... I>
MMFAST_INLINE void outer_rows(std::integer_sequence<int, I...>, const float* x, int64_t stride, const Lanes* s,
                              Lanes* tile, int64_t columns) {
  const Lanes factor[] = {s[I]...};
  for (int64_t j = 0; j < columns; ++j) {
    Lanes sum = tile[j];
    (sum.add(x[I * stride + j], factor[I]), ...);
    tile[j] = sum;
  }
}

MMFAST_CLONES void outer(const float* x, int64_t stride, const Lanes* s, Lanes* tile, int64_t columns,
                         int64_t count) {
  if (count == ROWS) return outer_rows(Each<ROWS>(), x, stride, s, tile, columns);
  for (int64_t i = 0; i < count; ++i) outer_rows(Each<1>(), x + i * stride, stride, s + i, tile, columns);
}

// sums[i] = start + Σ_r s[i, r] tile[r] for the rows I.
template <int... I>
MMFAST_INLINE void expand_rows(std::integer_sequence<int, I...>, const float* s, const Lanes* tile, int64_t ranks,
                               const Lanes& start, Lanes* sums) {
  Lanes sum[sizeof...(I)] = {((void)I, start)...};
  for (int64_t r = 0; r < ranks; ++r) {
    const Lanes factor = tile[r];
    (sum[I].add(s[I * ranks + r], factor), ...);
  }
  ((sums[I] = sum[I]), ...);
}

// s [count, ranks]; tiles [columns / 16, ranks + 1, 16], of which the last row of each is where the sums start.
MMFAST_CLONES void expand(const float* s, const Lanes* tiles, int64_t ranks, float* out, int64_t out_stride,
                          int64_t columns, int64_t count) {
  for (int64_t j = 0; j < columns; j += LANES, tiles += ranks + 1) {
    Lanes sums[ROWS];
    if (count == ROWS)
      expand_rows(Each<ROWS>(), s, tiles, ranks, tiles[ranks], sums);
    else
      for (int64_t i = 0; i < count; ++i) expand_rows(Each<1>(), s + i * ranks, tiles, ranks, tiles[ranks], sums + i);
    if (j + LANES <= columns)
      for (int64_t i = 0; i < count; ++i) std::memcpy(out + i * out_stride + j, sums + i, sizeof(Lanes));
    else
      for (int64_t i = 0; i < count; ++i) std::memcpy(out + i * out_stride + j, sums + i, (columns - j) * sizeof(float));
  }
}

void expect_matrix(const char* name, const TensorView& x, int64_t rows, int64_t columns, bool packed) {
  check(x.dtype == DType::f32 && x.dim() == 2 && x.size(0) == rows && x.size(1) == columns,
        name, " is ", x, "; expected float32[", rows, ", ", columns, "]");
  check(!packed || columns <= 1 || x.stride(1) == 1, name, " must have stride 1 in its last dimension");
}

}  // namespace

// out [rows, ranks] = scale · x factorsᵀ, for x [rows, columns] (last stride 1) and factors [ranks, columns].
void low_rank_project(TensorView x, TensorView factors, float scale, TensorView out, int threads) {
  const int64_t rows = x.size(0), columns = x.size(1), ranks = factors.size(0);
  expect_matrix("x", x, rows, columns, true);
  expect_matrix("factors", factors, ranks, columns, false);
  expect_matrix("out", out, rows, ranks, false);
  const auto packed = pack(strided(factors), ranks, columns, scale);
  const Strided target = strided(out);
#pragma omp parallel for schedule(static) num_threads(threads_for(rows * columns * ranks, threads))
  for (int64_t first = 0; first < rows; first += ROWS) {
    const int64_t count = std::min<int64_t>(ROWS, rows - first);
    for (int64_t r = 0; r < ranks; r += LANES) {  // the rows of x come from cache after the first tile
      Lanes sums[ROWS] = {};
      project(x.as<float>() + first * x.stride(0), x.stride(0),
              reinterpret_cast<const Lanes*>(packed.get() + r * columns), columns, count, sums);
      for (int64_t i = 0; i < count; ++i)
        for (int64_t k = 0; k < std::min(LANES, ranks - r); ++k) target.at(first + i, r + k) = reinterpret_cast<const float*>(sums + i)[k];
    }
  }
}

// out [rows, columns] (last stride 1) = scale · s factors + bias, for s [rows, ranks], factors [ranks, columns] and
// bias [columns].
void low_rank_expand(TensorView s, TensorView factors, float scale, std::optional<TensorView> bias, TensorView out,
                     int threads) {
  const int64_t rows = s.size(0), ranks = s.size(1), columns = factors.size(1);
  expect_matrix("s", s, rows, ranks, false);
  expect_matrix("factors", factors, ranks, columns, false);
  expect_matrix("out", out, rows, columns, true);
  if (bias) bias->expect("bias", DType::f32, {columns});
  const Strided source = strided(factors), from = strided(s);
  const int64_t tiles = (columns + LANES - 1) / LANES, size = (ranks + 1) * LANES;
  const auto packed = std::make_unique<float[]>(tiles * size);
  for (int64_t r = 0; r < ranks; ++r)
    for (int64_t j = 0; j < columns; ++j)
      packed[j / LANES * size + r * LANES + j % LANES] = source.at(r, j) * scale;
  for (int64_t j = 0; bias && j < columns; ++j)
    packed[j / LANES * size + ranks * LANES + j % LANES] = bias->as<float>()[j];
#pragma omp parallel num_threads(threads_for(rows * columns * ranks, threads))
  {
    const auto few = std::make_unique_for_overwrite<float[]>(ROWS * ranks);
#pragma omp for schedule(static)
    for (int64_t first = 0; first < rows; first += ROWS) {
      const int64_t count = std::min<int64_t>(ROWS, rows - first);
      for (int64_t i = 0; i < count; ++i)
        for (int64_t r = 0; r < ranks; ++r) few[i * ranks + r] = from.at(first + i, r);
      expand(few.get(), reinterpret_cast<const Lanes*>(packed.get()), ranks, out.as<float>() + first * out.stride(0),
             out.stride(0), columns, count);
    }
  }
}

// out [ranks, columns] (+)= scale · sᵀ x, for s [rows, ranks] and x [rows, columns] (last stride 1).
void low_rank_outer(TensorView s, TensorView x, float scale, bool add, TensorView out, int threads) {
  const int64_t rows = x.size(0), columns = x.size(1), ranks = s.size(1);
  expect_matrix("s", s, rows, ranks, false);
  expect_matrix("x", x, rows, columns, true);
  expect_matrix("out", out, ranks, columns, false);
  constexpr int64_t WIDTH = 128;  // columns whose sums, 8 KiB, stay in L1 while all rows pass by
  const Strided from = strided(s), target = strided(out);
  const auto packed = pack({from.data, from.column, from.row}, ranks, rows, scale);
#pragma omp parallel for schedule(static) num_threads(threads_for(rows * columns * ranks, threads))
  for (int64_t start = 0; start < columns; start += WIDTH) {
    const int64_t width = std::min(WIDTH, columns - start);
    for (int64_t r = 0; r < ranks; r += LANES) {
      Lanes sums[WIDTH] = {};
      for (int64_t run = 0; run < rows; run += RUN / ROWS * ROWS) {
        const int64_t last = std::min(rows, run + RUN / ROWS * ROWS);
        Lanes part[WIDTH] = {};
        for (int64_t first = run; first < last; first += ROWS)
          outer(x.as<float>() + first * x.stride(0) + start, x.stride(0),
                reinterpret_cast<const Lanes*>(packed.get() + r * rows) + first, part, width,
                std::min<int64_t>(ROWS, last - first));
        for (int64_t j = 0; j < width; ++j) sums[j].add(part[j]);
      }
      for (int64_t k = 0; k < std::min(LANES, ranks - r); ++k)
        for (int64_t j = 0; j < width; ++j)
          target.at(r + k, start + j) = reinterpret_cast<const float*>(sums + j)[k] + (add ? target.at(r + k, start + j) : 0.0f);
    }
  }
}

}  // namespace mmfast
