// The prompts' part of zero_init_attention: out = words + act · softmax(q kᵀ) v for at most 32 keys k and values v of
// each head, and its gradients. Forward reads q and words once and writes out; backward reads q and grad once, makes the
// probabilities again and writes the gradient of q. Keys, values, probabilities and sums stay in L1.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <type_traits>

#include "../tensor_view.h"
#include "amx.h"
#include "exponential.h"
#include "matrix.h"
#include "scalars.h"
#include "sixteen.h"
#include "stream.h"
#include "zero_init_attention.h"

namespace mmfast {
namespace {

using namespace zero_init;

constexpr const char* OP = "zero_init_attention";

// Rows that a thread takes at a time.
constexpr int64_t FORWARD_ROWS = 256;
// Rows whose sums make one part. The parts are added in order, so that no sum depends on the number of threads.
constexpr int64_t BACKWARD_ROWS = 1024;

// 0 for the lanes of prompts, -inf beyond them.
struct Absent {
  alignas(64) float lanes[MOST_PROMPTS];
};

// The loops, for TILES · 16 prompts at most and ROWS rows together, or fewer one by one.
template <typename L, int ROWS, int TILES>
struct Loops {
  static constexpr int64_t WIDTH = TILES * LANES;

  template <typename T>
  MMFAST_INLINE static void convert(const T* from, int64_t stride, int64_t count, int64_t dim, float* to) {
    for (int64_t i = 0; i < count; ++i) {
#pragma omp simd
      for (int64_t d = 0; d < dim; ++d) to[i * dim + d] = to_float(from[i * stride + d]);
    }
  }

  // Starts to bring the rows after `next`, of which there may be ROWS: they lie too far apart for the CPU to foresee.
  template <typename T>
  MMFAST_INLINE static void prefetch_rows(const T* x, int64_t stride, int64_t next, int64_t rows, int64_t dim) {
    for (int64_t i = next; i < std::min(next + ROWS, rows); ++i) prefetch(x + i * stride, dim);
  }

  // to [count, WIDTH] = x factorsᵀ
  MMFAST_INLINE static void project(const float* x, int64_t dim, const float* factors, int64_t count, float* to) {
    std::memset(to, 0, count * WIDTH * sizeof(float));
    for (int64_t t = 0; t < TILES; ++t) {
      const auto* tile = reinterpret_cast<const L*>(factors) + t * dim;
      auto* sums = reinterpret_cast<L*>(to) + t;
      if (count == ROWS)
        project_rows(Each<ROWS>(), x, dim, tile, dim, sums, TILES);
      else
        for (int64_t i = 0; i < count; ++i) project_rows(Each<1>(), x + i * dim, dim, tile, dim, sums + i * TILES);
    }
  }

  // to [count, round_up(dim)] = weights factors
  MMFAST_INLINE static void expand(const float* weights, const float* factors, int64_t prompts, int64_t dim,
                                   int64_t count, float* to) {
    const int64_t width = round_up(dim);
    for (int64_t j = 0; j < width; j += LANES) {
      const auto* tile = reinterpret_cast<const L*>(factors) + j / LANES * prompts;
      if (count == ROWS)
        expand_rows(Each<ROWS>(), weights, WIDTH, tile, prompts, L{}, to + j, width);
      else
        for (int64_t i = 0; i < count; ++i)
          expand_rows(Each<1>(), weights + i * WIDTH, WIDTH, tile, prompts, L{}, to + i * width + j, width);
    }
  }

  // sums [TILES, dim, 16] += the transpose of weightsᵀ x
  MMFAST_INLINE static void outer(const float* weights, const float* x, int64_t dim, int64_t count, float* sums) {
    for (int64_t t = 0; t < TILES; ++t) {
      const auto* factors = reinterpret_cast<const L*>(weights) + t;
      auto* tile = reinterpret_cast<L*>(sums) + t * dim;
      if (count == ROWS)
        outer_rows(Each<ROWS>(), x, dim, factors, tile, dim, TILES);
      else
        for (int64_t i = 0; i < count; ++i) outer_rows(Each<1>(), x + i * dim, dim, factors + i * TILES, tile, dim);
    }
  }

