// Products with a quantised weight: x Wᵀ and grad W, of bfloat16 in tiles (Intel AMX), of fp32 by quantized_product.h. The
// weight is read from memory as it lies and decoded, a panel at a time, into tiles that stay in cache. Compiled with
// -ffp-contract=off, see nf4.h.
#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "../tensor_view.h"
#include "kept.h"
#include "matrix.h"
#include "quantized_product.h"
#include "quantized_rows.h"
#include "tiles.h"

namespace mmfast {

#if defined(__x86_64__) && defined(__linux__)

namespace {

struct alignas(64) Sums {
  float values[TILE_ROWS * TILE_ROWS];
};

// A panel of the weight is at most so long in the direction of the sum, and so wide across it; narrow for few rows of x,
// where decoding it is most of the work, that it stay in the first-level cache.
constexpr int64_t DEPTH = 256, DEPTH_TILES = DEPTH / TILE_DEPTH, WIDTH = 512, NARROW = 64, FEW_ROWS = 32;
// Rows of x for which a panel is decoded once: their sums stay in the second-level cache with it.
constexpr int64_t CHUNK = 512;
// Rows of x that are packed at a time, after which threads wait for each other: a limit to memory.
constexpr int64_t PACKED_ROWS = 4 * CHUNK;
static_assert(DEPTH <= LONGEST && WIDTH <= LONGEST);

// Part of a row of W in registers of 32, zeros behind its end.
template <typename Rows>
struct Line {
  alignas(64) Bfloat16 values[WIDTH + nf4::BLOCK];

  MMFAST_AMX MMFAST_INLINE void read(const Rows& weight, int64_t row, int64_t column, int64_t count) {
    weight.read(row, column, count, values);
    for (int64_t k = count; k % 32; ++k) values[k] = {};
  }
  MMFAST_AMX MMFAST_INLINE __m512i at(int64_t k) const { return _mm512_load_si512(values + k); }
};

MMFAST_AMX MMFAST_INLINE void to_pairs(__m512i a, __m512i b, __m512i* even, __m512i* odd) {
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  *even = _mm512_ternarylogic_epi32(upper, _mm512_slli_epi32(b, 16), a, 0xca);  // bit by bit: upper ? b : a
  *odd = _mm512_ternarylogic_epi32(upper, b, _mm512_srli_epi32(a, 16), 0xca);
}

MMFAST_AMX MMFAST_INLINE __m512i widen(__m512 x) {
  return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x));
}
MMFAST_AMX MMFAST_INLINE __m512 even_halves(__m512i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(x, 16)); }
MMFAST_AMX MMFAST_INLINE __m512 odd_halves(__m512i x) {
  return _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}

// What a panel is decoded from: `columns` of the output from `first`, and of each `depth` elements from `from`.
struct Part {
  int64_t first, columns, from, depth;
};

// ---- x Wᵀ = (W xᵀ)ᵀ: rows of W are a tile of the left factor as they lie, and sums are stored transposed.

struct Forward {
  static constexpr bool WEIGHT_IS_LEFT = true;

  // 16 rows of x, of which there are `rows`, each `depth` long; panels of their tiles lie `step` apart.
  MMFAST_AMX static void pack(Matrix<const Bfloat16> x, int64_t rows, int64_t depth, Tile* tiles, int64_t step) {
    for (int64_t k = 0; k < depth; k += TILE_DEPTH) {
      Tile* to = tiles + k / DEPTH * step + k % DEPTH / TILE_DEPTH;
      Tile lines;
      pack_a(x.data + k, x.stride, rows, depth - k, &lines);
      transpose_pairs(lines.rows, to->rows);
    }
  }

  // Columns of the output are rows of W. Those that are missing in the last tiles are left as they are, because nobody
  // stores their sums.
  template <typename Rows>
  MMFAST_AMX static void decode(const Rows& weight, const Part& part, Tile* panel) {
    Line<Rows> line;
    for (int64_t n = 0; n < part.columns; ++n) {
      weight.fetch(part.first + n + AHEAD, part.from, part.depth);
      line.read(weight, part.first + n, part.from, part.depth);
      Tile* tiles = panel + n / TILE_ROWS * DEPTH_TILES;
      for (int64_t k = 0; k < part.depth; k += TILE_DEPTH)
        tiles[k / TILE_DEPTH].rows[n % TILE_ROWS] = line.at(k);
    }
  }

