// The gradients of attention that PyTorch's flash attention for CPUs has made, from its output and logarithms. A thread
// takes the heads that share keys.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>

#include "attention.h"
#include "matrix.h"

namespace mmfast {
namespace {

using namespace attention;

constexpr const char* OP = "flash_attention";

struct Sizes {
  int64_t batch, heads, dim;
};

struct Gradients {
  std::optional<TensorView> query, key, value;
};

template <typename T>
void backward(const TensorView& grad_out, const TensorView& query, const TensorView& out, const TensorView& lse,
              const TensorView& key, const TensorView& value, bool causal, float scale, const Gradients& grads,
              int bits, int threads) {
  const int64_t queries = query.size(2), keys = key.size(2), dim = query.size(3), key_heads = key.size(1);
  const int64_t group = query.size(1) / key_heads, tasks = key.size(0) * key_heads;
  const int64_t each = group > 1 ? round_up(keys, TILE) * round_up(dim) : 0;
  threads = static_cast<int>(std::clamp<int64_t>(std::min(query.numel() * keys >> 18, tasks), 1, threads));
#pragma omp parallel num_threads(threads)
  {
    Scratch scratch(backward_scratch(queries, dim)), sums(2 * each);
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < tasks; ++task) {
      const int64_t sample = task / key_heads, key_head = task % key_heads;
      sums.reset();
      const auto sums_for = [&](const std::optional<TensorView>& grad) -> float* {
        if (group == 1 || !grad) return nullptr;
        float* found = sums.take(each);
        std::memset(found, 0, each * sizeof(float));
        return found;
      };
      Segment<T> seen{rows_of<const T>(key, sample, key_head), rows_of<const T>(value, sample, key_head), {}, {},
                      nullptr, 0, keys, 0, causal, sums_for(grads.key), sums_for(grads.value)};
      const int64_t last = (key_head + 1) * group - 1;
      for (int64_t head = last - group + 1; head <= last; ++head) {
        if (head == last) {  // it writes the sums of all
          seen.grad_key = rows_of<T>(grads.key, sample, key_head);
          seen.grad_value = rows_of<T>(grads.value, sample, key_head);
        }
        const float* logarithms = lse.as<float>() + sample * lse.stride(0) + head * lse.stride(1);
        const Head<T> h{rows_of<const T>(query, sample, head), rows_of<const T>(out, sample, head),
                        rows_of<const T>(grad_out, sample, head), &seen, 1, scale, queries, dim,
                        {logarithms, lse.stride(2)}, true};
        kernels<T>(bits).backward(h, scratch, rows_of<T>(grads.query, sample, head), nullptr);
      }
    }
  }
}

}  // namespace

// query, out [B, H, L, D], key, value [B, Hkv, S, D] of one dtype and any strides but the last, lse [B, H, L] (float32)
// -> the gradients that are given, of the dtype and shape of what they belong to. That of the query is added to what is
// there.
void flash_attention_bwd_cpu(TensorView grad_out, TensorView query, TensorView out, TensorView lse, TensorView key,
                             TensorView value, bool causal, float scale, std::optional<TensorView> grad_query,
                             std::optional<TensorView> grad_key, std::optional<TensorView> grad_value, int threads,
                             int vector_bits) {
  check(query.dim() == 4 && key.dim() == 4, OP, ": query is ", query, " and key ", key, "; expected four dimensions");
  const Sizes sizes{query.size(0), query.size(1), query.size(3)}, of_keys{sizes.batch, key.size(1), sizes.dim};
  const int64_t queries = query.size(2), keys = key.size(2);
  const DType dtype = query.dtype;
  check(of_keys.heads > 0 && sizes.heads % of_keys.heads == 0, OP, ": ", sizes.heads, " heads do not share ",
        of_keys.heads);
  for (const auto& [name, x] : {std::pair("query", &query), {"out", &out}, {"grad_out", &grad_out}})
    expect_heads(OP, sizes, name, *x, dtype, queries);
  expect_heads(OP, sizes, "grad_query", grad_query, dtype, queries);
  for (const auto& [name, x] : {std::pair("key", &key), {"value", &value}})
    expect_heads(OP, of_keys, name, *x, dtype, keys);
  for (const auto& [name, x] : {std::pair("grad_key", &grad_key), {"grad_value", &grad_value}})
    expect_heads(OP, of_keys, name, *x, dtype, keys);
  check(lse.dtype == DType::f32 && lse.shape == std::vector{sizes.batch, sizes.heads, queries}, OP, ": lse is ", lse,
        "; expected float32[", sizes.batch, ", ", sizes.heads, ", ", queries, "]");
  with_scalar(OP, dtype, [&](auto scalar) {
    backward<decltype(scalar)>(grad_out, query, out, lse, key, value, causal, scale,
                               {grad_query, grad_key, grad_value}, vector_bits, threads);
  });
}

}  // namespace mmfast
