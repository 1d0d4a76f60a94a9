// The products of a low-rank adapter in fp32: matrices of many rows and columns times matrices of few ranks. A general
// matrix product packs its operands as if they were large; these read the large matrix once, as it lies in memory.
// Every sum is made in one order, whatever the number of threads.
#include "low_rank.h"

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>

#include "../tensor_view.h"
#include "matrix.h"
#include "scalars.h"
#include "sixteen.h"

namespace mmfast {
namespace {

constexpr int64_t WIDTH = 2048;  // columns whose factors and sums, 128 KiB each for 16 ranks, stay near as rows pass by
constexpr int64_t BLOCK = 64;    // columns whose sums a thread adds up at a time

// 16 numbers in one line of the caches: a vector that lies in two takes twice the time.
struct alignas(64) Line {
  float at[LANES];
};

std::unique_ptr<Line[]> lines(int64_t count) { return std::make_unique_for_overwrite<Line[]>(count); }

MMFAST_CLONES void add_to(Line* sums, const Line* more, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    for (int64_t r = 0; r < LANES; ++r) sums[i].at[r] += more[i].at[r];
}

// What is worth a second thread, in multiplications.
int threads_for(int64_t work, int threads) {
  return static_cast<int>(std::clamp<int64_t>(work >> 18, 1, threads));
}

// A matrix [count, ranks] as `tiles` times 16 numbers for each of count, zero beyond the ranks: it itself if it lies in
// memory so, or a copy.
class Sixteens {
 public:
  Sixteens(const Strided<float>& source, int64_t count, int64_t ranks)
      : source_(source), count_(count), ranks_(ranks), tiles_(divide_up(ranks, LANES)) {
    const bool lies = source.column == 1 && source.row == ranks && ranks % LANES == 0;
    if (!lies) copy_ = lines(count * tiles_);
    data_ = lies ? source.data : reinterpret_cast<const float*>(copy_.get());
  }

  // All threads of a team call it.
  void make() {
    if (!copy_) return;
#pragma omp for schedule(static)
    for (int64_t start = 0; start < count_; start += LANES) {  // a line of each rank, which is read once
      float* const to = copy_[start * tiles_].at;
      const int64_t width = tiles_ * LANES, count = std::min(LANES, count_ - start);
      for (int64_t r = 0; r < width; ++r)
        for (int64_t i = 0; i < count; ++i) to[i * width + r] = r < ranks_ ? source_.number(start + i, r) : 0.0f;
    }
  }

  const float* at(int64_t i) const { return data_ + i * tiles_ * LANES; }

 private:
  Strided<float> source_;
  int64_t count_, ranks_, tiles_;
  std::unique_ptr<Line[]> copy_;
  const float* data_;
};

// The loops for `count` rows: ROWS at once, then a third of them, then one by one. Of factors, s, `outer` and `sums`
// every `step`-th vector of 16 is meant.
template <typename L, int ROWS>
struct Loops {
  template <typename Part>
  MMFAST_INLINE static void each(int64_t count, Part part) {
    int64_t i = 0;
    if (count == ROWS) return part(Each<ROWS>(), i);
    for (; i + ROWS / 3 <= count; i += ROWS / 3) part(Each<ROWS / 3>(), i);
    for (; i < count; ++i) part(Each<1>(), i);
  }

  // With factors: sums [count] += x factorsᵀ; with s: outer [columns] += xᵀ s.
  MMFAST_INLINE static void read(const float* x, int64_t stride, const float* factors, const float* s, float* outer,
                                 int64_t columns, int64_t count, float* sums, int64_t step) {
    const auto *of_columns = reinterpret_cast<const L*>(factors), *of_rows = reinterpret_cast<const L*>(s);
    auto *to = reinterpret_cast<L*>(outer), *found = reinterpret_cast<L*>(sums);
    if (factors && s && L::IS_ONE_REGISTER)
      return each(count, [&](auto rows, int64_t i) __attribute__((always_inline)) {
        project_and_outer_rows(rows, x + i * stride, stride, of_columns, of_rows + i * step, to, columns,
                               found + i * step, step);
      });
    if (factors)
      each(count, [&](auto rows, int64_t i) __attribute__((always_inline)) {
        project_rows(rows, x + i * stride, stride, of_columns, columns, found + i * step, step, step);
      });
    if (s)
      each(count, [&](auto rows, int64_t i) __attribute__((always_inline)) {
        outer_rows(rows, x + i * stride, stride, of_rows + i * step, to, columns, step, step);
      });
  }

