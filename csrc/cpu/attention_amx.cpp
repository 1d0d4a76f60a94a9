// The loops of attention.h for bfloat16 in AMX tiles. Scores, exponentials and sums are fp32; weights and the gradients of
// scores are rounded to bfloat16 before they are multiplied.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "attention.h"
#include "attention_tiles.h"

namespace mmfast::attention {

#if defined(MMFAST_AMX)

namespace {

using Keys = Segment<Bfloat16>;

Bfloat16* take(Scratch& scratch, int64_t count) { return reinterpret_cast<Bfloat16*>(scratch.take(count / 2)); }

// Which keys of a tile are real.
uint64_t real_keys(const Keys& segment, int64_t first, int64_t count) {
  uint64_t found = 0;
  for (int64_t n = 0; n < count; ++n) found |= uint64_t{segment.is_real(first + n)} << n;
  return found;
}

// Rows of one head from `first` on, zeros where they are not real; those of the next tile, up to `last`, are asked for.
MMFAST_AMX MMFAST_INLINE void load_tile(Rows<const Bfloat16> x, uint64_t real, int64_t first, int64_t rows,
                                        int64_t last, int64_t dim, int64_t width, Bfloat16* to) {
  for (int64_t i = 0; i < rows; ++i, to += width) {
    const int64_t next = first + i + TILE;
    if (next < last)
      for (int64_t d = 0; d < dim; d += 32) __builtin_prefetch(x.row(next) + d, 0, 2);
    if (real >> i & 1)
      copy_row(x.row(first + i), dim, width, to);
    else
      std::memset(static_cast<void*>(to), 0, width * sizeof(Bfloat16));
  }
}

// All of `count` rows are real.
uint64_t all(int64_t count) { return count == 64 ? ~uint64_t{0} : (uint64_t{1} << count) - 1; }

// The softmax so far of 32 queries takes in a tile of scores, of which weights [rows, TILE] are made. Logarithms have
// base 2.
MMFAST_AMX MMFAST_INLINE void take_in(const float* scores, uint64_t real, int64_t rows, float factor, float* largest,
                                      float* total, float* shrink, Bfloat16* weights) {
  Floats before[2], most[2], sum[2];
  for (int i = 0; i < 2; ++i) most[i] = before[i] = avx512::load(largest + 16 * i);
  for (int64_t n = 0; n < rows; ++n)
    for (int i = 0; real >> n & 1 && i < 2; ++i)
      most[i] = _mm512_max_ps(most[i], avx512::load(scores + n * TILE + 16 * i) * factor);
  for (int i = 0; i < 2; ++i) {
    const Floats less = exp2_nonpositive(before[i] - most[i]);
    sum[i] = avx512::load(total + 16 * i) * less;
    avx512::store(shrink + 16 * i, less);
    avx512::store(largest + 16 * i, most[i]);
  }
  for (int64_t n = 0; n < rows; ++n) {
    Floats weight[2] = {};
    for (int i = 0; real >> n & 1 && i < 2; ++i) {
      weight[i] = exp2_nonpositive(avx512::load(scores + n * TILE + 16 * i) * factor - most[i]);
      sum[i] += weight[i];
    }
    _mm512_store_si512(weights + n * TILE, rounded(weight[0], weight[1]));
  }
  for (int i = 0; i < 2; ++i) avx512::store(total + 16 * i, sum[i]);
}

template <typename O>
MMFAST_AMX void forward(const Head<Bfloat16>& head, Scratch& scratch, Rows<O> out, Rows<float> lse) {
  const Tiles tiles;
  scratch.reset();
  const int64_t dim = head.dim, width = round_up(dim), lanes = round_up(head.queries), each = TILE * width;
  const float factor = head.scale * LOG2_E;
  Bfloat16 *query = take(scratch, each), *keys = take(scratch, each), *values = take(scratch, each);
  Bfloat16 *weights = take(scratch, TILE * TILE), *weights_t = take(scratch, TILE * TILE);
  float *sums = scratch.take(each), *scores = scratch.take(TILE * TILE), *largest = scratch.take(TILE);
  float *total = scratch.take(TILE), *shrink = scratch.take(TILE);
  load_tile(head.query, all(head.queries), 0, lanes, 0, dim, width, keys);
  pack_transposed(keys, lanes, width, query);
  std::memset(sums, 0, lanes * width * sizeof(float));
  std::fill_n(largest, TILE, -INFINITE);
  std::fill_n(total, TILE, 0.0f);
  for (const Keys& segment : head) {
    for (int64_t first = segment.first; first < segment.last; first += TILE) {
      const int64_t count = std::min(TILE, segment.last - first), rows = round_up(count);
      const uint64_t real = real_keys(segment, first, count);
      if (!real) continue;
      load_tile(segment.key, real, first, rows, segment.last, dim, width, keys);
      product<false>(keys, width, query, rows, lanes, width, scores, TILE);
      for (int64_t q = 0; q < lanes; q += 32)
        take_in(scores + q, real, rows, factor, largest + q, total + q, shrink + q, weights + q);
      transpose(weights, TILE, rows, lanes, weights_t, TILE);
      for (int64_t q = 0; q < lanes; ++q) {
        if (shrink[q] == 1.0f) continue;
        for (int64_t d = 0; d < width; d += 16)
          avx512::store(sums + q * width + d, avx512::load(sums + q * width + d) * shrink[q]);
      }
      load_tile(segment.value, real, first, rows, segment.last, dim, width, keys);
      pack_folded(keys, rows, width, values);
      product<true>(weights_t, TILE, values, lanes, width, rows, sums, width);
    }
  }
  for (int64_t q = 0; q < head.queries; ++q) {
    const bool none = largest[q] == -INFINITE && total[q] == 0.0f;
    store_unfolded(sums + q * width, dim, none ? 0.0f : 1.0f / total[q], out.row(q));
    *lse.row(q) = none ? -INFINITE : largest[q] * LN_2 + std::log(total[q]);
  }
}

// Queries whose weights are made before these are multiplied: sums are loaded and stored once for all of them.
constexpr int64_t QUERIES = 4 * TILE;

// Of scores and the gradients of weights, [rows, BLOCK], the weights and the gradients of scores are made, whose rows lie
// QUERIES apart. The first `blind` queries do not see the first key; where `causal`, one more for each key after it.
MMFAST_AMX MMFAST_INLINE void differentiate(const float* scores, const float* grad_weights, uint64_t real, int64_t rows,
                                            int64_t blind, bool causal, float factor, const float* lse,
                                            const float* mean, Bfloat16* weights, Bfloat16* slopes) {
  for (int64_t n = 0; n < rows; ++n) {
    const uint32_t sees = ~first_lanes(blind + (causal ? n : 0));
    Floats weight[2] = {}, slope[2] = {};
    for (int i = 0; real >> n & 1 && i < 2; ++i) {
      const auto seen = static_cast<__mmask16>(sees >> 16 * i);
      const Floats score = avx512::load(scores + n * BLOCK + 16 * i) * factor;
      weight[i] = _mm512_maskz_mov_ps(seen, exp2_nonpositive(score - avx512::load(lse + 16 * i)));
      const Floats grad = avx512::load(grad_weights + n * BLOCK + 16 * i);
      slope[i] = _mm512_maskz_mov_ps(seen, weight[i] * (grad - avx512::load(mean + 16 * i)));
    }
    _mm512_store_si512(weights + n * QUERIES, rounded(weight[0], weight[1]));
    _mm512_store_si512(slopes + n * QUERIES, rounded(slope[0], slope[1]));
  }
}

MMFAST_AMX void backward(const Head<Bfloat16>& head, Scratch& scratch, Rows<Bfloat16> to_query, float* part) {
  const Tiles tile_registers;
  scratch.reset();
  const int64_t dim = head.dim, width = round_up(dim), tiles = (head.queries + TILE - 1) / TILE, each = TILE * width;
  const float factor = head.scale * LOG2_E;
  const bool need_query = to_query || part;
  Bfloat16 *query = take(scratch, tiles * each), *query_t = take(scratch, tiles * each);
  Bfloat16 *grad = take(scratch, tiles * each), *grad_t = take(scratch, tiles * each);
  Bfloat16 *keys = take(scratch, each), *values = take(scratch, each), *packed_keys = take(scratch, each);
  Bfloat16 *weights = take(scratch, TILE * QUERIES), *slopes = take(scratch, TILE * QUERIES);
  Bfloat16* slopes_t = take(scratch, QUERIES * TILE);
  float *scores = scratch.take(TILE * BLOCK), *grad_weights = scratch.take(TILE * BLOCK);
  float *grad_query = scratch.take(tiles * each), *key_tile = scratch.take(each), *value_tile = scratch.take(each);
  float *lse = scratch.take(tiles * TILE), *mean = scratch.take(tiles * TILE);
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t first = t * TILE;
    const uint64_t real = all(std::min(TILE, head.queries - first));
    load_tile(head.query, real, first, TILE, 0, dim, width, keys);
    pack_folded(keys, TILE, width, query + t * each);
    for (int64_t q = 0; q < TILE; q += BLOCK)
      pack_transposed(keys + q * width, BLOCK, width, query_t + t * each + q * width);
    load_tile(head.grad_out, real, first, TILE, 0, dim, width, keys);
    pack_folded(keys, TILE, width, grad + t * each);
    for (int64_t q = 0; q < TILE; q += BLOCK)
      pack_transposed(keys + q * width, BLOCK, width, grad_t + t * each + q * width);
    for (int64_t q = first; q < first + TILE; ++q) {
      float sum = 0.0f;
      if (q < head.queries) {
        const Bfloat16 *out = head.out.row(q), *g = keys + (q - first) * width;
#pragma omp simd reduction(+ : sum)
        for (int64_t d = 0; d < dim; ++d) sum += to_float(g[d]) * to_float(out[d]);
      }
      mean[q] = sum;
      lse[q] = q < head.queries ? *head.lse.row(q) * LOG2_E : 0.0f;  // base 2
    }
  }
  std::memset(grad_query, 0, tiles * each * sizeof(float));
  for (const Keys& segment : head) {
    const bool need_key = segment.needs_key(), need_value = segment.needs_value();
    if (!need_key && !need_value && !need_query) continue;
    for (int64_t first = segment.first; first < segment.last; first += TILE) {
      const int64_t count = std::min(TILE, segment.last - first), rows = round_up(count);
      const uint64_t real = real_keys(segment, first, count);
      float* grad_keys = sums_of(segment.key_sums, first, rows, width, key_tile);
      float* grad_values = sums_of(segment.value_sums, first, rows, width, value_tile);
      if (real) {
        load_tile(segment.key, real, first, rows, segment.last, dim, width, keys);
        load_tile(segment.value, real, first, rows, segment.last, dim, width, values);
        if (need_query) pack_folded(keys, rows, width, packed_keys);
      }
      for (int64_t q = segment.first_that_sees(first) / TILE * TILE; real && q < head.queries; q += QUERIES) {
        const int64_t lanes = round_up(std::min(QUERIES, head.queries - q));
        for (int64_t i = 0; i < lanes; i += BLOCK) {
          const int64_t from = q + i, blind = segment.first_that_sees(first) - from;
          product<false>(keys, width, query_t + from * width, rows, BLOCK, width, scores, BLOCK);
          product<false>(values, width, grad_t + from * width, rows, BLOCK, width, grad_weights, BLOCK);
          differentiate(scores, grad_weights, real, rows, blind, segment.causal, factor, lse + from, mean + from,
                        weights + i, slopes + i);
        }
        if (need_value) product<true>(weights, QUERIES, grad + q * width, rows, width, lanes, grad_values, width);
        if (need_key) product<true>(slopes, QUERIES, query + q * width, rows, width, lanes, grad_keys, width);
        if (need_query) {
          transpose(slopes, QUERIES, rows, lanes, slopes_t, TILE);
          product<true>(slopes_t, TILE, packed_keys, lanes, width, rows, grad_query + q * width, width);
        }
      }
      for (int64_t n = 0; n < count; ++n) {
        if (segment.grad_key) store_unfolded(grad_keys + n * width, dim, head.scale, segment.grad_key.row(first + n));
        if (segment.grad_value) store_unfolded(grad_values + n * width, dim, 1.0f, segment.grad_value.row(first + n));
      }
    }
  }
  for (int64_t q = 0; q < head.queries; ++q) {
    if (to_query && head.add_query)
      add_unfolded(grad_query + q * width, dim, head.scale, to_query.row(q), to_query.row(q));
    else if (to_query)
      store_unfolded(grad_query + q * width, dim, head.scale, to_query.row(q));
    if (part) store_unfolded(grad_query + q * width, dim, head.scale, part + q * dim);
  }
}

}  // namespace

const Kernels<Bfloat16>* amx_kernels() {
  static constexpr Kernels<Bfloat16> found = {forward<Bfloat16>, forward<float>, backward};
  return has_amx() ? &found : nullptr;
}

#else

const Kernels<Bfloat16>* amx_kernels() { return nullptr; }

#endif

}  // namespace mmfast::attention