  // weights [count, WIDTH] = softmax(x keysᵀ); of one key it is 1, whatever x.
  MMFAST_INLINE static void attend(const float* x, int64_t dim, const float* keys, const float* absent, bool one,
                                   int64_t count, float* weights) {
    if (one) {
      for (int64_t i = 0; i < count * WIDTH; ++i) weights[i] = i % WIDTH == 0;
      return;
    }
    project(x, dim, keys, count, weights);
    for (int64_t i = 0; i < count; ++i) {
      float* row = weights + i * WIDTH;
      float largest = -std::numeric_limits<float>::infinity(), sum = 0.0f;
#pragma omp simd reduction(max : largest)
      for (int64_t p = 0; p < WIDTH; ++p) {
        row[p] += absent[p];
        largest = row[p] > largest ? row[p] : largest;
      }
#pragma omp simd reduction(+ : sum)
      for (int64_t p = 0; p < WIDTH; ++p) {
        row[p] = exp_nonpositive(row[p] - largest);
        sum += row[p];
      }
      const float per_weight = 1.0f / sum;
#pragma omp simd
      for (int64_t p = 0; p < WIDTH; ++p) row[p] *= per_weight;
    }
  }

  template <typename T>
  MMFAST_INLINE static void forward(const ForwardRows<T>& r) {
    if (r.act == 0.0f) {  // the bits of words, whatever the prompts hold
      for (int64_t i = 0; i < r.rows; ++i)
        std::memcpy(r.out + i * r.out_stride, r.words + i * r.words_stride, r.dim * sizeof(T));
      return;
    }
    alignas(64) float x[ROWS * MOST_DIM], weights[ROWS * WIDTH], part[ROWS * MOST_DIM];
    for (int64_t first = 0; first < r.rows; first += ROWS) {
      const int64_t count = std::min<int64_t>(ROWS, r.rows - first);
      if (r.prompts > 1) prefetch_rows(r.query, r.query_stride, first + ROWS, r.rows, r.dim);
      prefetch_rows(r.words, r.words_stride, first + ROWS, r.rows, r.dim);
      if (r.prompts > 1) convert(r.query + first * r.query_stride, r.query_stride, count, r.dim, x);
      attend(x, r.dim, r.keys_by_dim, r.absent, r.prompts == 1, count, weights);
      expand(weights, r.values, r.prompts, r.dim, count, part);
      for (int64_t i = 0; i < count; ++i) {
        const T* from = r.words + (first + i) * r.words_stride;
        const float* add = part + i * round_up(r.dim);
        T* to = r.out + (first + i) * r.out_stride;
#pragma omp simd
        for (int64_t d = 0; d < r.dim; ++d) to[d] = from_float<T>(to_float(from[d]) + r.act * add[d]);
      }
    }
  }

  template <typename T>
  MMFAST_INLINE static void backward(const BackwardRows<T>& r) {
    // A closed gate lets no gradient through but its own; the weight of one key does not depend on its score.
    const bool open = r.act != 0.0f, to_scores = open && r.prompts > 1 && (r.grad_query || r.grad_keys);
    if (!to_scores && r.grad_query)
      for (int64_t i = 0; i < r.rows; ++i)
        std::memset(static_cast<void*>(r.grad_query + i * r.grad_query_stride), 0, r.dim * sizeof(T));
    if (!to_scores && !r.grad_act && !(open && r.grad_values)) return;
    alignas(64) float x[ROWS * MOST_DIM], g[ROWS * MOST_DIM], part[ROWS * MOST_DIM];
    alignas(64) float weights[ROWS * WIDTH], slopes[ROWS * WIDTH];
    for (int64_t first = 0; first < r.rows; first += ROWS) {
      const int64_t count = std::min<int64_t>(ROWS, r.rows - first);
      if (r.prompts > 1) prefetch_rows(r.query, r.query_stride, first + ROWS, r.rows, r.dim);
      prefetch_rows(r.grad, r.grad_stride, first + ROWS, r.rows, r.dim);
      if (r.prompts > 1) convert(r.query + first * r.query_stride, r.query_stride, count, r.dim, x);
      convert(r.grad + first * r.grad_stride, r.grad_stride, count, r.dim, g);
      attend(x, r.dim, r.keys_by_dim, r.absent, r.prompts == 1, count, weights);
      if (to_scores || r.grad_act) {
        project(g, r.dim, r.values_by_dim, count, slopes);
        float total = 0.0f;
        for (int64_t i = 0; i < count; ++i) {
          const float* weight = weights + i * WIDTH;
          float *slope = slopes + i * WIDTH, mean = 0.0f;
#pragma omp simd reduction(+ : mean)
          for (int64_t p = 0; p < WIDTH; ++p) mean += weight[p] * slope[p];
          total += mean;
#pragma omp simd
          for (int64_t p = 0; p < WIDTH; ++p) slope[p] = r.act * weight[p] * (slope[p] - mean);
        }
        if (r.grad_act) *r.grad_act += total;
      }
      if (open && r.grad_values) {
        for (int64_t i = 0; i < count * WIDTH; ++i) weights[i] *= r.act;
        outer(weights, g, r.dim, count, r.grad_values);
      }
      if (to_scores && r.grad_keys) outer(slopes, x, r.dim, count, r.grad_keys);
      if (to_scores && r.grad_query) {
        expand(slopes, r.keys, r.prompts, r.dim, count, part);
        for (int64_t i = 0; i < count; ++i) {
          const float* from = part + i * round_up(r.dim);
          T* to = r.grad_query + (first + i) * r.grad_query_stride;
#pragma omp simd
          for (int64_t d = 0; d < r.dim; ++d) to[d] = from_float<T>(from[d]);
        }
      }
    }
  }
};

// The loops as they are compiled for one kind of CPU.
#define MMFAST_KERNELS(NAME, LANES_TYPE, ROWS, TARGET)                                                      \
  template <int TILES, typename T>                                                                          \
  TARGET void forward_##NAME(const ForwardRows<T>& rows) {                                                  \
    Loops<LANES_TYPE, ROWS, TILES>::forward(rows);                                                          \
  }                                                                                                         \
  template <int TILES, typename T>                                                                          \
  TARGET void backward_##NAME(const BackwardRows<T>& rows) {                                                \
    Loops<LANES_TYPE, ROWS, TILES>::backward(rows);                                                         \
  }

