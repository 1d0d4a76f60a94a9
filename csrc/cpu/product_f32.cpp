// Products of fp32 matrices in tiles of bfloat16 (Intel AMX), which multiply 32 times as many numbers in an instruction
// as vectors of fp32 do.
//
// A number of 24 bits is the sum of three bfloat16, its thirds: a = a1 + a2 + a3 exactly, |a2| ≤ 2^-8 |a| and |a3| ≤
// 2^-16 |a|. Of the nine products of two numbers' thirds, a1 b1, a1 b2, a2 b1, a1 b3, a2 b2 and a3 b1 are summed in fp32;
// the rest is at most 2^-23 |a b|, and of either sign. Sums of 256 products are added up in fp32, which all in all is
// nearer to the exact result than products and sums in fp32 are. (Henry, Tang, Heinecke, "Leveraging the bfloat16
// Artificial Intelligence Datatype For Higher-Precision Computations", arXiv 1904.06376.)
//
// Tiles take denormal numbers for zero, and infinity has no thirds: blocks in which a row of x and a column of W have
// numbers so small or so large that this would count are multiplied in fp32.
#include "product_f32.h"

#include <algorithm>
#include <bit>
#include <cfloat>
#include <cstdint>

#include "kept.h"
#include "matrix.h"
#include "tiles.h"

namespace mmfast {

#ifdef MMFAST_AMX

namespace {

// Sums of a block of out with so many rows and columns, 1 MiB, stay in the second-level cache while so many numbers of
// each of the columns of W do so as thirds, and rows of x pass by, 32 at a time.
constexpr int64_t ROWS = 1024, COLUMNS = 256, DEPTH = 256, STEPS = DEPTH / TILE_DEPTH, SIDE = 2 * TILE_ROWS;
// Rows of x from making thirds of one to asking memory for another: the hardware does not see them coming.
constexpr int64_t AHEAD = 8;
// Multiplications for which another thread is worth waking.
constexpr int64_t PER_THREAD = 1 << 21;

// Those of 32 rows of x, or columns of W, and of 32 numbers of each, of which tiles have the pairs (j, 16 + j).
struct Thirds {
  Tile first[2], second[2], third[2];

  MMFAST_AMX MMFAST_INLINE void set(int64_t tile, int64_t row, __m512 a, __m512 b) {
    const __m512 a1 = rounded(a), b1 = rounded(b);
    first[tile].rows[row] = pairs(a1, b1);
    a = _mm512_sub_ps(a, a1), b = _mm512_sub_ps(b, b1);
    const __m512 a2 = rounded(a), b2 = rounded(b);
    second[tile].rows[row] = pairs(a2, b2);
    third[tile].rows[row] = pairs(_mm512_sub_ps(a, a2), _mm512_sub_ps(b, b2));
  }

 private:
  static MMFAST_AMX MMFAST_INLINE __m512i upper_halves() { return _mm512_set1_epi32(static_cast<int>(0xffff0000u)); }
  static MMFAST_AMX MMFAST_INLINE __m512 rounded(__m512 x) {
    const __m512i up = _mm512_add_epi32(_mm512_castps_si512(x), _mm512_set1_epi32(0x8000));
    return _mm512_castsi512_ps(_mm512_and_si512(up, upper_halves()));
  }
  static MMFAST_AMX MMFAST_INLINE __m512i pairs(__m512 a, __m512 b) {
    const __m512i low = _mm512_srli_epi32(_mm512_castps_si512(a), 16);
    return _mm512_ternarylogic_epi32(upper_halves(), _mm512_castps_si512(b), low, 0xca);  // upper ? b : a
  }
};

MMFAST_AMX MMFAST_INLINE __m512i larger(__m512i most, __m512 x) {
  return _mm512_max_epu32(most, _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff)));
}

// Of some rows or columns, each of whose largest magnitude is one of `found`, 0 if it has none.
struct Range {
  float least = FLT_MAX, most = 0.0f;  // of those largest magnitudes that are not 0, and of all; most may be infinite, NaN

  MMFAST_AMX MMFAST_INLINE void add_row(__m512i found) { add(_mm512_set1_epi32(_mm512_reduce_max_epu32(found))); }
  MMFAST_AMX MMFAST_INLINE void add(__m512i found) {
    const __mmask16 there = _mm512_test_epi32_mask(found, found);
    const auto bits = [](float x) { return std::bit_cast<uint32_t>(x); };
    const __m512i low = _mm512_mask_mov_epi32(_mm512_set1_epi32(bits(least)), there, found);
    least = std::bit_cast<float>(std::min(bits(least), _mm512_reduce_min_epu32(low)));
    most = std::bit_cast<float>(std::max(bits(most), _mm512_reduce_max_epu32(found)));
  }

