// The products of a low-rank adapter in fp32: matrices of many rows and columns times matrices of few ranks. A general
// matrix product packs its operands as if they were large; these read the large matrix once, as it lies in memory.
// Every sum is made in one order, whatever the number of threads.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>

#include "../tensor_view.h"
#include "scalars.h"
#include "sixteen.h"

namespace mmfast {
namespace {

constexpr int MOST_ROWS = 12;  // of all Kernels

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

// The loops for `count` rows: ROWS at once, or fewer one by one.
template <typename L, int ROWS>
struct Loops {
  MMFAST_INLINE static void project(const float* x, int64_t stride, const float* tile, int64_t columns, int64_t count,
                                    float* sums) {
    const auto* from = reinterpret_cast<const L*>(tile);
    auto* to = reinterpret_cast<L*>(sums);
    if (count == ROWS) return project_rows(Each<ROWS>(), x, stride, from, columns, to);
    for (int64_t i = 0; i < count; ++i) project_rows(Each<1>(), x + i * stride, stride, from, columns, to + i);
  }

  MMFAST_INLINE static void outer(const float* x, int64_t stride, const float* s, float* tile, int64_t columns,
                                  int64_t count) {
    const auto* factors = reinterpret_cast<const L*>(s);
    auto* to = reinterpret_cast<L*>(tile);
    if (count == ROWS) return outer_rows(Each<ROWS>(), x, stride, factors, to, columns);
    for (int64_t i = 0; i < count; ++i) outer_rows(Each<1>(), x + i * stride, stride, factors + i, to, columns);
  }