MMFAST_KERNELS(baseline, Halves, 6, )
#if defined(__x86_64__)
MMFAST_KERNELS(avx2, Halves, 6, __attribute__((target("arch=x86-64-v3"))))
MMFAST_KERNELS(avx512, Whole, 12, __attribute__((target("arch=x86-64-v4"))))
#endif

template <typename T>
struct Kernels {
  void (*forward)(const ForwardRows<T>&);
  void (*backward)(const BackwardRows<T>&);
};

// Those for the widest vectors that this CPU has, of `vector_bits` at most.
template <int TILES, typename T>
Kernels<T> kernels(int vector_bits) {
#if defined(__x86_64__)
  if (vector_bits >= 512 && __builtin_cpu_supports("x86-64-v4"))
    return {forward_avx512<TILES, T>, backward_avx512<TILES, T>};
  if (vector_bits >= 256 && __builtin_cpu_supports("x86-64-v3"))
    return {forward_avx2<TILES, T>, backward_avx2<TILES, T>};
#endif
  return {forward_baseline<TILES, T>, backward_baseline<TILES, T>};
}

// Calls run(value of the scalar type, kernels).
template <typename F>
void with_kernels(DType dtype, int64_t prompts, int vector_bits, F run) {
  with_scalar(OP, dtype, [&](auto scalar) {
    using T = decltype(scalar);
    run(scalar, prompts > LANES ? kernels<2, T>(vector_bits) : kernels<1, T>(vector_bits));
  });
}

struct Sizes {
  int64_t batch, heads, length, dim, key_heads, prompts;
  bool shared;  // the batch shares the prompts
  Absent absent;

  Sizes(const TensorView& query, const TensorView& keys) {
    check(query.dim() == 4 && (keys.dim() == 3 || keys.dim() == 4), OP, ": query is ", query, " and prompt_key ", keys,
          "; expected four dimensions, and three or four");
    batch = query.size(0), heads = query.size(1), length = query.size(2), dim = query.size(3);
    shared = keys.dim() == 3;
    key_heads = keys.size(keys.dim() - 3), prompts = keys.size(keys.dim() - 2);
    check(prompts >= 1 && prompts <= MOST_PROMPTS && dim <= MOST_DIM, OP, ": ", prompts, " prompts of ", dim,
          " numbers; at most ", MOST_PROMPTS, " of ", MOST_DIM, " are accepted");
    check(key_heads > 0 && heads % key_heads == 0, OP, ": ", heads, " heads do not share ", key_heads);
    for (int64_t p = 0; p < MOST_PROMPTS; ++p)
      absent.lanes[p] = p < prompts ? 0.0f : -std::numeric_limits<float>::infinity();
  }

  int64_t tiles() const { return round_up(prompts) / LANES; }
  int64_t prompt_heads() const { return (shared ? 1 : batch) * key_heads; }
  // The prompts' head that a head of a sample attends to.
  int64_t prompt_head(int64_t sample, int64_t head) const {
    return (shared ? 0 : sample) * key_heads + head / (heads / key_heads);
  }

