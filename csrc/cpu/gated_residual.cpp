// x + factor · y with one factor, or one for each column, and its gradients, which are a pass of bias_scale_linear.cpp.
#include <cstdint>
#include <numeric>
#include <optional>
#include <vector>

#include "../tensor_view.h"
#include "lanes.h"
#include "matrix.h"
#include "scalars.h"
#include "stream.h"

namespace mmfast {

void bias_scale_linear_bwd_cpu(TensorView grad, std::optional<TensorView> z, std::optional<TensorView> bias,
                               std::optional<TensorView> scale, std::optional<TensorView> out,
                               std::optional<TensorView> grad_bias, std::optional<TensorView> grad_scale, int threads);

namespace {

constexpr const char* OP = "gated_residual";

// `ONE`: the factor is one number for all.
template <bool ONE, typename T>
MMFAST_INLINE void add_gated(const T* x, const T* y, const float* factor, T* out, int64_t first, int64_t count) {
  for (int64_t i = first; i < count; ++i)
    out[i] = from_float<T>(to_float(x[i]) + factor[ONE ? 0 : i] * to_float(y[i]));
}

}  // namespace
}  // namespace mmfast

#define MMFAST_FILE "gated_residual.inc"
#include "each_width.inc"

namespace mmfast {
namespace {

template <bool ONE, typename T>
void add_gated_row(const T* x, const T* y, const float* factor, T* out, int64_t count, int vector_bits) {
#if defined(__x86_64__)
  if (vector_bits >= 512 && has_avx512()) return avx512::add_gated<ONE>(x, y, factor, out, count);
  if (vector_bits >= 256 && has_avx2()) return avx2::add_gated<ONE>(x, y, factor, out, count);
#endif
  add_gated<ONE>(x, y, factor, out, 0, count);
}

}  // namespace

// out = x + factor · y; x, y, out [M, N], or packed [..., N], of one dtype, factor [N] or [1] f32. Vectors of
// `vector_bits` at most are used.
void gated_residual_fwd_cpu(TensorView x, TensorView y, TensorView factor, TensorView out, int threads,
                            int vector_bits) {
  for (TensorView* view : {&x, &y, &out}) to_matrix(*view);
  check(x.dim() == 2, OP, ": x is ", x, "; expected two dimensions");
  const int64_t rows = x.size(0), columns = x.size(1);
  check_matrix(OP, "x", x, rows, columns);
  check_matrix(OP, "y", y, rows, columns);
  check_matrix(OP, "out", out, rows, columns);
  check(y.dtype == x.dtype && out.dtype == x.dtype, OP, ": x is ", name_of(x.dtype), ", y ", name_of(y.dtype),
        " and out ", name_of(out.dtype), "; expected one dtype");
  const bool one = factor.numel() == 1;
  if (one) factor.shape = factor.strides = {1};
  factor.expect("factor", DType::f32, {one ? 1 : columns});
  with_scalar(OP, x.dtype, [&](auto scalar) {
    using T = decltype(scalar);
    const auto from = matrix<T>(x), with = matrix<T>(y), to = matrix<T>(out);
#pragma omp parallel for num_threads(worthwhile_threads(rows * columns, threads)) schedule(static)
    for (int64_t i = 0; i < rows; ++i)
      (one ? add_gated_row<true, T> : add_gated_row<false, T>)(from.row(i), with.row(i), factor.as<float>(), to.row(i),
                                                               columns, vector_bits);
  });
}

// grad_y = factor · grad, and of factor = tanh(gate) the gradient of the gate, (1 - factor²) · Σ grad · y: each if it is
// given, the second with y. grad, y, grad_y [M, N], or packed [..., N], of one dtype; factor, grad_gate [N] or [1] f32.
void gated_residual_bwd_cpu(TensorView grad, std::optional<TensorView> y, TensorView factor,
                            std::optional<TensorView> grad_y, std::optional<TensorView> grad_gate, int threads) {
  to_matrix(grad);
  check(grad.dim() == 2, OP, ": grad is ", grad, "; expected two dimensions");
  check(y.has_value() == grad_gate.has_value(), OP, ": grad_gate and y come together");
  const int64_t columns = grad.size(1), gates = factor.numel();
  check(gates == 1 || gates == columns, OP, ": factor is ", factor, "; expected ", columns, " numbers, or one");
  for (auto* view : {&factor, grad_gate ? &*grad_gate : nullptr}) {
    if (!view) continue;
    if (view->numel() == 1) view->shape = view->strides = {1};
    view->expect(view == &factor ? "factor" : "grad_gate", DType::f32, {gates});
  }

  const float* of = factor.as<float>();
  std::vector<float> factors = gates == columns ? std::vector<float>(of, of + columns) : std::vector<float>(columns, *of);
  std::vector<float> sums(columns);
  const auto row = [&](std::vector<float>& from) { return TensorView{from.data(), DType::f32, {columns}, {1}}; };
  bias_scale_linear_bwd_cpu(grad, y, std::nullopt, row(factors), grad_y, std::nullopt,
                            y ? std::optional(row(sums)) : std::nullopt, threads);
  if (!grad_gate) return;
  if (gates == 1) sums.assign(1, static_cast<float>(std::accumulate(sums.begin(), sums.end(), 0.0)));
  for (int64_t i = 0; i < gates; ++i) grad_gate->as<float>()[i] = (1.0f - of[i] * of[i]) * sums[i];
}

}  // namespace mmfast
