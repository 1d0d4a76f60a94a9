// Attention of few queries to two segments of keys, media and latents, as if they were one; and its gradients. A thread
// owns queries and walks through tiles of keys, which it reads once; scores stay in L2. A tile of scores has the keys
// as rows and the queries side by side, so that nothing of a tile is transposed. Masked media are never read.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <optional>

#include "../tensor_view.h"
#include "exponential.h"
#include "matrix.h"
#include "scalars.h"
#include "sixteen.h"

namespace mmfast {
namespace {

constexpr const char* OP = "resampler_attention";
constexpr int64_t TILE = 64;   // queries, or keys, that are worked on together
// What queries and dimensions are filled up to, which are lanes of vectors, and keys, which are rows.
constexpr int64_t BLOCK = 32, KEY_BLOCK = 8;
// Media that one task takes where a batch has few heads. Not chosen by the number of threads: sums would depend on it.
constexpr int64_t CHUNK = 512;
constexpr int64_t MANY_HEADS = 64;
constexpr float INFINITE = std::numeric_limits<float>::infinity();

constexpr int64_t round_up(int64_t count, int64_t block = BLOCK) { return (count + block - 1) / block * block; }

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

// One head: rows of numbers.
template <typename T>
struct Rows {
  T* data = nullptr;
  int64_t stride = 0;

  MMFAST_INLINE T* row(int64_t i) const { return data + i * stride; }
  explicit operator bool() const { return data != nullptr; }
};

// Keys and values first .. last of one head; gradients that are null are not wanted.
template <typename T>
struct Segment {
  Rows<const T> key, value;
  Rows<T> grad_key, grad_value;
  const bool* real = nullptr;  // null: all are
  int64_t first = 0, last = 0;

  MMFAST_INLINE bool is_real(int64_t n) const { return !real || real[n]; }
};

// One head of one sample, and the part of its keys that one task takes.
template <typename T>
struct Head {
  Rows<const T> query, out, grad_out;
  Segment<T> segments[2];
  float scale;
  int64_t queries, dim;  // of all queries, backward; of a tile of them, forward
  const float* lse;      // [queries]
};

// Memory that a thread takes its tiles from, anew for each task.
struct Scratch {
  std::unique_ptr<float[]> data;
  float* next;