  void expect_heads(const char* name, const TensorView& x, DType dtype) const {
    check(x.dtype == dtype && x.dim() == 4 && x.size(0) == batch && x.size(1) == heads && x.size(2) == length &&
              x.size(3) == dim && (dim <= 1 || x.stride(3) == 1),
          OP, ": ", name, " is ", x, "; expected ", name_of(dtype), "[", batch, ", ", heads, ", ", length, ", ", dim,
          "] with stride 1 in the last dimension");
  }
  void expect_prompts(const char* name, const TensorView& x, DType dtype, bool packed) const {
    const int64_t extra = shared ? 0 : 1;
    check(x.dtype == dtype && x.dim() == 3 + extra && (shared || x.size(0) == batch) && x.size(extra) == key_heads &&
              x.size(extra + 1) == prompts && x.size(extra + 2) == dim && (!packed || x.is_contiguous()),
          OP, ": ", name, " is ", x, "; expected ", name_of(dtype), "[", shared ? "" : std::to_string(batch) + ", ",
          key_heads, ", ", prompts, ", ", dim, "]", packed ? ", contiguous" : "");
  }
};

template <typename T>
T* head_of(const TensorView& x, int64_t sample, int64_t head, int64_t row) {
  return x.as<T>() + sample * x.stride(0) + head * x.stride(1) + row * x.stride(2);
}

// Keys or values of all heads as floats, packed as the loops read them.
struct Packed {
  int64_t each = 0;
  std::unique_ptr<float[]> data;

  void allocate(const Sizes& sizes, bool by_dim) {
    each = by_dim ? round_up(sizes.prompts) * sizes.dim : sizes.prompts * round_up(sizes.dim);
    data = std::make_unique<float[]>(sizes.prompt_heads() * each);
  }
  const float* head(int64_t i) const { return data.get() + i * each; }

  template <typename T>
  void fill(const Sizes& sizes, const TensorView& x, int64_t i, float scale, bool by_dim) {
    const int64_t extra = sizes.shared ? 0 : 1;
    const T* from = x.as<T>() + (extra ? i / sizes.key_heads * x.stride(0) : 0) + i % sizes.key_heads * x.stride(extra);
    float* to = data.get() + i * each;
    for (int64_t p = 0; p < sizes.prompts; ++p)
      for (int64_t d = 0; d < sizes.dim; ++d) {
        const float value = to_float(from[p * x.stride(extra + 1) + d * x.stride(extra + 2)]) * scale;
        if (by_dim)
          to[(p / LANES * sizes.dim + d) * LANES + p % LANES] = value;
        else
          to[(d / LANES * sizes.prompts + p) * LANES + d % LANES] = value;
      }
  }
};

// The same for the tiles of AMX; none unless these are for a call.
struct PackedTiles {
  int64_t each = 0;
  std::unique_ptr<Bfloat16[]> data;

  PackedTiles(const Sizes& sizes, DType dtype, int vector_bits) {
    if (dtype != DType::bf16 || sizes.prompts == 1 || vector_bits < TILE_BITS || !has_amx()) return;
    each = packed_tiles(sizes.dim);
    data = std::make_unique_for_overwrite<Bfloat16[]>(sizes.prompt_heads() * each + 32);
  }
  explicit operator bool() const { return data != nullptr; }
  Bfloat16* head(int64_t i) const {
    return data.get() + (64 - reinterpret_cast<uintptr_t>(data.get()) % 64) % 64 / sizeof(Bfloat16) + i * each;
  }
  void fill(const Sizes& sizes, const TensorView& key, const TensorView& value, int64_t i) const {
    const auto rows = [&](const TensorView& x) -> PromptRows {
      const int64_t extra = sizes.shared ? 0 : 1;
      const int64_t sample = extra ? i / sizes.key_heads * x.stride(0) : 0;
      return {x.as<Bfloat16>() + sample + i % sizes.key_heads * x.stride(extra),
              x.stride(extra + 1), x.stride(extra + 2)};
    };
    pack_tiles(rows(key), rows(value), sizes.prompts, sizes.dim, head(i));
  }
};

float act_of(const TensorView& act, int64_t head) { return act.as<float>()[head * act.stride(0)]; }

