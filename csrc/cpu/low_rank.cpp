// The products of a low-rank adapter in fp32: matrices of many rows and columns times matrices of few ranks. A general
// matrix product packs its operands as if they were large; these read the large matrix once, as it lies in memory.
// Every sum is made in one order, whatever the number of threads.
#include "low_rank.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>

#include "../tensor_view.h"
#include "scalars.h"
#include "sixteen.h"
#include "stream.h"

namespace mmfast {
namespace {

constexpr int MOST_ROWS = 12;     // of all Kernels
constexpr int64_t STEP = 64;      // columns between two requests for the rows that come next
constexpr int64_t WIDTH = 256;    // columns whose sums over all rows, 16 KiB, stay near while the rows pass by

// A matrix in which both strides count.
struct Strided {
  float* data;
  int64_t row, column;

  float& at(int64_t i, int64_t j) const { return data[i * row + j * column]; }
  Strided transposed() const { return {data, column, row}; }
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
    for (int64_t j = 0; j < columns; j += STEP) {
      const int64_t width = std::min(STEP, columns - j);
      prefetch_next(x + j, stride);
      if (count == ROWS)
        project_rows(Each<ROWS>(), x + j, stride, from + j, width, to);
      else
        for (int64_t i = 0; i < count; ++i)
          project_rows(Each<1>(), x + i * stride + j, stride, from + j, width, to + i);
    }
  }

  MMFAST_INLINE static void outer(const float* x, int64_t stride, const float* s, float* tile, int64_t columns,
                                  int64_t count) {
    const auto* factors = reinterpret_cast<const L*>(s);
    auto* to = reinterpret_cast<L*>(tile);
    for (int64_t j = 0; j < columns; j += STEP) {
      const int64_t width = std::min(STEP, columns - j);
      prefetch_next(x + j, stride);
      if (count == ROWS)
        outer_rows(Each<ROWS>(), x + j, stride, factors, to + j, width);
      else
        for (int64_t i = 0; i < count; ++i)
          outer_rows(Each<1>(), x + i * stride + j, stride, factors + i, to + j, width);
    }
  }

