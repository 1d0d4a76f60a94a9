// Products with a quantised weight in fp32 and AVX-512: the weight is decoded into panels that stay in the second-level
// cache while the rows of x pass by. Compiled with -ffp-contract=off, see nf4.h.
#include <algorithm>
#include <array>
#include <cstdint>
#include <utility>

#include "../tensor_view.h"
#include "amx.h"
#include "kept.h"
#include "matrix.h"
#include "quantized_product.h"
#include "quantized_rows.h"

namespace mmfast {

#ifdef MMFAST_AMX

namespace {

// A block of W has about so many rows and at most so many columns, 512 KiB. The sums of so many rows of x with its
// columns, 1 MiB, stay in the second-level cache with it from block to block.
constexpr int64_t DEPTH = 512, MOST_DEPTH = 3 * DEPTH / 2, WIDTH = 256, ROWS = 1024;
static_assert(MOST_DEPTH <= LONGEST && WIDTH <= LONGEST);
// Columns of W that lie beside each other in a panel, [steps, 32] in memory: two registers.
constexpr int64_t PANEL = 32;
// Rows of x in a group: their sums with a panel, and two registers of that, fill 31 of the 32 registers. Packed, a group
// has 16 floats for each step.
constexpr int HEIGHT = 14;
constexpr int64_t GROUP = 16;
// Steps from using a row of a panel to asking the second-level cache for another.
constexpr int64_t STEPS_AHEAD = 4;
// Multiplications for which another thread is worth waking.
constexpr int64_t PER_THREAD = 1 << 21;

// to [COUNT, 32] = x times a panel + before, if that is there; of the columns those in `masks` are there.
template <int COUNT>
MMFAST_AVX512 void add_product(const float* x, const float* panel, int64_t depth, Matrix<const float> before,
                               Matrix<float> to, const __mmask16* masks) {
  __m512 sums[COUNT][2];
#pragma GCC unroll 14
  for (int i = 0; i < COUNT; ++i) {
    __builtin_prefetch(to.row(i), 1);
    __builtin_prefetch(to.row(i) + 16, 1);
    sums[i][0] = sums[i][1] = _mm512_setzero_ps();
  }
  for (int64_t k = 0; k < depth; ++k, x += GROUP, panel += PANEL) {
    const __m512 left = _mm512_loadu_ps(panel), right = _mm512_loadu_ps(panel + 16);
    __builtin_prefetch(panel + STEPS_AHEAD * PANEL);
    __builtin_prefetch(panel + STEPS_AHEAD * PANEL + 16);
#pragma GCC unroll 14
    for (int i = 0; i < COUNT; ++i) {
      const __m512 factor = _mm512_set1_ps(x[i]);
      sums[i][0] = _mm512_fmadd_ps(factor, left, sums[i][0]);
      sums[i][1] = _mm512_fmadd_ps(factor, right, sums[i][1]);
    }
  }
#pragma GCC unroll 14
  for (int i = 0; i < COUNT; ++i)
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      if (before.data)
        sums[i][half] = _mm512_add_ps(sums[i][half], _mm512_maskz_loadu_ps(masks[half], before.row(i) + 16 * half));
      _mm512_mask_storeu_ps(to.row(i) + 16 * half, masks[half], sums[i][half]);
    }
}

template <std::size_t... I>
constexpr auto add_products_of(std::index_sequence<I...>) {
  return std::array{add_product<static_cast<int>(I) + 1>...};
}
constexpr auto ADD_PRODUCT = add_products_of(std::make_index_sequence<HEIGHT>());

// Row i of to = column i of 16 lines of which each has `count` floats, 16 at most; rows lie `step` apart.
MMFAST_AVX512 MMFAST_INLINE void turn(const __m512* lines, int64_t count, float* to, int64_t step) {
  __m512i bits[16], turned[16];
  for (int i = 0; i < 16; ++i) bits[i] = _mm512_castps_si512(lines[i]);
  transpose_pairs(bits, turned);
  for (int64_t k = 0; k < std::min<int64_t>(count, 16); ++k) _mm512_storeu_si512(to + k * step, turned[k]);
}

thread_local Kept<float> kept_x, kept_block, kept_sums;

template <typename Rows>
struct Product {
  const Rows& weight;
  bool forward;
  Matrix<const float> x;
  Matrix<float> out;
  const float* bias;
  bool add;
  int64_t row, rows, depth, blocks, groups;
  float* packed;  // rows of x: [blocks, groups, steps, 16]

  // Where a block begins: even, for a byte of NF4 has two values.
  int64_t step(int64_t block) const { return block < blocks ? depth * block / blocks / GROUP * GROUP : depth; }
  // The first row of a group, which has HEIGHT or one less.
  int64_t first(int64_t group) const { return row + rows * group / groups; }
  float* packed_at(int64_t block, int64_t group) const {
    return packed + GROUP * (step(block) * groups + group * (step(block + 1) - step(block)));
  }

  MMFAST_AVX512 void pack_x(int64_t block, int64_t group) const {
    const int64_t steps = step(block + 1) - step(block), count = first(group + 1) - first(group);
    float* const to = packed_at(block, group);
    for (int64_t k = 0; k < steps; k += 16) {
      const auto mask = static_cast<__mmask16>(first_lanes(steps - k));
      __m512 lines[16];
      for (int64_t i = 0; i < 16; ++i)
        lines[i] = i < count ? _mm512_maskz_loadu_ps(mask, x.at(first(group) + i, step(block) + k).data)
                             : _mm512_setzero_ps();
      turn(lines, steps - k, to + k * GROUP, GROUP);
    }
  }

