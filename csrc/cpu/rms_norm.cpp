// RMSNorm of each row of a matrix, and of the sum of two matrices. A row stays in the first-level cache between the pass
// that sums its squares and the one that scales it, so that memory is read once and written once.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <optional>

#include "../tensor_view.h"
#include "lanes.h"
#include "matrix.h"
#include "scalars.h"
#include "stream.h"

namespace mmfast {
namespace {

constexpr const char* OP = "rms_norm";

// Rows whose share of the weight's gradient makes one part. The parts are added in order, so that no sum depends on the
// number of threads.
constexpr int64_t ROWS = 32;

// T: the dtype of what is normalised. W: that of the weight and the output, T or float.
template <typename T, typename W>
struct Forward {
  const T *x, *residual;  // no residual: null
  const W* weight;
  float eps;
  T* sum;  // x + residual
  W* y;
  float* rstd;  // null: not wanted
  int64_t width;
};

template <typename T, typename W>
struct Backward {
  const W* grad_y;
  const T *grad_sum, *h;  // no gradient of the sum: null
  const W* weight;
  const float* rstd;
  T* grad_x;  // null: not wanted
  int64_t width;
};

template <typename T>
MMFAST_INLINE float sum_of_squares(const T* x, int64_t width) {
  float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
  for (int64_t d = 0; d < width; ++d) squares += to_float(x[d]) * to_float(x[d]);
  return squares;
}

template <typename T>
MMFAST_INLINE void add(const T* x, const T* residual, T* sum, int64_t width) {
#pragma omp simd
  for (int64_t d = 0; d < width; ++d) sum[d] = from_float<T>(to_float(x[d]) + to_float(residual[d]));
}

// y = weight · (h · rstd).
template <typename T, typename W>
MMFAST_INLINE void scale(const T* h, const W* weight, float rstd, W* y, int64_t width) {
#pragma omp simd
  for (int64_t d = 0; d < width; ++d) y[d] = from_float<W>(to_float(weight[d]) * round_to<T>(to_float(h[d]) * rstd));
}

template <typename T, typename W>
MMFAST_INLINE void forward(const Forward<T, W>& f, int64_t first, int64_t last) {
  const int64_t width = f.width;
  for (int64_t i = first; i < last; ++i) {
    const T* h = f.x + i * width;
    // Two loops: compilers do not vectorise one that rounds, stores and sums.
    if (f.residual) {
      T* sum = f.sum + i * width;
      add(h, f.residual + i * width, sum, width);
      h = sum;
    }
    const float rstd = 1.0f / std::sqrt(sum_of_squares(h, width) / static_cast<float>(width) + f.eps);
    if (f.rstd) f.rstd[i] = rstd;
    scale(h, f.weight, rstd, f.y + i * width, width);
  }
}

// Σ grad_y · weight · h.
template <typename T, typename W>
MMFAST_INLINE float dot(const W* grad_y, const W* weight, const T* h, int64_t width) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t d = 0; d < width; ++d) sum += to_float(grad_y[d]) * to_float(weight[d]) * to_float(h[d]);
  return sum;
}

// Of some rows: 1 / sqrt(mean(h²) + eps), and rstd² · mean(grad_y · weight · h).
template <int GROUP>
struct Factors {
  float rstd[GROUP], row[GROUP];
};

// Of GROUP rows from the i-th on, the gradients of the columns from `first` on. `part` gets their share of the weight's.
template <int GROUP, bool WITH_X, bool WITH_SUM, bool WITH_PART, typename T, typename W>
MMFAST_INLINE void gradients(const Backward<T, W>& b, int64_t i, const Factors<GROUP>& f, float* part, int64_t first) {
  for (int64_t d = first; d < b.width; ++d) {
    for (int k = 0; k < GROUP; ++k) {
      const int64_t at = (i + k) * b.width + d;
      const float g = to_float(b.grad_y[at]), value = to_float(b.h[at]);
      if constexpr (WITH_PART) part[d] += g * round_to<T>(value * f.rstd[k]);
      if constexpr (WITH_X) {
        float grad = (g * to_float(b.weight[d]) - value * f.row[k]) * f.rstd[k];
        if constexpr (WITH_SUM) grad += to_float(b.grad_sum[at]);
        b.grad_x[at] = from_float<T>(grad);
      }
    }
  }
}