  explicit Scratch(int64_t count) : data(new float[count + 16]) { reset(); }
  void reset() { next = data.get() + (64 - reinterpret_cast<uintptr_t>(data.get()) % 64) % 64 / sizeof(float); }
  float* take(int64_t count) {
    float* found = next;
    next += count;
    return found;
  }
};

int64_t forward_scratch(int64_t dim) { return 4 * TILE * round_up(dim) + TILE * TILE + 3 * TILE; }

int64_t backward_scratch(int64_t queries, int64_t dim) {
  const int64_t tiles = (queries + TILE - 1) / TILE;
  return (5 * tiles + 4) * TILE * round_up(dim) + 2 * TILE * TILE + 2 * tiles * TILE;
}

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
  MMFAST_INLINE static void store(const float* from, int64_t dim, float factor, T* to) {
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

  // out [queries, dim] and lse [queries] of this head's keys alone: zeros and -inf if there are none.
  template <typename T, typename O>
  MMFAST_INLINE static void forward(const Head<T>& head, Scratch& scratch, Rows<O> out, float* lse) {
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
    for (const Segment<T>& segment : head.segments) {
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
      lse[q] = none ? -INFINITE : largest[q] + std::log(total[q]);
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
    float *grad_keys = scratch.take(each), *grad_values = scratch.take(each);
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
      lse[q] = q < head.queries ? head.lse[q] : 0.0f;
    }
    std::memset(grad_query, 0, tiles * each * sizeof(float));
    for (const Segment<T>& segment : head.segments) {
      for (int64_t first = segment.first; first < segment.last; first += TILE) {
        const int64_t count = std::min(TILE, segment.last - first), rows = round_up(count, KEY_BLOCK);
        const bool need_key = bool(segment.grad_key), need_value = bool(segment.grad_value);
        if (!need_key && !need_value && !need_query) continue;
        std::memset(grad_keys, 0, rows * width * sizeof(float));
        std::memset(grad_values, 0, rows * width * sizeof(float));
        if (any_real(segment, first, count)) {
          load_tile(segment.key, &segment, first, count, rows, dim, keys);
          load_tile(segment.value, &segment, first, count, rows, dim, values);
          for (int64_t t = 0; t < tiles; ++t) {
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
          if (need_key) store(grad_keys + n * width, dim, head.scale, segment.grad_key.row(first + n));
          if (need_value) store(grad_values + n * width, dim, 1.0f, segment.grad_value.row(first + n));
        }
      }
    }
    return grad_query;
  }
};

// The loops as they are compiled for one kind of CPU.
template <typename T>
struct Kernels {
  void (*forward)(const Head<T>&, Scratch&, Rows<T>, float*);
  void (*forward_part)(const Head<T>&, Scratch&, Rows<float>, float*);
  void (*backward)(const Head<T>&, Scratch&, Rows<T>, float*);
};

#define MMFAST_KERNELS(NAME, LANES_TYPE, ROWS, TARGET)                                                      \
  template <typename T, typename O>                                                                         \
  TARGET void forward_##NAME(const Head<T>& head, Scratch& scratch, Rows<O> out, float* lse) {              \
    Loops<LANES_TYPE, ROWS>::forward(head, scratch, out, lse);                                              \
  }                                                                                                         \
  /* The gradient of the queries, if wanted, into grad_query or, if that is null, into part. */             \
  template <typename T>                                                                                     \
  TARGET void backward_##NAME(const Head<T>& head, Scratch& scratch, Rows<T> grad_query, float* part) {     \
    using Compiled = Loops<LANES_TYPE, ROWS>;                                                               \
    const float* found = Compiled::backward(head, scratch, grad_query || part);                             \
    for (int64_t q = 0; q < head.queries; ++q, found += round_up(head.dim)) {                               \
      if (grad_query) Compiled::store(found, head.dim, head.scale, grad_query.row(q));                      \
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

// Those for the widest vectors that this CPU has, of `bits` at most.
template <typename T>
const Kernels<T>& kernels(int bits) {
#if defined(__x86_64__)
  if (bits >= 512 && __builtin_cpu_supports("x86-64-v4")) return avx512<T>;
  if (bits >= 256 && __builtin_cpu_supports("x86-64-v3")) return avx2<T>;
#endif
  return baseline<T>;
}

struct Sizes {
  int64_t batch, heads, queries, media, latents, dim;

  Sizes(const TensorView& query, const TensorView& media_key, const std::optional<TensorView>& latent_key) {
    check(query.dim() == 4 && media_key.dim() == 4 && (!latent_key || latent_key->dim() == 4), OP,
          ": queries and keys must have four dimensions; query is ", query, ", media_key ", media_key);
    batch = query.size(0), heads = query.size(1), queries = query.size(2), dim = query.size(3);
    media = media_key.size(2), latents = latent_key ? latent_key->size(2) : 0;
  }

  // Into how many parts the media of a head are cut.
  int64_t chunks() const {
    return batch * heads >= MANY_HEADS ? 1 : std::max<int64_t>((media + CHUNK - 1) / CHUNK, 1);
  }
  int threads(int threads, int64_t tasks) const {
    const int64_t work = batch * heads * queries * (media + latents) * dim;
    return static_cast<int>(std::clamp<int64_t>(std::min(work >> 18, tasks), 1, threads));
  }

  void expect(const char* name, const TensorView& x, DType dtype, int64_t rows) const {
    check(x.dtype == dtype && x.dim() == 4 && x.size(0) == batch && x.size(1) == heads && x.size(2) == rows &&
              x.size(3) == dim && (dim <= 1 || x.stride(3) == 1),
          OP, ": ", name, " is ", x, "; expected ", name_of(dtype), "[", batch, ", ", heads, ", ", rows, ", ", dim,
          "] with stride 1 in the last dimension");
  }
  void expect(const char* name, const std::optional<TensorView>& x, DType dtype, int64_t rows) const {
    if (x) expect(name, *x, dtype, rows);
  }
};

template <typename T>
Rows<T> rows_of(const TensorView& x, int64_t sample, int64_t head, int64_t first = 0) {
  using Value = std::remove_const_t<T>;
  return {x.as<Value>() + sample * x.stride(0) + head * x.stride(1) + first * x.stride(2), x.stride(2)};
}
template <typename T>
Rows<T> rows_of(const std::optional<TensorView>& x, int64_t sample, int64_t head) {
  return x ? rows_of<T>(*x, sample, head) : Rows<T>{};
}

// What forward and backward are given alike.
struct Keys {
  TensorView media_key, media_value;
  std::optional<TensorView> latent_key, latent_value, media_mask;

  void expect(const Sizes& sizes, DType dtype) const {
    sizes.expect("media_key", media_key, dtype, sizes.media);
    sizes.expect("media_value", media_value, dtype, sizes.media);
    check(latent_key.has_value() == latent_value.has_value(), OP, ": latent_key and latent_value go together");
    sizes.expect("latent_key", latent_key, dtype, sizes.latents);
    sizes.expect("latent_value", latent_value, dtype, sizes.latents);
    if (media_mask) media_mask->expect("media_mask", DType::boolean, {sizes.batch, sizes.media});
  }

  // The segments of one chunk of the media; the last one has the latents too.
  template <typename T>
  void segments(const Sizes& sizes, int64_t sample, int64_t head, int64_t chunk, Segment<T>* to) const {
    const int64_t chunks = sizes.chunks(), each = chunks == 1 ? sizes.media : CHUNK;
    to[0] = {rows_of<const T>(media_key, sample, head), rows_of<const T>(media_value, sample, head), {}, {},
             media_mask ? media_mask->as<bool>() + sample * sizes.media : nullptr, chunk * each,
             std::min((chunk + 1) * each, sizes.media)};
    to[1] = {rows_of<const T>(latent_key, sample, head), rows_of<const T>(latent_value, sample, head), {}, {},
             nullptr, 0, chunk == chunks - 1 ? sizes.latents : 0};
  }
};

// One output row of the parts of its chunks, each `step` after the other, weighted as their sums of exponentials are.
template <typename T>
void merge(const float* part, const float* lse, int64_t parts, int64_t step, int64_t lse_step, int64_t dim, T* out,
           float* total_lse, float* row) {
  float largest = -INFINITE, total = 0.0f;
  for (int64_t i = 0; i < parts; ++i) largest = std::max(largest, lse[i * lse_step]);
  std::fill_n(row, dim, 0.0f);
  for (int64_t i = 0; i < parts && largest != -INFINITE; ++i) {
    const float weight = std::exp(lse[i * lse_step] - largest), *from = part + i * step;
    total += weight;
    for (int64_t d = 0; d < dim; ++d) row[d] += weight * from[d];
  }
  *total_lse = total == 0.0f ? -INFINITE : largest + std::log(total);
  for (int64_t d = 0; d < dim; ++d) out[d] = from_float<T>(total == 0.0f ? 0.0f : row[d] / total);
}

template <typename T>
void forward(const Sizes& sizes, const TensorView& query, const Keys& keys, float scale, const TensorView& out,
             float* lse, int bits, int threads) {
  const auto& [batch, heads, queries, media, latents, dim] = sizes;
  const int64_t tiles = (queries + TILE - 1) / TILE, chunks = sizes.chunks(), tasks = batch * heads * chunks * tiles;
  const int64_t all = batch * heads * queries;
  const bool split = chunks > 1;
  std::unique_ptr<float[]> parts(split ? new float[chunks * all * (dim + 1)] : nullptr);
  float* part_lse = parts.get() + (split ? chunks * all * dim : 0);
  threads = sizes.threads(threads, tasks);
#pragma omp parallel num_threads(threads)
  {
    Scratch scratch(forward_scratch(dim));
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < tasks; ++task) {
      const int64_t tile = task % tiles, chunk = task / tiles % chunks, i = task / tiles / chunks;
      const int64_t sample = i / heads, head = i % heads, first = tile * TILE, row = i * queries + first;
      Head<T> h{rows_of<const T>(query, sample, head, first), {}, {}, {}, scale, std::min(TILE, queries - first), dim,
                nullptr};
      keys.segments(sizes, sample, head, chunk, h.segments);
      if (split)
        kernels<T>(bits).forward_part(h, scratch, {parts.get() + (chunk * all + row) * dim, dim},
                                      part_lse + chunk * all + row);
      else
        kernels<T>(bits).forward(h, scratch, rows_of<T>(out, sample, head, first), lse + row);
    }
    if (split) {
      const auto sums = std::make_unique<float[]>(dim);
#pragma omp for
      for (int64_t row = 0; row < all; ++row) {
        const int64_t i = row / queries;
        merge(parts.get() + row * dim, part_lse + row, chunks, all * dim, all, dim,
              rows_of<T>(out, i / heads, i % heads).row(row % queries), lse + row, sums.get());
      }
    }
  }
}

struct Gradients {
  std::optional<TensorView> query, media_key, media_value, latent_key, latent_value;
};

template <typename T>
void backward(const Sizes& sizes, const TensorView& grad_out, const TensorView& query, const TensorView& out,
              const float* lse, const Keys& keys, float scale, const Gradients& grads, int bits, int threads) {
  const auto& [batch, heads, queries, media, latents, dim] = sizes;
  const int64_t chunks = sizes.chunks(), tasks = batch * heads * chunks, each = queries * dim;
  const bool split = chunks > 1 && grads.query;
  std::unique_ptr<float[]> parts(split ? new float[tasks * each] : nullptr);
  threads = sizes.threads(threads, tasks);
#pragma omp parallel num_threads(threads)
  {
    Scratch scratch(backward_scratch(queries, dim));
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < tasks; ++task) {
      const int64_t chunk = task % chunks, i = task / chunks, sample = i / heads, head = i % heads;
      Head<T> h{rows_of<const T>(query, sample, head), rows_of<const T>(out, sample, head),
                rows_of<const T>(grad_out, sample, head), {}, scale, queries, dim, lse + i * queries};
      keys.segments(sizes, sample, head, chunk, h.segments);
      h.segments[0].grad_key = rows_of<T>(grads.media_key, sample, head);
      h.segments[0].grad_value = rows_of<T>(grads.media_value, sample, head);
      h.segments[1].grad_key = rows_of<T>(grads.latent_key, sample, head);
      h.segments[1].grad_value = rows_of<T>(grads.latent_value, sample, head);
      kernels<T>(bits).backward(h, scratch, split ? Rows<T>{} : rows_of<T>(grads.query, sample, head),
                                split ? parts.get() + task * each : nullptr);
    }
    if (split) {
#pragma omp for
      for (int64_t row = 0; row < batch * heads * queries; ++row) {
        const int64_t i = row / queries, q = row % queries;
        const float* part = parts.get() + i * chunks * each + q * dim;
        T* to = rows_of<T>(grads.query, i / heads, i % heads).row(q);
        for (int64_t d = 0; d < dim; ++d) {
          float sum = 0.0f;
          for (int64_t c = 0; c < chunks; ++c) sum += part[c * each + d];
          to[d] = from_float<T>(sum);
        }
      }
    }
  }
}

}  // namespace

