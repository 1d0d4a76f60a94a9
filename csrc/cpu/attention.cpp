// The loops of attention.h. A thread reads each tile of keys once; masked keys are never read.
#include "attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "amx.h"
#include "exponential.h"
#include "matrix.h"
#include "sixteen.h"

namespace mmfast::attention {
namespace {

// What keys are filled up to, which are rows.
constexpr int64_t KEY_BLOCK = 8;

// 32 numbers in two registers of AVX-512.
struct Wholes {
  Whole low, high;

  MMFAST_INLINE void add(float x, const Wholes& y) {
    low.add(x, y.low);
    high.add(x, y.high);
  }
  MMFAST_INLINE void add(const Wholes& y) {
    low.add(y.low);
    high.add(y.high);
  }
};

// The loops for vectors L of WIDTH numbers and ROWS rows together.
template <typename L, int ROWS>
struct Loops {
  static constexpr int64_t WIDTH = sizeof(L) / sizeof(float);
  static_assert(BLOCK % WIDTH == 0 && BLOCK % ROWS == 0 && KEY_BLOCK % ROWS == 0);

  template <int... I>
  MMFAST_INLINE static void block(std::integer_sequence<int, I...>, const float* left, int64_t left_row,
                                  int64_t left_step, const float* right, int64_t right_stride, int64_t steps, float* to,
                                  int64_t to_stride, bool add) {
    L sum[ROWS] = {};
    for (int64_t k = 0; k < steps; ++k) {
      const L factor = *reinterpret_cast<const L*>(right + k * right_stride);
      (sum[I].add(left[I * left_row + k * left_step], factor), ...);
    }
    if (add) (sum[I].add(*reinterpret_cast<const L*>(to + I * to_stride)), ...);
    ((*reinterpret_cast<L*>(to + I * to_stride) = sum[I]), ...);
  }

  // to[i, j] (+)= Σ_k left[i, k] right[k, j]; rows and columns are whole blocks.
  MMFAST_INLINE static void product(const float* left, int64_t left_row, int64_t left_step, const float* right,
                                    int64_t right_stride, int64_t rows, int64_t columns, int64_t steps, float* to,
                                    int64_t to_stride, bool add) {
    for (int64_t j = 0; j < columns; j += WIDTH)
      for (int64_t i = 0; i < rows; i += ROWS)
        block(Each<ROWS>(), left + i * left_row, left_row, left_step, right + j, right_stride, steps,
              to + i * to_stride + j, to_stride, add);
  }

  template <typename T>
  MMFAST_INLINE static void load(const T* from, int64_t dim, int64_t padded, float* to) {
#pragma omp simd
    for (int64_t d = 0; d < dim; ++d) to[d] = to_float(from[d]);
    for (int64_t d = dim; d < padded; ++d) to[d] = 0.0f;
  }

  template <typename T>
  MMFAST_INLINE static void store(const float* from, int64_t dim, float factor, T* to, bool add = false) {
    if (add) {
#pragma omp simd
      for (int64_t d = 0; d < dim; ++d) to[d] = from_float<T>(to_float(to[d]) + from[d] * factor);
      return;
    }
#pragma omp simd
    for (int64_t d = 0; d < dim; ++d) to[d] = from_float<T>(from[d] * factor);
  }

  // Rows lie far apart, where the hardware foresees nothing: those of the next tile are asked for while this one is
  // worked on.
  template <typename T>
  MMFAST_INLINE static void foresee(Rows<const T> x, int64_t row, int64_t last, int64_t dim) {
    if (row >= last) return;
    const char* from = reinterpret_cast<const char*>(x.row(row));
    const int64_t bytes = dim * static_cast<int64_t>(sizeof(T));
    for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(from + byte, 0, 2);
  }

  // Rows first .. first + count of x, zeros where they are not real and up to `padded` rows.
  template <typename T>
  MMFAST_INLINE static void load_tile(Rows<const T> x, const Segment<T>* segment, int64_t first, int64_t count,
                                      int64_t padded, int64_t dim, float* to) {
    const int64_t width = round_up(dim);
    for (int64_t i = 0; i < padded; ++i) {
      if (segment) foresee(x, first + i + TILE, segment->last, dim);
      if (i < count && (!segment || segment->is_real(first + i)))
        load(x.row(first + i), dim, width, to + i * width);
      else
        std::memset(to + i * width, 0, width * sizeof(float));
    }
  }

  // to [dim, TILE] = factor · the transpose of x [TILE, width]
  MMFAST_INLINE static void transpose(const float* x, int64_t width, int64_t dim, int64_t rows, float factor,
                                      float* to) {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t d = 0; d < dim; ++d) to[d * TILE + i] = x[i * width + d] * factor;
  }

  template <typename T>
  MMFAST_INLINE static bool any_real(const Segment<T>& segment, int64_t first, int64_t count) {
    return !segment.real || std::memchr(segment.real + first, 1, count) != nullptr;
  }

