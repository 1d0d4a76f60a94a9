// y = x W + scale · s factors + bias of bfloat16 matrices, in tiles: the low-rank part is where the sums of the large
// product start, so that it is neither written, nor rounded, nor read. That of fp32 matrices is in product_f32.cpp.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>

#include "../tensor_view.h"
#include "kept.h"
#include "product_f32.h"
#include "scalars.h"
#include "tiles.h"

namespace mmfast {

#ifdef MMFAST_AMX

namespace {

// One thread's task is out's block of so many rows and columns. A block of W with so many rows, 1 MiB, is packed and
// stays in the second-level cache while the rows of x pass by, a panel of 32 at a time.
constexpr int64_t ROWS = 1024, COLUMNS = 256, DEPTH = 2048, PANEL = 2 * TILE_ROWS, STEPS = DEPTH / TILE_DEPTH;

// W [depth, width] as [pairs of tiles, steps of 32 rows, 2] tiles of B, in the order in which it lies in memory.
MMFAST_AMX void pack(const Strided<Bfloat16>& w, int64_t depth, int64_t width, Tile* to) {
  const int64_t pairs = divide_up(width, PAIR), steps = divide_up(depth, TILE_DEPTH);
  const bool along_rows = w.rows_are_packed(width);
  for (int64_t i = 0; i < pairs * steps; ++i) {
    const int64_t p = along_rows ? i % pairs : i / steps, step = along_rows ? i / pairs : i % steps;
    const int64_t rows = depth - step * TILE_DEPTH, columns = width - p * PAIR;
    const auto from = w.at(step * TILE_DEPTH, p * PAIR);
    Tile* pair = to + 2 * (p * steps + step);
    if (along_rows && rows >= TILE_DEPTH && columns >= PAIR) {
      pack_b_pair(from.data, from.row, pair);
    } else {
      pack_b(from, rows, columns, pair);
      pack_b(from.at(0, std::min(TILE_PAIRS, columns)), rows, columns - TILE_PAIRS, pair + 1);
    }
  }
}

// Tiles 0 to 3 = scale · s factors + bias, for tiles of s [depths, 2] and of the factors [depths, 2].
MMFAST_AMX void start(const Tile* s, const Tile* factors, int64_t depths, float scale, const float* bias) {
  zero_sums();
  for (int64_t d = 0; d < depths; ++d) {
    _tile_loadd(4, s + 2 * d, TILE_BYTES);
    _tile_loadd(5, s + 2 * d + 1, TILE_BYTES);
    _tile_loadd(6, factors + 2 * d, TILE_BYTES);
    _tile_loadd(7, factors + 2 * d + 1, TILE_BYTES);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  alignas(64) float sums[4 * SUMS];
  store_sums(sums);
  const __m512 factor = _mm512_set1_ps(scale);
  const __m512 biases[] = {_mm512_load_ps(bias), _mm512_load_ps(bias + TILE_PAIRS)};
  for (int64_t i = 0; i < 4 * TILE_ROWS; ++i) {
    float* row = sums + i * TILE_PAIRS;
    _mm512_store_ps(row, _mm512_fmadd_ps(_mm512_load_ps(row), factor, biases[i / TILE_ROWS % 2]));
  }
  stored_before_tiles();
  load_sums(sums);
}

// Tiles 0 to 3 += x [32, 32 · steps] W, for pairs of tiles of W. Meanwhile so many rows from `next` on are brought in.
MMFAST_AMX void multiply(const Bfloat16* x, int64_t stride, const Tile* w, int64_t steps, const Bfloat16* next,
                         int64_t next_stride, int64_t next_rows) {
  const int64_t bytes = stride * static_cast<int64_t>(sizeof(Bfloat16));
  for (int64_t step = 0; step < steps; ++step, x += TILE_DEPTH, next += TILE_DEPTH, w += 2) {
    for (int64_t i = 0; i < next_rows; ++i) __builtin_prefetch(next + i * next_stride, 0, 2);
    _tile_loadd(4, x, bytes);
    _tile_loadd(6, w, TILE_BYTES);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, w + 1, TILE_BYTES);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, x + TILE_ROWS * stride, bytes);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
}

// out [rows, columns], 32 of each at most, = tiles 0 to 3.
MMFAST_AMX void finish(Bfloat16* out, int64_t stride, int64_t rows, int64_t columns) {
  alignas(64) float sums[4 * SUMS];
  store_sums(sums);
  const __mmask32 mask = first_lanes(columns);
  for (int64_t i = 0; i < rows; ++i) {
    const float* row = sums + i / TILE_ROWS * 2 * SUMS + i % TILE_ROWS * TILE_PAIRS;
    const auto bits = (__m512i)_mm512_cvtne2ps_pbh(_mm512_load_ps(row + SUMS), _mm512_load_ps(row));
    if (columns >= PAIR)
      _mm512_storeu_si512(out + i * stride, bits);
    else
      _mm512_mask_storeu_epi16(out + i * stride, mask, bits);
  }
}

struct Operands {
  Strided<Bfloat16> s, factors, x, w, out;
  const Bfloat16* bias;  // null: there is none
  float scale;
  int64_t rows, columns, ranks, features;
};

thread_local Kept<Tile> kept_w, kept_copy, kept_s, kept_factors, kept_sums;

// What one thread packs, and its tasks.
class Worker {
 public:
  explicit Worker(const Operands& given) : of(given), depths(divide_up(of.ranks, TILE_DEPTH)) {}