template <bool WITH_X, bool WITH_SUM, bool WITH_PART, typename T, typename W>
void backward_all(const Backward<T, W>& b, int64_t first, int64_t last, float* part) {
  for (int64_t i = first; i < last; ++i) {
    Factors<1> f{{b.rstd[i]}, {}};
    if constexpr (WITH_X)
      f.row[0] = dot(b.grad_y + i * b.width, b.weight, b.h + i * b.width, b.width) * f.rstd[0] * f.rstd[0] /
                 static_cast<float>(b.width);
    gradients<1, WITH_X, WITH_SUM, WITH_PART>(b, i, f, part, 0);
  }
}

}  // namespace
}  // namespace mmfast

#define MMFAST_FILE "rms_norm.inc"
#include "each_width.inc"

namespace mmfast {
namespace {

template <typename T, typename W>
void forward_rows(const Forward<T, W>& f, int64_t first, int64_t last, int vector_bits) {
#if defined(__x86_64__)
  if (vector_bits >= 512 && has_avx512()) return avx512::forward(f, first, last);
  if (vector_bits >= 256 && has_avx2()) return avx2::forward(f, first, last);
#endif
  forward(f, first, last);
}

template <bool WITH_X, bool WITH_SUM, bool WITH_PART, typename T, typename W>
void backward_rows(const Backward<T, W>& b, int64_t first, int64_t last, float* part, int vector_bits) {
#if defined(__x86_64__)
  if (vector_bits >= 512 && has_avx512())
    return avx512::backward_all<WITH_X, WITH_SUM, WITH_PART>(b, first, last, part);
  if (vector_bits >= 256 && has_avx2()) return avx2::backward_all<WITH_X, WITH_SUM, WITH_PART>(b, first, last, part);
#endif
  backward_all<WITH_X, WITH_SUM, WITH_PART>(b, first, last, part);
}

template <typename T, typename W>
void backward_rows(const Backward<T, W>& b, int64_t first, int64_t last, float* part, int vector_bits) {
  if (!b.grad_x) return backward_rows<false, false, true>(b, first, last, part, vector_bits);
  if (b.grad_sum && part) return backward_rows<true, true, true>(b, first, last, part, vector_bits);
  if (b.grad_sum) return backward_rows<true, true, false>(b, first, last, part, vector_bits);
  if (part) return backward_rows<true, false, true>(b, first, last, part, vector_bits);
  backward_rows<true, false, false>(b, first, last, part, vector_bits);
}

MMFAST_CLONES void add_parts(const float* parts, int64_t count, int64_t stride, float* total, int64_t width) {
  std::fill_n(total, width, 0.0f);
  for (int64_t i = 0; i < count; ++i) {
    const float* part = parts + i * stride;
#pragma omp simd
    for (int64_t d = 0; d < width; ++d) total[d] += part[d];
  }
}

// Calls run(first row, last row) for each `step` rows, on as many threads as are worth it.
template <typename F>
void for_each_step(int64_t rows, int64_t step, int threads, F run) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t first = 0; first < rows; first += step) run(first, std::min(first + step, rows));
}

// Checks a matrix [rows, width], flattened or not, of packed elements.
void check_rows(const char* name, const TensorView& view, DType dtype, const TensorView& like) {
  check(view.dtype == dtype && view.shape == like.shape, "rms_norm: ", name, " is ", view, "; expected ",
        TensorView{nullptr, dtype, like.shape, {}});
  check(view.is_contiguous(), "rms_norm: ", name, " must be contiguous");
}

struct Sizes {
  int64_t rows, width;
};

// What forward and backward demand: h [..., H] of a float dtype, weight [H] of that dtype or float32.
Sizes check_sizes(const TensorView& h, const TensorView& weight) {
  check(h.dim() >= 1, "rms_norm: x has no dimension; expected [..., H]");
  const int64_t width = h.size(h.dim() - 1);
  weight.expect("rms_norm: weight", weight.dtype == DType::f32 ? DType::f32 : h.dtype, {width});
  return {width ? h.numel() / width : 0, width};
}

// Calls run with values of the C++ types of h and weight.
template <typename F>
void with_types(DType h, DType weight, F run) {
  with_scalar(OP, h, [&](auto scalar) {
    if (h == weight) return run(scalar, scalar);
    run(scalar, float{});
  });
}

template <typename T>
T* address(const std::optional<TensorView>& view) {
  return view ? view->as<T>() : nullptr;
}

}  // namespace

