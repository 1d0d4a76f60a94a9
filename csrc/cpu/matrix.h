// Matrices of any float dtype, with packed rows or any strides, and the choice of a C++ type by a dtype.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>

#include "../tensor_view.h"
#include "scalars.h"

namespace mmfast {

template <typename T>
struct Matrix {
  T* data;  // null: there is none
  int64_t stride;

  Matrix at(int64_t row, int64_t column) const { return {data ? data + row * stride + column : nullptr, stride}; }
  T* row(int64_t i) const { return data + i * stride; }
};

template <typename T>
Matrix<T> matrix(const TensorView& view) {
  return {view.as<T>(), view.stride(0)};
}

template <typename T>
Matrix<T> matrix(const std::optional<TensorView>& view) {
  return view ? matrix<T>(*view) : Matrix<T>{nullptr, 0};
}

// A matrix in which both strides count.
template <typename T>
struct Strided {
  T* data;
  int64_t row, column;

  explicit Strided(const TensorView& x) : Strided(x.as<T>(), x.stride(0), x.stride(1)) {}
  Strided(T* data, int64_t row, int64_t column) : data(data), row(row), column(column) {}

  Strided at(int64_t i, int64_t j) const { return {data + i * row + j * column, row, column}; }
  T& number(int64_t i, int64_t j) const { return data[i * row + j * column]; }
  Strided transposed() const { return {data, column, row}; }
  bool rows_are_packed(int64_t columns) const { return column == 1 || columns <= 1; }
};

// Makes a matrix of a packed view [..., columns]; leaves any other view as it is.
inline void to_matrix(TensorView& view) {
  if (view.dim() == 2 || view.dim() == 0 || !view.is_contiguous()) return;
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < view.dim(); ++i) rows *= view.size(i);
  const int64_t columns = view.shape.back();
  view.shape = {rows, columns};
  view.strides = {columns, 1};
}

inline void to_matrix(std::optional<TensorView>& view) {
  if (view) to_matrix(*view);
}

// Raises unless the view is [rows, columns] with packed rows; `op` and `name` say whose it is.
inline void check_matrix(const char* op, const char* name, const TensorView& view, int64_t rows, int64_t columns) {
  check(view.dim() == 2 && view.size(0) == rows && view.size(1) == columns && (columns <= 1 || view.stride(1) == 1),
        op, ": ", name, " is ", view, "; expected [", rows, ", ", columns, "] with stride 1 in the last dimension");
}

// Raises unless the view is a [rows, columns] of this dtype with stride 1 in its last dimension or, not `packed`, in one.
inline void check_operand(const char* op, const char* name, const TensorView& view, DType dtype, int64_t rows,
                          int64_t columns, bool packed) {
  check(view.dtype == dtype && view.dim() == 2 && view.size(0) == rows && view.size(1) == columns, op, ": ", name, " is ",
        view, "; expected ", name_of(dtype), "[", rows, ", ", columns, "]");
  check(columns <= 1 || view.stride(1) == 1 || (!packed && (rows <= 1 || view.stride(0) == 1)), op, ": ", name, " is ",
        view, "; expected stride 1 in ", packed ? "its last dimension" : "one of its dimensions");
}

// Calls run with a value of the C++ type that stands for `dtype`.
template <typename F>
void with_scalar(const char* op, DType dtype, F run) {
  switch (dtype) {
    case DType::f32: return run(float{});
    case DType::f16: return run(Float16{});
    case DType::bf16: return run(Bfloat16{});
    default: check(false, op, ": no kernel for ", name_of(dtype));
  }
}

inline int64_t divide_up(int64_t size, int64_t by) { return (size + by - 1) / by; }

// How many of `threads` are worth starting for a pass over so many elements.
inline int worthwhile_threads(int64_t elements, int threads) {
  constexpr int64_t elements_per_thread = 1 << 15;
  return static_cast<int>(std::clamp<int64_t>(elements / elements_per_thread, 1, threads));
}

}  // namespace mmfast