  template <typename T, typename O>
  MMFAST_INLINE static void forward(const Head<T>& head, Scratch& scratch, Rows<O> out, Rows<float> lse) {
    scratch.reset();
    const int64_t dim = head.dim, width = round_up(dim), lanes = round_up(head.queries);
    float *query = scratch.take(TILE * width), *keys = scratch.take(TILE * width);
    float *values = scratch.take(TILE * width), *sums = scratch.take(TILE * width);
    float *scores = scratch.take(TILE * TILE), *largest = scratch.take(TILE), *total = scratch.take(TILE);
    float* shrink = scratch.take(TILE);
    load_tile<T>(head.query, nullptr, 0, head.queries, lanes, dim, sums);
    transpose(sums, width, dim, lanes, head.scale, query);
    std::memset(sums, 0, lanes * width * sizeof(float));
    std::fill_n(largest, TILE, -INFINITE);
    std::fill_n(total, TILE, 0.0f);
    for (const Segment<T>& segment : head) {
      for (int64_t first = segment.first; first < segment.last; first += TILE) {
        const int64_t count = std::min(TILE, segment.last - first), rows = round_up(count, KEY_BLOCK);
        if (!any_real(segment, first, count)) continue;
        load_tile(segment.key, &segment, first, count, rows, dim, keys);
        load_tile(segment.value, &segment, first, count, rows, dim, values);
        product(keys, width, 1, query, TILE, rows, lanes, dim, scores, TILE, false);
        std::copy_n(largest, lanes, shrink);
        for (int64_t n = 0; n < count; ++n) {
          if (!segment.is_real(first + n)) continue;
          const float* score = scores + n * TILE;
#pragma omp simd
          for (int64_t q = 0; q < lanes; ++q) largest[q] = score[q] > largest[q] ? score[q] : largest[q];
        }
#pragma omp simd
        for (int64_t q = 0; q < lanes; ++q) {
          shrink[q] = exp_nonpositive(shrink[q] - largest[q]);
          total[q] *= shrink[q];
        }
        for (int64_t n = 0; n < rows; ++n) {
          float* weight = scores + n * TILE;
          if (n >= count || !segment.is_real(first + n)) {
            std::memset(weight, 0, lanes * sizeof(float));
            continue;
          }
#pragma omp simd
          for (int64_t q = 0; q < lanes; ++q) {
            weight[q] = exp_nonpositive(weight[q] - largest[q]);
            total[q] += weight[q];
          }
        }
        for (int64_t q = 0; q < lanes; ++q) {
          float* sum = sums + q * width;
          const float factor = shrink[q];
#pragma omp simd
          for (int64_t d = 0; d < width; ++d) sum[d] *= factor;
        }
        product(scores, 1, TILE, values, width, lanes, width, rows, sums, width, true);
      }
    }
    for (int64_t q = 0; q < head.queries; ++q) {
      const bool none = largest[q] == -INFINITE && total[q] == 0.0f;
      store(sums + q * width, dim, none ? 0.0f : 1.0f / total[q], out.row(q));
      *lse.row(q) = none ? -INFINITE : largest[q] + std::log(total[q]);
    }
  }