  // Whether what tiles leave out of products counts for nothing.
  bool suits(const Range& other) const {
    constexpr float small = 0x1p-100f, large = 0x1p120f;
    return least >= small && other.least >= small && most <= large && other.most <= large &&
           least * other.least >= 0x1p-94f && most * other.most <= 0x1p100f;
  }
};

// 32 rows of x as thirds [steps], made in small parts while tiles are multiplied: they keep different units busy.
class XPacker {
 public:
  Range range;

  XPacker(Strided<float> x, int64_t rows, int64_t depth, Thirds* to)
      : x(x), rows(rows), depth(depth), steps(divide_up(depth, TILE_DEPTH)), to(to) {}

  int64_t parts() const { return SIDE * steps; }

  MMFAST_AMX MMFAST_INLINE void run(int64_t parts) {
    for (; parts > 0 && i < SIDE && steps > 0; --parts) {
      const uint32_t mask = i < rows ? first_lanes(depth - step * TILE_DEPTH) : 0;
      const float* from = x.data + i * x.row + step * TILE_DEPTH;
      _mm_prefetch(from + AHEAD * x.row, _MM_HINT_T1);
      _mm_prefetch(from + AHEAD * x.row + 16, _MM_HINT_T1);
      const __m512 a = _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), from);
      const __m512 b = _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask >> 16), from + 16);
      most = larger(larger(most, a), b);
      to[step].set(i / TILE_ROWS, i % TILE_ROWS, a, b);
      if (++step < steps) continue;
      range.add_row(most);
      most = _mm512_setzero_si512(), step = 0, ++i;
    }
  }

 private:
  const Strided<float> x;
  const int64_t rows, depth, steps;
  Thirds* const to;
  int64_t i = 0, step = 0;
  __m512i most = {};
};

// Columns of W as thirds [pairs of tiles, STEPS], likewise.
class WPacker {
 public:
  WPacker(Strided<float> w, int64_t depth, int64_t width, Thirds* to, Range* ranges)
      : w(w), depth(depth), width(width), steps(divide_up(depth, TILE_DEPTH)), blocks(divide_up(width, TILE_PAIRS)),
        along_rows(w.rows_are_packed(width)), to(to), ranges(ranges), row(along_rows ? 0 : TURNS) {
    for (int64_t i = 0; i < divide_up(width, PAIR); ++i) ranges[i] = {};
  }

  int64_t parts() const { return blocks * steps * (TILE_PAIRS - (along_rows ? 0 : TURNS)); }

  MMFAST_AMX MMFAST_INLINE void run(int64_t parts) {
    for (; parts > 0 && block < blocks && step < steps; --parts) along_rows ? two_rows() : columns();
  }

 private:
  static constexpr int64_t TURNS = -2;  // parts before those of rows

  // 16 columns of two rows; then those to the right of them, and then the next rows.
  MMFAST_AMX MMFAST_INLINE void two_rows() {
    const auto mask = static_cast<__mmask16>(first_lanes(width - block * TILE_PAIRS));
    const int64_t k = step * TILE_DEPTH + row;
    const float* from = w.data + k * w.row + block * TILE_PAIRS;
    set(_mm512_maskz_loadu_ps(k < depth ? mask : 0, from),
        _mm512_maskz_loadu_ps(k + TILE_PAIRS < depth ? mask : 0, from + TILE_PAIRS * w.row));
    if (step == steps - 1 && row == TILE_PAIRS - 1) ranges[block / 2].add(most[block]);
    if (++block < blocks) return;
    block = 0;
    if (++row == TILE_PAIRS) row = 0, ++step;
  }

