// The passes of bias_scale_linear over what a matrix product gives or takes. Forward reads a matrix once and writes one;
// backward reads the gradient and the matrix it is multiplied with once, and gives all that is made of them.
#include <algorithm>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "../tensor_view.h"
#include "matrix.h"
#include "scalars.h"

namespace mmfast {
namespace {

constexpr const char* OP = "bias_scale_linear";

// Columns that pass together: their bias, scale and sums (16 KiB) stay in L1 while the rows go by.
constexpr int64_t WIDTH = 1024;
// Rows whose sums make one part. The parts are added in order, so that no sum depends on the number of threads.
constexpr int64_t ROWS = 256;

template <typename Z, typename Y>
MMFAST_INLINE void forward(Matrix<Z> z, const float* bias, const float* scale, Matrix<Y> y, int64_t rows,
                           int64_t width) {
  for (int64_t i = 0; i < rows; ++i) {
    const Z* from = z.row(i);
    Y* to = y.row(i);
#pragma omp simd
    for (int64_t d = 0; d < width; ++d) to[d] = from_float<Y>((to_float(from[d]) + bias[d]) * scale[d]);
  }
}

// COUNT rows; with z too, sums[1] gets Σ grad · (z + bias).
template <int COUNT, bool WITH_Z, bool WITH_OUT, typename G, typename Z, typename O>
MMFAST_INLINE void add_rows(Matrix<G> grad, Matrix<Z> z, const float* bias, const float* scale, Matrix<O> out,
                            float* const* sums, int64_t width) {
  float *plain = sums[0], *weighted = sums[1];
#pragma omp simd
  for (int64_t d = 0; d < width; ++d) {
    float sum = 0.0f, product = 0.0f;
#pragma GCC unroll 4
    for (int k = 0; k < COUNT; ++k) {
      const float g = to_float(grad.data[k * grad.stride + d]);
      sum += g;
      if constexpr (WITH_Z) product += g * (to_float(z.data[k * z.stride + d]) + bias[d]);
      if constexpr (WITH_OUT) out.data[k * out.stride + d] = from_float<O>(g * scale[d]);
    }
    plain[d] += sum;
    if constexpr (WITH_Z) weighted[d] += product;
  }
}

template <bool WITH_Z, bool WITH_OUT, typename G, typename Z, typename O>
MMFAST_INLINE void add_all_rows(Matrix<G> grad, Matrix<Z> z, const float* bias, const float* scale, Matrix<O> out,
                                float* const* sums, int64_t rows, int64_t width) {
  int64_t i = 0;
  for (; i + 4 <= rows; i += 4)
    add_rows<4, WITH_Z, WITH_OUT>(grad.at(i, 0), z.at(i, 0), bias, scale, out.at(i, 0), sums, width);
  for (; i < rows; ++i)
    add_rows<1, WITH_Z, WITH_OUT>(grad.at(i, 0), z.at(i, 0), bias, scale, out.at(i, 0), sums, width);
}

template <typename G, typename Z, typename O>
MMFAST_INLINE void backward(Matrix<G> grad, Matrix<Z> z, const float* bias, const float* scale, Matrix<O> out,
                            float* const* sums, int64_t rows, int64_t width) {
  if (z.data && out.data) return add_all_rows<true, true>(grad, z, bias, scale, out, sums, rows, width);
  if (z.data) return add_all_rows<true, false>(grad, z, bias, scale, out, sums, rows, width);
  if (out.data) return add_all_rows<false, true>(grad, z, bias, scale, out, sums, rows, width);
  add_all_rows<false, false>(grad, z, bias, scale, out, sums, rows, width);
}

// One function for each combination of dtypes, because a template cannot be cloned. float on one side only: where
// products of 16-bit matrices are made in float.
#define MMFAST_FORWARD(Z, Y)                                                                                  \
  MMFAST_CLONES void forward_tile(Matrix<Z> z, const float* bias, const float* scale, Matrix<Y> y, int64_t rows, \
                                  int64_t width) {                                                            \
    forward(z, bias, scale, y, rows, width);                                                                  \
  }
#define MMFAST_BACKWARD(G, Z, O)                                                                                   \
  MMFAST_CLONES void backward_tile(Matrix<G> grad, Matrix<Z> z, const float* bias, const float* scale, Matrix<O> out, \
                                   float* const* sums, int64_t rows, int64_t width) {                              \
    backward(grad, z, bias, scale, out, sums, rows, width);                                                        \
  }
#define MMFAST_ALL(T)          \
  MMFAST_FORWARD(T, T)         \
  MMFAST_FORWARD(T, float)     \
  MMFAST_FORWARD(float, T)     \
  MMFAST_BACKWARD(T, T, T)     \
  MMFAST_BACKWARD(T, T, float) \
  MMFAST_BACKWARD(float, T, T)

MMFAST_FORWARD(float, float)
MMFAST_BACKWARD(float, float, float)
MMFAST_ALL(Float16)
MMFAST_ALL(Bfloat16)

// Calls run(first row, rows, first column, columns) for each tile, on as many threads as are worth it.
template <typename F>
void for_each_tile(int64_t rows, int64_t columns, int threads, F run) {
  threads = worthwhile_threads(rows * columns, threads);
  const int64_t blocks = (rows + ROWS - 1) / ROWS, slices = (columns + WIDTH - 1) / WIDTH;
  const auto tile = [&](int64_t i) {
    const int64_t row = i / slices * ROWS, column = i % slices * WIDTH;
    run(row, std::min(ROWS, rows - row), column, std::min(WIDTH, columns - column));
  };
  if (threads == 1) {  // a team of one is not made faster than one of two
    for (int64_t i = 0; i < blocks * slices; ++i) tile(i);
    return;
  }
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < blocks * slices; ++i) tile(i);
}

// A vector of the op's columns; where there is none, `absent` in each.
struct Vector {
  std::vector<float> filled;
  const float* data;