// h = x + residual (x without one), y = weight · (h · rstd), rstd = 1 / sqrt(mean(h²) + eps); sum = h. x, residual, sum
// [..., H] of one dtype, weight [H] of that dtype or f32, y [..., H] of the weight's, rstd [rows] f32; all packed. Vectors of `vector_bits` at most are used.
void rms_norm_fwd_cpu(TensorView x, TensorView weight, std::optional<TensorView> residual, float eps, TensorView y,
                      std::optional<TensorView> sum, std::optional<TensorView> rstd, int threads, int vector_bits) {
  const auto [rows, width] = check_sizes(x, weight);
  check_rows("x", x, x.dtype, x);
  check_rows("y", y, weight.dtype, x);
  check(residual.has_value() == sum.has_value(), "rms_norm: residual and sum come together");
  if (residual) check_rows("residual", *residual, x.dtype, x);
  if (sum) check_rows("sum", *sum, x.dtype, x);
  if (rstd && width) rstd->expect("rms_norm: rstd", DType::f32, {rows});
  threads = worthwhile_threads(rows * width, threads);
  with_types(x.dtype, weight.dtype, [&, rows = rows, width = width](auto h_scalar, auto w_scalar) {
    using T = decltype(h_scalar);
    using W = decltype(w_scalar);
    const Forward<T, W> f{x.as<T>(),       address<T>(residual), weight.as<W>(),       eps,
                          address<T>(sum), y.as<W>(),            address<float>(rstd), width};
    for_each_step(rows, std::max<int64_t>((rows + threads - 1) / threads, 1), threads,
                  [&](int64_t first, int64_t last) { forward_rows(f, first, last, vector_bits); });
  });
}

// grad_x = grad_sum + rstd · (g - h · rstd² · mean(g · h)) with g = grad_y · weight, and grad_weight = Σ grad_y · n over
// the rows, where n = h · rstd is rounded as in forward: each if it is given. grad_y [..., H] of the weight's dtype;
// grad_sum, h, grad_x of x's; grad_weight [H], rstd [rows] f32; all packed. Vectors of
// `vector_bits` at most are used.
void rms_norm_bwd_cpu(TensorView grad_y, std::optional<TensorView> grad_sum, TensorView h, TensorView weight,
                      TensorView rstd, std::optional<TensorView> grad_x, std::optional<TensorView> grad_weight,
                      int threads, int vector_bits) {
  const auto [rows, width] = check_sizes(h, weight);
  check_rows("h", h, h.dtype, h);
  check_rows("grad_y", grad_y, weight.dtype, h);
  if (grad_sum) check_rows("grad_sum", *grad_sum, h.dtype, h);
  if (grad_x) check_rows("grad_x", *grad_x, h.dtype, h);
  if (grad_weight) grad_weight->expect("rms_norm: grad_weight", DType::f32, {width});
  if (width) rstd.expect("rms_norm: rstd", DType::f32, {rows});
  check(grad_x || grad_weight, "rms_norm: no gradient is asked for");
  threads = worthwhile_threads(rows * width, threads);
  const int64_t blocks = grad_weight ? (rows + ROWS - 1) / ROWS : 0;
  const auto parts = std::make_unique<float[]>(blocks * width);
  with_types(h.dtype, weight.dtype, [&, rows = rows, width = width](auto h_scalar, auto w_scalar) {
    using T = decltype(h_scalar);
    using W = decltype(w_scalar);
    const Backward<T, W> b{grad_y.as<W>(),   address<T>(grad_sum), h.as<T>(), weight.as<W>(),
                           rstd.as<float>(), address<T>(grad_x),   width};
    const int64_t step = grad_weight ? ROWS : std::max<int64_t>((rows + threads - 1) / threads, 1);
    for_each_step(rows, step, threads, [&](int64_t first, int64_t last) {
      backward_rows(b, first, last, grad_weight ? parts.get() + first / ROWS * width : nullptr, vector_bits);
    });
  });
  if (!grad_weight) return;
  const int64_t step = (width + threads - 1) / threads;
  for_each_step(width, std::max<int64_t>(step, 1), threads, [&, width = width](int64_t first, int64_t last) {
    add_parts(parts.get() + first, blocks, width, grad_weight->as<float>() + first, last - first);
  });
}

}  // namespace mmfast
