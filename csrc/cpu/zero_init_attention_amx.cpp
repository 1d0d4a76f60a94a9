// The loops of zero_init_attention for bfloat16 in AMX tiles. Scores and softmax are fp32; weights and the gradients of
// scores are rounded to bfloat16 before they are multiplied. Scores come out of a product with the queries as rows and
// are turned, so that the softmax of 16 queries needs no sum within a vector.
#include <algorithm>
#include <cstring>
#include <limits>

#include "attention_tiles.h"
#include "stream.h"
#include "zero_init_attention.h"

namespace mmfast::zero_init {

#if defined(MMFAST_AMX)

namespace {

using namespace attention;

constexpr int64_t ROWS = 64;  // that are worked on together
constexpr int64_t WIDTH = MOST_PROMPTS;

constexpr int64_t padded(int64_t dim) { return round_up(dim, TILE_DEPTH); }

// What `pack_tiles` makes: tiles of B.
struct Prompts {
  const Bfloat16 *keys, *keys_t, *values, *values_t;

  Prompts(const Bfloat16* packed, int64_t dim) {
    const int64_t each = WIDTH * padded(dim);
    keys = packed, keys_t = packed + each, values = packed + 2 * each, values_t = packed + 3 * each;
  }
};

// Rows `first` to `first + count` of x, then zeros up to `rows`; those after them are asked for.
MMFAST_AMX MMFAST_INLINE void load_rows(const Bfloat16* x, int64_t stride, int64_t first, int64_t count, int64_t rows,
                                        int64_t all, int64_t dim, int64_t width, Bfloat16* to) {
  for (int64_t i = 0; i < count; ++i) {
    if (first + i + ROWS < all) prefetch(x + (first + i + ROWS) * stride, dim);
    copy_row(x + (first + i) * stride, dim, width, to + i * width);
  }
  std::memset(static_cast<void*>(to + count * width), 0, (rows - count) * width * sizeof(Bfloat16));
}

// to [WIDTH] vectors = the scores of 16 queries, [16, WIDTH], turned
MMFAST_AMX MMFAST_INLINE void turn(const float* scores, int64_t prompts, Floats* to) {
  for (int64_t p = 0; p < prompts; p += 16) {
    __m512i from[16];
    for (int i = 0; i < 16; ++i) from[i] = _mm512_loadu_si512(scores + i * WIDTH + p);
    transpose_pairs(from, reinterpret_cast<__m512i*>(to + p));
  }
}

// Scores become exponentials, for each query those of the largest score 1; zeros beyond the prompts. Their sums.
MMFAST_AMX MMFAST_INLINE Floats soften(Floats* scores, int64_t prompts, float factor) {
  Floats most = scores[0] * factor, sum = {};
  for (int64_t p = 1; p < prompts; ++p) most = _mm512_max_ps(most, scores[p] * factor);
  for (int64_t p = 0; p < prompts; ++p) {
    scores[p] = exp2_nonpositive(scores[p] * factor - most);
    sum += scores[p];
  }
  for (int64_t p = prompts; p < WIDTH; ++p) scores[p] = Floats{};
  return sum;
}

// to [16, WIDTH] = x [WIDTH] vectors, turned back and rounded
MMFAST_AMX MMFAST_INLINE void turn_back(const Floats* x, int64_t prompts, Bfloat16* to) {
  __m512i pairs[16] = {}, rows[16];
  const auto next = (__m512i)(Integers16{0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                         8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31});
  for (int64_t j = 0; j < (prompts + 1) / 2; ++j)
    pairs[j] = _mm512_permutexvar_epi16(next, rounded(x[2 * j], x[2 * j + 1]));
  transpose_pairs(pairs, rows);
  for (int i = 0; i < 16; ++i) _mm512_store_si512(to + i * WIDTH, rows[i]);
}

// to [tiles of 16 prompts, dim, 16] += sums [prompts, padded(dim)], whose columns are folded
MMFAST_AMX MMFAST_INLINE void add_sums(const float* sums, int64_t prompts, int64_t dim, float* to) {
  float row[MOST_DIM];
  for (int64_t p = 0; p < prompts; ++p) {
    store_unfolded(sums + p * padded(dim), dim, 1.0f, row);
    for (int64_t d = 0; d < dim; ++d) to[(p / LANES * dim + d) * LANES + p % LANES] += row[d];
  }
}

}  // namespace

int64_t packed_tiles(int64_t dim) { return 4 * WIDTH * padded(dim); }

MMFAST_AMX void pack_tiles(const PromptRows& key, const PromptRows& value, int64_t prompts, int64_t dim, Bfloat16* to) {
  const int64_t width = padded(dim), each = WIDTH * width;
  alignas(64) Bfloat16 dense[WIDTH * MOST_DIM];
  for (const PromptRows* x : {&key, &value}) {
    std::memset(static_cast<void*>(dense), 0, each * sizeof(Bfloat16));
    for (int64_t p = 0; p < prompts; ++p)
      for (int64_t d = 0; d < dim; ++d) dense[p * width + d] = x->data[p * x->row + d * x->column];
    pack_folded(dense, WIDTH, width, to);
    pack_transposed(dense, WIDTH, width, to + each);
    to += 2 * each;
  }
}

MMFAST_AMX void forward_tiles(const ForwardRows<Bfloat16>& r, const Bfloat16* packed, float scale) {
  if (r.act == 0.0f) {  // the bits of words, whatever the prompts hold
    for (int64_t i = 0; i < r.rows; ++i)
      std::memcpy(static_cast<void*>(r.out + i * r.out_stride), r.words + i * r.words_stride,
                  r.dim * sizeof(Bfloat16));
    return;
  }
  const Tiles tiles;
  const Prompts prompts(packed, r.dim);
  const int64_t width = padded(r.dim);
  alignas(64) Bfloat16 x[ROWS * MOST_DIM], weights[ROWS * WIDTH];
  alignas(64) float scores[ROWS * WIDTH], factors[ROWS], part[ROWS * MOST_DIM];
  for (int64_t first = 0; first < r.rows; first += ROWS) {
    const int64_t count = std::min(ROWS, r.rows - first), rows = round_up(count, 32);
    load_rows(r.query, r.query_stride, first, count, rows, r.rows, r.dim, width, x);
    product<false>(x, width, prompts.keys_t, rows, WIDTH, width, scores, WIDTH);
    for (int64_t q = 0; q < rows; q += 16) {
      Floats turned[WIDTH];
      turn(scores + q * WIDTH, r.prompts, turned);
      avx512::store(factors + q, r.act / soften(turned, r.prompts, scale * LOG2_E));
      turn_back(turned, r.prompts, weights + q * WIDTH);
    }
    product<false>(weights, WIDTH, prompts.values, rows, width, WIDTH, part, width);
    for (int64_t i = 0; i < count; ++i) {
      const Bfloat16* words = r.words + (first + i) * r.words_stride;
      Bfloat16* out = r.out + (first + i) * r.out_stride;
      if (first + i + ROWS < r.rows) {
        prefetch(words + ROWS * r.words_stride, r.dim);
        prefetch_to_write(out + ROWS * r.out_stride, r.dim);
      }
      add_unfolded(part + i * width, r.dim, factors[i], words, out);
    }
  }
}

MMFAST_AMX void backward_tiles(const BackwardRows<Bfloat16>& r, const Bfloat16* packed, float scale) {
  // A closed gate lets no gradient through but its own.
  const bool open = r.act != 0.0f, to_scores = open && (r.grad_query || r.grad_keys);
  if (!open && r.grad_query)
    for (int64_t i = 0; i < r.rows; ++i)
      std::memset(static_cast<void*>(r.grad_query + i * r.grad_query_stride), 0, r.dim * sizeof(Bfloat16));
  if (!r.grad_act && !(open && (to_scores || r.grad_values))) return;
  const Tiles tiles;
  const Prompts prompts(packed, r.dim);
  const int64_t width = padded(r.dim);
  alignas(64) Bfloat16 x[ROWS * MOST_DIM], g[ROWS * MOST_DIM], folded[ROWS * MOST_DIM];
  // Weights and the gradients of scores: with the prompts as rows, and with the queries.
  alignas(64) Bfloat16 weights[WIDTH * ROWS], slopes[WIDTH * ROWS], slope_rows[ROWS * WIDTH];
  alignas(64) float scores[ROWS * WIDTH], grad_weights[ROWS * WIDTH], part[ROWS * MOST_DIM];
  alignas(64) float grad_keys[WIDTH * MOST_DIM], grad_values[WIDTH * MOST_DIM];
  std::memset(grad_keys, 0, WIDTH * width * sizeof(float));
  std::memset(grad_values, 0, WIDTH * width * sizeof(float));
  std::memset(static_cast<void*>(weights), 0, sizeof(weights));
  std::memset(static_cast<void*>(slopes), 0, sizeof(slopes));
  Floats total = {};
  for (int64_t first = 0; first < r.rows; first += ROWS) {
    const int64_t count = std::min(ROWS, r.rows - first), rows = round_up(count, 32);
    load_rows(r.query, r.query_stride, first, count, rows, r.rows, r.dim, width, x);
    load_rows(r.grad, r.grad_stride, first, count, rows, r.rows, r.dim, width, g);
    product<false>(x, width, prompts.keys_t, rows, WIDTH, width, scores, WIDTH);
    product<false>(g, width, prompts.values_t, rows, WIDTH, width, grad_weights, WIDTH);
    for (int64_t q = 0; q < rows; q += 16) {
      const auto there = static_cast<__mmask16>(first_lanes(std::max<int64_t>(count - q, 0)));
      Floats weight[WIDTH], slope[WIDTH], mean = {};
      turn(scores + q * WIDTH, r.prompts, weight);
      turn(grad_weights + q * WIDTH, r.prompts, slope);
      const Floats per_weight = 1.0f / soften(weight, r.prompts, scale * LOG2_E);
      for (int64_t p = 0; p < r.prompts; ++p) {
        weight[p] *= per_weight;
        mean += weight[p] * slope[p];
      }
      total += _mm512_maskz_mov_ps(there, mean);
      for (int64_t p = 0; p < r.prompts; ++p) {
        slope[p] = _mm512_maskz_mov_ps(there, r.act * weight[p] * (slope[p] - mean));
        weight[p] = _mm512_maskz_mov_ps(there, r.act * weight[p]);
        store_rounded(weights + p * ROWS + q, weight[p]);
        store_rounded(slopes + p * ROWS + q, slope[p]);
      }
      if (!(to_scores && r.grad_query)) continue;
      for (int64_t p = r.prompts; p < WIDTH; ++p) slope[p] = Floats{};
      turn_back(slope, r.prompts, slope_rows + q * WIDTH);
    }
    if (open && r.grad_values) {
      pack_folded(g, rows, width, folded);
      product<true>(weights, ROWS, folded, WIDTH, width, rows, grad_values, width);
    }
    if (to_scores && r.grad_keys) {
      pack_folded(x, rows, width, folded);
      product<true>(slopes, ROWS, folded, WIDTH, width, rows, grad_keys, width);
    }
    if (to_scores && r.grad_query) {
      product<false>(slope_rows, WIDTH, prompts.keys, rows, width, WIDTH, part, width);
      for (int64_t i = 0; i < count; ++i) {
        Bfloat16* to = r.grad_query + (first + i) * r.grad_query_stride;
        if (first + i + ROWS < r.rows) prefetch_to_write(to + ROWS * r.grad_query_stride, r.dim);
        store_unfolded(part + i * width, r.dim, scale, to);
      }
    }
  }
  if (r.grad_act) *r.grad_act += _mm512_reduce_add_ps(total);
  if (to_scores && r.grad_keys) add_sums(grad_keys, r.prompts, r.dim, r.grad_keys);
  if (open && r.grad_values) add_sums(grad_values, r.prompts, r.dim, r.grad_values);
}

#else

int64_t packed_tiles(int64_t) { return 0; }
void pack_tiles(const PromptRows&, const PromptRows&, int64_t, int64_t, Bfloat16*) {}
void forward_tiles(const ForwardRows<Bfloat16>&, const Bfloat16*, float) {}
void backward_tiles(const BackwardRows<Bfloat16>&, const Bfloat16*, float) {}

#endif

}  // namespace mmfast::zero_init
