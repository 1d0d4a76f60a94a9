// The products of a low-rank adapter in bfloat16, in tiles: matrices of many rows and columns times matrices of few
// ranks. As in low_rank.cpp the large matrix is read once, as it lies in memory; only the small ones are packed. Sums
// are fp32, each made in one order, whatever the number of threads.
#include "low_rank.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <utility>

#include "../tensor_view.h"
#include "scalars.h"
#include "tiles.h"

namespace mmfast {

#ifdef MMFAST_AMX

namespace {

constexpr int64_t PANEL = 64;   // rows of the large matrix that pass together: four tiles of A, two depths of B
constexpr int64_t WIDTH = 512;  // columns whose sums over all rows, 32 KiB for 16 ranks, stay near while rows pass by

// A tile of A: the transpose of 32 rows and 16 columns of x, whose rows are packed; zero beyond [rows, columns].
MMFAST_AMX void pack_transposed(const Strided<Bfloat16>& x, int64_t rows, int64_t columns, Tile* to) {
  Tile pairs;
  pack_b(x, rows, columns, &pairs);
  transpose_pairs(pairs.rows, to->rows);
}

// Rows and columns of the large matrix of which every tile can be loaded.
struct Panel {
  const Bfloat16* data;
  int64_t stride, steps;  // of 32 columns