  // Of 16 columns 32 numbers that lie along them: turned in two parts, and made thirds in 16.
  MMFAST_AMX MMFAST_INLINE void columns() {
    if (row < 0) {
      const int64_t half = row - TURNS, k = step * TILE_DEPTH + half * TILE_PAIRS, n = block * TILE_PAIRS;
      const auto mask = static_cast<__mmask16>(first_lanes(depth - k));
      __m512i lines[TILE_PAIRS];
      for (int64_t j = 0; j < TILE_PAIRS; ++j)
        lines[j] = _mm512_maskz_loadu_epi32(n + j < width ? mask : 0, w.data + (n + j) * w.column + k);
      transpose_pairs(lines, turned + half * TILE_PAIRS);
      ++row;
      return;
    }
    set(_mm512_castsi512_ps(turned[row]), _mm512_castsi512_ps(turned[TILE_PAIRS + row]));
    if (++row < TILE_PAIRS) return;
    row = TURNS;
    if (++step < steps) return;
    ranges[block / 2].add(most[block]);
    step = 0, ++block;
  }

  MMFAST_AMX MMFAST_INLINE void set(__m512 a, __m512 b) {
    most[block] = larger(larger(most[block], a), b);
    to[block / 2 * STEPS + step].set(block % 2, row, a, b);
  }

  const Strided<float> w;
  const int64_t depth, width, steps, blocks;
  const bool along_rows;
  Thirds* const to;
  Range* const ranges;
  int64_t block = 0, step = 0, row;
  __m512i turned[2 * TILE_PAIRS], most[COLUMNS / TILE_PAIRS] = {};
};

MMFAST_AMX MMFAST_INLINE void load_x(const Tile* tiles) {
  _tile_loadd(4, tiles, TILE_BYTES);
  _tile_loadd(5, tiles + 1, TILE_BYTES);
}
MMFAST_AMX MMFAST_INLINE void load_w(const Tile* tiles) {
  _tile_loadd(6, tiles, TILE_BYTES);
  _tile_loadd(7, tiles + 1, TILE_BYTES);
}
MMFAST_AMX MMFAST_INLINE void add_four_products() {
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 4, 7);
  _tile_dpbf16ps(2, 5, 6);
  _tile_dpbf16ps(3, 5, 7);
}

// What is packed while tiles are multiplied, so much of it at a time.
struct Meanwhile {
  XPacker& x;
  WPacker& w;
  int64_t x_parts, w_parts;

  MMFAST_AMX MMFAST_INLINE void run() const { x.run(x_parts), w.run(w_parts); }
};

// sums [4, 16, 16] = or += the product of 32 rows of x and 32 columns of W.
MMFAST_AMX MMFAST_INLINE void multiply(const Thirds* x, const Thirds* w, int64_t steps, float* sums, bool first,
                                       const Meanwhile& meanwhile) {
  zero_sums();
  for (int64_t step = 0; step < steps; ++step, ++x, ++w) {
    load_x(x->third);
    load_w(w->first);
    add_four_products();
    load_x(x->second);
    add_four_products();
    meanwhile.run();
    load_w(w->second);
    add_four_products();
    load_x(x->first);
    add_four_products();
    meanwhile.run();
    load_w(w->third);
    add_four_products();
    load_w(w->first);
    add_four_products();
  }
  if (first) return store_sums(sums);
  alignas(64) float found[4 * SUMS];
  store_sums(found);
  for (int64_t i = 0; i < 4 * SUMS; i += 16)
    _mm512_store_ps(sums + i, _mm512_add_ps(_mm512_load_ps(sums + i), _mm512_load_ps(found + i)));
}

// The same in fp32 and from the matrices themselves.
MMFAST_AMX void multiply_plainly(Strided<float> x, Strided<float> w, int64_t rows, int64_t columns, int64_t depth,
                                 float* sums, bool first) {
  alignas(64) float packed[DEPTH][PAIR] = {};
  for (int64_t k = 0; k < depth; ++k)
    for (int64_t j = 0; j < columns; ++j) packed[k][j] = w.number(k, j);
  for (int64_t i = 0; i < SIDE; ++i) {
    float *left = sums + i / TILE_ROWS * 2 * SUMS + i % TILE_ROWS * TILE_PAIRS, *right = left + SUMS;
    __m512 a = first ? _mm512_setzero_ps() : _mm512_load_ps(left);
    __m512 b = first ? _mm512_setzero_ps() : _mm512_load_ps(right);
    for (int64_t k = 0; i < rows && k < depth; ++k) {
      const __m512 factor = _mm512_set1_ps(x.number(i, k));
      a = _mm512_fmadd_ps(factor, _mm512_load_ps(packed[k]), a);
      b = _mm512_fmadd_ps(factor, _mm512_load_ps(packed[k] + TILE_PAIRS), b);
    }
    _mm512_store_ps(left, a);
    _mm512_store_ps(right, b);
  }
}