  MMFAST_AMX static void store(const Sums* sums, const float* scale, const float* bias, bool add, Matrix<Bfloat16> out,
                               int64_t rows, int64_t columns) {
    for (int64_t n = 0; n < columns; n += 16, ++sums) {
      const auto mask = static_cast<__mmask16>(first_lanes(columns - n));
      __m512i lines[16], turned[16];
      for (int64_t i = 0; i < 16; ++i) lines[i] = _mm512_load_si512(sums->values + 16 * i);
      transpose_pairs(lines, turned);
      const __m512 factor = scale ? _mm512_maskz_loadu_ps(mask, scale + n) : _mm512_set1_ps(1.0f);
      const __m512 shift = bias ? _mm512_maskz_loadu_ps(mask, bias + n) : _mm512_setzero_ps();
      for (int64_t m = 0; m < rows; ++m) {
        Bfloat16* to = out.row(m) + n;
        __m512 sum = _mm512_fmadd_ps(_mm512_castsi512_ps(turned[m]), factor, shift);
        if (add) sum = _mm512_add_ps(sum, even_halves(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, to))));
        _mm256_mask_storeu_epi16(to, mask, (__m256i)_mm512_cvtneps_pbh(sum));
      }
    }
  }
};

// ---- grad W: two rows of W beside each other are a row of two tiles, of its even and of its odd columns.

struct Backward {
  static constexpr bool WEIGHT_IS_LEFT = false;

  MMFAST_AMX static void pack(Matrix<const Bfloat16> grad, int64_t rows, int64_t depth, Tile* tiles, int64_t step) {
    for (int64_t n = 0; n < depth; n += TILE_DEPTH) {
      Tile* to = tiles + n / DEPTH * step + n % DEPTH / TILE_DEPTH;
      pack_a(grad.data + n, grad.stride, rows, depth - n, to);
    }
  }

  template <typename Rows>
  MMFAST_AMX static void decode(const Rows& weight, const Part& part, Tile* panel) {
    Line<Rows> line[2];
    const int64_t last = divide_up(part.depth, TILE_DEPTH) * TILE_DEPTH;
    for (int64_t n = 0; n < last; n += 2) {
      for (int64_t i = 0; i < 2 && n + i < part.depth; ++i) {
        weight.fetch(part.from + n + i + AHEAD, part.first, part.columns);
        line[i].read(weight, part.from + n + i, part.first, part.columns);
      }
      Tile* tiles = panel + n / TILE_DEPTH;
      for (int64_t k = 0; k < part.columns; k += PAIR, tiles += 2 * DEPTH_TILES) {
        const __m512i a = n < part.depth ? line[0].at(k) : _mm512_setzero_si512();
        const __m512i b = n + 1 < part.depth ? line[1].at(k) : _mm512_setzero_si512();
        const int64_t row = n % TILE_DEPTH / 2;
        to_pairs(a, b, &tiles[0].rows[row], &tiles[DEPTH_TILES].rows[row]);
      }
    }
  }

  MMFAST_AMX static void store(const Sums* sums, const float*, const float*, bool add, Matrix<Bfloat16> out,
                               int64_t rows, int64_t columns) {
    const __mmask32 mask = first_lanes(columns);
    for (int64_t m = 0; m < rows; ++m) {
      Bfloat16* to = out.row(m);
      __m512 even = _mm512_load_ps(sums[0].values + 16 * m), odd = _mm512_load_ps(sums[1].values + 16 * m);
      if (add) {
        const __m512i before = _mm512_maskz_loadu_epi16(mask, to);
        even = _mm512_add_ps(even, even_halves(before));
        odd = _mm512_add_ps(odd, odd_halves(before));
      }
      _mm512_mask_storeu_epi16(to, mask, _mm512_or_si512(widen(even), _mm512_slli_epi32(widen(odd), 16)));
    }
  }
};

// ---- the product

thread_local Kept<Tile> kept_rows, kept_panel;
thread_local Kept<Sums> kept_sums;