  // s [count, ranks]; tiles [columns / 16, ranks + 1, 16], of which the last row of each is where the sums start.
  MMFAST_INLINE static void expand(const float* s, const float* tiles, int64_t ranks, float* out, int64_t out_stride,
                                   int64_t columns, int64_t count) {
    const auto* tile = reinterpret_cast<const L*>(tiles);
    for (int64_t j = 0; j < columns; j += LANES, tile += ranks + 1) {
      L sums[ROWS];
      if (count == ROWS)
        expand_rows(Each<ROWS>(), s, ranks, tile, ranks, tile[ranks], sums);
      else
        for (int64_t i = 0; i < count; ++i)
          expand_rows(Each<1>(), s + i * ranks, ranks, tile, ranks, tile[ranks], sums + i);
      if (j + LANES <= columns)
        for (int64_t i = 0; i < count; ++i) std::memcpy(out + i * out_stride + j, sums + i, sizeof(L));
      else
        for (int64_t i = 0; i < count; ++i)
          std::memcpy(out + i * out_stride + j, sums + i, (columns - j) * sizeof(float));
    }
  }
};

// The loops as they were compiled for one kind of CPU, and the rows that pass through them together.
struct Kernels {
  int rows;
  decltype(&Loops<Halves, 1>::project) project;
  decltype(&Loops<Halves, 1>::outer) outer;
  decltype(&Loops<Halves, 1>::expand) expand;
};

#define MMFAST_KERNELS(NAME, LANES_TYPE, ROWS, TARGET)                                                              \
  TARGET void project_##NAME(const float* x, int64_t stride, const float* tile, int64_t columns, int64_t count,     \
                             float* sums) {                                                                         \
    Loops<LANES_TYPE, ROWS>::project(x, stride, tile, columns, count, sums);                                      \
  }                                                                                                                 \
  TARGET void outer_##NAME(const float* x, int64_t stride, const float* s, float* tile, int64_t columns,            \
                           int64_t count) {                                                                         \
    Loops<LANES_TYPE, ROWS>::outer(x, stride, s, tile, columns, count);                                           \
  }                                                                                                                 \
  TARGET void expand_##NAME(const float* s, const float* tiles, int64_t ranks, float* out, int64_t out_stride,      \
                            int64_t columns, int64_t count) {                                                       \
    Loops<LANES_TYPE, ROWS>::expand(s, tiles, ranks, out, out_stride, columns, count);                            \
  }                                                                                                                 \
  constexpr Kernels NAME = {ROWS, project_##NAME, outer_##NAME, expand_##NAME};                                     \
  static_assert(ROWS <= MOST_ROWS && RUN % ROWS == 0);

MMFAST_KERNELS(baseline, Halves, 6, )
#if defined(__x86_64__)
MMFAST_KERNELS(avx2, Halves, 6, __attribute__((target("arch=x86-64-v3"))))
MMFAST_KERNELS(avx512, Whole, 12, __attribute__((target("arch=x86-64-v4"))))
#endif

const Kernels& kernels() {
#if defined(__x86_64__)
  static const Kernels& found = __builtin_cpu_supports("x86-64-v4")   ? avx512
                                : __builtin_cpu_supports("x86-64-v3") ? avx2
                                                                      : baseline;
  return found;
#else
  return baseline;
#endif
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
  const Kernels& loops = kernels();
#pragma omp parallel for schedule(static) num_threads(threads_for(rows * columns * ranks, threads))
  for (int64_t first = 0; first < rows; first += loops.rows) {
    const int64_t count = std::min<int64_t>(loops.rows, rows - first);
    for (int64_t r = 0; r < ranks; r += LANES) {  // the rows of x come from cache after the first tile
      float sums[MOST_ROWS][LANES] = {};
      loops.project(x.as<float>() + first * x.stride(0), x.stride(0), packed.get() + r * columns, columns, count,
                    sums[0]);
      for (int64_t i = 0; i < count; ++i)
        for (int64_t k = 0; k < std::min(LANES, ranks - r); ++k) target.at(first + i, r + k) = sums[i][k];
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
  const Kernels& loops = kernels();
#pragma omp parallel num_threads(threads_for(rows * columns * ranks, threads))
  {
    const auto few = std::make_unique_for_overwrite<float[]>(loops.rows * ranks);
#pragma omp for schedule(static)
    for (int64_t first = 0; first < rows; first += loops.rows) {
      const int64_t count = std::min<int64_t>(loops.rows, rows - first);
      for (int64_t i = 0; i < count; ++i)
        for (int64_t r = 0; r < ranks; ++r) few[i * ranks + r] = from.at(first + i, r);
      loops.expand(few.get(), packed.get(), ranks, out.as<float>() + first * out.stride(0), out.stride(0), columns,
                   count);
    }
  }
}

// out [ranks, columns] (+)= scale · sᵀ x, for s [rows, ranks] and x [rows, columns] (last stride 1).
void low_rank_outer(TensorView s, TensorView x, float scale, bool add, TensorView out, int threads) {
  const int64_t rows = x.size(0), columns = x.size(1), ranks = s.size(1);
  expect_matrix("s", s, rows, ranks, false);
  expect_matrix("x", x, rows, columns, true);
  expect_matrix("out", out, ranks, columns, false);
  constexpr int64_t WIDTH = 256;  // columns whose sums, 16 KiB, stay near while all rows pass by
  const Strided from = strided(s), target = strided(out);
  const Kernels& loops = kernels();
  const auto packed = pack({from.data, from.column, from.row}, ranks, rows, scale);
#pragma omp parallel for schedule(static) num_threads(threads_for(rows * columns * ranks, threads))
  for (int64_t start = 0; start < columns; start += WIDTH) {
    const int64_t width = std::min(WIDTH, columns - start);
    for (int64_t r = 0; r < ranks; r += LANES) {
      float sums[WIDTH][LANES] = {};
      for (int64_t run = 0; run < rows; run += RUN) {
        const int64_t last = std::min(rows, run + RUN);
        float part[WIDTH][LANES] = {};
        for (int64_t first = run; first < last; first += loops.rows)
          loops.outer(x.as<float>() + first * x.stride(0) + start, x.stride(0),
                      packed.get() + r * rows + first * LANES, part[0], width,
                      std::min<int64_t>(loops.rows, last - first));
        for (int64_t j = 0; j < width; ++j)
          for (int64_t k = 0; k < LANES; ++k) sums[j][k] += part[j][k];
      }
      for (int64_t k = 0; k < std::min(LANES, ranks - r); ++k)
        for (int64_t j = 0; j < width; ++j)
          target.at(r + k, start + j) = sums[j][k] + (add ? target.at(r + k, start + j) : 0.0f);
    }
  }
}

}  // namespace mmfast
