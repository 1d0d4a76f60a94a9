// A tensor as the kernels see it: address, dtype, shape, strides. Checked once, where Python enters.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <ostream>
#include <sstream>
#include <stdexcept>
#include <vector>

namespace mmfast {

// The codes of DTYPE_CODES in mmfast/ops/extension.py.
enum class DType : int { f32 = 0, f16 = 1, bf16 = 2, f64 = 3, i64 = 4, i32 = 5, boolean = 6, u8 = 7, i8 = 8 };

inline const char* name_of(DType dtype) {
  constexpr const char* names[] = {"float32", "float16", "bfloat16", "float64", "int64", "int32", "bool",
                                   "uint8",   "int8"};
  return names[static_cast<int>(dtype)];
}

// Raises unless `holds`; becomes a ValueError in Python. The message is joined from its parts only then.
template <typename... Parts>
void check(bool holds, const Parts&... message) {
  if (holds) [[likely]] return;
  std::ostringstream text;
  (text << ... << message);
  throw std::invalid_argument(text.str());
}

struct TensorView {
  void* data = nullptr;
  DType dtype = DType::f32;
  std::vector<int64_t> shape;
  std::vector<int64_t> strides;  // in elements

  int64_t dim() const { return static_cast<int64_t>(shape.size()); }
  int64_t size(int64_t i) const { return shape[i]; }
  int64_t stride(int64_t i) const { return strides[i]; }

  int64_t numel() const {
    int64_t product = 1;
    for (int64_t extent : shape) product *= extent;
    return product;
  }

  template <typename T>
  T* as() const {
    return static_cast<T*>(data);
  }

  friend std::ostream& operator<<(std::ostream& text, const TensorView& view) {
    text << name_of(view.dtype) << "[";
    for (int64_t i = 0; i < view.dim(); ++i) text << (i ? ", " : "") << view.shape[i];
    return text << "]";
  }

  // Raises unless the view has this dtype and shape and its elements are packed.
  void expect(const char* name, DType wanted, std::initializer_list<int64_t> wanted_shape) const {
    const bool fits = std::equal(shape.begin(), shape.end(), wanted_shape.begin(), wanted_shape.end());
    if (dtype != wanted || !fits)
      check(false, name, " is ", *this, "; expected ", TensorView{nullptr, wanted, wanted_shape, {}});
    check(is_contiguous(), name, " must be contiguous");
  }

  bool is_contiguous() const {
    int64_t expected = 1;
    for (int64_t i = dim() - 1; i >= 0; --i) {
      if (shape[i] != 1 && strides[i] != expected) return numel() == 0;
      expected *= shape[i];
    }
    return true;
  }
};

}  // namespace mmfast
