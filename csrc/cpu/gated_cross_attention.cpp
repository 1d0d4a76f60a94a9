// Attention of text tokens to the media that each may see, and its gradients. Tokens are sorted by time: those of one
// time fill tiles with the keys of their media, so there is no mask, and no score that is not needed.
#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "attention.h"
#include "matrix.h"

namespace mmfast {
namespace {

using namespace attention;

constexpr const char* OP = "gated_cross_attention";

struct Sizes {
  int64_t batch, heads, length, dim, media, media_length;

  Sizes(const TensorView& query, const TensorView& key, int64_t media_length) : media_length(media_length) {
    check(query.dim() == 4 && key.dim() == 4, OP, ": query and key must have four dimensions; query is ", query,
          ", key ", key);
    batch = query.size(0), heads = query.size(1), length = query.size(2), dim = query.size(3);
    check(media_length > 0 && key.size(2) % media_length == 0, OP, ": key is ", key, ", of media of ", media_length);
    media = key.size(2) / media_length;
  }

  int threads(int threads, int64_t tasks, bool only_latest) const {
    const int64_t work = batch * heads * length * media_length * dim * (only_latest ? 1 : media);
    return static_cast<int>(std::clamp<int64_t>(std::min(work >> 18, tasks), 1, threads));
  }

  template <typename View>
  void expect(const char* name, const View& x, DType dtype, int64_t rows) const {
    expect_heads(OP, *this, name, x, dtype, rows);
  }
};

// The tokens of each sample in the order of their times: 0 for those that see nothing, else the last medium seen.
struct Times {
  int64_t length, media;
  std::vector<int64_t> order, firsts;

  Times(const Sizes& sizes, const TensorView& text_time, bool only_latest)
      : length(sizes.length), media(sizes.media), order(sizes.batch * length), firsts(sizes.batch * (media + 2)) {
    std::vector<int64_t> next(media + 1);
    for (int64_t sample = 0; sample < sizes.batch; ++sample) {
      const int32_t* given = text_time.as<int32_t>() + sample * length;
      const auto time_of = [&](int64_t token) {
        const int64_t time = std::max<int64_t>(given[token], 0);
        return time <= media ? time : only_latest ? 0 : media;
      };
      int64_t* first = firsts.data() + sample * (media + 2);
      for (int64_t token = 0; token < length; ++token) ++first[time_of(token) + 1];
      for (int64_t time = 0; time <= media; ++time) next[time] = first[time + 1] += first[time];
      for (int64_t token = length - 1; token >= 0; --token) order[sample * length + --next[time_of(token)]] = token;
    }
  }

  // The tokens of times `time` and later are those from this one on, in their order.
  int64_t first(int64_t sample, int64_t time) const { return firsts[sample * (media + 2) + time]; }
  const int64_t* tokens(int64_t sample, int64_t from) const { return order.data() + sample * length + from; }
};

// Tokens of one time that are worked on together.
struct Tile {
  int64_t sample, time, first, count;
};

std::vector<Tile> tiles_of(const Sizes& sizes, const Times& times) {
  std::vector<Tile> tiles;
  for (int64_t sample = 0; sample < sizes.batch; ++sample)
    for (int64_t time = 0; time <= sizes.media; ++time) {
      const int64_t last = times.first(sample, time + 1);
      for (int64_t first = times.first(sample, time); first < last; first += TILE)
        tiles.push_back({sample, time, first, std::min(TILE, last - first)});
    }
  return tiles;
}

template <typename T>
void forward(const Sizes& sizes, const TensorView& query, const TensorView& key, const TensorView& value,
             const Times& times, float scale, bool only_latest, const TensorView& out, float* lse, int bits,
             int threads) {
  const std::vector<Tile> tiles = tiles_of(sizes, times);
  const int64_t tasks = static_cast<int64_t>(tiles.size()) * sizes.heads;
  threads = sizes.threads(threads, tasks, only_latest);
#pragma omp parallel num_threads(threads)
  {
    Scratch scratch(forward_scratch(sizes.dim));
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < tasks; ++task) {
      const auto [sample, time, first, count] = tiles[task / sizes.heads];
      const int64_t head = task % sizes.heads, last_key = time * sizes.media_length;
      const int64_t* tokens = times.tokens(sample, first);
      const Segment<T> seen{rows_of<const T>(key, sample, head), rows_of<const T>(value, sample, head), {}, {}, nullptr,
                            only_latest ? std::max<int64_t>(last_key - sizes.media_length, 0) : 0, last_key};
      const Head<T> h{rows_of<const T>(query, sample, head, 0, tokens), {}, {}, &seen, 1, scale, count, sizes.dim, {}};
      kernels<T>(bits).forward(h, scratch, rows_of<T>(out, sample, head, 0, tokens),
                               {lse + (sample * sizes.heads + head) * sizes.length, 1, tokens});
    }
  }
}

struct Gradients {
  std::optional<TensorView> query, key, value;
};

// A task has the keys of one medium and the tokens that see it alone; or, where tokens see several, all of a head.
template <typename T>
void backward(const Sizes& sizes, const TensorView& grad_out, const TensorView& query, const TensorView& out,
              const float* lse, const TensorView& key, const TensorView& value, const Times& times, float scale,
              bool only_latest, const Gradients& grads, int bits, int threads) {
  const auto& [batch, heads, length, dim, media, media_length] = sizes;
  const int64_t groups = only_latest ? media : std::min<int64_t>(media, 1), each = only_latest ? 1 : media;
  const int64_t tasks = batch * groups * heads;
  int64_t most = 0;
  for (int64_t i = 0; i < batch * groups; ++i) {
    const int64_t sample = i / groups, time = i % groups + 1;
    most = std::max(most, times.first(sample, time + each) - times.first(sample, time));
  }
  threads = sizes.threads(threads, tasks, only_latest);
#pragma omp parallel num_threads(threads)
  {
    Scratch scratch(backward_scratch(most, dim));
    std::vector<Segment<T>> segments(each);
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < tasks; ++task) {
      const int64_t head = task % heads, i = task / heads, sample = i / groups, time = i % groups + 1;
      const int64_t first = times.first(sample, time), *tokens = times.tokens(sample, first);
      for (int64_t m = 0; m < each; ++m)
        segments[m] = {rows_of<const T>(key, sample, head),
                       rows_of<const T>(value, sample, head),
                       rows_of<T>(grads.key, sample, head),
                       rows_of<T>(grads.value, sample, head),
                       nullptr,
                       (time - 1 + m) * media_length,
                       (time + m) * media_length,
                       times.first(sample, time + m) - first};
      const Head<T> h{rows_of<const T>(query, sample, head, 0, tokens),
                      rows_of<const T>(out, sample, head, 0, tokens),
                      rows_of<const T>(grad_out, sample, head, 0, tokens),
                      segments.data(),
                      each,
                      scale,
                      times.first(sample, time + each) - first,
                      dim,
                      {lse + (sample * heads + head) * length, 1, tokens}};
      kernels<T>(bits).backward(h, scratch, rows_of<T>(grads.query, sample, head, tokens), nullptr);
    }
    if (grads.query) {
#pragma omp for
      for (int64_t i = 0; i < batch * heads; ++i) {
        const int64_t sample = i / heads;
        const Rows<T> blind = rows_of<T>(grads.query, sample, i % heads, times.tokens(sample, 0));
        for (int64_t token = 0; token < times.first(sample, 1); ++token) std::fill_n(blind.row(token), dim, T{});
      }
    }
  }
}

}  // namespace