  // Brings in what the rows after these have in the columns of a step: the hardware's own prefetching ends with a page
  // of 4 KiB.
  MMFAST_INLINE static void prefetch_next(const float* x, int64_t stride) {
    for (int64_t i = ROWS; i < 2 * ROWS; ++i) prefetch(x + i * stride, STEP);
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

void expect_matrix(const char* name, const TensorView& x, DType dtype, int64_t rows, int64_t columns, bool packed) {
  check(x.dtype == dtype && x.dim() == 2 && x.size(0) == rows && x.size(1) == columns,
        name, " is ", x, "; expected ", name_of(dtype), "[", rows, ", ", columns, "]");
  check(!packed || columns <= 1 || x.stride(1) == 1, name, " must have stride 1 in its last dimension");
}

}  // namespace

// One pass over x [rows, columns] (last stride 1), all of one dtype but for `outer`, which is fp32. With factors
// [ranks, columns]: projected [rows, ranks] = scale · x factorsᵀ. With s [rows, ranks]: outer [ranks, columns] =
// scale · sᵀ x, or += if `add`. In bfloat16 factors and `outer` have stride 1 in one dimension.
void low_rank_read(TensorView x, std::optional<TensorView> factors, std::optional<TensorView> s, float scale,
                   std::optional<TensorView> projected, std::optional<TensorView> outer, bool add, int threads) {
  check(factors || s, "low_rank_read: expected factors, s, or both");
  const int64_t rows = x.size(0), columns = x.size(1), ranks = factors ? factors->size(0) : s->size(1);
  expect_matrix("x", x, x.dtype, rows, columns, true);
  check(factors.has_value() == projected.has_value() && s.has_value() == outer.has_value(),
        "low_rank_read: factors and projected come together, and s and outer");
  if (factors) expect_matrix("factors", *factors, x.dtype, ranks, columns, false);
  if (factors) expect_matrix("projected", *projected, x.dtype, rows, ranks, true);
  if (s) expect_matrix("s", *s, x.dtype, rows, ranks, true);
  if (s) expect_matrix("outer", *outer, DType::f32, ranks, columns, false);
  if (x.dtype == DType::bf16) return low_rank_read_bf16(x, factors, s, scale, projected, outer, add, threads);
  check(x.dtype == DType::f32, "low_rank_read: x is ", x, "; expected float32 or bfloat16");

  const Kernels& loops = kernels();
  const int64_t tiles = (ranks + LANES - 1) / LANES, slices = s ? (columns + WIDTH - 1) / WIDTH : 1;
  const auto packed = factors ? pack(strided(*factors), ranks, columns, scale) : nullptr;
  const auto packed_s = s ? pack(strided(*s).transposed(), ranks, rows, scale) : nullptr;
  // Of `projected`: sums over each slice of the columns, [slices, rows, tiles, 16].
  const auto sums = std::make_unique_for_overwrite<float[]>(factors ? slices * rows * tiles * LANES : 0);
  const auto project = [&](int64_t slice, int64_t first, int64_t start, int64_t width) {
    const int64_t count = std::min<int64_t>(loops.rows, rows - first);
    for (int64_t t = 0; t < tiles; ++t) {  // the rows of x come from cache after the first tile
      float found[MOST_ROWS][LANES] = {};
      loops.project(x.as<float>() + first * x.stride(0) + start, x.stride(0),
                    packed.get() + (t * columns + start) * LANES, width, count, found[0]);
      for (int64_t i = 0; i < count; ++i)
        std::memcpy(&sums[((slice * rows + first + i) * tiles + t) * LANES], found[i], sizeof(found[i]));
    }
  };
  const auto read_slice = [&](int64_t slice) {
    const int64_t start = slice * WIDTH, width = std::min(WIDTH, columns - start), size = tiles * WIDTH * LANES;
    const auto all = std::make_unique<float[]>(size), part = std::make_unique_for_overwrite<float[]>(size);
    for (int64_t run = 0; run < rows; run += RUN) {
      const int64_t last = std::min(rows, run + RUN);
      std::fill_n(part.get(), size, 0.0f);
      for (int64_t first = run; first < last; first += loops.rows) {
        if (factors) project(slice, first, start, width);
        for (int64_t t = 0; t < tiles; ++t)
          loops.outer(x.as<float>() + first * x.stride(0) + start, x.stride(0),
                      packed_s.get() + (t * rows + first) * LANES, &part[t * WIDTH * LANES], width,
                      std::min<int64_t>(loops.rows, last - first));
      }
      for (int64_t i = 0; i < size; ++i) all[i] += part[i];
    }
    const Strided target = strided(*outer);
    for (int64_t r = 0; r < ranks; ++r)
      for (int64_t j = 0; j < width; ++j) {
        const float sum = all[(r / LANES * WIDTH + j) * LANES + r % LANES];
        target.at(r, start + j) = add ? target.at(r, start + j) + sum : sum;
      }
  };
#pragma omp parallel num_threads(threads_for(rows * columns * ranks, threads))
  {
    if (s) {
#pragma omp for schedule(static)
      for (int64_t slice = 0; slice < slices; ++slice) read_slice(slice);
    } else {
#pragma omp for schedule(static)
      for (int64_t first = 0; first < rows; first += loops.rows) project(0, first, 0, columns);
    }
    if (factors) {
      const Strided target = strided(*projected);
#pragma omp for schedule(static)
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t r = 0; r < ranks; ++r) {
          float sum = 0.0f;
          for (int64_t slice = 0; slice < slices; ++slice) sum += sums[(slice * rows + i) * tiles * LANES + r];
          target.at(i, r) = sum;
        }
    }
  }
}

// out [rows, columns] (last stride 1) = scale · s factors + bias, for s [rows, ranks], factors [ranks, columns] and
// bias [columns].
void low_rank_expand(TensorView s, TensorView factors, float scale, std::optional<TensorView> bias, TensorView out,
                     int threads) {
  const int64_t rows = s.size(0), ranks = s.size(1), columns = factors.size(1);
  expect_matrix("s", s, DType::f32, rows, ranks, false);
  expect_matrix("factors", factors, DType::f32, ranks, columns, false);
  expect_matrix("out", out, DType::f32, rows, columns, true);
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

}  // namespace mmfast