thread_local Kept<Thirds> kept_thirds;
thread_local Kept<float> kept_sums, kept_scaled;

// Two matrices to multiply, `depth` the size that they share.
struct Factors {
  Strided<float> x, w;
  int64_t depth;
};

struct Operands {
  Factors low_rank, large;  // both products are added up, the first first
  Strided<float> out;
  const float* bias;  // null: there is none
  bool add;           // to what is there
  int64_t rows, columns;

  int64_t stages() const { return divide_up(low_rank.depth, DEPTH) + divide_up(large.depth, DEPTH); }
};

// The block of out from `row` and `column` on.
class Block {
 public:
  MMFAST_AMX Block(const Operands& of, int64_t row, int64_t column, int64_t height, int64_t width)
      : of(of), row(row), column(column), height(height), width(width) {}

  MMFAST_AMX void run() {
    XPacker x = pack_x(0, 0);
    WPacker w = pack_w(0);
    x.run(x.parts());
    w.run(w.parts());
    Range range = x.range;
    for (int64_t stage = 0; stage < of.stages(); ++stage) {
      const Factors now = part(stage);
      const int64_t steps = divide_up(now.depth, TILE_DEPTH);
      WPacker next_w = pack_w(stage + 1);
      const int64_t w_parts = divide_up(next_w.parts(), 2 * panels * pairs * steps);
      for (int64_t i = 0; i < panels; ++i) {
        XPacker next_x = i + 1 < panels ? pack_x(stage, i + 1) : pack_x(stage + 1, 0);
        const Meanwhile meanwhile = {next_x, next_w, divide_up(next_x.parts(), 2 * pairs * steps), w_parts};
        stored_before_tiles();
        for (int64_t p = 0; p < pairs; ++p) {
          float* const to = sums + (i * pairs + p) * 4 * SUMS;
          if (range.suits(ranges[stage % 2][p]))
            multiply(x_thirds(stage, i), w_thirds(stage) + p * STEPS, steps, to, stage == 0, meanwhile);
          else
            multiply_plainly(now.x.at(row + i * SIDE, 0), now.w.at(0, column + p * PAIR), rows_of(i),
                             std::min(PAIR, width - p * PAIR), now.depth, to, stage == 0);
        }
        next_x.run(next_x.parts());
        range = next_x.range;
      }
      next_w.run(next_w.parts());
    }
    finish();
  }

 private:
  Factors part(int64_t stage) const {
    const int64_t before = divide_up(of.low_rank.depth, DEPTH);
    const Factors& all = stage < before ? of.low_rank : of.large;
    const int64_t k = (stage < before ? stage : stage - before) * DEPTH;
    return {all.x.at(0, k), all.w.at(k, 0), std::clamp<int64_t>(all.depth - k, 0, DEPTH)};
  }
  int64_t rows_of(int64_t panel) const { return std::min(SIDE, height - panel * SIDE); }
  Thirds* w_thirds(int64_t stage) const { return thirds + stage % 2 * pairs * STEPS; }
  Thirds* x_thirds(int64_t stage, int64_t panel) const {
    return thirds + (2 * pairs + (stage * panels + panel) % 2) * STEPS;
  }

  MMFAST_AMX XPacker pack_x(int64_t stage, int64_t panel) const {
    const Factors from = part(stage);
    return {from.x.at(row + panel * SIDE, 0), rows_of(panel), from.depth, x_thirds(stage, panel)};
  }
  MMFAST_AMX WPacker pack_w(int64_t stage) {
    const Factors from = part(stage);
    return {from.w.at(0, column), from.depth, width, w_thirds(stage), ranges[stage % 2]};
  }

  MMFAST_AMX void finish() const {
    for (int64_t i = 0; i < height; ++i)
      for (int64_t j = 0; j < width; j += TILE_PAIRS) {
        const auto mask = static_cast<__mmask16>(first_lanes(width - j));
        const float* tile = sums + (i / SIDE * pairs + j / PAIR) * 4 * SUMS + i % SIDE / TILE_ROWS * 2 * SUMS;
        __m512 sum = _mm512_load_ps(tile + j % PAIR / TILE_PAIRS * SUMS + i % TILE_ROWS * TILE_PAIRS);
        float* const to = &of.out.number(row + i, column + j);
        if (of.bias) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(mask, of.bias + column + j));
        if (of.add) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(mask, to));
        _mm512_mask_storeu_ps(to, mask, sum);
      }
  }

  const Operands& of;
  const int64_t row, column, height, width;
  const int64_t panels = divide_up(height, SIDE), pairs = divide_up(width, PAIR);
  Range ranges[2][COLUMNS / PAIR];
  Thirds* const thirds = kept_thirds.get((2 * pairs + 2) * STEPS);  // of W and of x, this stage's or panel's and the next
  float* const sums = kept_sums.get(panels * pairs * 4 * SUMS);
};