// query [B, H, L, D], key, value [B, H, T · media_length, D] of one dtype and any strides but the last; text_time [B, L]
// (int32) -> out, as query, and lse [B, H, L] (float32): the logarithm of the sum of the exponentials of the scores that
// the token sees, -inf if it sees none.
void gated_cross_attention_fwd_cpu(TensorView query, TensorView key, TensorView value, TensorView text_time,
                                   int64_t media_length, float scale, bool only_latest, TensorView out, TensorView lse,
                                   int vector_bits, int threads) {
  const Sizes sizes(query, key, media_length);
  const DType dtype = query.dtype;
  sizes.expect("query", query, dtype, sizes.length);
  sizes.expect("key", key, dtype, key.size(2));
  sizes.expect("value", value, dtype, key.size(2));
  text_time.expect("text_time", DType::i32, {sizes.batch, sizes.length});
  sizes.expect("out", out, dtype, sizes.length);
  lse.expect("lse", DType::f32, {sizes.batch, sizes.heads, sizes.length});
  const Times times(sizes, text_time, only_latest);
  with_scalar(OP, dtype, [&](auto scalar) {
    forward<decltype(scalar)>(sizes, query, key, value, times, scale, only_latest, out, lse.as<float>(), vector_bits,
                              threads);
  });
}

// The gradients that are given, of the dtype and shape of what they belong to. What nobody sees gets zeros.
void gated_cross_attention_bwd_cpu(TensorView grad_out, TensorView query, TensorView out, TensorView lse,
                                   TensorView key, TensorView value, TensorView text_time, int64_t media_length,
                                   float scale, bool only_latest, std::optional<TensorView> grad_query,
                                   std::optional<TensorView> grad_key, std::optional<TensorView> grad_value,
                                   int vector_bits, int threads) {
  const Sizes sizes(query, key, media_length);
  const DType dtype = query.dtype;
  const int64_t keys = key.size(2);
  sizes.expect("query", query, dtype, sizes.length);
  sizes.expect("key", key, dtype, keys);
  sizes.expect("value", value, dtype, keys);
  sizes.expect("grad_out", grad_out, dtype, sizes.length);
  sizes.expect("out", out, dtype, sizes.length);
  text_time.expect("text_time", DType::i32, {sizes.batch, sizes.length});
  lse.expect("lse", DType::f32, {sizes.batch, sizes.heads, sizes.length});
  const Gradients grads{grad_query, grad_key, grad_value};
  sizes.expect("grad_query", grads.query, dtype, sizes.length);
  sizes.expect("grad_key", grads.key, dtype, keys);
  sizes.expect("grad_value", grads.value, dtype, keys);
  const Times times(sizes, text_time, only_latest);
  with_scalar(OP, dtype, [&](auto scalar) {
    backward<decltype(scalar)>(sizes, grad_out, query, out, lse.as<float>(), key, value, times, scale, only_latest,
                               grads, vector_bits, threads);
  });
}

}  // namespace mmfast