// Two rows of `depth` tiles of the weight times X of x.
template <bool WEIGHT_IS_LEFT, int X>
MMFAST_AMX void multiply(const Tile* w, const Tile* x, int64_t depth, Sums* sums, int64_t sums_step, bool first) {
  stored_before_tiles();
  if (first) {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (X == 2) {
      _tile_zero(2);
      _tile_zero(3);
    }
  } else {
    _tile_loadd(0, sums, TILE_BYTES);
    _tile_loadd(1, sums + 1, TILE_BYTES);
    if constexpr (X == 2) {
      _tile_loadd(2, sums + sums_step, TILE_BYTES);
      _tile_loadd(3, sums + sums_step + 1, TILE_BYTES);
    }
  }
  for (int64_t k = 0; k < depth; ++k) {
    _tile_loadd(4, w + k, TILE_BYTES);
    _tile_loadd(6, x + k, TILE_BYTES);
    _tile_loadd(5, w + DEPTH_TILES + k, TILE_BYTES);
    if constexpr (X == 2) _tile_loadd(7, x + DEPTH_TILES + k, TILE_BYTES);
    if constexpr (WEIGHT_IS_LEFT) {
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 5, 6);
      if constexpr (X == 2) {
        _tile_dpbf16ps(2, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
      }
    } else {
      _tile_dpbf16ps(0, 6, 4);
      _tile_dpbf16ps(1, 6, 5);
      if constexpr (X == 2) {
        _tile_dpbf16ps(2, 7, 4);
        _tile_dpbf16ps(3, 7, 5);
      }
    }
  }
  _tile_stored(0, sums, TILE_BYTES);
  _tile_stored(1, sums + 1, TILE_BYTES);
  if constexpr (X == 2) {
    _tile_stored(2, sums + sums_step, TILE_BYTES);
    _tile_stored(3, sums + sums_step + 1, TILE_BYTES);
  }
}

// out [rows, columns] = x [rows, depth] times the weight, or its transpose: scale [columns] · sums + bias [columns], each
// if it is there.
template <typename Side, typename Rows>
struct Product {
  Rows weight;
  Matrix<const Bfloat16> x;
  Matrix<Bfloat16> out;
  const float *scale, *bias;
  bool add;
  int64_t rows, depth, columns;

  // Columns `first` to `last` of the output, a panel's width, of `count` rows from `row`, which are packed.
  MMFAST_AMX void multiply_columns(int64_t row, int64_t count, int64_t first, int64_t last, const Tile* packed) const {
    const Tiles tiles;
    const int64_t x_blocks = divide_up(count, TILE_ROWS), w_blocks = 2 * divide_up(last - first, PAIR);
    Tile* const panel = kept_panel.get(w_blocks * DEPTH_TILES);
    Sums* const sums = kept_sums.get(w_blocks * x_blocks);
    for (int64_t from = 0; from < depth; from += DEPTH) {
      const int64_t length = std::min(DEPTH, depth - from);
      Side::decode(weight, {first, last - first, from, length}, panel);
      add_panel(panel, w_blocks, packed + from / TILE_DEPTH * x_blocks, x_blocks, divide_up(length, TILE_DEPTH), sums,
                from == 0);
    }
    for (int64_t i = 0; i < x_blocks; ++i)
      for (int64_t j = 0; j < w_blocks; j += 2) {
        const int64_t m = i * TILE_ROWS, n = first + j * TILE_ROWS;
        Side::store(sums + i * w_blocks + j, scale ? scale + n : nullptr, bias ? bias + n : nullptr, add,
                    out.at(row + m, n), std::min(count - m, TILE_ROWS), std::min(last - n, PAIR));
      }
  }

  MMFAST_AMX void add_panel(const Tile* panel, int64_t w_blocks, const Tile* packed, int64_t x_blocks, int64_t length,
                            Sums* sums, bool first) const {
    for (int64_t i = 0; i < x_blocks; i += 2)
      for (int64_t j = 0; j < w_blocks; j += 2) {
        const auto run = i + 1 < x_blocks ? multiply<Side::WEIGHT_IS_LEFT, 2> : multiply<Side::WEIGHT_IS_LEFT, 1>;
        run(panel + j * DEPTH_TILES, packed + i * DEPTH_TILES, length, sums + i * w_blocks + j, w_blocks, first);
      }
  }

  void run(int threads) const {
    const int64_t tiles = divide_up(depth, DEPTH) * DEPTH_TILES;
    Tile* const packed = kept_rows.get(divide_up(std::min(rows, PACKED_ROWS), TILE_ROWS) * tiles);
    for (int64_t row = 0; row < rows; row += PACKED_ROWS) {
      const int64_t end = std::min(rows, row + PACKED_ROWS);
      const int64_t most = Side::WEIGHT_IS_LEFT && end - row <= FEW_ROWS ? NARROW : WIDTH;
      const int64_t width = std::min(most, divide_up(columns, 2 * threads * PAIR) * PAIR);
#pragma omp parallel num_threads(threads)
      {
#pragma omp for schedule(static)
        for (int64_t m = row; m < end; m += TILE_ROWS) {
          const int64_t chunk = m - (m - row) % CHUNK, blocks = divide_up(std::min(CHUNK, end - chunk), TILE_ROWS);
          Tile* to = packed + (chunk - row) / TILE_ROWS * tiles + (m - chunk) / TILE_ROWS * DEPTH_TILES;
          Side::pack(x.at(m, 0), std::min(end - m, TILE_ROWS), depth, to, blocks * DEPTH_TILES);
        }
        // A thread whose core does something else too takes fewer.
#pragma omp for schedule(dynamic) collapse(2) nowait
        for (int64_t m = row; m < end; m += CHUNK)
          for (int64_t first = 0; first < columns; first += width)
            multiply_columns(m, std::min(CHUNK, end - m), first, std::min(columns, first + width),
                             packed + (m - row) / TILE_ROWS * tiles);
      }
    }
  }
};