  // s [count, ranks]; tiles [columns / 16, ranks + 1, 16], of which the last row of each is where the sums start.
  MMFAST_INLINE static void expand(const float* s, const float* tiles, int64_t ranks, float* out, int64_t out_stride,
                                   int64_t columns, int64_t count) {
    each(count, [&](auto rows, int64_t i) __attribute__((always_inline)) {
      constexpr int64_t some = rows.size();
      const auto* tile = reinterpret_cast<const L*>(tiles);
      float* const to = out + i * out_stride;
      int64_t j = 0;
      for (; j + LANES <= columns; j += LANES, tile += ranks + 1)
        expand_rows(rows, s + i * ranks, ranks, tile, ranks, tile[ranks], to + j, out_stride);
      if (j == columns) return;
      float last[some * LANES];
      expand_rows(rows, s + i * ranks, ranks, tile, ranks, tile[ranks], last, LANES);
      for (int64_t k = 0; k < some; ++k) std::copy_n(last + k * LANES, columns - j, to + k * out_stride + j);
    });
  }
};

// The loops as they were compiled for one kind of CPU, and the rows that pass through them together.
struct Kernels {
  int rows;
  decltype(&Loops<Halves, 6>::read) read;
  decltype(&Loops<Halves, 6>::expand) expand;
};

#define MMFAST_KERNELS(NAME, LANES_TYPE, ROWS, TARGET)                                                               \
  TARGET void read_##NAME(const float* x, int64_t stride, const float* factors, const float* s, float* outer,        \
                          int64_t columns, int64_t count, float* sums, int64_t step) {                               \
    Loops<LANES_TYPE, ROWS>::read(x, stride, factors, s, outer, columns, count, sums, step);                         \
  }                                                                                                                  \
  TARGET void expand_##NAME(const float* s, const float* tiles, int64_t ranks, float* out, int64_t out_stride,       \
                            int64_t columns, int64_t count) {                                                        \
    Loops<LANES_TYPE, ROWS>::expand(s, tiles, ranks, out, out_stride, columns, count);                               \
  }                                                                                                                  \
  constexpr Kernels NAME = {ROWS, read_##NAME, expand_##NAME};                                                       \
  static_assert(RUN % ROWS == 0);

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
  const int64_t tiles = divide_up(ranks, LANES), panels = divide_up(rows, loops.rows);
  const int64_t width = std::max(WIDTH / std::max<int64_t>(tiles, 1), RUN);
  // What one thread takes at a time. The sums over the rows of a part are an array of their own, a quarter of x's size
  // in all, so the size alone decides how many there are; without such sums any cut will do.
  const int64_t few = std::min<int64_t>(panels, 4), fitting = rows / (64 * std::max<int64_t>(tiles, 1));
  const int64_t parts = s ? std::bit_floor<uint64_t>(std::clamp<int64_t>(std::min(panels / 8, fitting), few, 32))
                          : std::min<int64_t>(panels, 4 * threads);
  const auto start_of = [&](int64_t part) { return std::min(rows, panels * part / parts * loops.rows); };
  std::optional<Sixteens> of_columns, of_rows;
  if (factors) of_columns.emplace(Strided<float>(*factors).transposed(), columns, ranks);
  if (s) of_rows.emplace(Strided<float>(*s), rows, ranks);
  const auto sums = lines(s ? parts * columns * tiles : 0);  // [parts, columns, tiles]

  // A run of rows of a part: `found` [rows, tiles] is room for what is projected, `near` [width, tiles] for `outer`.
  const auto read_run = [&](int64_t part, int64_t run, int64_t stop, Line* found, Line* near) {
    const bool is_first = run == start_of(part);
    if (factors) std::memset(found, 0, (stop - run) * tiles * sizeof(Line));
    for (int64_t start = 0; start < columns; start += width) {
      const int64_t count = std::min(width, columns - start), size = s ? count * tiles : 0;
      Line* const total = sums.get() + (s ? (part * columns + start) * tiles : 0);
      Line* const outer_sums = is_first ? total : near;
      std::memset(outer_sums, 0, size * sizeof(Line));
      for (int64_t i = run; i < stop; i += loops.rows)
        for (int64_t j = 0; j < count; j += RUN)
          for (int64_t t = 0; t < tiles; ++t)  // after the first tile x comes from cache
            loops.read(x.as<float>() + i * x.stride(0) + start + j, x.stride(0),
                       factors ? of_columns->at(start + j) + t * LANES : nullptr,
                       s ? of_rows->at(i) + t * LANES : nullptr, s ? outer_sums[j * tiles + t].at : nullptr,
                       std::min(RUN, count - j), std::min<int64_t>(loops.rows, stop - i),
                       factors ? found[(i - run) * tiles + t].at : nullptr, tiles);
      if (!is_first) add_to(total, near, size);
    }
    if (!factors) return;
    const Strided<float> into(*projected);
    for (int64_t i = run; i < stop; ++i)
      for (int64_t r = 0; r < ranks; ++r)
        into.number(i, r) = found[(i - run) * tiles + r / LANES].at[r % LANES] * scale;
  };
  const auto add_up = [&](int64_t start, Line* total) {
    const int64_t count = std::min(BLOCK, columns - start);
    std::memset(total, 0, count * tiles * sizeof(Line));
    for (int64_t part = 0; part < parts; ++part)
      add_to(total, &sums[(part * columns + start) * tiles], count * tiles);
    const Strided<float> target(*outer);
    const auto put = [&](int64_t r, int64_t j) {
      const float sum = total[j * tiles + r / LANES].at[r % LANES] * scale;
      float& found = target.number(r, start + j);
      found = add ? found + sum : sum;
    };
    if (target.row == 1)
      for (int64_t j = 0; j < count; ++j)
        for (int64_t r = 0; r < ranks; ++r) put(r, j);
    else
      for (int64_t r = 0; r < ranks; ++r)
        for (int64_t j = 0; j < count; ++j) put(r, j);
  };
#pragma omp parallel num_threads(threads_for(rows * columns * ranks, threads))
  {
    const auto found = lines(factors ? RUN * tiles : 0), near = lines(s ? std::max(width, BLOCK) * tiles : 0);
    if (factors) of_columns->make();
    if (s) of_rows->make();
#pragma omp for schedule(static)
    for (int64_t part = 0; part < parts; ++part)
      for (int64_t run = start_of(part), end = start_of(part + 1); run < end; run += RUN)
        read_run(part, run, std::min(end, run + RUN), found.get(), near.get());
    if (s) {
#pragma omp for schedule(static)
      for (int64_t start = 0; start < columns; start += BLOCK) add_up(start, near.get());
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
  const Strided<float> source(factors), from(s);
  const Kernels& loops = kernels();
  const auto packed = lines(divide_up(columns, LANES) * (ranks + 1));
  const auto pack = [&](int64_t start) {
    Line* const to = &packed[start / LANES * (ranks + 1)];
    const int64_t count = std::min(LANES, columns - start);
    for (int64_t r = 0; r < ranks; ++r)
      for (int64_t j = 0; j < LANES; ++j) to[r].at[j] = j < count ? source.number(r, start + j) * scale : 0.0f;
    for (int64_t j = 0; j < LANES; ++j) to[ranks].at[j] = bias && j < count ? bias->as<float>()[start + j] : 0.0f;
  };
#pragma omp parallel num_threads(threads_for(rows * columns * ranks, threads))
  {
    const auto few = std::make_unique_for_overwrite<float[]>(loops.rows * ranks);
#pragma omp for schedule(static)
    for (int64_t start = 0; start < columns; start += LANES) pack(start);
#pragma omp for schedule(static)
    for (int64_t first = 0; first < rows; first += loops.rows) {
      const int64_t count = std::min<int64_t>(loops.rows, rows - first);
      for (int64_t i = 0; i < count; ++i)
        for (int64_t r = 0; r < ranks; ++r) few[i * ranks + r] = from.number(first + i, r);
      loops.expand(few.get(), packed[0].at, ranks, out.as<float>() + first * out.stride(0), out.stride(0), columns,
                   count);
    }
  }
}

}  // namespace mmfast