// query [B, H, Q, D], media_key, media_value [B, H, N, D], latent_key, latent_value [B, H, Q2, D] of one dtype and any
// strides but the last; media_mask [B, N] (bool) -> out, as query, and lse [B, H, Q] (float32): the logarithm of the
// sum of the scores' exponentials.
void resampler_attention_fwd_cpu(TensorView query, TensorView media_key, TensorView media_value,
                                 std::optional<TensorView> latent_key, std::optional<TensorView> latent_value,
                                 std::optional<TensorView> media_mask, float scale, TensorView out, TensorView lse,
                                 int vector_bits, int threads) {
  const Sizes sizes(query, media_key, latent_key);
  const Keys keys{media_key, media_value, latent_key, latent_value, media_mask};
  sizes.expect("query", query, query.dtype, sizes.queries);
  keys.expect(sizes, query.dtype);
  sizes.expect("out", out, query.dtype, sizes.queries);
  lse.expect("lse", DType::f32, {sizes.batch, sizes.heads, sizes.queries});
  with_scalar(OP, query.dtype, [&](auto scalar) {
    forward<decltype(scalar)>(sizes, query, keys, scale, out, lse.as<float>(), vector_bits, threads);
  });
}

// The gradients that are given, of the dtype and shape of what they belong to. Masked media get zeros.
void resampler_attention_bwd_cpu(TensorView grad_out, TensorView query, TensorView out, TensorView lse,
                                 TensorView media_key, TensorView media_value, std::optional<TensorView> latent_key,
                                 std::optional<TensorView> latent_value, std::optional<TensorView> media_mask,
                                 float scale, std::optional<TensorView> grad_query,
                                 std::optional<TensorView> grad_media_key, std::optional<TensorView> grad_media_value,
                                 std::optional<TensorView> grad_latent_key,
                                 std::optional<TensorView> grad_latent_value, int vector_bits, int threads) {
  const Sizes sizes(query, media_key, latent_key);
  const Keys keys{media_key, media_value, latent_key, latent_value, media_mask};
  const DType dtype = query.dtype;
  sizes.expect("query", query, dtype, sizes.queries);
  keys.expect(sizes, dtype);
  sizes.expect("grad_out", grad_out, dtype, sizes.queries);
  sizes.expect("out", out, dtype, sizes.queries);
  lse.expect("lse", DType::f32, {sizes.batch, sizes.heads, sizes.queries});
  const Gradients grads{grad_query, grad_media_key, grad_media_value, grad_latent_key, grad_latent_value};
  sizes.expect("grad_query", grads.query, dtype, sizes.queries);
  sizes.expect("grad_media_key", grads.media_key, dtype, sizes.media);
  sizes.expect("grad_media_value", grads.media_value, dtype, sizes.media);
  sizes.expect("grad_latent_key", grads.latent_key, dtype, sizes.latents);
  sizes.expect("grad_latent_value", grads.latent_value, dtype, sizes.latents);
  with_scalar(OP, dtype, [&](auto scalar) {
    backward<decltype(scalar)>(sizes, grad_out, query, out, lse.as<float>(), keys, scale, grads, vector_bits, threads);
  });
}

}  // namespace mmfast