  // The block of out from `row` and `column` on.
  MMFAST_AMX void run(int64_t row, int64_t column) {
    first_row = row, first_column = column;
    height = std::min(ROWS, of.rows - row), width = std::min(COLUMNS, of.columns - column);
    pack(of.factors.at(0, column), of.ranks, width, factors);
    for (int64_t j = 0; of.bias && j < width; ++j) bias[j] = to_float(of.bias[column + j]);
    for (int64_t k = 0; k < std::max<int64_t>(of.features, 1); k += DEPTH) {
      const int64_t depth = std::min(DEPTH, of.features - k);
      pack(of.w.at(k, column), depth, width, w);
      for (int64_t i = 0; i < height; i += PANEL) panel(i, k, depth);
    }
  }

 private:
  MMFAST_AMX void panel(int64_t i, int64_t k, int64_t depth) {
    const bool first = k == 0, last = k + DEPTH >= of.features;
    const int64_t rows = std::min(PANEL, height - i), steps = divide_up(depth, TILE_DEPTH);
    const int64_t pairs = divide_up(width, PAIR), each = divide_up(PANEL, pairs);
    for (int64_t t = 0; first && t < 2 * depths; ++t) {
      const auto from = of.s.at(first_row + i + std::min(t % 2 * TILE_ROWS, rows), t / 2 * TILE_DEPTH);
      pack_a(from.data, from.row, rows - t % 2 * TILE_ROWS, of.ranks - t / 2 * TILE_DEPTH, &s[t]);
    }
    const Bfloat16* x = of.x.at(first_row + i, k).data;
    const Bfloat16* next = x + PANEL * of.x.row;
    int64_t stride = of.x.row;
    if (rows < PANEL || depth % TILE_DEPTH) {  // by way of a copy, with zeros beyond
      auto* to = reinterpret_cast<Bfloat16*>(copy);
      std::memset(to, 0, 2 * STEPS * sizeof(Tile));
      for (int64_t r = 0; r < rows; ++r) std::memcpy(to + r * DEPTH, x + r * stride, depth * sizeof(Bfloat16));
      x = to, stride = DEPTH;
    }
    for (int64_t p = 0; p < pairs; ++p) {
      float* sums = kept[first && last ? 0 : (i / PANEL * pairs + p) * 4].sums();
      if (first)
        start(s, &factors[2 * p * depths], depths, of.scale, bias + p * PAIR);
      else
        load_sums(sums);
      multiply(x, stride, &w[2 * p * steps], steps, next + p * each * of.x.row, of.x.row, each);
      if (last)
        finish(of.out.at(first_row + i, first_column + p * PAIR).data, of.out.row, rows, width - p * PAIR);
      else
        store_sums(sums);
    }
  }

  const Operands& of;
  const int64_t depths;  // steps of the ranks
  int64_t first_row = 0, first_column = 0, height = 0, width = 0;
  alignas(64) float bias[COLUMNS] = {};
  Tile* const w = kept_w.get(COLUMNS / TILE_PAIRS * STEPS);
  Tile* const copy = kept_copy.get(2 * STEPS);
  Tile* const s = kept_s.get(2 * depths);
  Tile* const factors = kept_factors.get(COLUMNS / TILE_PAIRS * depths);
  Tile* const kept = kept_sums.get(of.features > DEPTH ? ROWS * COLUMNS / SUMS : 1);
};

}  // namespace

#endif

// out [rows, columns] = x w + scale · s factors + bias, for x [rows, features], w [features, columns], s [rows, ranks],
// factors [ranks, columns] and bias [columns]; x, s and out have stride 1 in their last dimension, w and factors in one
// of theirs.
void low_rank_product(TensorView x, TensorView w, TensorView s, TensorView factors, float scale,
                      std::optional<TensorView> bias, TensorView out, int threads) {
  if (x.dtype == DType::f32) return product_f32(x, w, LowRank{s, factors, scale}, bias, false, out, threads);
#ifdef MMFAST_AMX
  check(has_amx(), "low_rank_product: this CPU does not multiply bfloat16 in tiles");
  const int64_t rows = x.size(0), features = x.size(1), ranks = s.size(1), columns = w.size(1);
  const auto expect = [](const char* name, const TensorView& view, int64_t height, int64_t width, bool packed) {
    check_operand("low_rank_product", name, view, DType::bf16, height, width, packed);
  };
  expect("x", x, rows, features, true);
  expect("w", w, features, columns, false);
  expect("s", s, rows, ranks, true);
  expect("factors", factors, ranks, columns, false);
  expect("out", out, rows, columns, true);
  if (bias) bias->expect("bias", DType::bf16, {columns});
  const Operands of = {Strided<Bfloat16>(s), Strided<Bfloat16>(factors), Strided<Bfloat16>(x), Strided<Bfloat16>(w),
                       Strided<Bfloat16>(out), bias ? bias->as<Bfloat16>() : nullptr, scale, rows, columns, ranks,
                       features};
  const int64_t row_blocks = divide_up(rows, ROWS), tasks = row_blocks * divide_up(columns, COLUMNS);
#pragma omp parallel num_threads(threads)
  {
    const Tiles configured;
    Worker worker(of);
#pragma omp for schedule(static)
    for (int64_t task = 0; task < tasks; ++task) worker.run(task % row_blocks * ROWS, task / row_blocks * COLUMNS);
  }
#else
  check(false, "low_rank_product: this CPU does not multiply bfloat16 in tiles");
#endif
}

}  // namespace mmfast
