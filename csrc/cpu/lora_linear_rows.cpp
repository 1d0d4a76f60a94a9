// A LoRA linear of few rows without gradients: dot products with the rows of W, which is read from memory once.
#include <cstdint>
#include <optional>
#include <vector>

#include "../tensor_view.h"
#include "lanes.h"
#include "matrix.h"
#include "scalars.h"
#include "stream.h"

namespace mmfast {
namespace {

constexpr const char* OP = "lora_linear";

template <typename T>
MMFAST_INLINE float dot(const T* w, const float* x, int64_t count) {
  float sum = 0.0f;
  for (int64_t k = 0; k < count; ++k) sum += to_float(w[k]) * x[k];
  return sum;
}

}  // namespace
}  // namespace mmfast

#define MMFAST_FILE "lora_linear_rows.inc"
#include "each_width.inc"

namespace mmfast {
namespace {

template <typename T>
float dot(const T* w, const float* x, int64_t count, int vector_bits) {
#if defined(__x86_64__)
  if (vector_bits >= 512 && has_avx512()) return avx512::dot(w, x, count);
  if (vector_bits >= 256 && has_avx2()) return avx2::dot(w, x, count);
#endif
  return dot(w, x, count);
}

// T: of x, W, bias and out; A: of a and b.
template <typename T, typename A>
void multiply_rows(const TensorView& x, const std::optional<TensorView>& weight, const TensorView& a,
                   const TensorView& b, float scaling, const std::optional<TensorView>& bias, const TensorView& out,
                   int threads, int vector_bits) {
  const int64_t rows = x.size(0), features = x.size(1), columns = b.size(0), ranks = a.size(0);
  const auto from = matrix<T>(x), large = matrix<T>(weight), to = matrix<T>(out);
  const auto down = matrix<A>(a), up = matrix<A>(b);
  std::vector<float> wide(rows * features), s(rows * ranks);
  for (int64_t m = 0; m < rows; ++m)
    for (int64_t k = 0; k < features; ++k) wide[m * features + k] = to_float(from.row(m)[k]);
#pragma omp parallel num_threads(worthwhile_threads(columns * (weight ? features : ranks), threads))
  {
#pragma omp for schedule(static) collapse(2)
    for (int64_t r = 0; r < ranks; ++r)
      for (int64_t m = 0; m < rows; ++m)
        s[m * ranks + r] = scaling * dot(down.row(r), &wide[m * features], features, vector_bits);
#pragma omp for schedule(static)
    for (int64_t n = 0; n < columns; ++n)
      for (int64_t m = 0; m < rows; ++m) {
        T& target = to.row(m)[n];
        const float base = weight ? dot(large.row(n), &wide[m * features], features, vector_bits) : to_float(target);
        const float update = dot(up.row(n), &s[m * ranks], ranks, vector_bits);
        target = from_float<T>(base + update + (bias ? to_float(bias->as<T>()[n]) : 0.0f));
      }
  }
}

}  // namespace

// out [M, N] = x Wᵀ + bias + scaling · (x aᵀ) bᵀ, rounded once, or without a weight out += the last, for x [M, K], weight
// [N, K] and bias [N] of one dtype, a [R, K] and b [N, R] of this or fp32; x and out may be packed [..., K] and [..., N].
// Vectors of `vector_bits` at most are used.
void lora_linear_rows_cpu(TensorView x, std::optional<TensorView> weight, TensorView a, TensorView b, float scaling,
                          std::optional<TensorView> bias, TensorView out, int threads, int vector_bits) {
  to_matrix(x), to_matrix(out);
  check(x.dim() == 2 && a.dim() == 2 && b.dim() == 2, OP, ": x is ", x, ", a ", a, " and b ", b, "; expected matrices");
  const int64_t rows = x.size(0), features = x.size(1), columns = b.size(0), ranks = a.size(0);
  check_matrix(OP, "x", x, rows, features);
  if (weight) check_matrix(OP, "weight", *weight, columns, features);
  check_matrix(OP, "a", a, ranks, features);
  check_matrix(OP, "b", b, columns, ranks);
  check_matrix(OP, "out", out, rows, columns);
  if (bias) bias->expect("bias", x.dtype, {columns});
  check(weight || !bias, OP, ": bias comes with weight");
  for (const TensorView* view : {weight ? &*weight : &out, &out})
    check(view->dtype == x.dtype, OP, ": x is ", name_of(x.dtype), " and another ", *view, "; expected one dtype");
  check(a.dtype == b.dtype && (a.dtype == x.dtype || a.dtype == DType::f32), OP, ": a is ", a, " and b ", b,
        "; expected both ", name_of(x.dtype), " or float32");
  with_scalar(OP, x.dtype, [&](auto scalar) {
    using T = decltype(scalar);
    (a.dtype == x.dtype ? multiply_rows<T, T> : multiply_rows<T, float>)(x, weight, a, b, scaling, bias, out, threads,
                                                                         vector_bits);
  });
}

}  // namespace mmfast