  // `steps` from `from` on of `columns` columns as panels, with zeros beyond the last column.
  MMFAST_AVX512 void decode(int64_t from, int64_t steps, int64_t column, int64_t columns, float* panels) const {
    if (columns % PANEL)
      std::fill_n(panels + columns / PANEL * steps * PANEL, steps * PANEL, 0.0f);
    if (forward)
      decode_columns(from, steps, column, columns, panels);
    else
      decode_rows(from, steps, column, columns, panels);
  }

  // Columns of the output are rows of W.
  MMFAST_AVX512 void decode_columns(int64_t from, int64_t steps, int64_t column, int64_t columns, float* panels) const {
    alignas(64) float decoded[16][LONGEST + nf4::BLOCK];
    for (int64_t n = 0; n < columns; n += 16) {
      const int64_t count = std::min<int64_t>(columns - n, 16);
      for (int64_t i = 0; i < count; ++i) {
        weight.fetch(column + n + i + AHEAD, from, steps);
        weight.read(column + n + i, from, steps, decoded[i]);
      }
      for (int64_t k = 0; k < steps; k += 16) {
        __m512 lines[16];
        for (int64_t i = 0; i < 16; ++i) lines[i] = i < count ? _mm512_load_ps(&decoded[i][k]) : _mm512_setzero_ps();
        turn(lines, steps - k, panels + (n / PANEL * steps + k) * PANEL + n % PANEL, PANEL);
      }
    }
  }

  MMFAST_AVX512 void decode_rows(int64_t from, int64_t steps, int64_t column, int64_t columns, float* panels) const {
    alignas(64) float decoded[WIDTH + nf4::BLOCK];
    for (int64_t k = 0; k < steps; ++k) {
      weight.fetch(from + k + AHEAD, column, columns);
      weight.read(from + k, column, columns, decoded);
      for (int64_t n = 0; n < columns; n += 16) {
        const auto mask = static_cast<__mmask16>(first_lanes(columns - n));
        _mm512_mask_storeu_ps(panels + (n / PANEL * steps + k) * PANEL + n % PANEL, mask, _mm512_load_ps(decoded + n));
      }
    }
  }

  MMFAST_AVX512 void multiply_columns(int64_t column, int64_t columns) const {
    const int64_t panels = (columns + PANEL - 1) / PANEL, most = std::min(depth, depth / blocks + GROUP);
    float* const block = kept_block.get((panels * most + STEPS_AHEAD) * PANEL);
    float* const sums = kept_sums.get(blocks > 1 ? groups * panels * HEIGHT * PANEL : 0);
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t steps = step(b + 1) - step(b);
      decode(step(b), steps, column, columns, block);
      for (int64_t g = 0; g < groups; ++g)
        for (int64_t p = 0; p < panels; ++p) {
          const auto mask = first_lanes(columns - p * PANEL);
          const __mmask16 masks[] = {static_cast<__mmask16>(mask), static_cast<__mmask16>(mask >> 16)};
          const Matrix<float> kept = {sums + (g * panels + p) * HEIGHT * PANEL, PANEL};
          const Matrix<float> target = out.at(first(g), column + p * PANEL);
          Matrix<const float> before = {bias ? bias + column + p * PANEL : nullptr, 0};
          if (add) before = {target.data, target.stride};
          if (b > 0) before = {kept.data, kept.stride};
          ADD_PRODUCT[first(g + 1) - first(g) - 1](packed_at(b, g), block + p * steps * PANEL, steps, before,
                                                   b + 1 < blocks ? kept : target, masks);
        }
    }
  }
};

}  // namespace

template <typename Rows>
void multiply_f32(const Rows& weight, bool forward, const TensorView& x, const TensorView& out, const float* bias,
                  bool add, int threads) {
  const int64_t rows = x.size(0), depth = x.size(1), columns = out.size(1);
  const int64_t blocks = std::max<int64_t>((depth + DEPTH / 2) / DEPTH, 1);
  threads = static_cast<int>(std::clamp<int64_t>(depth * columns * std::max(rows, GROUP) / PER_THREAD, 1, threads));
  const int64_t share = (columns + 2 * threads - 1) / (2 * threads);
  const int64_t width = std::min(WIDTH, (share + PANEL - 1) / PANEL * PANEL);
  for (int64_t row = 0; row < rows; row += ROWS) {
    const int64_t count = std::min(ROWS, rows - row), groups = (count + HEIGHT - 1) / HEIGHT;
    const Product<Rows> product{.weight = weight,
                                .forward = forward,
                                .x = matrix<const float>(x),
                                .out = matrix<float>(out),
                                .bias = bias,
                                .add = add,
                                .row = row,
                                .rows = count,
                                .depth = depth,
                                .blocks = blocks,
                                .groups = groups,
                                .packed = kept_x.get(GROUP * groups * depth)};
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static) collapse(2)
      for (int64_t group = 0; group < groups; ++group)
        for (int64_t block = 0; block < blocks; ++block) product.pack_x(block, group);
      // A thread whose core does something else too takes fewer.
#pragma omp for schedule(dynamic) nowait
      for (int64_t column = 0; column < columns; column += width)
        product.multiply_columns(column, std::min(width, columns - column));
    }
  }
}

template void multiply_f32(const Nf4Rows&, bool, const TensorView&, const TensorView&, const float*, bool, int);
template void multiply_f32(const Int8Rows&, bool, const TensorView&, const TensorView&, const float*, bool, int);

#endif

}  // namespace mmfast