  // x [rows, columns], by way of `copy` [PANEL, WIDTH] and with zeros beyond where they are no whole tiles.
  Panel(const Bfloat16* x, int64_t stride, int64_t rows, int64_t columns, Bfloat16* copy)
      : data(x), stride(stride), steps(divide_up(columns, TILE_DEPTH)) {
    if (rows == PANEL && columns % TILE_DEPTH == 0) return;
    std::memset(copy, 0, PANEL * WIDTH * sizeof(Bfloat16));
    for (int64_t i = 0; i < rows; ++i) std::memcpy(copy + i * WIDTH, x + i * stride, columns * sizeof(Bfloat16));
    data = copy;
    this->stride = WIDTH;
  }
};

// sums [PANEL, 16] = x factors, or += unless `first`, for a tile of B for each step of x.
MMFAST_AMX void project(const Panel& x, const Tile* factors, bool first, float* sums) {
  const int64_t stride = x.stride * static_cast<int64_t>(sizeof(Bfloat16)), next = TILE_ROWS * x.stride;
  if (first)
    zero_sums();
  else
    load_sums(sums);
  for (int64_t step = 0; step < x.steps; ++step) {
    const Bfloat16* from = x.data + step * TILE_DEPTH;
    _tile_loadd(4, factors + step, TILE_BYTES);
    _tile_loadd(5, from, stride);
    _tile_dpbf16ps(0, 5, 4);
    _tile_loadd(6, from + next, stride);
    _tile_dpbf16ps(1, 6, 4);
    _tile_loadd(5, from + 2 * next, stride);
    _tile_dpbf16ps(2, 5, 4);
    _tile_loadd(6, from + 3 * next, stride);
    _tile_dpbf16ps(3, 6, 4);
  }
  store_sums(sums);
}

// sums [tiles of ranks, steps of WIDTH, 2, 16, 16] += sᵀ x, for two tiles of sᵀ for each tile of ranks.
MMFAST_AMX void outer(const Panel& x, const Tile* s, int64_t tiles, float* sums) {
  Tile pairs[4];
  for (int64_t step = 0; step < x.steps; ++step) {
    const Bfloat16* from = x.data + step * TILE_DEPTH;
    pack_b_pair(from, x.stride, pairs);
    pack_b_pair(from + TILE_DEPTH * x.stride, x.stride, pairs + 2);
    stored_before_tiles();
    for (int64_t t = 0; t < tiles; ++t) {
      float* to = sums + (t * (WIDTH / TILE_DEPTH) + step) * 2 * SUMS;
      _tile_loadd(0, to, TILE_BYTES);
      _tile_loadd(1, to + SUMS, TILE_BYTES);
      _tile_loadd(2, s + 2 * t, TILE_BYTES);
      _tile_loadd(3, s + 2 * t + 1, TILE_BYTES);
      _tile_loadd(4, pairs, TILE_BYTES);
      _tile_dpbf16ps(0, 2, 4);
      _tile_loadd(5, pairs + 1, TILE_BYTES);
      _tile_dpbf16ps(1, 2, 5);
      _tile_loadd(6, pairs + 2, TILE_BYTES);
      _tile_dpbf16ps(0, 3, 6);
      _tile_loadd(7, pairs + 3, TILE_BYTES);
      _tile_dpbf16ps(1, 3, 7);
      _tile_stored(0, to, TILE_BYTES);
      _tile_stored(1, to + SUMS, TILE_BYTES);
    }
  }
}

// out [ranks, columns], 16 of each at most, (+)= scale · a tile of sums.
MMFAST_AMX void write_outer(const float* sums, float scale, bool add, Strided<float> out, int64_t ranks,
                            int64_t columns) {
  Tile tile, turned;
  for (int64_t r = 0; r < TILE_ROWS; ++r)
    tile.rows[r] = _mm512_castps_si512(_mm512_mul_ps(_mm512_load_ps(sums + r * TILE_PAIRS), _mm512_set1_ps(scale)));
  const bool transposed = !out.rows_are_packed(columns);
  if (transposed) {
    transpose_pairs(tile.rows, turned.rows);
    out = out.transposed();
    std::swap(ranks, columns);
  }
  const auto mask = static_cast<__mmask16>(first_lanes(columns));
  for (int64_t i = 0; i < std::min(TILE_ROWS, ranks); ++i) {
    const __m512 sum = _mm512_castsi512_ps((transposed ? turned : tile).rows[i]);
    float* row = out.data + i * out.row;
    _mm512_mask_storeu_ps(row, mask, add ? _mm512_add_ps(sum, _mm512_maskz_loadu_ps(mask, row)) : sum);
  }
}

// out [16 at most] = scale · the sum of `parts` rows that lie `stride` apart.
MMFAST_AMX void round_parts(const float* sums, int64_t parts, int64_t stride, float scale, Bfloat16* out,
                            int64_t count) {
  __m512 sum = _mm512_load_ps(sums);
  for (int64_t i = 1; i < parts; ++i) sum = _mm512_add_ps(sum, _mm512_load_ps(sums + i * stride));
  const __m256i bits = (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(sum, _mm512_set1_ps(scale)));
  _mm256_mask_storeu_epi16(out, static_cast<__mmask16>(first_lanes(count)), bits);
}

// What is worth a second thread, in elements of the large matrix.
int threads_for(int64_t elements, int threads) {
  return static_cast<int>(std::clamp<int64_t>(elements >> 16, 1, threads));
}

}  // namespace

void low_rank_read_bf16(const TensorView& x, const std::optional<TensorView>& factors,
                        const std::optional<TensorView>& s, float scale, const std::optional<TensorView>& projected,
                        const std::optional<TensorView>& outer_sums, bool add, int threads) {
  check(has_amx(), "low_rank_read: this CPU does not multiply bfloat16 in tiles");
  const int64_t rows = x.size(0), columns = x.size(1), ranks = factors ? factors->size(0) : s->size(1);
  const int64_t tiles = divide_up(ranks, TILE_ROWS), steps = divide_up(columns, TILE_DEPTH);
  const int64_t panels = divide_up(rows, PANEL), slices = std::max<int64_t>(divide_up(columns, WIDTH), 1);
  const auto packed_factors = std::make_unique_for_overwrite<Tile[]>(factors ? tiles * steps : 0);
  const auto packed_s = std::make_unique_for_overwrite<Tile[]>(s ? panels * tiles * 2 : 0);
  // Of `projected`, tile of ranks by tile: one sum of each slice if slices are shared among threads, else one of all.
  const int64_t parts = s ? slices : 1, size = panels * PANEL * TILE_PAIRS;
  const auto sums = std::make_unique_for_overwrite<Tile[]>(factors ? parts * tiles * size / SUMS : 0);
  const auto part = [&](int64_t slice, int64_t t, int64_t row) {
    return sums[0].sums() + (slice * tiles + t) * size + row * TILE_PAIRS;
  };
  const auto panel = [&](int64_t p, int64_t slice, Bfloat16* copy) {
    return Panel(x.as<Bfloat16>() + p * PANEL * x.stride(0) + slice * WIDTH, x.stride(0),
                 std::min(PANEL, rows - p * PANEL), std::min(WIDTH, columns - slice * WIDTH), copy);
  };
  const auto factors_of = [&](int64_t slice, int64_t t) {
    return &packed_factors[t * steps + slice * (WIDTH / TILE_DEPTH)];
  };
  const auto read_slice = [&](int64_t slice, Bfloat16* copy) {
    const auto found = std::make_unique<Tile[]>(tiles * WIDTH / TILE_PAIRS);
    for (int64_t p = 0; p < panels; ++p) {
      const Panel here = panel(p, slice, copy);
      for (int64_t t = 0; factors && t < tiles; ++t)
        project(here, factors_of(slice, t), true, part(slice, t, p * PANEL));
      outer(here, &packed_s[p * tiles * 2], tiles, found[0].sums());
    }
    for (int64_t t = 0; t < tiles; ++t)
      for (int64_t k = slice * WIDTH; k < std::min((slice + 1) * WIDTH, columns); k += TILE_PAIRS)
        write_outer(found[(t * WIDTH + k % WIDTH) / TILE_PAIRS].sums(), scale, add,
                    Strided<float>(*outer_sums).at(t * TILE_ROWS, k), ranks - t * TILE_ROWS, columns - k);
  };
#pragma omp parallel num_threads(threads_for(rows * columns, threads))
  {
    const Tiles configured;
    alignas(64) Bfloat16 copy[PANEL * WIDTH];
    if (factors) {
#pragma omp for schedule(static)
      for (int64_t i = 0; i < tiles * steps; ++i) {
        const int64_t r = i / steps * TILE_PAIRS, k = i % steps * TILE_DEPTH;
        pack_b(Strided<Bfloat16>(*factors).transposed().at(k, r), columns - k, ranks - r, &packed_factors[i]);
      }
    }
    if (s) {
#pragma omp for schedule(static)
      for (int64_t i = 0; i < panels * tiles * 2; ++i) {
        const int64_t row = i / (2 * tiles) * PANEL + i % 2 * TILE_DEPTH, r = i / 2 % tiles * TILE_ROWS;
        pack_transposed(Strided<Bfloat16>(*s).at(row, r), rows - row, ranks - r, &packed_s[i]);
      }
#pragma omp for schedule(static)
      for (int64_t slice = 0; slice < slices; ++slice) read_slice(slice, copy);
    } else {
#pragma omp for schedule(static)
      for (int64_t i = 0; i < panels * tiles; ++i)
        for (int64_t slice = 0; slice < slices; ++slice)
          project(panel(i / tiles, slice, copy), factors_of(slice, i % tiles), slice == 0,
                  part(0, i % tiles, i / tiles * PANEL));
    }
    if (factors) {
#pragma omp for schedule(static)
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t t = 0; t < tiles; ++t)
          round_parts(part(0, t, i), parts, tiles * size, scale,
                      projected->as<Bfloat16>() + i * projected->stride(0) + t * TILE_PAIRS, ranks - t * TILE_PAIRS);
    }
  }
}

#else

void low_rank_read_bf16(const TensorView&, const std::optional<TensorView>&, const std::optional<TensorView>&, float,
                        const std::optional<TensorView>&, const std::optional<TensorView>&, bool, int) {
  check(false, "low_rank_read: this CPU does not multiply bfloat16 in tiles");
}

#endif

}  // namespace mmfast