  // Gradients of this head's keys and values; grad_query [queries, width] gets their part of that of its queries.
  template <typename T>
  MMFAST_INLINE static const float* backward(const Head<T>& head, Scratch& scratch, bool need_query) {
    scratch.reset();
    const int64_t dim = head.dim, width = round_up(dim), tiles = (head.queries + TILE - 1) / TILE;
    const int64_t each = TILE * width;
    float *query = scratch.take(tiles * each), *query_t = scratch.take(tiles * each);
    float *grad = scratch.take(tiles * each), *grad_t = scratch.take(tiles * each);
    float *grad_query = scratch.take(tiles * each), *keys = scratch.take(each), *values = scratch.take(each);
    float *key_tile = scratch.take(each), *value_tile = scratch.take(each);
    float *weights = scratch.take(TILE * TILE), *slopes = scratch.take(TILE * TILE);
    float *lse = scratch.take(tiles * TILE), *mean = scratch.take(tiles * TILE);
    load_tile<T>(head.query, nullptr, 0, head.queries, tiles * TILE, dim, query);
    load_tile<T>(head.grad_out, nullptr, 0, head.queries, tiles * TILE, dim, grad);
    for (int64_t t = 0; t < tiles; ++t) {
      transpose(query + t * each, width, dim, TILE, head.scale, query_t + t * each);
      transpose(grad + t * each, width, dim, TILE, 1.0f, grad_t + t * each);
    }
    for (int64_t q = 0; q < tiles * TILE; ++q) {
      float sum = 0.0f;
      if (q < head.queries) {
        const T* out = head.out.row(q);
        const float* g = grad + q * width;
#pragma omp simd reduction(+ : sum)
        for (int64_t d = 0; d < dim; ++d) sum += g[d] * to_float(out[d]);
      }
      mean[q] = sum;
      lse[q] = q < head.queries ? *head.lse.row(q) : 0.0f;
    }
    std::memset(grad_query, 0, tiles * each * sizeof(float));
    for (const Segment<T>& segment : head) {
      for (int64_t first = segment.first; first < segment.last; first += TILE) {
        const int64_t count = std::min(TILE, segment.last - first), rows = round_up(count, KEY_BLOCK);
        const bool need_key = segment.needs_key(), need_value = segment.needs_value();
        if (!need_key && !need_value && !need_query) continue;
        float* grad_keys = sums_of(segment.key_sums, first, rows, width, key_tile);
        float* grad_values = sums_of(segment.value_sums, first, rows, width, value_tile);
        if (any_real(segment, first, count)) {
          load_tile(segment.key, &segment, first, count, rows, dim, keys);
          load_tile(segment.value, &segment, first, count, rows, dim, values);
          for (int64_t t = segment.first_that_sees(first) / TILE; t < tiles; ++t) {
            const int64_t lanes = round_up(std::min(TILE, head.queries - t * TILE));
            product(keys, width, 1, query_t + t * each, TILE, rows, lanes, dim, weights, TILE, false);
            if (need_key || need_query)
              product(values, width, 1, grad_t + t * each, TILE, rows, lanes, dim, slopes, TILE, false);
            else
              std::memset(slopes, 0, rows * TILE * sizeof(float));
            for (int64_t n = 0; n < rows; ++n) {
              float *weight = weights + n * TILE, *slope = slopes + n * TILE;
              if (n >= count || !segment.is_real(first + n)) {
                std::memset(weight, 0, lanes * sizeof(float));
                std::memset(slope, 0, lanes * sizeof(float));
                continue;
              }
              const float *shift = lse + t * TILE, *m = mean + t * TILE;
#pragma omp simd
              for (int64_t q = 0; q < lanes; ++q) {
                weight[q] = exp_nonpositive(weight[q] - shift[q]);
                slope[q] = weight[q] * (slope[q] - m[q]);
              }
              const int64_t blind = std::clamp<int64_t>(segment.first_that_sees(first + n) - t * TILE, 0, lanes);
              std::fill_n(weight, blind, 0.0f);
              std::fill_n(slope, blind, 0.0f);
            }
            if (need_value)
              product(weights, TILE, 1, grad + t * each, width, rows, width, lanes, grad_values, width, true);
            if (need_key)
              product(slopes, TILE, 1, query + t * each, width, rows, width, lanes, grad_keys, width, true);
            if (need_query)
              product(slopes, 1, TILE, keys, width, lanes, width, rows, grad_query + t * each, width, true);
          }
        }
        for (int64_t n = 0; n < count; ++n) {
          if (segment.grad_key) store(grad_keys + n * width, dim, head.scale, segment.grad_key.row(first + n));
          if (segment.grad_value) store(grad_values + n * width, dim, 1.0f, segment.grad_value.row(first + n));
        }
      }
    }
    return grad_query;
  }
};

#define MMFAST_KERNELS(NAME, LANES_TYPE, ROWS, TARGET)                                                      \
  template <typename T, typename O>                                                                         \
  TARGET void forward_##NAME(const Head<T>& head, Scratch& scratch, Rows<O> out, Rows<float> lse) {         \
    Loops<LANES_TYPE, ROWS>::forward(head, scratch, out, lse);                                              \
  }                                                                                                         \
  template <typename T>                                                                                     \
  TARGET void backward_##NAME(const Head<T>& head, Scratch& scratch, Rows<T> grad_query, float* part) {     \
    using Compiled = Loops<LANES_TYPE, ROWS>;                                                               \
    const float* found = Compiled::backward(head, scratch, grad_query || part);                             \
    for (int64_t q = 0; q < head.queries; ++q, found += round_up(head.dim)) {                               \
      if (grad_query) Compiled::store(found, head.dim, head.scale, grad_query.row(q), head.add_query);      \
      if (part) Compiled::store(found, head.dim, head.scale, part + q * head.dim);                          \
    }                                                                                                       \
  }                                                                                                         \
  template <typename T>                                                                                     \
  constexpr Kernels<T> NAME = {forward_##NAME<T, T>, forward_##NAME<T, float>, backward_##NAME<T>};

MMFAST_KERNELS(baseline, Halves, 4, )
#if defined(__x86_64__)
MMFAST_KERNELS(avx2, Halves, 4, __attribute__((target("arch=x86-64-v3"))))
MMFAST_KERNELS(avx512, Wholes, 8, __attribute__((target("arch=x86-64-v4"))))
#endif

}  // namespace

template <typename T>
const Kernels<T>& kernels(int bits) {
  if constexpr (std::is_same_v<T, Bfloat16>)
    if (bits >= TILE_BITS && amx_kernels()) return *amx_kernels();
#if defined(__x86_64__)
  if (bits >= 512 && __builtin_cpu_supports("x86-64-v4")) return avx512<T>;
  if (bits >= 256 && __builtin_cpu_supports("x86-64-v3")) return avx2<T>;
#endif
  return baseline<T>;
}

template const Kernels<float>& kernels<float>(int);
template const Kernels<Float16>& kernels<Float16>(int);
template const Kernels<Bfloat16>& kernels<Bfloat16>(int);

}  // namespace mmfast::attention