  Vector(const char* name, const std::optional<TensorView>& view, int64_t columns, float absent) {
    if (view) {
      view->expect(name, DType::f32, {columns});
      data = view->as<float>();
    } else {
      filled.assign(columns, absent);
      data = filled.data();
    }
  }
};

}  // namespace

// y = (z + bias) · scale; z, y [M, N], or packed [..., N], of one dtype, or one of them f32; bias, scale [N] f32. y may
// be z.
void bias_scale_linear_fwd_cpu(TensorView z, std::optional<TensorView> bias, std::optional<TensorView> scale,
                               TensorView y, int threads) {
  for (auto* view : {&z, &y}) to_matrix(*view);
  check(z.dim() == 2, "bias_scale_linear: z is ", z, "; expected two dimensions");
  const int64_t rows = z.size(0), columns = z.size(1);
  check_matrix(OP, "z", z, rows, columns);
  check_matrix(OP, "y", y, rows, columns);
  check(z.dtype == y.dtype || z.dtype == DType::f32 || y.dtype == DType::f32,
        "bias_scale_linear: z is ", z, " and y ", y, "; expected one dtype, or one float32");
  const Vector b("bias", bias, columns, 0.0f), s("scale", scale, columns, 1.0f);
  const auto run = [&](auto z_scalar, auto y_scalar) {
    const auto from = matrix<decltype(z_scalar)>(z);
    const auto to = matrix<decltype(y_scalar)>(y);
    for_each_tile(rows, columns, threads, [&](int64_t row, int64_t height, int64_t column, int64_t width) {
      forward_tile(from.at(row, column), b.data + column, s.data + column, to.at(row, column), height, width);
    });
  };
  with_scalar(OP, z.dtype == DType::f32 ? y.dtype : z.dtype, [&](auto scalar) {
    if (z.dtype == y.dtype) return run(scalar, scalar);
    if (z.dtype == DType::f32) return run(float{}, scalar);
    run(scalar, float{});
  });
}

// out = grad · scale, grad_bias += Σ_m grad · scale, grad_scale += Σ_m grad · (z + bias): each if it is given, the last
// with z. grad, z, out [M, N], or packed [..., N], of one dtype, or grad or out f32; bias, scale, grad_bias, grad_scale
// [N] f32. out may be grad.
void bias_scale_linear_bwd_cpu(TensorView grad, std::optional<TensorView> z, std::optional<TensorView> bias,
                               std::optional<TensorView> scale, std::optional<TensorView> out,
                               std::optional<TensorView> grad_bias, std::optional<TensorView> grad_scale,
                               int threads) {
  to_matrix(grad);
  for (auto* view : {&z, &out}) to_matrix(*view);
  check(grad.dim() == 2, "bias_scale_linear: grad is ", grad, "; expected two dimensions");
  const int64_t rows = grad.size(0), columns = grad.size(1);
  check_matrix(OP, "grad", grad, rows, columns);
  if (z) check_matrix(OP, "z", *z, rows, columns);
  if (out) check_matrix(OP, "out", *out, rows, columns);
  check(z.has_value() == grad_scale.has_value(), "bias_scale_linear: grad_scale and z come together");
  if (grad_bias) grad_bias->expect("grad_bias", DType::f32, {columns});
  if (grad_scale) grad_scale->expect("grad_scale", DType::f32, {columns});
  const Vector b("bias", bias, columns, 0.0f), s("scale", scale, columns, 1.0f);

  const int64_t blocks = (rows + ROWS - 1) / ROWS;
  const auto parts = std::make_unique<float[]>(blocks * 2 * columns);
  const auto run = [&](auto grad_scalar, auto z_scalar, auto out_scalar) {
    const auto from = matrix<decltype(grad_scalar)>(grad);
    const auto with = matrix<decltype(z_scalar)>(z);
    const auto to = matrix<decltype(out_scalar)>(out);
    for_each_tile(rows, columns, threads, [&](int64_t row, int64_t height, int64_t column, int64_t width) {
      float* part = parts.get() + row / ROWS * 2 * columns + column;
      float* const sums[] = {part, part + columns};
      backward_tile(from.at(row, column), with.at(row, column), b.data + column, s.data + column, to.at(row, column),
                    sums, height, width);
    });
  };
  const DType other = grad.dtype != DType::f32 ? grad.dtype : z ? z->dtype : out ? out->dtype : DType::f32;
  const DType z_dtype = z ? z->dtype : other, out_dtype = out ? out->dtype : other;
  check(z_dtype == other && (grad.dtype == other || out_dtype == other) &&
            (out_dtype == other || out_dtype == DType::f32),
        "bias_scale_linear: grad is ", name_of(grad.dtype), ", z ", name_of(z_dtype), " and out ", name_of(out_dtype),
        "; expected one dtype, or float32 for grad or out");
  with_scalar(OP, other, [&](auto scalar) {
    if (grad.dtype != other) return run(float{}, scalar, scalar);
    if (out_dtype != other) return run(scalar, scalar, float{});
    run(scalar, scalar, scalar);
  });

  const auto add_parts = [&](const float* first, const float* factor, float* total) {
    for (int64_t i = 0; i < blocks; ++i)
      for (int64_t d = 0; d < columns; ++d) total[d] += first[i * 2 * columns + d] * (factor ? factor[d] : 1.0f);
  };
  if (grad_bias) add_parts(parts.get(), s.data, grad_bias->as<float>());
  if (grad_scale) add_parts(parts.get() + columns, nullptr, grad_scale->as<float>());
}

}  // namespace mmfast