void expect_act(const Sizes& sizes, const TensorView& act) {
  check(act.dtype == DType::f32 && act.dim() == 1 && act.size(0) == sizes.heads, OP, ": act is ", act,
        "; expected float32[", sizes.heads, "]");
}

}  // namespace

// out = words + act · softmax(scale · query prompt_keyᵀ) prompt_value; query, words, out [B, H, L, D], prompts
// [Hkv, P, D] or [B, Hkv, P, D], all of one dtype; act [H] f32. Vectors of `vector_bits` at most are used.
void zero_init_attention_fwd_cpu(TensorView words, TensorView query, TensorView prompt_key, TensorView prompt_value,
                                 TensorView act, float scale, TensorView out, int threads, int vector_bits) {
  const Sizes sizes(query, prompt_key);
  sizes.expect_heads("query", query, query.dtype);
  sizes.expect_heads("words", words, query.dtype);
  sizes.expect_heads("out", out, query.dtype);
  sizes.expect_prompts("prompt_key", prompt_key, query.dtype, false);
  sizes.expect_prompts("prompt_value", prompt_value, query.dtype, false);
  expect_act(sizes, act);
  Packed keys_by_dim, values;
  const PackedTiles tiles(sizes, query.dtype, vector_bits);
  if (!tiles) {
    keys_by_dim.allocate(sizes, true);
    values.allocate(sizes, false);
  }
  const int64_t blocks = (sizes.length + FORWARD_ROWS - 1) / FORWARD_ROWS;
  with_kernels(query.dtype, sizes.prompts, vector_bits, [&](auto scalar, auto loops) {
    using T = decltype(scalar);
#pragma omp parallel num_threads(worthwhile_threads(query.numel(), threads))
    {
#pragma omp for schedule(static)
      for (int64_t i = 0; i < sizes.prompt_heads(); ++i) {
        if (tiles) {
          tiles.fill(sizes, prompt_key, prompt_value, i);
          continue;
        }
        keys_by_dim.fill<T>(sizes, prompt_key, i, scale, true);
        values.fill<T>(sizes, prompt_value, i, 1.0f, false);
      }
#pragma omp for schedule(static)
      for (int64_t i = 0; i < sizes.batch * sizes.heads * blocks; ++i) {
        const int64_t sample = i / blocks / sizes.heads, head = i / blocks % sizes.heads;
        const int64_t row = i % blocks * FORWARD_ROWS, prompt_head = sizes.prompt_head(sample, head);
        const ForwardRows<T> rows{head_of<T>(query, sample, head, row), head_of<T>(words, sample, head, row),
                                  head_of<T>(out, sample, head, row), query.stride(2), words.stride(2), out.stride(2),
                                  std::min(FORWARD_ROWS, sizes.length - row), sizes.prompts, sizes.dim,
                                  act_of(act, head), keys_by_dim.head(prompt_head), values.head(prompt_head),
                                  sizes.absent.lanes};
        if constexpr (std::is_same_v<T, Bfloat16>)
          if (tiles) {
            forward_tiles(rows, tiles.head(prompt_head), scale);
            continue;
          }
        loops.forward(rows);
      }
    }
  });
}