struct Size {
  int64_t height, width;
};

// That of the blocks into which out is cut for so many threads: what the busiest of them takes, in products.
Size block_size(int64_t rows, int64_t columns, int64_t threads) {
  constexpr int64_t packing = 64;  // a number of x or W takes as long to pack as to multiply by so many
  const auto part = [](int64_t size, int64_t count) { return divide_up(divide_up(size, count), SIDE) * SIDE; };
  const int64_t least_down = divide_up(rows, ROWS), least_across = divide_up(columns, COLUMNS);
  Size best = {};
  for (int64_t least = INT64_MAX, down = least_down; down < least_down + 4; ++down)
    for (int64_t across = least_across; across < least_across + threads; ++across) {
      const Size size = {part(rows, down), part(columns, across)};
      const int64_t blocks = divide_up(rows, size.height) * divide_up(columns, size.width);
      const int64_t work = size.height * size.width + packing * (size.height + size.width);
      if (const int64_t most = divide_up(blocks, threads) * work; most < least) least = most, best = size;
    }
  return best;
}

}  // namespace

void product_f32(const TensorView& x, const TensorView& w, const std::optional<LowRank>& low_rank,
                 const std::optional<TensorView>& bias, bool add, const TensorView& out, int threads) {
  check(has_amx(), "product_f32: this CPU does not multiply bfloat16 in tiles");
  check(x.dim() == 2 && w.dim() == 2, "product_f32: x is ", x, " and w ", w, "; expected two matrices");
  const int64_t rows = x.size(0), depth = x.size(1), columns = w.size(1);
  const auto expect = [](const char* name, const TensorView& view, int64_t height, int64_t width, bool packed) {
    check_operand("product_f32", name, view, DType::f32, height, width, packed);
  };
  expect("x", x, rows, depth, true);
  expect("w", w, depth, columns, false);
  expect("out", out, rows, columns, true);
  if (bias) bias->expect("bias", DType::f32, {columns});
  check(depth > 0 || low_rank, "product_f32: x is ", x, "; expected a column or more");
  if (rows == 0 || columns == 0) return;
  Operands of = {.low_rank = {{nullptr, 0, 1}, {nullptr, 0, 1}, 0},
                 .large = {Strided<float>(x), Strided<float>(w), depth},
                 .out = Strided<float>(out),
                 .bias = bias ? bias->as<float>() : nullptr,
                 .add = add,
                 .rows = rows,
                 .columns = columns};
  if (low_rank) {
    check(low_rank->s.dim() == 2, "product_f32: s is ", low_rank->s, "; expected a matrix");
    const int64_t ranks = low_rank->s.size(1);
    expect("s", low_rank->s, rows, ranks, true);
    expect("factors", low_rank->factors, ranks, columns, false);
    of.low_rank = {Strided<float>(low_rank->s), Strided<float>(low_rank->factors), ranks};
    if (low_rank->scale != 1.0f) {
      const Strided<float> scaled = {kept_scaled.get(rows * ranks), ranks, 1};
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t r = 0; r < ranks; ++r) scaled.number(i, r) = low_rank->scale * of.low_rank.x.number(i, r);
      of.low_rank.x = scaled;
    }
  }
  threads = static_cast<int>(std::clamp<int64_t>(rows * columns * depth / PER_THREAD, 1, threads));
  const auto [height, width] = block_size(rows, columns, threads);
#pragma omp parallel num_threads(threads)
  {
    const Tiles configured;
    // A thread whose core does something else too takes fewer.
#pragma omp for collapse(2) schedule(dynamic)
    for (int64_t column = 0; column < columns; column += width)
      for (int64_t row = 0; row < rows; row += height)
        Block(of, row, column, std::min(height, rows - row), std::min(width, columns - column)).run();
  }
}

#else

void product_f32(const TensorView&, const TensorView&, const std::optional<LowRank>&, const std::optional<TensorView>&,
                 bool, const TensorView&, int) {
  check(false, "product_f32: this CPU does not multiply bfloat16 in tiles");
}

#endif

}  // namespace mmfast
