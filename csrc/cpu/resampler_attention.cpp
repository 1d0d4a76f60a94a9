// Attention of few queries to two segments of keys, media and latents, as if they were one; and its gradients. A thread
// takes a head, or a part of the media of one where there are few.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <optional>

#include "attention.h"
#include "matrix.h"

namespace mmfast {
namespace {

using namespace attention;

constexpr const char* OP = "resampler_attention";
// Media that one task takes where a batch has few heads. Not chosen by the number of threads: sums would depend on it.
constexpr int64_t CHUNK = 512;
constexpr int64_t MANY_HEADS = 64;

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

  template <typename View>
  void expect(const char* name, const View& x, DType dtype, int64_t rows) const {
    expect_heads(OP, *this, name, x, dtype, rows);
  }
};

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
      Segment<T> segments[2];
      keys.segments(sizes, sample, head, chunk, segments);
      const Head<T> h{rows_of<const T>(query, sample, head, first), {}, {}, segments, 2, scale,
                      std::min(TILE, queries - first), dim, {}};
      if (split)
        kernels<T>(bits).forward_part(h, scratch, {parts.get() + (chunk * all + row) * dim, dim},
                                      {part_lse + chunk * all + row, 1});
      else
        kernels<T>(bits).forward(h, scratch, rows_of<T>(out, sample, head, first), {lse + row, 1});
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
      Segment<T> segments[2];
      keys.segments(sizes, sample, head, chunk, segments);
      segments[0].grad_key = rows_of<T>(grads.media_key, sample, head);
      segments[0].grad_value = rows_of<T>(grads.media_value, sample, head);
      segments[1].grad_key = rows_of<T>(grads.latent_key, sample, head);
      segments[1].grad_value = rows_of<T>(grads.latent_value, sample, head);
      const Head<T> h{rows_of<const T>(query, sample, head), rows_of<const T>(out, sample, head),
                      rows_of<const T>(grad_out, sample, head), segments, 2, scale, queries, dim,
                      {lse + i * queries, 1}};
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