// Multiplications for which another thread is worth waking.
constexpr int64_t PER_THREAD = 1 << 21;

template <typename Side, typename Rows>
void run(const Rows& weight, const TensorView& x, const TensorView& out, const float* scale, const float* bias, bool add,
         int threads) {
  const Product<Side, Rows> product{
      weight, matrix<const Bfloat16>(x), matrix<Bfloat16>(out), scale, bias, add, x.size(0), x.size(1), out.size(1)};
  const int64_t work = product.depth * product.columns * std::max(product.rows, TILE_ROWS);
  product.run(static_cast<int>(std::clamp<int64_t>(work / PER_THREAD, 1, threads)));
}

template <typename Side>
void run(const std::vector<TensorView>& weight, const TensorView& x, const TensorView& out, const float* bias,
         bool add, int threads) {
  const TensorView& values = weight[0];
  const bool nf4 = values.dtype == DType::u8;
  check(values.dim() == 2 && values.numel() > 0 && (nf4 || values.dtype == DType::i8), "the weight is ", values,
        "; expected uint8 [N, K // 2] or int8 [N, K]");
  const int64_t rows = values.size(0), columns = nf4 ? 2 * values.size(1) : values.size(1);
  const bool forward = Side::WEIGHT_IS_LEFT, in_tiles = x.dtype == DType::bf16;
  check_matrix("quantized_product", "x", x, x.size(0), forward ? columns : rows);
  check_matrix("quantized_product", "out", out, x.size(0), forward ? rows : columns);
  check((in_tiles || x.dtype == DType::f32) && out.dtype == x.dtype, "x is ", x, " and out ", out,
        "; expected both bfloat16 or float32");
  check(in_tiles ? has_amx() : has_avx512(), "quantized_product: this CPU has no ", in_tiles ? "AMX" : "AVX-512");
  const auto multiply = [&](const auto& decoded, const float* scale) {
    if (in_tiles)
      run<Side>(decoded, x, out, scale, bias, add, threads);
    else
      multiply_f32(decoded, forward, x, out, bias, add, threads);
  };
  if (nf4) return multiply(Nf4Rows{values.as<uint8_t>(), nf4::read_scales(weight), columns}, nullptr);
  check(weight.size() == 2, "int8: ", weight.size(), " tensors; expected 2");
  values.expect("values", DType::i8, {rows, columns});
  weight[1].expect("scale", DType::f32, {rows});
  const float* scale = weight[1].as<float>();
  const bool scales_sums = in_tiles && forward;
  multiply(Int8Rows{values.as<int8_t>(), scales_sums ? nullptr : scale, columns}, scales_sums ? scale : nullptr);
}

}  // namespace

// out [M, N] = x [M, K] Wᵀ + bias [N] (f32), or += without a bias; x and out bf16 or f32, with packed rows. Sums in f32.
void quantized_linear(TensorView x, std::vector<TensorView> weight, std::optional<TensorView> bias, bool add,
                      TensorView out, int threads) {
  check(!bias || !add, "quantized_product: a bias is not added to what is there");
  if (bias) bias->expect("bias", DType::f32, {weight[0].size(0)});
  run<Forward>(weight, x, out, bias ? bias->as<float>() : nullptr, add, threads);
}

// out [M, K] = or += grad [M, N] W, likewise.
void quantized_grad(TensorView grad, std::vector<TensorView> weight, bool add, TensorView out, int threads) {
  run<Backward>(weight, grad, out, nullptr, add, threads);
}

#else

void quantized_linear(TensorView, std::vector<TensorView>, std::optional<TensorView>, bool, TensorView, int) {
  check(false, "quantized_product: this CPU has no AVX-512");
}

void quantized_grad(TensorView, std::vector<TensorView>, bool, TensorView, int) {
  check(false, "quantized_product: this CPU has no AVX-512");
}

#endif

}  // namespace mmfast