// The gradients of query, of the prompts (in their dtype, contiguous) and of act (f32): those that are given.
void zero_init_attention_bwd_cpu(TensorView grad, TensorView query, TensorView prompt_key, TensorView prompt_value,
                                 TensorView act, float scale, std::optional<TensorView> grad_query,
                                 std::optional<TensorView> grad_key, std::optional<TensorView> grad_value,
                                 std::optional<TensorView> grad_act, int threads, int vector_bits) {
  const Sizes sizes(query, prompt_key);
  sizes.expect_heads("query", query, query.dtype);
  sizes.expect_heads("grad", grad, query.dtype);
  sizes.expect_prompts("prompt_key", prompt_key, query.dtype, false);
  sizes.expect_prompts("prompt_value", prompt_value, query.dtype, false);
  expect_act(sizes, act);
  if (grad_query) sizes.expect_heads("grad_query", *grad_query, query.dtype);
  if (grad_key) sizes.expect_prompts("grad_key", *grad_key, query.dtype, true);
  if (grad_value) sizes.expect_prompts("grad_value", *grad_value, query.dtype, true);
  if (grad_act) grad_act->expect("grad_act", DType::f32, {sizes.heads});
  Packed keys_by_dim, values_by_dim, keys;
  const PackedTiles tiles(sizes, query.dtype, vector_bits);
  if (!tiles) {
    keys_by_dim.allocate(sizes, true);
    values_by_dim.allocate(sizes, true);
    keys.allocate(sizes, false);
  }

  // For each block of rows: the sums for the keys, for the values, for act.
  const int64_t blocks = (sizes.length + BACKWARD_ROWS - 1) / BACKWARD_ROWS, items = sizes.batch * sizes.heads * blocks;
  const int64_t each = sizes.tiles() * sizes.dim * LANES, part = 2 * each + LANES;
  const auto parts = std::make_unique_for_overwrite<float[]>(items * part);
  const int64_t samples = sizes.shared ? sizes.batch : 1, group = sizes.heads / sizes.key_heads;
  const auto part_of = [&](int64_t sample, int64_t head, int64_t block) {
    return parts.get() + ((sample * sizes.heads + head) * blocks + block) * part;
  };
  with_kernels(query.dtype, sizes.prompts, vector_bits, [&](auto scalar, auto loops) {
    using T = decltype(scalar);
    const auto add_parts = [&](const TensorView& total, int64_t prompt_head, int64_t offset, float factor) {
      const auto sum = std::make_unique<float[]>(each);
      const int64_t first = sizes.shared ? 0 : prompt_head / sizes.key_heads;
      const int64_t head = prompt_head % sizes.key_heads * group;
      for (int64_t sample = first; sample < first + samples; ++sample)
        for (int64_t i = 0; i < group * blocks; ++i) {
          const float* from = part_of(sample, head, i) + offset;  // the blocks of a head, then those of the next
#pragma omp simd
          for (int64_t j = 0; j < each; ++j) sum[j] += from[j];
        }
      T* to = total.as<T>() + prompt_head * sizes.prompts * sizes.dim;
      for (int64_t p = 0; p < sizes.prompts; ++p)
        for (int64_t d = 0; d < sizes.dim; ++d)
          to[p * sizes.dim + d] = from_float<T>(sum[(p / LANES * sizes.dim + d) * LANES + p % LANES] * factor);
    };
#pragma omp parallel num_threads(worthwhile_threads(query.numel(), threads))
    {
#pragma omp for schedule(static)
      for (int64_t i = 0; i < sizes.prompt_heads(); ++i) {
        if (tiles) {
          tiles.fill(sizes, prompt_key, prompt_value, i);
          continue;
        }
        keys_by_dim.fill<T>(sizes, prompt_key, i, scale, true);
        values_by_dim.fill<T>(sizes, prompt_value, i, 1.0f, true);
        keys.fill<T>(sizes, prompt_key, i, scale, false);
      }
#pragma omp for schedule(static)
      for (int64_t i = 0; i < items; ++i) {
        const int64_t sample = i / blocks / sizes.heads, head = i / blocks % sizes.heads;
        const int64_t row = i % blocks * BACKWARD_ROWS, prompt_head = sizes.prompt_head(sample, head);
        float* sums = parts.get() + i * part;
        std::fill_n(sums, part, 0.0f);
        const BackwardRows<T> rows{
            head_of<T>(query, sample, head, row), head_of<T>(grad, sample, head, row),
            grad_query ? head_of<T>(*grad_query, sample, head, row) : nullptr, query.stride(2), grad.stride(2),
            grad_query ? grad_query->stride(2) : 0, std::min(BACKWARD_ROWS, sizes.length - row), sizes.prompts,
            sizes.dim, act_of(act, head), grad_key ? sums : nullptr, grad_value ? sums + each : nullptr,
            grad_act ? sums + 2 * each : nullptr, keys_by_dim.head(prompt_head), values_by_dim.head(prompt_head),
            keys.head(prompt_head), sizes.absent.lanes};
        if constexpr (std::is_same_v<T, Bfloat16>)
          if (tiles) {
            backward_tiles(rows, tiles.head(prompt_head), scale);
            continue;
          }
        loops.backward(rows);
      }
#pragma omp for schedule(static)
      for (int64_t i = 0; i < sizes.prompt_heads(); ++i) {
        if (grad_key) add_parts(*grad_key, i, 0, scale);
        if (grad_value) add_parts(*grad_value, i, each, 1.0f);
      }
    }
    for (int64_t head = 0; grad_act && head < sizes.heads; ++head) {
      float sum = 0.0f;
      for (int64_t sample = 0; sample < sizes.batch; ++sample)
        for (int64_t block = 0; block < blocks; ++block) sum += part_of(sample, head, block)[2 * each];
      grad_act->as<float>()[head] = sum;
    }
  });
}

}  // namespace mmfast
