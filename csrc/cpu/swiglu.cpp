// silu(gate) · up, and its gradients. Each pass reads its operands once and writes its results once.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>

#include "../tensor_view.h"
#include "exponential.h"
#include "lanes.h"
#include "matrix.h"
#include "scalars.h"
#include "stream.h"

namespace mmfast {
namespace {

constexpr const char* OP = "swiglu";

// Elements that a thread takes at a time.
constexpr int64_t TILE = 1 << 14;

// out = silu(gate) · up. silu is rounded to T, as where it is an op of its own.
template <typename T>
MMFAST_INLINE void forward(const T* gate, const T* up, T* out, int64_t first, int64_t count) {
  for (int64_t i = first; i < count; ++i) {
    const float x = to_float(gate[i]), e = exp_nonpositive(-std::abs(x));
    const float silu = x * (x < 0.0f ? e : 1.0f) / (1.0f + e);
    out[i] = from_float<T>(to_float(from_float<T>(silu)) * to_float(up[i]));
  }
}

// grad_gate = grad · up · silu'(gate), grad_up = grad · silu(gate): each if it is given.
template <typename T>
MMFAST_INLINE void backward(const T* grad, const T* gate, const T* up, T* grad_gate, T* grad_up, int64_t first,
                            int64_t count) {
  for (int64_t i = first; i < count; ++i) {
    const float x = to_float(gate[i]), g = to_float(grad[i]), e = exp_nonpositive(-std::abs(x));
    const float value = (x < 0.0f ? e : 1.0f) / (1.0f + e), silu = x * value;
    if (grad_up) grad_up[i] = from_float<T>(g * to_float(from_float<T>(silu)));
    if (grad_gate) grad_gate[i] = from_float<T>(g * to_float(up[i]) * (value + silu * (1.0f - value)));
  }
}

}  // namespace
}  // namespace mmfast

#define MMFAST_FILE "swiglu.inc"
#include "each_width.inc"

namespace mmfast {
namespace {

template <typename T>
void forward_run(const T* gate, const T* up, T* out, int64_t count, int vector_bits) {
#if defined(__x86_64__)
  if (vector_bits >= 512 && has_avx512()) return avx512::forward(gate, up, out, count);
  if (vector_bits >= 256 && has_avx2()) return avx2::forward(gate, up, out, count);
#endif
  forward(gate, up, out, 0, count);
}

template <typename T>
void backward_run(const T* grad, const T* gate, const T* up, T* grad_gate, T* grad_up, int64_t count, int vector_bits) {
#if defined(__x86_64__)
  if (vector_bits >= 512 && has_avx512()) return avx512::backward(grad, gate, up, grad_gate, grad_up, count);
  if (vector_bits >= 256 && has_avx2()) return avx2::backward(grad, gate, up, grad_gate, grad_up, count);
#endif
  backward(grad, gate, up, grad_gate, grad_up, 0, count);
}

// Calls run(row, first column, columns) for every part of every row, on as many threads as are worth it.
template <typename F>
void for_each_run(int64_t rows, int64_t columns, int threads, F run) {
  const int64_t width = std::min(columns, TILE), slices = width ? (columns + width - 1) / width : 0;
  const auto part = [&](int64_t i) {
    const int64_t column = i % slices * width;
    run(i / slices, column, std::min(width, columns - column));
  };
  threads = worthwhile_threads(rows * columns, threads);
  if (threads == 1) {  // a team of one is not made faster than one of two
    for (int64_t i = 0; i < rows * slices; ++i) part(i);
    return;
  }
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < rows * slices; ++i) part(i);
}

// The rows and columns that a pass goes through: one row where all operands are packed.
struct Extent {
  int64_t rows, columns;
  bool packed = true;

  explicit Extent(const TensorView& gate)
      : rows(gate.dim() ? gate.size(0) : 0), columns(gate.dim() > 1 ? gate.size(1) : 0) {
    check(gate.dim() == 2, OP, ": gate is ", gate, "; expected two dimensions");
  }

  void add(const char* name, const TensorView& view, DType dtype) {
    check_matrix(OP, name, view, rows, columns);
    check(view.dtype == dtype, OP, ": ", name, " is ", name_of(view.dtype), "; expected ", name_of(dtype));
    packed = packed && view.is_contiguous();
  }

  template <typename F>
  void run(int threads, F part) const {
    for_each_run(packed ? 1 : rows, packed ? rows * columns : columns, threads, part);
  }
};

}  // namespace

// out = silu(gate) · up; all [M, F], or packed [..., F], of one dtype. Vectors of `vector_bits` at most are used.
void swiglu_fwd_cpu(TensorView gate, TensorView up, TensorView out, int threads, int vector_bits) {
  for (TensorView* view : {&gate, &up, &out}) to_matrix(*view);
  Extent extent(gate);
  extent.add("gate", gate, gate.dtype);
  extent.add("up", up, gate.dtype);
  extent.add("out", out, gate.dtype);
  with_scalar(OP, gate.dtype, [&](auto scalar) {
    using T = decltype(scalar);
    const auto g = matrix<T>(gate), u = matrix<T>(up), o = matrix<T>(out);
    extent.run(threads, [&](int64_t row, int64_t column, int64_t count) {
      forward_run(g.at(row, column).data, u.at(row, column).data, o.at(row, column).data, count, vector_bits);
    });
  });
}

// grad_gate = grad · up · silu'(gate), grad_up = grad · silu(gate): each if it is given, the first with up. All [M, F],
// or packed [..., F], of one dtype.
void swiglu_bwd_cpu(TensorView grad, TensorView gate, std::optional<TensorView> up, std::optional<TensorView> grad_gate,
                    std::optional<TensorView> grad_up, int threads, int vector_bits) {
  for (auto* view : {&grad, &gate}) to_matrix(*view);
  for (auto* view : {&up, &grad_gate, &grad_up}) to_matrix(*view);
  check(up.has_value() == grad_gate.has_value(), OP, ": grad_gate and up come together");
  check(grad_gate || grad_up, OP, ": no gradient is asked for");
  Extent extent(gate);
  extent.add("gate", gate, gate.dtype);
  extent.add("grad", grad, gate.dtype);
  if (up) extent.add("up", *up, gate.dtype);
  if (grad_gate) extent.add("grad_gate", *grad_gate, gate.dtype);
  if (grad_up) extent.add("grad_up", *grad_up, gate.dtype);
  with_scalar(OP, gate.dtype, [&](auto scalar) {
    using T = decltype(scalar);
    const auto y = matrix<T>(grad), g = matrix<T>(gate), u = matrix<T>(up), dg = matrix<T>(grad_gate),
               du = matrix<T>(grad_up);
    extent.run(threads, [&](int64_t row, int64_t column, int64_t count) {
      backward_run(y.at(row, column).data, g.at(row, column).data, u.at(row, column).data, dg.at(row, column).data,
                   du.at(row, column).data, count, vector_bits);
    });
  });
}

}  // namespace mmfast
